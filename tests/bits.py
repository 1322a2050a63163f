"""Whether a change of structure changed results: saves the operators' outputs, and compares them.

    python -m tests.bits --save before.pt       # on the state before
    python -m tests.bits --compare before.pt    # on the state after

A fixed set of problems runs on the CPU kernels and, with --emulator, on the CUDA kernels under the
emulator (tests/simt), whose launches and counts are saved beside the tensors. Any difference in a
bit or a count is printed, and the exit status is 1.
"""

import argparse
import itertools
import sys

import torch

from tests import problem as problems
from tvmf_ext import row_statistics, tvmf_cross_entropy

OPTIONS = {
    "kappa": "[C]",
    "scale": "softplus",
    "bias": True,
    "prior": True,
    "class_weight": True,
    "ignored": 0.1,
    "label_smoothing": 0.1,
}
CPU_SHAPES = ((1, 1, 1), (1, 8, 8), (33, 5000, 37), (300, 601, 130), (256, 1000, 512))
EMULATED_SHAPES = ((1, 1, 4), (140, 200, 72), (300, 331, 40), (70, 90, 33))
# An H200 with other sizes: few multiprocessors make large tiles, a small cache makes chunks. The
# last three take Hopper's own kernels where the dtypes allow it.
EMULATED_GPUS = (
    {},
    {"sms": 2},
    {"sms": 4, "l2": 60_000, "shared_per_block": 60_000},
    {"capability": 90},
    {"capability": 90, "sms": 2},
    {"capability": 90, "sms": 2, "l2": 1 << 15},
)
COUNTS = ("threads", "shared_bytes", "mma", "wgmma", "load_matrix", "barriers")
COUNTS += ("global_read_sectors", "global_write_sectors", "shared_wavefronts", "tensor_copies")


def problems_of(shape, dtype, weight_dtype=None):
    for options in ({}, OPTIONS):
        yield problems.make_problem(*shape, dtype=dtype, weight_dtype=weight_dtype, **options)


def cpu_results():
    torch.set_num_threads(2)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for shape, dtype in itertools.product(CPU_SHAPES, dtypes):
        for i, problem in enumerate(problems_of(shape, dtype)):
            statistics = problems.statistics_arguments(problem)
            for name, function, arguments in (
                ("loss", tvmf_cross_entropy, problem),
                ("statistics", row_statistics, statistics),
            ):
                outputs, gradients = problems.evaluate(function, arguments)
                if name == "statistics":
                    outputs["rank"] = function(**arguments).rank
                yield f"cpu {shape} {dtype} {i} {name}", {**outputs, **gradients}


def emulated_results():
    from tests import simt

    mixes = {
        "bf16-fp32": (torch.bfloat16, torch.float32, False),
        "fp16-fp32": (torch.float16, torch.float32, False),
        "bf16": (torch.bfloat16, None, False),
        "tf32": (torch.float32, None, True),
        "fp32": (torch.float32, None, False),
        "fp64": (torch.float64, None, False),
    }
    module = simt.load()
    for shape, (mix, (dtype, weight_dtype, tf32)), (g, gpu) in itertools.product(
        EMULATED_SHAPES, mixes.items(), enumerate(EMULATED_GPUS)
    ):
        for i, problem in enumerate(problems_of(shape, dtype, weight_dtype)):
            for statistics in (False, True):
                arguments = problems.statistics_arguments(problem) if statistics else problem
                names = ("others", "cosine", "sum") if statistics else ("loss",)
                size = (shape[0],) if statistics or arguments.get("reduction") == "none" else ()
                upstream = problems.upstream_of({name: torch.empty(size) for name in names})
                compute = problems.compute_dtype(dtype)
                own = {n: u.to(compute) for n, u in zip(names, upstream, strict=True)}
                module.reset()
                outputs, gradients, _ = simt.step(
                    arguments, own, statistics=statistics, tf32=tf32, **gpu
                )
                counts = [(*(getattr(r, c) for c in COUNTS), str(r.grid)) for r in module.reports()]
                key = f"emulated {shape} {mix} {g} {i} {'statistics' if statistics else 'loss'}"
                yield key, {**outputs, **gradients}
                yield key + " launches", counts


def same(a, b):
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def main():
    parser = argparse.ArgumentParser("python -m tests.bits", description=__doc__.split("\n")[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--save", metavar="FILE", help="save the results there")
    group.add_argument("--compare", metavar="FILE", help="a file of --save")
    parser.add_argument("--emulator", action="store_true", help="the CUDA kernels too: minutes")
    options = parser.parse_args()
    before = {}
    if options.compare:
        try:
            before = torch.load(options.compare, weights_only=False)
        except OSError as error:
            parser.error(f"--compare: got {error}, wanted a file of --save")
    results = dict(cpu_results())
    if options.emulator:
        results |= dict(emulated_results())
    if options.save:
        torch.save(results, options.save)
        print(f"{len(results)} results saved")
        return 0
    wrong = [f"{key}: only on one side" for key in before.keys() ^ results.keys()]
    for key in before.keys() & results.keys():
        a, b = before[key], results[key]
        if isinstance(a, list):
            wrong += [f"{key}: launches or counts differ"] if a != b else []
        else:
            wrong += [f"{key}: {n}" for n in a.keys() | b.keys() if not same(a.get(n), b.get(n))]
    print("\n".join(sorted(wrong)) or f"{len(results)} results: every bit and count is the same")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
