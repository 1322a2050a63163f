"""The operators and torch: their schemas, fake tensors, torch.compile, autocast and autograd."""

import inspect
from typing import get_type_hints

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.problem import (
    assert_same_bits,
    error,
    evaluate,
    leaves_of,
    make_problem,
    statistics_arguments,
)
from tvmf_ext import (
    SoftplusScale,
    TvMFLoss,
    loss_of_statistics,
    ops,
    plan,
    reference,
    row_statistics,
    tvmf_cross_entropy,
    tvmf_logits,
)
from tvmf_ext import head as head_module

OPERATORS = pytest.mark.parametrize("operator", [tvmf_cross_entropy, row_statistics])
OPS = torch.ops.tvmf_ext


def full_problem(N=6, C=40, D=130, **options):
    options = {"dtype": torch.float32, "kappa": "[C]", "scale": "softplus"} | options
    return make_problem(
        N,
        C,
        D,
        bias=True,
        prior=True,
        class_weight=True,
        ignored=0.2,
        label_smoothing=0.1,
        reduction="none",
        **options,
    )


def head_arguments(problem):
    """The arguments that all operators share."""
    scale, kappa = problem["scale"], problem["kappa"]
    softplus = isinstance(scale, SoftplusScale)
    tensor = isinstance(kappa, torch.Tensor)
    return ops.Head(
        input=problem["input"],
        weight=problem["linear_weight"],
        target=problem["target"],
        kappa=kappa if tensor else None,
        scale=scale.s if softplus else None,
        bias=problem.get("linear_bias"),
        prior=problem.get("prior"),
        class_weight=problem.get("weight"),
        cosine_margin=None,
        angular_margin=None,
        target_score=None,
        kappa_value=0.0 if tensor else kappa,
        scale_value=1.0 if softplus else scale,
        cosine_margin_value=problem.get("cosine_margin", 0.0),
        angular_margin_value=problem.get("angular_margin", 0.0),
        softplus_scale=softplus,
        ignore_index=problem.get("ignore_index", -100),
        allow_tf32=False,
    )


SCHEMA_TYPES = {
    "Tensor": torch.Tensor,
    "Optional[Tensor]": torch.Tensor | None,
    "float": float,
    "bool": bool,
    "int": int,
}


@pytest.mark.parametrize("operator", ["row_statistics", "cross_entropy"])
def test_python_lists_the_head_as_the_schemas_do(operator):
    fields = get_type_hints(ops.Head)
    gradients = {"row_statistics": 3, "cross_entropy": 1}[operator]
    for name, first in ((operator, 0), (f"{operator}_backward", gradients)):
        schema = getattr(OPS, name).default._schema
        arguments = schema.arguments[first : first + len(fields)]
        assert {a.name: SCHEMA_TYPES[str(a.type)] for a in arguments} == fields
        assert tuple(a.name for a in arguments) == ops.Head._fields
    returned = [r.name for r in schema.returns]
    assert returned == [f"grad_{name}" for name in ops.DIFFERENTIABLE]


def test_the_public_functions_and_the_module_have_the_same_arguments_and_defaults():
    def defaults(function):
        return {n: p.default for n, p in inspect.signature(function).parameters.items()}

    loss = defaults(tvmf_cross_entropy)
    for function, like in (
        (row_statistics, reference.row_statistics),
        (tvmf_logits, reference.tvmf_logits),
        (tvmf_cross_entropy, reference.tvmf_cross_entropy),
    ):
        assert defaults(function) == defaults(like)
        assert defaults(function).items() <= loss.items()
    module = defaults(TvMFLoss)
    # The module's scale starts where the paper's does.
    assert all(module[name] == loss[name] for name in module.keys() & loss.keys() - {"scale"})
    own = {"in_features", "num_classes", "bias", "device", "dtype", "learn_kappa", "learn_scale"}
    tensors = {"input", "linear_weight", "target", "scale", "linear_bias"}
    assert module.keys() - own - tensors == loss.keys() - tensors


