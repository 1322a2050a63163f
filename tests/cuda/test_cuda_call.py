"""The host code between torch's tensors and the CUDA kernels, csrc/torch/cuda_call.cpp, run on CPU
tensors and the emulator's CUDA runtime: its results, errors and allocations."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests import problem as problems
from tests import simt
from tvmf_ext import plan, tvmf_cross_entropy
from tvmf_ext.head import kept_products
from tvmf_ext.ops import DIFFERENTIABLE, Head

MEAN = 1


@pytest.fixture
def operators():
    module = simt.load("simt_torch")
    yield torch.ops.tvmf_emulated
    module.configure()


def head_of(input, weight, target, kappa=None, scale=8.0):
    """A head without bias, prior, class weights and margins."""
    absent = [None] * (Head._fields.index("kappa_value") - 4)
    return Head(input, weight, target, kappa, *absent, 16.0, scale, 0.0, 0.0, False, -100, False)


def step(operators, head, wanted, kept=0):
    """The loss, and the gradients that the bits of `wanted` ask for, by name."""
    options = (0.0, MEAN, kept)
    loss, saved = operators.cross_entropy(*head, *options)
    upstream = torch.ones((), dtype=loss.dtype)
    gradients = operators.cross_entropy_backward(upstream, *head, *options, saved, wanted)
    named = zip(DIFFERENTIABLE, gradients, strict=True)
    return loss, {name: g for bit, (name, g) in enumerate(named) if wanted >> bit & 1}


# D keeps them from Hopper's kernels, whose copies must name their buffers to the emulator.
@pytest.mark.parametrize(
    "dtype, weight_dtype",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),  # the kernels read a copy of the weight
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_results(operators, dtype, weight_dtype):
    problem = problems.make_problem(9, 70, 18, dtype=dtype, weight_dtype=weight_dtype)
    # One number for every class, of which the kernels make C gradients.
    problem["kappa"] = torch.tensor(16.0, dtype=dtype).expand(70)
    head = head_of(*(problem[name] for name in ("input", "linear_weight", "target", "kappa")))
    loss, gradients = step(operators, head, 0b111)
    gradients["linear_weight"] = gradients.pop("weight")
    upstream = [torch.ones_like(loss)]
    for line in problems.judge(
        tvmf_cross_entropy, problem, {"loss": loss}, gradients, upstream, eager_dtype=dtype
    ):
        assert line.error <= line.bound, line


def test_no_rows(operators):
    head = head_of(torch.empty(0, 8), torch.ones(5, 8), torch.empty(0, dtype=torch.int64))
    loss, gradients = step(operators, head, 0b11)
    assert loss.isnan() and gradients["input"].shape == (0, 8)
    assert torch.equal(gradients["weight"], torch.zeros(5, 8))


def test_a_later_call_raises_for_a_wrong_label(operators):
    right = head_of(torch.ones(2, 6), torch.ones(3, 6), torch.tensor([0, 1]))
    loss, _ = operators.cross_entropy(*right._replace(target=torch.tensor([0, 3])), 0.0, MEAN, 0)
    assert loss.isnan()
    with pytest.raises(IndexError, match="an earlier call on cuda"):
        operators.cross_entropy(*right, 0.0, MEAN, 0)
    assert operators.cross_entropy(*right, 0.0, MEAN, 0)[0].isfinite()


def allocations(operator, *args):
    """What the operator returns, and the bytes of each allocation that it makes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = operator(*args)
    events = profiled.profiler.kineto_results.events()
    return result, [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((256, 1000, 512), torch.bfloat16),
        ((65536, 5000, 64), torch.bfloat16),  # in segments of rows
        ((64, 1000, 512), torch.float32),  # the portable path, which keeps products
    ],
    ids=str,
)
def test_a_step_allocates_its_results_what_is_saved_and_a_workspace_for_each_pass(
    operators, shape, dtype
):
    simt.load("simt_torch").configure(execute=False)
    N, C, D = shape
    input, weight = torch.zeros(N, D, dtype=dtype), torch.zeros(C, D)
    head = head_of(input, weight, torch.zeros(N, dtype=torch.int64))
    planned = plan(N, C, D, dtype=dtype, weight_dtype=torch.float32, device="H200")
    options = (0.0, MEAN, planned.kept)
    (loss, saved), forward = allocations(operators.cross_entropy, *head, *options)
    assert forward == [loss.nbytes, saved.nbytes, planned.forward_workspace]
    assert saved.nbytes == planned.saved
    args = (torch.ones(()), *head, *options, saved, 0b11)
    _, backward = allocations(operators.cross_entropy_backward, *args)
    assert backward == [input.nbytes, weight.nbytes, planned.backward_workspace]


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("forward_aligned", [True, False], ids=["Hopper's", "portable"])
def test_products_of_one_path_are_not_read_by_the_other(operators, forward_aligned, weight_dtype):
    """A hook of saved tensors can give the backward pass a weight that lies otherwise, so that it
    takes the other path: the number of what is kept says whose products they are."""
    module = simt.load("simt_torch")
    module.configure(execute=False)
    N, C, D = 64, 1000, 512
    both = {}
    for aligned in (True, False):
        weight = torch.zeros(C * D + 1, dtype=weight_dtype)[not aligned :][: C * D].view(C, D)
        target = torch.zeros(N, dtype=torch.int64)
        head = head_of(torch.zeros(N, D, dtype=torch.bfloat16), weight, target)
        keeps = kept_products(C, D, torch.bfloat16, weight_dtype, (D, 1, aligned), "H200")
        both[aligned] = head, keeps.elements(N, C, D, torch.bfloat16)
    head, kept = both[forward_aligned]
    other = both[not forward_aligned][0]
    options = (0.0, MEAN, kept)
    _, saved = operators.cross_entropy(*head, *options)

    def launches(head):
        module.reset()
        operators.cross_entropy_backward(torch.ones(()), *head, *options, saved, 0b11)
        return module.calls()["launches"]

    assert launches(head) == (3 if forward_aligned else 4)
    assert launches(other) == 4  # Hopper's path makes the products again
    planned = torch.ops.tvmf_ext.plan(
        N, C, D, "bfloat16", str(weight_dtype).removeprefix("torch."), False, kept, False, "A100"
    )
    assert f"kept={0 if forward_aligned else kept};" in planned
