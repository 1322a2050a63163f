"""The same bits for any number of threads and instruction set; memory; offsets beyond 2^31."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.problem import TOLERANCE, check, error, evaluate, make_problem, statistics_arguments
from tvmf_ext import row_statistics, tvmf_cross_entropy

TESTS = Path(__file__).parent


def start_python(code, **environment):
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.split()


def in_exact_products(problem):
    """The problem with small integers, so that a product is exact in any order of summation."""
    for name in ("input", "linear_weight"):
        problem[name] = problem[name].mul(2).round()
    return problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 9001, 40), (70, 5000, 129), (600, 700, 24)], ids=str)
def test_thread_counts_give_the_same_bits(shape, dtype, threads):
    """Two gradients may differ by roundings: a BLAS may split their sums between threads."""
    problem = in_exact_products(
        make_problem(*shape, dtype=dtype, kappa="[C]", scale="[]", bias=True, class_weight=True)
    )
    problem["label_smoothing"] = 0.1
    statistics = statistics_arguments(problem)
    results = []
    for count in (1, 2):
        threads(count)
        rank = row_statistics(**statistics).rank
        of_statistics = evaluate(row_statistics, statistics)
        results.append((rank, of_statistics, evaluate(tvmf_cross_entropy, problem)))
    (rank, *one), (other_rank, *two) = results
    assert torch.equal(rank, other_rank)
    for (outputs, gradients), (other_outputs, other_gradients) in zip(one, two, strict=True):
        for name in outputs:
            assert torch.equal(outputs[name], other_outputs[name])
        for name in gradients:
            if name == "input" or (name == "linear_weight" and shape[0] > 1):
                assert error(other_gradients[name], gradients[name]) <= TOLERANCE[dtype]
            else:
                assert torch.equal(gradients[name], other_gradients[name])


HASHES = """
import hashlib, torch
from tests.problem import *
from tvmf_ext import build_info, row_statistics, tvmf_cross_entropy
torch.set_num_threads(1)
print(build_info().cpu)
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for shape in ((33, 5000, 37), (3, 600, 130)):
        problem = make_problem(
            *shape, dtype=dtype, kappa="[C]", scale="softplus", bias=True, prior=True,
            class_weight=True, ignored=0.1, label_smoothing=0.1,
        )
        statistics = statistics_arguments(problem)
        digest = hashlib.sha256(row_statistics(**statistics).rank.numpy().tobytes())
        for result in (evaluate(row_statistics, statistics), evaluate(tvmf_cross_entropy, problem)):
            for tensors in result:
                for tensor in tensors.values():
                    digest.update(tensor.double().numpy().tobytes())
        print(digest.hexdigest())
"""


def test_instruction_sets_give_the_same_bits():
    sets = ["baseline", "avx2", "avx512"]
    processes = [
        start_python(HASHES, TVMF_CPU_CAPABILITY=name, TVMF_CPU_PRODUCT="library") for name in sets
    ]
    results = [output_of(process) for process in processes]
    for index, (name, *hashes) in enumerate(results):
        assert name in sets[: index + 1]  # the set asked for, or a smaller one that the machine has
        assert len(hashes) == 6
        assert hashes == results[0][1:]


# A process inherits the peak that `getrusage` tells from the one that starts it, but not VmHWM.
PEAK = """
import re, sys, torch
from tvmf_ext import plan, tvmf_cross_entropy
N, C, D = map(int, sys.argv[1:])
def peak():
    return 1024 * int(re.search("VmHWM:(.*)kB", open("/proc/self/status").read())[1])
def step(input, weight, target):
    loss = tvmf_cross_entropy(input, weight, target)
    return torch.autograd.grad(loss, (input, weight))
def problem(N, C, D):
    weight = torch.empty(C, D).uniform_(-1, 1).requires_grad_()
    return torch.randn(N, D, requires_grad=True), weight, torch.arange(N)
step(*problem(N, 8192, D))
arguments = problem(N, C, D)
before = peak()
gradients = step(*arguments)
extra = peak() - before - sum(g.nbytes for g in gradients)
assert all(g.isfinite().all() for g in gradients)
planned = plan(N, C, D, device="cpu")
print(extra, planned.saved + planned.workspace)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("product", ["own", "library"])
@pytest.mark.parametrize("shape", ["256 1000000 64", "256 200000 256"])
def test_memory_beyond_inputs_and_gradients_stays_under_64_mb(shape, product):
    code = PEAK.replace("sys.argv[1:]", repr(shape.split()))
    process = start_python(code, TVMF_CPU_PRODUCT=product, OMP_NUM_THREADS="2")
    extra, planned = map(int, output_of(process))
    assert extra <= 64e6 and abs(extra - planned) <= 4e6, (extra, planned)


def untouched(size):
    """float32 numbers in pages that take memory only after they are written to."""
    no_reserve = 0x4000  # MAP_NORESERVE, which Python names since 3.13
    memory = mmap.mmap(-1, size * 4, flags=mmap.MAP_PRIVATE | no_reserve)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="the flags are Linux's")
@pytest.mark.parametrize("name", ["input", "linear_weight"])
def test_rows_beyond_2_to_the_31_elements(name):
    problem = make_problem(*((5000, 600, 20) if name == "input" else (600, 5000, 20)))
    far = untouched(5000 * 600_000).view(5000, -1)[:, 7:27]
    assert far[4096].storage_offset() > 2**31  # where the last block begins, or one before it
    far.copy_(problem[name])
    problem[name] = far
    check(tvmf_cross_entropy, problem)