@pytest.mark.parametrize(
    ("N", "C", "kept"),
    [(0, 1, 0), (1, 1, 16), (7, 40, 0), (7, 40, 48), (33, 16, 16), (300, 1001, 48)],
)
def test_python_and_the_library_agree_on_the_size_of_what_is_saved(N, C, kept):
    head = head_arguments(make_problem(N, C, 8))
    *_, saved = OPS.row_statistics(*head, False, kept)
    assert ops._fake_saved(head.input, head.weight, kept).shape == saved.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_python_and_the_plan_agree_on_the_tile_beside_the_kept_products(dtype):
    def tile(N):
        return N * plan(N, 10**6, 8, dtype=dtype, device="cpu").class_block * dtype.itemsize

    assert tile(1 << 20) == (1 << 20) * head_module._TILE_CLASSES * dtype.itemsize
    assert tile(256) == head_module._TILE_BYTES


def operator_calls(problem, kept):
    """The four operators, each with arguments as autograd would pass them."""
    head, N = head_arguments(problem), len(problem["input"])
    optional = sum(
        1 << bit
        for bit, name in enumerate(ops.DIFFERENTIABLE)
        if bit > 1 and getattr(head, name) is not None
    )
    *_, saved = OPS.row_statistics(*head, True, kept)
    grads = [torch.randn(N, dtype=saved.dtype) for _ in range(3)]
    yield OPS.row_statistics.default, (*head, True, kept)
    yield OPS.row_statistics.default, (*head, False, kept)
    for wanted in (3 + optional, 1, 2):
        yield OPS.row_statistics_backward.default, (*grads, *head, kept, saved, wanted)
    yield (
        OPS.row_statistics_backward.default,
        (grads[0], None, None, *head, kept, saved, 3 + optional),
    )
    for reduction in (0, 1, 2) if N else (0, 2):  # opcheck cannot compare a mean that is NaN
        loss, saved = OPS.cross_entropy(*head, 0.1, reduction, kept)
        yield OPS.cross_entropy.default, (*head, 0.1, reduction, kept)
        grad = torch.randn_like(loss)
        yield (
            OPS.cross_entropy_backward.default,
            (grad, *head, 0.1, reduction, kept, saved, 3 + optional),
        )


PROBLEMS = {
    "every tensor": ({}, 16),
    "floats": ({"kappa": 16.0, "scale": 2.0}, 0),
    "bfloat16 features": ({"dtype": torch.bfloat16, "weight_dtype": torch.float32}, 48),
    "float64": ({"dtype": torch.float64}, 48),
    "half-precision vectors, no rows": ({"N": 0, "dtype": torch.float16}, 48),
}


@pytest.mark.parametrize(("options", "kept"), PROBLEMS.values(), ids=PROBLEMS)
def test_opcheck_of_all_four_operators(options, kept):
    problem = full_problem(**options)
    for operator, arguments in operator_calls(problem, kept):
        library.opcheck(operator, arguments)


def layout(tensor):
    return tensor.shape, tensor.dtype, tensor.stride()


@pytest.mark.parametrize(("options", "kept"), PROBLEMS.values(), ids=PROBLEMS)
def test_fake_tensors_have_the_real_shapes_dtypes_and_strides(options, kept):
    for operator, arguments in operator_calls(full_problem(**options), kept):
        with FakeTensorMode() as mode:
            fake = operator(
                *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
            )
        for one, other in zip(operator(*arguments), fake, strict=True):
            assert layout(one) == layout(other)
            assert one.device == other.device


def fake_cuda(arguments):
    """The arguments as fake CUDA tensors, under an active FakeTensorMode."""
    try:
        return [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
            if isinstance(a, torch.Tensor)
            else a
            for a in arguments
        ]
    except (AssertionError, RuntimeError):
        pytest.skip("this torch makes no cuda tensors")


def test_fake_cuda_tensors_give_fake_cuda_results():
    for operator, arguments in operator_calls(full_problem(), 48):
        with FakeTensorMode():
            fake = operator(*fake_cuda(arguments))
        for one, other in zip(operator(*arguments), fake, strict=True):
            assert layout(one) == layout(other)
            assert other.is_cuda


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_with_cuda_tensors_is_compiled_in_one_graph(operator, dtype):
    """Python asks more of CUDA tensors than of others. torch.compile must be able to trace that."""
    with FakeTensorMode():
        input, weight, target = fake_cuda(
            [
                torch.empty(4, 8, dtype=dtype),
                torch.empty(5, 8),
                torch.empty(4, dtype=torch.int64),
            ]
        )
        weight.requires_grad_()
        compiled = torch.compile(operator, fullgraph=True, backend="eager")
        results = torch.utils._pytree.tree_leaves(compiled(input, weight, target))
    assert results and all(result.is_cuda for result in results)


