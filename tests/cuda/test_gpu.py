"""The kernels on a real device: the oracle's rule, equal bits, graphs, memory, streams, bad labels.

`pytest -m cuda` runs these alone. Tests of the same source without a GPU are those of tests/simt.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tvmf_ext
from tests.problem import (
    TOLERANCE,
    assert_same_bits,
    check,
    check_rank,
    compute_dtype,
    error,
    evaluate,
    judge,
    leaves_of,
    make_problem,
    oracle,
    statistics_arguments,
    to_device,
)
from tvmf_ext import TvMFLoss, ops, plan, row_statistics, tvmf_cross_entropy, tvmf_logits

HERE = torch.cuda.is_available()
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not HERE, reason="needs a GPU"),
    pytest.mark.skipif(HERE and not ops.HAS_CUDA, reason="this build has no CUDA kernels"),
]
DEVICE = torch.device("cuda")
OPERATORS = pytest.mark.parametrize("operator", [tvmf_cross_entropy, row_statistics])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MIXES = [(a, b) for a in DTYPES for b in DTYPES]


@pytest.fixture(autouse=True)
def full_float32():
    """float32 products in full, and no flag of an earlier test's labels."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    yield setting
    setting.fp32_precision = before


def on_device(problem, device=DEVICE):
    return to_device(problem, device)


