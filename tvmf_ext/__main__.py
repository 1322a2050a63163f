"""Describes this build and checks it, or reports what a problem would run.

python -m tvmf_ext
python -m tvmf_ext plan 256 8142 2048 --dtype bfloat16 --weight-dtype float32 --gpu H200
"""

import argparse
import os
import sys
from collections.abc import Callable

import torch

from . import __version__, build_info, plan, reference, tvmf_cross_entropy

DTYPES = ("float16", "bfloat16", "float32", "float64")


def largest_errors() -> tuple[float, float]:
    """The largest relative error of the float32 loss and its gradients against float64, of the
    fused function and of eager PyTorch."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(64, 128, generator=generator)
    weight = torch.randn(1000, 128, generator=generator)
    target = torch.randint(1000, (64,), generator=generator)

    def evaluate(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (input, weight)]
        loss = function(*leaves, target, kappa=16.0, scale=16.0)
        return [loss, *torch.autograd.grad(loss, leaves)]

    exact = evaluate(reference.tvmf_cross_entropy, torch.float64)

    def error(function: Callable[..., torch.Tensor]) -> float:
        got = evaluate(function, torch.float32)
        return max(((g - e).norm() / e.norm()).item() for g, e in zip(got, exact, strict=True))

    return error(tvmf_cross_entropy), error(reference.tvmf_cross_entropy)


def print_info(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    print(build_info())
    return 0


def self_check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    print_info(parser, args)
    fused, eager = largest_errors()
    ok = fused <= 2 * eager + 1e-6
    verdict = "ok" if ok else "WRONG"
    print(f"self-check: relative error {fused:.1e}, of eager PyTorch {eager:.1e}: {verdict}")
    return 0 if ok else 1


def print_plan(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    try:
        result = plan(
            args.N,
            args.C,
            args.D,
            dtype=getattr(torch, args.dtype),
            weight_dtype=args.weight_dtype and getattr(torch, args.weight_dtype),
            device=args.gpu,
            allow_tf32=args.tf32,
            backward=not args.forward_only,
        )
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(result)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tvmf_ext",
        description="Without a command: describe this build, and compare a loss and its gradients "
        "with eager PyTorch in float64.",
    )
    parser.add_argument("--version", action="version", version=f"tvmf_ext {__version__}")
    parser.set_defaults(run=self_check, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="{info,plan}")

    what = "describe this build"
    info = commands.add_parser("info", help=what, description=f"{what.capitalize()}.")
    info.set_defaults(run=print_info, parser=info)

    what = "report what a problem would run, and what it costs"
    problem = commands.add_parser("plan", help=what, description=f"{what.capitalize()}.")
    problem.set_defaults(run=print_plan, parser=problem)
    for name, meaning in (("N", "rows"), ("C", "classes"), ("D", "features")):
        problem.add_argument(name, type=int, help=f"number of {meaning}")
    problem.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the features (float32)"
    )
    problem.add_argument(
        "--weight-dtype", choices=DTYPES, help="dtype of the class weights, if it is another"
    )
    problem.add_argument(
        "--gpu",
        help="a GPU's name such as H200, cuda for the one that is here, or cpu; by default a GPU "
        "that is here, or else the CPU",
    )
    problem.add_argument("--tf32", action="store_true", help="float32 products may be TF32")
    problem.add_argument("--forward-only", action="store_true", help="no backward pass follows")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    try:
        code = args.run(args.parser, args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


if __name__ == "__main__":
    sys.exit(main())
