"""Hopper's own kernels on a real device: 16-bit features with float32 weights, every way to them,
and with weights of their own dtype.

The same source runs under the emulator in tests/cuda/test_emulated_sm90.py.
"""

import pytest
import torch

from tests.cuda.test_gpu import DEVICE, HERE, check_cuda, everything, full_float32  # noqa: F401
from tests.problem import assert_same_bits, evaluate, make_problem, statistics_arguments, to_device
from tvmf_ext import ops, row_statistics, tvmf_cross_entropy

HOPPER = HERE and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0"),
    pytest.mark.skipif(HOPPER and not ops.HAS_CUDA, reason="this build has no CUDA kernels"),
]
OPERATORS = pytest.mark.parametrize("operator", [tvmf_cross_entropy, row_statistics])
MIXED = {"weight_dtype": torch.float32}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SHAPES = [
    (1, 1, 4),
    (1, 70, 8),
    (33, 65, 36),
    (70, 333, 64),
    (128, 256, 128),
    (256, 1000, 512),
    (255, 1003, 68),
    (257, 513, 136),  # two blocks of rows
    (300, 9001, 24),
    (1000, 2049, 260),  # four
    (1100, 20011, 40),
    (64, 40000, 32),  # tiles of 128 classes with one block of rows
]


@DTYPES
@pytest.mark.parametrize("weights", [MIXED, {}], ids=["float32 weights", "16-bit weights"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@OPERATORS
def test_whole_and_ragged_tiles(operator, shape, weights, dtype):
    problem = everything(*shape, dtype=dtype, scale="[]", reduction="none", **weights)
    check_cuda(operator, problem, tolerance=torch.finfo(dtype).eps)


@DTYPES
@pytest.mark.parametrize("weights", [MIXED, {}], ids=["float32 weights", "16-bit weights"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_the_loss_alone(shape, weights, dtype):
    """Other instances of the kernels run where no sums, ranks or gradients of kappa and bias are
    wanted."""
    problem = make_problem(*shape, dtype=dtype, scale="[]", **weights)
    check_cuda(tvmf_cross_entropy, problem, tolerance=torch.finfo(dtype).eps)


@pytest.mark.parametrize("kappa", [0.0, -0.4, 16.0])
@pytest.mark.parametrize("scale", [1.0, 64.0, 300.0])
@OPERATORS
def test_large_scales_raise_the_reference(operator, scale, kappa):
    """Some targets are far below the largest logit, and some rows have no target."""
    problem = make_problem(
        150, 700, 64, dtype=torch.bfloat16, kappa=kappa, scale=scale, ignored=0.3, **MIXED
    )
    far = torch.arange(0, 150, 3)
    problem["target"] = problem["target"].clone()
    known = problem["target"][far] >= 0
    problem["target"][far[known]] = (problem["target"][far[known]] + 1) % 700
    check_cuda(operator, problem, tolerance=torch.finfo(torch.bfloat16).eps)


@OPERATORS
def test_a_hundred_runs_give_the_same_bits(operator):
    problem = to_device(everything(700, 3000, 200, dtype=torch.bfloat16, **MIXED), DEVICE)
    if operator is row_statistics:
        problem = statistics_arguments(problem)
    first = evaluate(operator, problem)
    for _ in range(100):
        assert_same_bits(evaluate(operator, problem), first)
