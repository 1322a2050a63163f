"""Runs the CUDA kernels on one problem on the emulator and compares the results with float64.

python -m tests.simt --n 129 --c 1003 --d 72 --dtype bf16 --kappa 16 --scale 16 --seed 0
"""

import argparse
import time

import torch

from tests import problem as problems
from tests import simt

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def parse():
    parser = argparse.ArgumentParser(
        prog="python -m tests.simt",
        description="Runs one forward and backward pass of the CUDA kernels on an emulated GPU, "
        "which checks for races and uninitialised memory. Prints the error of each result relative "
        "to float64 in norm, and the error allowed: twice that of eager PyTorch in the same dtype, "
        "plus a few roundings. Exits with 1 if an error is larger.",
    )
    add = parser.add_argument
    add("--n", type=int, default=129, help="rows (samples)")
    add("--c", type=int, default=1003, help="classes")
    add("--d", type=int, default=72, help="features")
    add("--dtype", choices=DTYPES, default="bf16", help="dtype of the features")
    add(
        "--weight-dtype",
        choices=DTYPES,
        help="dtype of the weight: that of the features, or fp32 with 16-bit features",
    )
    add("--tf32", action="store_true", help="compute float32 products in TF32")
    add("--kappa", default="16", help="a number, or the shape of a tensor: [], [1] or [C]")
    add("--scale", default="16", help="a number, the shape of a tensor: [] or [1], or softplus")
    for name in ("bias", "prior", "class-weight"):
        add(f"--{name}", action="store_true")
    add("--ignored", type=float, default=0.0, help="fraction of rows whose label is ignore_index")
    add("--label-smoothing", type=float, default=0.0)
    add("--reduction", choices=("mean", "sum", "none"), default="mean")
    add("--statistics", action="store_true", help="compute row statistics instead of the loss")
    add("--recompute", action="store_true", help="compute the products again in the backward pass")
    add("--strided", action="store_true", help="use features and weight that are not contiguous")
    add("--sms", type=int, default=132, help="multiprocessors of the GPU to plan for")
    add("--l2", type=int, default=50 << 20, help="bytes of L2 of the GPU to plan for")
    add("--capability", type=int, default=80, help="of the GPU to plan for: 90 takes Hopper's path")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the data and of the order of blocks and threads",
    )
    add("--counts", action="store_true", help="print the counts of each launch")
    args = parser.parse_args()
    for name in ("n", "c", "d", "sms", "l2"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    dtype = DTYPES[args.dtype]
    weight_dtype = DTYPES[args.weight_dtype or args.dtype]
    if weight_dtype != dtype and not (dtype.itemsize == 2 and weight_dtype == torch.float32):
        parser.error(
            f"--weight-dtype must be that of the features or, for 16-bit features, fp32; got "
            f"{args.weight_dtype} for {args.dtype} (the operators convert others first)"
        )
    if args.tf32 and args.dtype != "fp32":
        parser.error(f"--tf32 is for fp32 features, got {args.dtype}")
    for name, shapes in (("kappa", ("[]", "[1]", "[C]")), ("scale", ("[]", "[1]", "softplus"))):
        value = getattr(args, name)
        if value not in shapes:
            try:
                setattr(args, name, float(value))
            except ValueError:
                parser.error(
                    f"--{name} must be a number or one of {', '.join(shapes)}, got {value}"
                )
    if isinstance(args.kappa, float) and not args.kappa > -0.5:
        parser.error(f"--kappa must be > -1/2, got {args.kappa}")
    if isinstance(args.scale, float) and not args.scale > 0:
        parser.error(f"--scale must be > 0, got {args.scale}")
    return args


def main():
    args = parse()
    dtype = DTYPES[args.dtype]
    problem = problems.make_problem(
        args.n,
        args.c,
        args.d,
        dtype=dtype,
        weight_dtype=DTYPES[args.weight_dtype or args.dtype],
        kappa=args.kappa,
        scale=args.scale,
        bias=args.bias,
        prior=args.prior,
        class_weight=args.class_weight,
        ignored=args.ignored,
        seed=args.seed,
        label_smoothing=args.label_smoothing,
        reduction=args.reduction,
    )
    if args.strided:
        for name in ("input", "linear_weight"):
            problem[name] = problem[name].T.contiguous().T
    module = simt.load()
    module.configure(args.seed, True, args.counts)
    module.reset()
    start = time.perf_counter()
    lines, rest = simt.judge(
        problem,
        statistics=args.statistics,
        kept=not args.recompute,
        tf32=args.tf32,
        sms=args.sms,
        l2=args.l2,
        capability=args.capability,
    )
    seconds = time.perf_counter() - start
    plan = rest["plan"]
    form = {True: "latency ", False: "throughput ", None: ""}[plan.get("latency")]
    print(
        f"N {args.n}, C {args.c}, D {args.d}, {args.dtype} features: "
        f"{form}path of {plan['architecture']}, {len(module.reports())} launches, "
        f"{plan['chunks']} chunk(s) of classes, {seconds:.1f} s emulated"
    )
    print(f"{'':14}{'max error':>10}{'allowed':>10}")
    for line in lines:
        verdict = "" if line.error <= line.bound else "  <- off"
        print(f"{line.name:14}{line.error:10.1e}{line.bound:10.1e}{verdict}")
    if args.counts:
        print(f"{'':18}{'mma':>9}{'MB read':>9}{'written':>9}{'barriers':>10}{'conflicts':>10}")
        for r in module.reports():
            name = r.kernel.split("<")[0].split("::")[-1]
            print(
                f"{name:18}{r.mma + r.wgmma:9}{r.global_read_sectors * 32e-6:9.2f}"
                f"{r.global_write_sectors * 32e-6:9.2f}{r.barriers:10}{r.bank_conflicts:10}"
            )
    return all(line.error <= line.bound for line in lines)
