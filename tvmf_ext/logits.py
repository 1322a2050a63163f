"""Logits of the t-vMF head, and the largest ones of each row."""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .head import SoftplusScale, check_count, check_tensor, number


def _check_logits(
    input: Tensor,
    linear_weight: Tensor,
    kappa: float | Tensor,
    scale: float | Tensor,
    linear_bias: Tensor | None,
    prior: Tensor | None,
) -> None:
    for name, matrix, shape in (
        ("input", input, "[N, D]"),
        ("linear_weight", linear_weight, "[C, D]"),
    ):
        check_tensor(name, matrix)
        if matrix.dim() != 2:
            raise ValueError(f"{name} must have shape {shape}, got {list(matrix.shape)}")
        if matrix.dtype not in ops.DTYPES:
            raise ValueError(
                f"{name} must be float16, bfloat16, float32 or float64, got {matrix.dtype}"
            )
    if input.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            "input [N, D] and linear_weight [C, D] must agree in D, got "
            f"{list(input.shape)} and {list(linear_weight.shape)}"
        )
    C = linear_weight.shape[0]
    shapes: tuple[tuple[str, Any, tuple[tuple[int, ...], ...]], ...] = (
        ("kappa", kappa, ((), (1,), (C,))),
        ("scale", scale, ((), (1,))),
        ("linear_bias", linear_bias, ((C,),)),
        ("prior", prior, ((C,),)),
    )
    for name, value, allowed in shapes:
        if isinstance(value, Tensor) and tuple(value.shape) not in allowed:
            wanted = " or ".join(str(list(shape)) for shape in allowed)
            raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}")
    for name, optional in (("linear_bias", linear_bias), ("prior", prior)):
        if optional is not None:
            check_tensor(name, optional)
    if not isinstance(kappa, Tensor) and not -0.5 < number("kappa", kappa) < math.inf:
        raise ValueError(f"kappa must be finite and > -1/2, got {kappa}")
    if not isinstance(scale, Tensor) and not 0 < number("scale", scale) < math.inf:
        raise ValueError(f"scale must be finite and > 0, got {scale}")


def tvmf_logits(
    input: Tensor,
    linear_weight: Tensor,
    *,
    kappa: float | Tensor = 16.0,
    scale: float | Tensor | SoftplusScale = 1.0,
    linear_bias: Tensor | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """The logits `[N, C]`, for inference, in float32 (float64 for float64 features).

    The arguments are those of `tvmf_cross_entropy`. PyTorch's operators make the logits, with their
    gradients. The cosine is never rounded below float32, because `kappa` would multiply its error.
    """
    check_tensor("input", input)
    dtype = ops.compute_dtype(input.dtype)
    if isinstance(scale, SoftplusScale):
        scale = scale.value(dtype)  # the kernels do not compute it in a shorter dtype either
    _check_logits(input, linear_weight, kappa, scale, linear_bias, prior)
    known = input.is_cpu or input.is_cuda  # other devices may not know of autocast
    with torch.autocast(input.device.type, enabled=False) if known else nullcontext():
        unit_input = F.normalize(input.to(dtype), dim=1)
        unit_weight = F.normalize(linear_weight.to(dtype), dim=1)
        kappa = kappa.to(dtype) if isinstance(kappa, Tensor) else kappa
        scale = scale.to(dtype) if isinstance(scale, Tensor) else scale
        cosine = F.linear(unit_input, unit_weight).clamp(-1, 1)
        gap = 1 - cosine
        score = (cosine - kappa * gap) / (1 + kappa * gap)
        if linear_bias is not None:
            score = score + linear_bias.to(dtype)
        logits = scale * score
        return logits if prior is None else logits + prior.to(dtype)


# A block of classes that `topk` makes logits of has at most so many logits.
_TOPK_BLOCK = 1 << 22


def topk(
    input: Tensor,
    linear_weight: Tensor,
    k: int,
    *,
    kappa: float | Tensor = 16.0,
    scale: float | Tensor | SoftplusScale = 1.0,
    linear_bias: Tensor | None = None,
    prior: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their classes, without the logits `[N, C]`.

    The logits are those of `tvmf_logits`, made for a block of classes at a time. The other
    arguments are those of `tvmf_cross_entropy`. No gradients are made.

    Args:
        k: how many classes, from 1 to C.

    Returns:
        The logits `[N, k]`, the largest first, in float32 (float64 for float64 features), and the
        classes `[N, k]`, int64.

    Raises:
        TypeError, ValueError: as `tvmf_logits`, or k is out of range.
    """
    check_tensor("input", input)
    if isinstance(scale, SoftplusScale):
        scale = scale.value(ops.compute_dtype(input.dtype))
    _check_logits(input, linear_weight, kappa, scale, linear_bias, prior)
    check_count("k", k)
    C = linear_weight.shape[0]
    if not 1 <= k <= C:
        raise ValueError(f"k must be from 1 to C = {C}, got {k}")

    def of_block(values: Any, block: slice) -> Any:
        per_class = isinstance(values, Tensor) and values.dim() == 1 and len(values) == C > 1
        return values[block] if per_class else values

    step = max(k, _TOPK_BLOCK // max(len(input), 1))
    best: tuple[Tensor, Tensor] | None = None
    with torch.no_grad():
        for begin in range(0, C, step):
            block = slice(begin, begin + step)
            logits = tvmf_logits(
                input,
                linear_weight[block],
                kappa=of_block(kappa, block),
                scale=scale,
                linear_bias=of_block(linear_bias, block),
                prior=of_block(prior, block),
            )
            values, classes = logits.topk(min(k, logits.shape[1]), dim=1)
            classes = classes + begin
            if best is not None:
                values = torch.cat([best[0], values], dim=1)
                values, order = values.topk(k, dim=1)
                classes = torch.cat([best[1], classes], dim=1).gather(1, order)
            best = values, classes
    assert best is not None
    return best
