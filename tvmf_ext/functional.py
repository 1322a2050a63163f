"""Functions of the t-vMF head: row statistics, the losses made of them, and logits."""

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .head import IGNORE_INDEX, SoftplusScale, check_tensor, make_head, number

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # the enum Reduction of csrc/problem.h


class RowStatistics(NamedTuple):
    """Per-row statistics of the logits `z`, each `[N]`; every softmax loss is a function of them.

    `lse`, `target` and `sum` are float32 (float64 for float64 features) and differentiable.
    """

    lse: Tensor
    """`log sum_c exp z_nc`"""
    target: Tensor
    """`z_{n, y_n}`; 0 for an ignored row"""
    sum: Tensor
    """`sum_c weight_c z_nc` with the class weights"""
    rank: Tensor
    """int64: the number of classes whose `phi + bias` is above the target's; -1 for an ignored row.
    The target is not among the best k classes where `rank >= k`; see `error_at`."""


def check_loss_options(reduction: str, label_smoothing: float) -> None:
    if not isinstance(label_smoothing, (int, float, Real)):
        raise TypeError(f"label_smoothing must be a number, got {type(label_smoothing).__name__}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def _explained(error: RuntimeError) -> RuntimeError:
    """Names the way out where torch says that torch.func or forward mode is not implemented."""
    unsupported = "setup_context" in str(error) or "jvp" in str(error)
    return NotImplementedError(ops.ONCE) if unsupported else error


def row_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    kappa: float | Tensor = 16.0,
    scale: float | Tensor | SoftplusScale = 1.0,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    prior: Tensor | None = None,
) -> RowStatistics:
    """Row statistics of the logits `z_nc = scale (phi(x_n, w_c; kappa_c) + bias_c) + prior_c`.

    The arguments are those of `tvmf_cross_entropy`, and no `[N, C]` tensor is made. A loss is made
    of the result with `cross_entropy_from_statistics` or a few lines of PyTorch, for example with a
    z-loss `1e-4 * (statistics.lse ** 2).mean()`.
    """
    head, kept = make_head(
        input, linear_weight, target, kappa, scale, linear_bias, prior, weight, ignore_index
    )
    try:
        return RowStatistics(*ops.row_statistics(*head, True, kept))
    except RuntimeError as error:
        raise _explained(error) from None


def tvmf_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    kappa: float | Tensor = 16.0,
    scale: float | Tensor | SoftplusScale = 1.0,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    prior: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy over t-vMF similarities (Kobayashi, CVPR 2021), without the logits.

    With the cosine `c` of feature and class weight, `phi = (1 + c) / (1 + kappa (1 - c)) - 1`, the
    logit is `scale (phi + bias) + prior`, and the rest is `torch.nn.functional.cross_entropy`.

    Args:
        input: the features `[N, D]` in float16, bfloat16, float32 or float64, with any strides.
        linear_weight: the class vectors `[C, D]`. Their dtype may differ from the features'.
        target: the class indices `[N]`, int64.
        kappa: the concentration, above -1/2: a float, or a tensor `[]`, `[1]` or `[C]`. With 0 the
            similarity is the cosine.
        scale: above 0: a float, a tensor `[]` or `[1]`, or the `SoftplusScale` of such a tensor.
        linear_bias: `[C]`; it is added to the similarity, inside the scale.
        weight: the class weights of the loss, `[C]`. They have no gradient.
        ignore_index: a row with this target adds nothing to the loss or to a gradient. None is
            -100.
        reduction: `"mean"` (weighted by the class weights of the rows that are not ignored),
            `"sum"` or `"none"`.
        label_smoothing: a number in [0, 1].
        prior: `[C]`; it is added to the logit, outside the scale, and has no gradient. The
            logarithms of class frequencies give logit adjustment (Menon et al., ICLR 2021) or
            balanced softmax.

    Returns:
        The loss, `[]`, or `[N]` for `"none"`, in float32 (float64 for float64 features). Input,
        linear_weight, kappa, scale and linear_bias have gradients, each in its own dtype. Under
        autocast float32 features are rounded to its dtype, as for `torch.nn.Linear`.

    Raises:
        TypeError: an argument is of another type than the above.
        ValueError: a shape, dtype, device or value is not one of the above.
        IndexError: a target is outside [0, C) and is not ignore_index. On CUDA, where no call waits
            for the device, the loss of that row is NaN, and a later call on the device raises.
        NotImplementedError: a tensor is on a device for which there are no kernels.

    On CUDA the values of tensors, such as a `kappa` below -1/2, are not checked, and float32
    products are rounded to TF32 if `torch.backends.cuda.matmul.fp32_precision` is `"tf32"`.
    """
    check_loss_options(reduction, label_smoothing)
    head, kept = make_head(
        input, linear_weight, target, kappa, scale, linear_bias, prior, weight, ignore_index
    )
    try:
        return ops.cross_entropy(*head, float(label_smoothing), _REDUCTIONS[reduction], kept)
    except RuntimeError as error:
        raise _explained(error) from None


def cross_entropy_from_statistics(
    statistics: RowStatistics,
    target: Tensor,
    *,
    num_classes: int,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of `tvmf_cross_entropy`, made of row statistics; `[]`, or `[N]` for `"none"`.

    `target`, `weight` and `ignore_index` must be those that the statistics were made with. `lse -
    target` is a difference of rounded numbers, so that a loss that is much smaller than `lse` is
    exact only from `tvmf_cross_entropy`.
    """
    check_loss_options(reduction, label_smoothing)
    valid = target != (IGNORE_INDEX if ignore_index is None else ignore_index)
    # The statistics of an ignored row may be NaN, which must not reach the sum.
    lse, target_logit, total = (torch.where(valid, t, 0) for t in statistics[:3])
    row_weight = valid.to(lse.dtype)
    total_weight: float | Tensor = num_classes
    if weight is not None:
        row_weight = row_weight * weight.to(lse.dtype)[torch.where(valid, target, 0)]
        total_weight = weight.sum().to(lse.dtype)
    loss = (1 - label_smoothing) * row_weight * (lse - target_logit)
    if label_smoothing > 0:
        smooth = lse * total_weight - total
        loss = loss + label_smoothing / num_classes * torch.where(valid, smooth, 0)
    if reduction == "none":
        return loss
    return loss.sum() / row_weight.sum() if reduction == "mean" else loss.sum()


def error_at(statistics: RowStatistics, k: int = 1) -> Tensor:
    """The share of the rows whose target is not among the k classes with the largest logits.

    Args:
        statistics: of `row_statistics`. Ignored rows count as nothing.
        k: how many classes count as right, at least 1.

    Returns:
        A float32 tensor `[]` in [0, 1]; NaN where all rows are ignored.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    rank = statistics.rank
    return (rank >= k).sum() / (rank >= 0).sum()


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
    with torch.autocast(input.device.type, enabled=False):
        unit_input = F.normalize(input.to(dtype), dim=1)
        unit_weight = F.normalize(linear_weight.to(dtype), dim=1)
        kappa = kappa.to(dtype) if isinstance(kappa, Tensor) else kappa
        scale = scale.to(dtype) if isinstance(scale, Tensor) else scale
        gap = 1 - F.linear(unit_input, unit_weight).clamp(-1, 1)
        score = (1 - gap * (1 + kappa)) / (1 + kappa * gap)
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