@OPERATORS
def test_fake_tensors_on_two_devices_are_refused(operator):
    with FakeTensorMode():
        input, weight = fake_cuda([torch.empty(4, 8), torch.empty(5, 8)])
        with pytest.raises(ValueError, match=r"input's device, cuda:0, got cpu"):
            operator(input, weight, torch.empty(4, dtype=torch.int64))


@pytest.mark.skipif(ops.HAS_CUDA, reason="this build has CUDA kernels")
def test_a_build_without_cuda_says_so():
    with (
        FakeTensorMode(),
        pytest.raises(NotImplementedError, match=r"no CUDA kernels, got .* cuda:0.*TVMF_CUDA=1"),
    ):
        ops._no_cuda_kernels(*fake_cuda([torch.empty(4, 8), None]))


@pytest.fixture
def matmul():
    """torch's settings for CUDA products. The test's end restores them."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    yield setting
    torch.set_float32_matmul_precision("highest")
    setting.fp32_precision = before


@pytest.mark.filterwarnings("error")
def test_the_setting_of_tf32_is_read_however_it_was_made(matmul):
    for value in ("tf32", "ieee"):
        matmul.fp32_precision = value
        assert head_module.cuda_allows_tf32() == (value == "tf32")
    for value in ("high", "highest"):
        torch.set_float32_matmul_precision(value)
        assert head_module.cuda_allows_tf32() == (value == "high")
    matmul.fp32_precision = "tf32"  # while the older setting is still at "highest"
    assert head_module.cuda_allows_tf32()


def test_compiled_code_follows_the_setting_of_tf32(matmul):
    function = compiled(lambda x: x + head_module.cuda_allows_tf32(), backend="eager")
    for value in ("tf32", "ieee", "tf32"):
        matmul.fp32_precision = value
        assert function(torch.zeros(())) == (value == "tf32")


@OPERATORS
def test_meta_tensors_give_meta_results(operator):
    arguments = [torch.empty(4, 8, device="meta"), torch.empty(5, 8, device="meta")]
    result = operator(*arguments, torch.empty(4, dtype=torch.int64, device="meta"))
    for tensor in [result] if isinstance(result, torch.Tensor) else result:
        assert tensor.is_meta


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


# Compiled code makes a smoothed loss of the row statistics, whose last bits differ.
UNSMOOTHED = {"label_smoothing": 0.0}


@pytest.mark.parametrize("dynamic", [False, True])
@OPERATORS
def test_compiled_in_one_graph_equals_eager(operator, dynamic):
    function = compiled(operator, dynamic=dynamic, backend="aot_eager")
    for N, C in ((6, 40), (9, 53)) if dynamic else ((6, 40),):
        problem = full_problem(N=N, C=C) | UNSMOOTHED
        if operator is row_statistics:
            problem = statistics_arguments(problem)
        assert_same_bits(evaluate(function, problem), evaluate(operator, problem))
    with torch.no_grad():
        assert torch.equal(function(**problem)[0], operator(**problem)[0])


def test_dynamic_shapes_do_not_compile_again():
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(tvmf_cross_entropy, dynamic=True, backend=counter)
    counts = []
    for N, C, D in ((6, 40, 130), (9, 53, 140), (50, 700, 200)):
        evaluate(function, make_problem(N, C, D))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_compiled_under_autocast_equals_eager():
    function = compiled(tvmf_cross_entropy, backend="aot_eager")
    problem = full_problem() | UNSMOOTHED
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(evaluate(function, problem), evaluate(tvmf_cross_entropy, problem))


def test_a_training_step_through_inductor_equals_eager():
    """One compiled function has a layer, the head, and a z-loss made of its statistics."""
    torch.manual_seed(0)
    head = TvMFLoss(130, 40, kappa=16.0, bias=True, label_smoothing=0.1)
    layer = torch.nn.Linear(20, 130)
    input, target = torch.randn(6, 20), torch.arange(6)
    parameters = [*layer.parameters(), *head.parameters()]

    def step(input, target):
        statistics = head.row_statistics(layer(input), target)
        z_loss = 1e-3 * statistics.lse.square().mean()
        return head.loss(statistics, target) + z_loss + head(layer(input), target)

    loss, like = compiled(step)(input, target), step(input, target)
    assert error(loss.detach(), like.detach()) <= 2e-6
    gradients = [torch.autograd.grad(t, parameters) for t in (loss, like)]
    for one, other in zip(*gradients, strict=True):
        assert error(one, other) <= 1e-5


@OPERATORS
def test_autocast_rounds_float32_features_as_linear_would(operator):
    problem = make_problem(12, 40, 24, kappa="[C]", scale="[]", bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, gradients = evaluate(operator, problem)
    rounded = problem | {"input": problem["input"].bfloat16()}
    like_outputs, like = evaluate(operator, rounded)
    like["input"] = like["input"].float()
    assert_same_bits((outputs, gradients), (like_outputs, like))
    assert all(t.dtype == torch.float32 for t in [*outputs.values(), *gradients.values()])


def test_autocast_leaves_other_features_alone():
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        problem = make_problem(12, 40, 24, dtype=dtype)
        expected = tvmf_cross_entropy(**problem)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tvmf_cross_entropy(**problem), expected)


def test_autocast_keeps_losses_and_logits_in_float32():
    problem = make_problem(12, 40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        statistics = row_statistics(**problem)
        loss = loss_of_statistics(statistics, problem["target"], num_classes=40)
        assert loss.dtype == torch.float32
        assert error(loss, tvmf_cross_entropy(**problem)) <= 1e-6
        logits = tvmf_logits(problem["input"], problem["linear_weight"])
        assert logits.dtype == torch.float32
    assert torch.equal(logits, tvmf_logits(problem["input"], problem["linear_weight"]))


def test_no_gradient_is_recorded_where_none_is_wanted():
    problem, _ = leaves_of(make_problem(5, 7, 3, kappa="[]"))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert tvmf_cross_entropy(**problem).grad_fn is None
            assert row_statistics(**problem).lse.grad_fn is None
    assert tvmf_cross_entropy(**make_problem(5, 7, 3)).grad_fn is None
    statistics = row_statistics(**problem)
    assert not statistics.rank.requires_grad
    assert statistics.lse.requires_grad


def test_statistics_that_are_not_used_cost_no_gradient_and_no_error():
    problem, leaves = leaves_of(make_problem(5, 7, 3, kappa="[]"))
    for name in ("others", "cosine", "target", "sum"):
        output = getattr(row_statistics(**problem), name)
        gradients = torch.autograd.grad(output.sum(), list(leaves.values()))
        assert all(g.isfinite().all() for g in gradients)


def test_gradients_accumulate_and_flow_on_through_other_operators():
    problem = make_problem(8, 10, 6)
    features = problem["input"].clone().requires_grad_()
    weight = problem["linear_weight"].clone().requires_grad_()
    target = problem["target"]
    for _ in range(2):
        tvmf_cross_entropy(features.tanh() * 2, weight, target).backward()
    once = torch.autograd.grad(
        tvmf_cross_entropy(features.tanh() * 2, weight, target), (features, weight)
    )
    assert torch.equal(features.grad, 2 * once[0])
    assert torch.equal(weight.grad, 2 * once[1])


def test_features_that_are_the_weight_get_both_gradients():
    both = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.arange(6).flip(0)
    (together,) = torch.autograd.grad(tvmf_cross_entropy(both, both, target), both)
    other = both.detach().clone().requires_grad_()
    apart = torch.autograd.grad(tvmf_cross_entropy(both, other, target), (both, other))
    assert error(together, sum(apart)) <= 1e-6


def test_checkpointing_and_saved_tensor_hooks_give_the_same_gradients():
    problem, leaves = leaves_of(make_problem(8, 40, 130, kappa="[]", scale="[1]"))
    expected = torch.autograd.grad(tvmf_cross_entropy(**problem), list(leaves.values()))
    recomputed = checkpoint(tvmf_cross_entropy, use_reentrant=False, **problem)
    with torch.autograd.graph.save_on_cpu():
        packed = tvmf_cross_entropy(**problem)
    for loss in (recomputed, packed):
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize(
    "name", ["kappa", "scale", "cosine_margin", "angular_margin", "label_smoothing"]
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_schedule_of_a_number_is_compiled_once_more_and_is_never_stale(name, backend):
    problem = make_problem(6, 5, 8, dtype=torch.float64)
    problem["linear_weight"].requires_grad_()

    def loss(value):
        return tvmf_cross_entropy(**problem | {name: value})

    function = compiled(loss, backend=backend)
    for step in range(1, 12):  # torch.compile gives up after eight graphs
        value = step / 16
        results = []
        for each in (function, loss):
            problem["linear_weight"].grad = None
            out = each(value)
            out.backward()
            results.append((out.detach(), problem["linear_weight"].grad))
        for one, other in zip(*results, strict=True):
            assert error(one, other) <= 1e-14


class Net(torch.nn.Module):
    """A layer, and the head after it."""

    def __init__(self, D):
        super().__init__()
        self.layer, self.head = torch.nn.Linear(D, D), TvMFLoss(D, 5)

    def forward(self, input, target):
        return self.head(self.layer(input), target)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_loss_trains(strict):
    torch.manual_seed(0)
    net, batch = Net(130), (torch.randn(6, 130), torch.arange(6) % 5)
    exported = torch.export.export(net, batch, strict=strict).module()
    assert torch.equal(exported(*batch), net(*batch))
    wanted = gradients(net, net(*batch))
    found = gradients(exported, exported(*batch))
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert error(found[name], gradient) <= 1e-6


@OPERATORS
def test_the_operators_themselves_have_gradients(operator):
    problem = make_problem(
        6, 40, 130, dtype=torch.float64, kappa="[C]", scale="softplus", bias=True
    )
    head = head_arguments(problem)
    leaves = [
        t.requires_grad_()
        for t in head
        if isinstance(t, torch.Tensor) and t.dtype.is_floating_point
    ]
    arguments = (0.1, 1, 48) if operator is tvmf_cross_entropy else (True, 48)
    name = "cross_entropy" if operator is tvmf_cross_entropy else "row_statistics"
    results = []
    for function in (getattr(ops, f"_eager_{name}"), getattr(OPS, name)):
        out = function(*head, *arguments)
        total = out[0].sum() if name == "cross_entropy" else sum(t.square().sum() for t in out[:3])
        results.append(torch.autograd.grad(total, leaves))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.any()


@pytest.mark.parametrize("D", [8, 512])
def test_a_traced_head_gives_the_loss_and_its_gradients(D):
    torch.manual_seed(0)
    net, batch = Net(D), (torch.randn(6, D), torch.arange(6) % 5)
    traced = torch.jit.trace(net, batch)
    wanted, found = gradients(net, net(*batch)), gradients(traced, traced(*batch))
    for name, gradient in wanted.items():
        assert error(found[name], gradient) <= 1e-6
    larger = torch.randn(9, D), torch.arange(9) % 5
    assert torch.equal(traced(*larger), net(*larger))


def test_what_a_head_cannot_do_is_refused_with_the_way_out():
    x, weight, target = torch.randn(6, 8), torch.randn(5, 8), torch.arange(6) % 5

    def loss(x):
        return tvmf_cross_entropy(x, weight, target)

    for transform in (torch.func.grad(loss), torch.func.vmap(lambda x: loss(x[None]))):
        with pytest.raises(NotImplementedError, match=r"torch.func use .* tvmf_ext\.reference"):
            transform(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=r"forward mode .* tvmf_ext\.reference"):
            loss(dual)
    with pytest.raises(TypeError, match=r"got Proxy; .* a leaf module"):
        torch.fx.symbolic_trace(Net(8))
    with pytest.raises(ValueError, match=r"soft targets use cross_entropy over tvmf_logits"):
        tvmf_cross_entropy(x, weight, torch.rand(6, 5))
    with pytest.raises(ValueError, match=r"got \[2, 3, 8\]; pass input.flatten\(0, -2\)"):
        tvmf_cross_entropy(x.view(2, 3, 8), weight, target.view(2, 3))


@pytest.mark.parametrize(("D", "products"), [(128, 3), (8, 4)])  # kept, and made again
def test_torchs_counter_counts_the_operations_of_the_products(D, products):
    head = TvMFLoss(D, 5)
    with FlopCounterMode(display=False) as counter:
        head(torch.randn(6, D, requires_grad=True), torch.arange(6) % 5).backward()
    assert counter.get_total_flops() == products * 2 * 6 * 5 * D
