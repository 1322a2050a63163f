"""`python -m tvmf_ext`: what this build is, and one check of it against the reference."""

import sys

import torch

from . import build_info, reference, tvmf_cross_entropy


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


def main() -> int:
    print(build_info())
    fused, eager = self_check()
    ok = fused <= 2 * eager + 1e-6
    verdict = "ok" if ok else "WRONG"
    print(f"self-check: relative error {fused:.1e}, of eager PyTorch {eager:.1e}: {verdict}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