def check_cuda(operator, problem, **options):
    """Checks the error rule against eager PyTorch on the same device in the features' own dtype."""
    problem = on_device(problem)
    check(operator, problem, eager_dtype=problem["input"].dtype, **options)


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(ops.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr


def everything(N, C, D, **options):
    return make_problem(
        N,
        C,
        D,
        kappa="[C]",
        bias=True,
        prior=True,
        class_weight=True,
        ignored=0.1,
        **({"scale": "softplus", "label_smoothing": 0.1} | options),
    )


# The oracle


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.parametrize("shape", [(128, 256, 128), (70, 333, 77)], ids=str)
@OPERATORS
def test_every_mix_of_dtypes(operator, shape, dtypes):
    check_cuda(operator, everything(*shape, dtype=dtypes[0], weight_dtype=dtypes[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 7, 5),
        (2, 16, 16),
        (33, 31, 3),
        (64, 64, 64),
        (129, 1003, 72),
        (257, 513, 136),
        (1, 20000, 64),
        (300, 9001, 24),
        (1500, 700, 200),
        (1100, 20011, 40),  # many chunks of classes
    ],
    ids=str,
)
@OPERATORS
def test_whole_and_ragged_tiles(operator, shape, dtype):
    problem = everything(*shape, dtype=dtype, scale="[]", reduction="none")
    check_cuda(operator, problem)
    if dtype in (torch.float32, torch.float64):
        check_rank(on_device(problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@OPERATORS
def test_one_feature(operator, dtype):
    """Every cosine is 1 or -1. Eager PyTorch has it exactly; the kernels may be off by a rounding,
    which phi' multiplies."""
    problem = on_device(make_problem(20, 40, 1, dtype=dtype, kappa=1.0, scale="[]", bias=True))
    half = dtype in (torch.float16, torch.bfloat16)  # eager PyTorch may give NaN in these
    tolerance = torch.finfo(dtype).eps if half else 4 * TOLERANCE[compute_dtype(dtype)]
    check(operator, problem, tolerance=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_class_has_no_loss_and_no_gradient(dtype):
    problem = on_device(make_problem(6, 1, 33, dtype=dtype, kappa="[C]", scale="[]", bias=True))
    outputs, gradients = evaluate(tvmf_cross_entropy, problem, [torch.ones(())])
    assert outputs["loss"] == 0
    only_target = [None, torch.full((6,), 1 / 6), None]
    _, of_logit, _ = oracle(row_statistics, statistics_arguments(problem), only_target)
    eps = torch.finfo(compute_dtype(dtype)).eps
    for name, gradient in gradients.items():
        assert gradient.norm() <= 8 * eps * of_logit[name].norm()


@pytest.mark.parametrize("kappa", [0, 16.0, -0.4, "[]", "[1]", "[C]"])
@pytest.mark.parametrize("scale", [1, 20.0, "[]", "[1]", "softplus"])
@OPERATORS
def test_every_form_of_kappa_and_scale(operator, kappa, scale):
    check_cuda(operator, make_problem(9, 35, 21, kappa=kappa, scale=scale, bias=True))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("class_weight", [False, True])
@pytest.mark.parametrize("ignore", [{}, {"ignored": 0.3, "ignore_index": 2}])
def test_loss_options(reduction, label_smoothing, class_weight, ignore):
    options = {"reduction": reduction, "label_smoothing": label_smoothing, **ignore}
    check_cuda(tvmf_cross_entropy, make_problem(21, 80, 64, class_weight=class_weight, **options))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rows_are_as_in_cross_entropy(dtype, reduction):
    input = torch.empty(0, 70, dtype=dtype, device=DEVICE, requires_grad=True)
    weight = torch.randn(40, 70, device=DEVICE, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=DEVICE)
    loss = tvmf_cross_entropy(input, weight, target, reduction=reduction)
    if reduction == "none":
        assert loss.shape == (0,)
    else:
        assert loss.isnan() if reduction == "mean" else loss == 0
    gradients = torch.autograd.grad(loss.sum(), (input, weight))
    assert gradients[0].shape == (0, 70) and not gradients[1].any()
    assert row_statistics(input, weight, target).rank.shape == (0,)


def layouts_of(tensor):
    """The same matrix in other strides."""
    rows, cols = tensor.shape
    wide = tensor.new_full((rows, 2 * cols), float("nan"))
    wide[:, ::2] = tensor
    framed = tensor.new_full((rows + 7, cols + 5), float("nan"))
    framed[4:-3, 2:-3] = tensor
    return {
        "transposed": tensor.T.contiguous().T,
        "every other column": wide[:, ::2],
        "inside a larger one": framed[4:-3, 2:-3],
        "one row expanded": tensor[:1].expand(rows, cols),
        "one column expanded": tensor[:, :1].expand(rows, cols),
    }


@pytest.mark.parametrize("layout", list(layouts_of(torch.empty(1, 1))))
@pytest.mark.parametrize("name", ["input", "linear_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_features_and_weight(dtype, name, layout):
    problem = make_problem(150, 400, 72, dtype=dtype, weight_dtype=torch.float32, scale="[]")
    problem = on_device(problem)
    problem[name] = layouts_of(problem[name])[layout]
    check(tvmf_cross_entropy, problem, eager_dtype=dtype)


def test_strides_of_the_vectors():
    problem = on_device(everything(30, 50, 8))
    for name in ("target", "kappa", "linear_bias", "prior", "weight"):
        spaced = problem[name].repeat_interleave(3)[1::3]
        assert not spaced.is_contiguous()
        check(tvmf_cross_entropy, problem | {name: spaced})
        check(tvmf_cross_entropy, problem | {name: problem[name][3].expand(len(spaced))})


@pytest.mark.parametrize("which", ["input", "linear_weight", "kappa", "scale", "linear_bias"])
@OPERATORS
def test_a_gradient_asked_for_alone_is_that_of_all_together(operator, which):
    problem = on_device(make_problem(70, 600, 140, kappa="[C]", scale="[]", bias=True))
    problem, leaves = leaves_of(problem)
    output = operator(**problem)
    loss = output if isinstance(output, torch.Tensor) else output.lse.sum() + output.sum.mean()
    wanted = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == which)
    output = operator(**problem)
    loss = output if isinstance(output, torch.Tensor) else output.lse.sum() + output.sum.mean()
    (gradient,) = torch.autograd.grad(loss, leaves[which])
    assert torch.equal(gradient, wanted[which])


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_products_follow_torchs_own_setting(full_float32, precision):
    problem = on_device(make_problem(300, 2000, 256, scale="[]", bias=True))
    full_float32.fp32_precision = precision
    check(tvmf_cross_entropy, problem)
    check(row_statistics, problem)
    outputs, _ = evaluate(tvmf_cross_entropy, problem | {"reduction": "none"})
    exact, *_ = oracle(tvmf_cross_entropy, problem | {"reduction": "none"})
    off = error(outputs["loss"], exact["loss"])
    assert (off > 1e-5) == (precision == "tf32")  # TF32 has 11 bits


def test_the_setting_of_tf32_leaves_other_dtypes_alone(full_float32):
    for dtype in (torch.float64, torch.bfloat16):
        problem = on_device(make_problem(70, 300, 64, dtype=dtype))
        full_float32.fp32_precision = "ieee"
        first = evaluate(tvmf_cross_entropy, problem)
        full_float32.fp32_precision = "tf32"
        assert_same_bits(first, evaluate(tvmf_cross_entropy, problem))


# Equal bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 3001, 128), (1100, 20011, 64)], ids=str)
@OPERATORS
def test_two_runs_give_the_same_bits(operator, shape, dtype):
    problem = on_device(everything(*shape, dtype=dtype))
    if operator is row_statistics:
        problem = statistics_arguments(problem)
    first = evaluate(operator, problem)
    spoilt = [torch.full((2**22,), torch.nan, device=DEVICE) for _ in range(20)]
    del spoilt  # what the next call's memory held
    for _ in range(3):
        assert_same_bits(evaluate(operator, problem), first)


# Tests for a sanitizer that watches our kernels alone


NATIVE = [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[2:]]


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        *(((70, 333, 77), dtypes) for dtypes in NATIVE),
        *(((300, 9001, 24), dtypes) for dtypes in NATIVE),
        ((1100, 20011, 40), (torch.bfloat16, torch.float32)),  # many chunks of classes
    ],
    ids=str,
)
@OPERATORS
def test_between_copies_nothing_but_our_kernels(operator, shape, dtypes):
    """Our kernels read only what was copied to the device or what they wrote, and all of their
    results are copied back. No kernel of torch runs between, so that initcheck sees every write
    and finds every element that was not written."""
    problem = everything(*shape, dtype=dtypes[0], weight_dtype=dtypes[1])
    if operator is row_statistics:
        problem = statistics_arguments(problem)
    results = evaluate(operator, on_device(problem))
    outputs, gradients = ({name: t.cpu() for name, t in part.items()} for part in results)
    for line in judge(operator, problem, outputs, gradients, eager_dtype=dtypes[0]):
        assert line.error <= line.bound, str(line)


# Graphs, streams, devices


def test_a_captured_graph_replays_with_new_data():
    problem = on_device(make_problem(130, 3000, 128, dtype=torch.bfloat16, scale="[]"))
    problem, leaves = leaves_of(problem)

    def step():
        loss = tvmf_cross_entropy(**problem)
        return loss, *torch.autograd.grad(loss, list(leaves.values()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (5, 0):
        data = make_problem(130, 3000, 128, dtype=torch.bfloat16, scale="[]", seed=seed)
        with torch.no_grad():
            for name in ("input", "linear_weight", "target", "scale"):
                problem[name].copy_(data[name])
        graph.replay()
        replayed = [t.clone() for t in captured]
        for one, like in zip(replayed, step(), strict=True):
            assert torch.equal(one, like)


FIRST_CALL_IN_A_GRAPH = """
import torch
from tvmf_ext import tvmf_cross_entropy
x, w = (torch.randn(n, 64, device="cuda") for n in (32, 100))
y = torch.arange(32, device="cuda")
x @ w.T
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = tvmf_cross_entropy(x, w, y)
graph.replay()
assert torch.equal(loss, tvmf_cross_entropy(x, w, y))
"""


def test_the_first_call_of_a_process_can_be_captured():
    run_python(FIRST_CALL_IN_A_GRAPH)


def test_a_stream_of_ones_own():
    """The call runs on the current stream, and so after the features, which are still being made
    when it is called."""
    problem = on_device(make_problem(256, 4000, 256))
    expected = evaluate(tvmf_cross_entropy, problem)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.full_like(problem["input"], torch.nan)
        torch.cuda._sleep(50_000_000)
        late.copy_(problem["input"])
        result = evaluate(tvmf_cross_entropy, problem | {"input": late})
    side.synchronize()
    assert_same_bits(result, expected)


@pytest.mark.skipif(HERE and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device():
    problem = everything(70, 900, 128)
    first = evaluate(tvmf_cross_entropy, on_device(problem, "cuda:0"))
    second = evaluate(tvmf_cross_entropy, on_device(problem, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for part in second for t in part.values())
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same_bits(first, [{k: v.to("cuda:0") for k, v in p.items()} for p in second])
    with pytest.raises(ValueError, match=r"input's device, cuda:1, got cuda:0"):
        other = on_device(problem, "cuda:1")
        tvmf_cross_entropy(**other | {"kappa": other["kappa"].to("cuda:0")})


# Memory


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((256, 8142, 2048), torch.bfloat16),
        ((256, 8142, 512), torch.float32),
        ((1024, 300_000, 128), torch.bfloat16),
    ],
    ids=str,
)
def test_peak_memory_is_what_the_plan_says(shape, dtype):
    N, C, D = shape
    weight = torch.randn(C, D, device=DEVICE, requires_grad=True)
    input = torch.randn(N, D, device=DEVICE, dtype=dtype, requires_grad=True)
    target = torch.randint(C, (N,), device=DEVICE)
    expected = plan(N, C, D, dtype=dtype, weight_dtype=torch.float32, device=DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = tvmf_cross_entropy(input, weight, target)
    gradients = torch.autograd.grad(loss, (input, weight))
    extra = torch.cuda.max_memory_allocated() - before
    outputs = loss.nbytes + sum(g.nbytes for g in gradients)
    assert extra <= 1.05 * (expected.workspace + expected.saved + outputs)
    assert expected.workspace <= 64 * 2**20


def test_a_step_allocates_its_results_what_is_saved_and_a_workspace_for_each_pass():
    weight = torch.randn(1000, 512, device=DEVICE, requires_grad=True)
    input = torch.randn(256, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    target, one = torch.randint(1000, (256,), device=DEVICE), torch.ones((), device=DEVICE)

    def allocated():
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    before = allocated()
    loss = tvmf_cross_entropy(input, weight, target)
    between = allocated()
    torch.autograd.grad(loss, (input, weight), one)
    assert (between - before, allocated() - between) == (3, 3)


@pytest.mark.skipif(
    HERE and torch.cuda.mem_get_info()[1] < 30e9, reason="needs 30 GB of GPU memory"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_beyond_2_to_the_31_elements(dtype):
    problem = on_device(make_problem(5000, 600, 24, dtype=dtype, scale="[]"))
    far = torch.empty(5000, 600_000, dtype=dtype, device=DEVICE)[:, 7:31]
    far.copy_(problem["input"])
    check(tvmf_cross_entropy, problem | {"input": far}, eager_dtype=dtype)


# Bad labels


@pytest.mark.parametrize("label", [5, -1, 2**40, -(2**62)])
@OPERATORS
def test_a_bad_label_is_nan_and_the_next_call_raises(operator, label):
    problem = on_device(statistics_arguments(make_problem(4, 5, 70)))
    expected = evaluate(operator, problem)
    wrong = problem["target"].clone()
    wrong[2] = label
    reduction = {"reduction": "none"} if operator is tvmf_cross_entropy else {}
    output = operator(**problem | {"target": wrong} | reduction)
    rows = output if isinstance(output, torch.Tensor) else output.target
    assert rows.isnan().tolist() == [False, False, True, False]  # waits for the device
    with pytest.raises(IndexError, match=r"earlier call on cuda:0 .* outside \[0, C\).*NaN"):
        operator(**problem)
    assert_same_bits(evaluate(operator, problem), expected)  # the context is alive
    operator(**problem | {"target": wrong}, ignore_index=label)
    torch.cuda.synchronize()
    operator(**problem)


def test_a_bad_label_in_a_training_step_raises_once():
    problem, leaves = leaves_of(on_device(make_problem(4, 5, 70)))
    wrong = torch.full_like(problem["target"], 5)
    loss = tvmf_cross_entropy(**problem | {"target": wrong})
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="earlier call"):
        torch.autograd.grad(loss, list(leaves.values()))
    torch.cuda.synchronize()
    assert evaluate(tvmf_cross_entropy, problem)[0]["loss"].isfinite()


def test_one_can_ask_for_bad_labels_after_a_replay():
    problem = on_device(make_problem(4, 5, 70))
    tvmf_cross_entropy(**problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = tvmf_cross_entropy(**problem)
    tvmf_ext.check_targets()
    problem["target"][2] = 5
    graph.replay()
    with pytest.raises(IndexError, match="earlier call on cuda:0"):
        tvmf_ext.check_targets("cuda")
    assert loss.isnan()
    tvmf_ext.check_targets(0)  # it raises once


# The head with other features of torch


def test_autocast_rounds_float32_features():
    problem = on_device(make_problem(40, 300, 64, kappa="[C]", scale="[]", bias=True))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            outputs, gradients = evaluate(tvmf_cross_entropy, problem)
        like = evaluate(tvmf_cross_entropy, problem | {"input": problem["input"].to(dtype)})
        like[1]["input"] = like[1]["input"].float()
        assert_same_bits((outputs, gradients), like)


@pytest.mark.parametrize("dynamic", [False, True])
@OPERATORS
def test_compiled_in_one_graph_equals_eager(operator, dynamic):
    torch._dynamo.reset()
    function = torch.compile(operator, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N, C in ((6, 40), (9, 53)) if dynamic else ((6, 40),):
        # Compiled code makes a smoothed loss of the row statistics, whose last bits differ.
        problem = on_device(everything(N, C, 130)) | {"label_smoothing": 0.0}
        if operator is row_statistics:
            problem = statistics_arguments(problem)
        assert_same_bits(evaluate(function, problem), evaluate(operator, problem))


def test_a_training_step_through_inductor_equals_eager():
    torch._dynamo.reset()
    torch.manual_seed(0)
    head = TvMFLoss(130, 40, bias=True, label_smoothing=0.1, device=DEVICE)
    layer = torch.nn.Linear(20, 130, device=DEVICE)
    input, target = torch.randn(6, 20, device=DEVICE), torch.arange(6, device=DEVICE)
    parameters = [*layer.parameters(), *head.parameters()]

    def step(input, target):
        statistics = head.row_statistics(layer(input), target)
        return head.loss(statistics, target) + 1e-3 * statistics.lse.square().mean()

    results = [f(input, target) for f in (torch.compile(step, fullgraph=True), step)]
    assert error(*(t.detach() for t in results)) <= 2e-6
    for one, other in zip(*(torch.autograd.grad(t, parameters) for t in results), strict=True):
        assert error(one, other) <= 1e-5


def test_cpu_and_cuda_agree():
    problem = everything(70, 900, 128)
    for part, like in zip(
        evaluate(tvmf_cross_entropy, on_device(problem)),
        evaluate(tvmf_cross_entropy, problem),
        strict=True,
    ):
        for name in part:
            assert error(part[name].cpu(), like[name]) <= 1e-5
    logits = tvmf_logits(*(on_device(problem)[name] for name in ("input", "linear_weight")))
    assert logits.is_cuda


def test_second_derivatives_are_refused():
    problem, leaves = leaves_of(on_device(make_problem(4, 5, 70)))
    loss = tvmf_cross_entropy(**problem)
    (gradient, *_) = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


def test_a_tensor_on_the_cpu_is_refused():
    problem = on_device(everything(4, 5, 6))
    for name in ("input", "linear_weight", "target", "kappa", "linear_bias", "prior", "weight"):
        with pytest.raises(ValueError, match=r"must be on the input's device"):
            tvmf_cross_entropy(**problem | {name: problem[name].cpu()})


def test_no_call_waits_for_the_device():
    problem, leaves = leaves_of(on_device(everything(64, 500, 128)))
    evaluate(tvmf_cross_entropy, problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = tvmf_cross_entropy(**problem)
        torch.autograd.grad(loss, list(leaves.values()))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_plan_of_this_device_has_its_sizes():
    here = plan(256, 8142, 2048, dtype=torch.bfloat16, device=DEVICE)
    assert here.sms == torch.cuda.get_device_properties(DEVICE).multi_processor_count
    assert here == plan(256, 8142, 2048, dtype=torch.bfloat16)
