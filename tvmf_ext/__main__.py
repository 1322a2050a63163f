"""What this build is, and one check of it against the reference; or, with `plan`, what a problem
would run.

    python -m tvmf_ext
    python -m tvmf_ext plan 256 8142 2048 --dtype bfloat16 --weight-dtype float32 --gpu H200
"""

import argparse
import sys

import torch

from . import build_info, plan, reference, tvmf_cross_entropy

DTYPES = ("float16", "bfloat16", "float32", "float64")


def self_check() -> tuple[float, float]:
    """Largest relative error of float32 loss and gradients against float64: fused, and eager."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(64, 128, generator=generator)
    weight = torch.randn(1000, 128, generator=generator)
    target = torch.randint(1000, (64,), generator=generator)

    def evaluate(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (input, weight)]
        loss = function(*leaves, target, kappa=16.0, scale=16.0)
        return loss, *torch.autograd.grad(loss, leaves)

    exact = evaluate(reference.tvmf_cross_entropy, torch.float64)

    def error(function):
        got = evaluate(function, torch.float32)
        return max(((g - e).norm() / e.norm()).item() for g, e in zip(got, exact, strict=True))

    return error(tvmf_cross_entropy), error(reference.tvmf_cross_entropy)


def print_plan(arguments) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tvmf_ext plan", description="What a problem would run, and what it costs."
    )
    for name, what in (("N", "rows"), ("C", "classes"), ("D", "features")):
        parser.add_argument(name, type=int, help=what)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the features")
    parser.add_argument("--weight-dtype", choices=DTYPES, help="of the class weights")
    parser.add_argument("--gpu", help="its name, such as H200; cpu; cuda for the one that is here")
    parser.add_argument("--tf32", action="store_true", help="float32 products may be TF32")
    parser.add_argument("--forward-only", action="store_true")
    args = parser.parse_args(arguments)
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


def main() -> int:
    if sys.argv[1:2] == ["plan"]:
        return print_plan(sys.argv[2:])
    print(build_info())
    fused, eager = self_check()
    ok = fused <= 2 * eager + 1e-6
    verdict = "ok" if ok else "WRONG"
    print(f"self-check: relative error {fused:.1e}, of eager PyTorch {eager:.1e}: {verdict}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
