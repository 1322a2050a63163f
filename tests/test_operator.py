"""Values and gradients of both operators against the float64 oracle, by problem.py's error rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.problem import (
    DIFFERENTIABLE,
    TOLERANCE,
    assert_same_bits,
    check,
    check_rank,
    compute_dtype,
    error,
    evaluate,
    leaves_of,
    make_problem,
    oracle,
    statistics_arguments,
    upstream_of,
)
from tvmf_ext import (
    SoftplusScale,
    loss_of_statistics,
    ops,
    reference,
    row_statistics,
    tvmf_cross_entropy,
    tvmf_logits,
)
from tvmf_ext import head as head_module

OPERATORS = pytest.mark.parametrize("operator", [tvmf_cross_entropy, row_statistics])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kappa", [0, 16.0, -0.4, "[]", "[1]", "[C]"])
@pytest.mark.parametrize("scale", [1, 20.0, "[]", "[1]", "softplus"])
@OPERATORS
def test_every_form_of_kappa_and_scale(operator, kappa, scale):
    check(operator, make_problem(9, 35, 21, kappa=kappa, scale=scale, bias=True))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("class_weight", [False, True])
@pytest.mark.parametrize("ignore", [{}, {"ignored": 0.3}, {"ignored": 0.3, "ignore_index": 2}])
def test_loss_options_combine_as_in_cross_entropy(reduction, label_smoothing, class_weight, ignore):
    problem = make_problem(
        21,
        18,
        16,
        class_weight=class_weight,
        reduction=reduction,
        label_smoothing=label_smoothing,
        **ignore,
    )
    check(tvmf_cross_entropy, problem)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("class_weight", [False, True])
@OPERATORS
def test_bias_prior_and_class_weights(operator, bias, prior, class_weight):
    problem = make_problem(
        17, 40, 12, bias=bias, prior=prior, class_weight=class_weight, label_smoothing=0.2
    )
    check(operator, problem)
    check_rank(problem)


@pytest.mark.parametrize("which", [{0}, {1}, {2}, {3}, {0, 1}, {0, 2}, {0, 1, 2, 3}], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_each_statistic_has_its_own_gradient(which, ignored):
    """Some statistics have upstream gradients, which ignored rows have too."""
    problem = make_problem(
        40, 700, 20, kappa="[C]", scale="[]", bias=True, class_weight=True, ignored=ignored
    )
    upstream = upstream_of({i: torch.empty(40) for i in range(4)})
    check(row_statistics, problem, [g if i in which else None for i, g in enumerate(upstream)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 7, 5),
        (2, 16, 16),
        (33, 31, 3),
        (32, 512, 64),
        (64, 4096, 32),
        (257, 513, 17),
        (3, 9001, 33),
        (70, 5000, 129),
        (300, 9001, 24),
        (600, 1000, 200),
    ],
    ids=str,
)
@OPERATORS
def test_whole_and_ragged_vectors_row_groups_stripes_and_blocks(operator, shape, dtype):
    problem = make_problem(
        *shape,
        dtype=dtype,
        kappa="[C]",
        scale="[]",
        bias=True,
        class_weight=True,
        ignored=0.1,
        label_smoothing=0.1,
        reduction="none",
    )
    check(operator, problem)
    check_rank(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@OPERATORS
def test_one_feature_leaves_cosines_of_one_and_no_gradient_to_it(operator, dtype):
    """Eager PyTorch has such cosines exactly. The operators may be off by a rounding, which phi'
    multiplies."""
    problem = make_problem(20, 40, 1, dtype=dtype, kappa=1.0, scale="[]", bias=True)
    check(operator, problem, tolerance=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_class_has_no_loss_and_no_gradient(dtype, label_smoothing):
    problem = make_problem(6, 1, 33, dtype=dtype, kappa="[C]", scale="[]", bias=True)
    check(row_statistics, problem)
    assert (row_statistics(**problem).others == -torch.inf).all()
    problem |= {"label_smoothing": label_smoothing, "weight": torch.tensor([0.3], dtype=dtype)}
    outputs, gradients = evaluate(tvmf_cross_entropy, problem, [torch.ones(())])
    assert outputs["loss"] == 0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    "dtypes",
    [
        *((a, a) for a in DTYPES[2:]),
        *((a, torch.float32) for a in DTYPES[1:]),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
@OPERATORS
def test_dtypes_mix_and_each_gradient_has_its_tensors_own(operator, dtypes):
    problem = make_problem(
        600,
        1000,  # two blocks
        12,
        dtype=dtypes[0],
        weight_dtype=dtypes[1],
        kappa="[C]",
        scale="softplus",
        bias=True,
        prior=True,
        class_weight=True,
        label_smoothing=0.1,
        reduction="sum",
    )
    check(operator, problem)


def test_half_precision_features_cost_a_float32_weight_gradient_nothing():
    """The gradients of a mean over many rows are below float16's range, and must not be rounded
    to it."""
    problem = make_problem(2048, 600, 32, dtype=torch.float16, weight_dtype=torch.float32)
    upstream = [torch.tensor(1e-5)]
    _, gradients = evaluate(tvmf_cross_entropy, problem, upstream)
    _, exact, _ = oracle(tvmf_cross_entropy, problem, upstream)
    assert exact["linear_weight"].abs().max() < 6e-8  # float16's smallest number
    assert error(gradients["linear_weight"], exact["linear_weight"]) <= 5e-6


def layouts_of(tensor):
    """The matrix with other strides, or other matrices that only strides can make, by name."""
    rows, cols = tensor.shape
    spaced = tensor.new_full((2 * rows, cols), float("nan"))
    spaced[::2] = tensor
    wide = tensor.new_full((rows, 2 * cols), float("nan"))
    wide[:, ::2] = tensor
    framed = tensor.new_full((rows + 7, cols + 5), float("nan"))
    framed[4:-3, 2:-3] = tensor
    return {
        "transposed": tensor.T.contiguous().T,
        "every other row": spaced[::2],
        "every other column": wide[:, ::2],
        "inside a larger one": framed[4:-3, 2:-3],
        "one row expanded": tensor[:1].expand(rows, cols),
        "one column expanded": tensor[:, :1].expand(rows, cols),
    }


@pytest.mark.parametrize("layout", list(layouts_of(torch.empty(1, 1))))
@pytest.mark.parametrize("name", ["input", "linear_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@OPERATORS
def test_strides_of_features_and_weight(operator, dtype, name, layout):
    problem = make_problem(600, 1000, 12, dtype=dtype, weight_dtype=torch.float32, scale="[]")
    problem[name] = layouts_of(problem[name])[layout]
    check(operator, problem)


def test_strides_of_the_vectors():
    problem = make_problem(
        30, 50, 8, kappa="[C]", scale="[1]", bias=True, prior=True, class_weight=True
    )
    problem["label_smoothing"] = 0.1
    for name in ("target", "kappa", "linear_bias", "prior", "weight"):
        spaced = problem[name].repeat_interleave(3)[1::3]
        assert not spaced.is_contiguous()
        check(tvmf_cross_entropy, problem | {name: spaced})
        check(tvmf_cross_entropy, problem | {name: problem[name][3].expand(len(spaced))})


def test_strides_of_upstream_gradients():
    problem = make_problem(30, 50, 8, kappa="[]", reduction="none")
    spaced = torch.randn(90, generator=torch.Generator().manual_seed(0))
    check(tvmf_cross_entropy, problem, [torch.tensor(0.7).expand(30)])
    check(tvmf_cross_entropy, problem, [spaced[1::3]])
    check(row_statistics, problem, [spaced[i % 3 :: 3] for i in range(4)])


@pytest.mark.parametrize("requires_grad", ["input", "linear_weight", "kappa", "scale", "bias"])
@OPERATORS
def test_a_gradient_asked_for_alone_is_that_of_all_together(operator, requires_grad):
    requires_grad = requires_grad.replace("bias", "linear_bias")
    problem = make_problem(20, 600, 140, kappa="[C]", scale="[]", bias=True)
    if operator is row_statistics:
        problem = statistics_arguments(problem)
    _, everything = evaluate(operator, problem)
    problem, leaves = leaves_of(problem)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == requires_grad)
    output = operator(**problem)
    outputs = [output] if isinstance(output, torch.Tensor) else output[:4]
    upstream = upstream_of(dict(enumerate(outputs)))
    torch.autograd.backward(outputs, [g.float() for g in upstream])
    for name, leaf in leaves.items():
        if name == requires_grad:
            assert torch.equal(leaf.grad, everything[name])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kept_and_recomputed_products_give_the_same_gradients(dtype, monkeypatch):
    problem = make_problem(
        70, 3001, 128, dtype=dtype, kappa="[C]", scale="[]", bias=True, reduction="none"
    )
    wanted = problem["input"].requires_grad_(), problem["linear_weight"]
    whole = head_module._kept(*wanted)
    assert whole >= 3001
    results = []
    for kept in (whole, 1024, 16, 0):
        monkeypatch.setattr(head_module, "_KEEP_BYTES", 70 * kept * problem["input"].itemsize)
        assert head_module._kept(*wanted) == kept
        check(tvmf_cross_entropy, problem)
        results.append(evaluate(tvmf_cross_entropy, problem))
    for other in results[1:]:
        for part, like in zip(other, results[0], strict=True):
            for name in part:
                assert error(part[name], like[name]) <= 2 * TOLERANCE[dtype]


def test_products_are_kept_only_for_a_backward_pass():
    problem = make_problem(8, 100, 256)
    x, w = problem["input"], problem["linear_weight"]
    assert head_module._kept(x, w) == 0
    assert head_module._kept(x, w, None, torch.ones(1, requires_grad=True)) == 112
    w.requires_grad_()
    assert head_module._kept(x, w) == 112
    assert head_module._kept(x[:, :16], w[:, :16]) == 0
    with torch.no_grad():
        assert head_module._kept(x, w) == 0


def test_cuda_keeps_all_products_or_none():
    keep = head_module.KeptProducts().elements
    assert keep(256, 8142, 2048, torch.bfloat16) == 8144
    assert keep(256, 65536, 64, torch.float32) == 65536
    assert keep(256, 65537, 64, torch.float32) == 0
    assert keep(256, 65536, 64, torch.float64) == 0
    assert keep(256, 1000, 63, torch.float32) == 0
    assert keep(0, 1000, 64, torch.float32) == 0


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("class_weight", [False, True])
def test_loss_from_statistics_is_the_operators_loss(reduction, label_smoothing, class_weight):
    problem = make_problem(
        25,
        60,
        10,
        kappa="[C]",
        scale="softplus",
        bias=True,
        prior=True,
        class_weight=class_weight,
        ignored=0.2,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )

    def from_statistics(**problem):
        options = {name: problem.pop(name) for name in ("reduction", "label_smoothing")}
        options |= {"weight": problem.get("weight"), "num_classes": 60}
        return loss_of_statistics(row_statistics(**problem), problem["target"], **options)

    outputs, gradients = evaluate(from_statistics, problem)
    like_outputs, like = evaluate(tvmf_cross_entropy, problem)
    assert error(outputs["loss"], like_outputs["loss"]) <= 2e-6
    for name in like:
        assert error(gradients[name], like[name]) <= 5e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_match_the_oracle_and_the_statistics(dtype):
    problem = make_problem(20, 70, 40, dtype=dtype, kappa="[C]", scale="[]", bias=True, prior=True)
    names = ("input", "linear_weight", "kappa", "scale", "linear_bias", "prior")
    arguments = {name: problem[name] for name in names}
    logits = tvmf_logits(**arguments)
    exact = reference.tvmf_logits(**{k: v.double() for k, v in arguments.items()})
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(logits, exact) <= 16 * torch.finfo(logits.dtype).eps
    statistics = row_statistics(**statistics_arguments(problem))
    assert error(statistics.lse, logits.logsumexp(1)) <= 16 * torch.finfo(logits.dtype).eps


@OPERATORS
def test_gradcheck_in_float64(operator):
    problem = make_problem(
        4,
        6,
        5,
        dtype=torch.float64,
        kappa="[C]",
        scale="softplus",
        bias=True,
        prior=True,
        class_weight=True,
        ignored=0.3,
        label_smoothing=0.2,
        reduction="none",
        seed=3,
    )
    if operator is row_statistics:
        problem = statistics_arguments(problem)
    _, leaves = leaves_of(problem)

    def function(input, linear_weight, kappa, s, linear_bias):
        scale = SoftplusScale(s)
        leaves = (input, linear_weight, kappa, scale, linear_bias)
        output = operator(**problem | dict(zip(DIFFERENTIABLE, leaves, strict=True)))
        return output if isinstance(output, torch.Tensor) else output[:4]

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@st.composite
def problems(draw):
    dtype, weight_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    C = draw(st.one_of(st.integers(2, 40), st.sampled_from([255, 256, 257, 512, 513, 1100])))
    problem = make_problem(
        draw(st.integers(1, 70)),
        C,
        draw(st.one_of(st.integers(2, 40), st.sampled_from([127, 128, 160]))),
        dtype=dtype,
        weight_dtype=weight_dtype,
        kappa=draw(st.sampled_from([0.0, 16.0, -0.3, "[]", "[1]", "[C]"])),
        scale=draw(st.sampled_from([1.0, 16.0, "[]", "[1]", "softplus"])),
        bias=draw(st.booleans()),
        prior=draw(st.booleans()),
        class_weight=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 1000)),
        ignore_index=draw(st.sampled_from([-100, -1, 0, C])),
        reduction=draw(st.sampled_from(["none", "mean", "sum"])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
    )
    for name in ("input", "linear_weight"):
        if draw(st.booleans()):
            problem[name] = problem[name].T.contiguous().T
    problem["target"][0] = 1  # the mean of no rows is NaN
    return problem


@given(problem=problems(), operator=st.sampled_from([tvmf_cross_entropy, row_statistics]))
def test_any_shape_with_any_options(problem, operator):
    # The eager result of a single row may by luck be far better than usual.
    check(operator, problem, tolerance=5 * TOLERANCE[compute_dtype(problem["input"].dtype)])
    check_rank(problem)


@pytest.mark.parametrize("kept", [0, 32])
def test_no_uninitialised_memory_reaches_a_result(kept, monkeypatch):
    """Memory of all sizes is filled with NaN and freed, so that the next call allocates it."""
    problem = make_problem(7, 50, 13, kappa="[C]", scale="softplus", bias=True, label_smoothing=0.1)
    head = ops.Head(
        input=problem["input"],
        weight=problem["linear_weight"],
        target=problem["target"],
        kappa=problem["kappa"],
        scale=problem["scale"].s,
        bias=problem["linear_bias"],
        prior=None,
        class_weight=None,
        cosine_margin=None,
        angular_margin=None,
        target_score=None,
        kappa_value=0.0,
        scale_value=1.0,
        cosine_margin_value=0.0,
        angular_margin_value=0.0,
        softplus_scale=True,
        ignore_index=-100,
        allow_tf32=False,
    )
    monkeypatch.setattr(head_module, "_KEEP_MIN_FEATURES", 1)
    monkeypatch.setattr(head_module, "_KEEP_BYTES", 7 * 4 * kept)
    statistics = statistics_arguments(problem)
    expected = evaluate(tvmf_cross_entropy, problem), evaluate(row_statistics, statistics)
    for _ in range(3):
        for function, arguments, clean in (
            (tvmf_cross_entropy, problem, expected[0]),
            (row_statistics, statistics, expected[1]),
        ):
            for size in [*range(1, 2000, 4), *range(1, 2000, 4)]:
                torch.full((size,), torch.nan)
            assert_same_bits(evaluate(function, arguments), clean)
        size = torch.ops.tvmf_ext.row_statistics(*head, True, kept)[-1].numel()
        spoilt = [torch.full((size,), torch.nan) for _ in range(20)]
        del spoilt
        assert torch.ops.tvmf_ext.row_statistics(*head, True, kept)[-1].isfinite().all()


def test_two_calls_and_a_retained_graph_give_the_same_bits():
    problem = make_problem(70, 3001, 128, kappa="[C]", scale="softplus", bias=True)
    for operator in (tvmf_cross_entropy, row_statistics):
        arguments = statistics_arguments(problem)
        first = evaluate(operator, arguments)
        assert_same_bits(first, evaluate(operator, arguments))
    problem, leaves = leaves_of(problem)
    loss = tvmf_cross_entropy(**problem)
    first, second = (
        torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
