"""Functions of the t-vMF head: row statistics, and the losses made of them."""

from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .head import IGNORE_INDEX, SoftplusScale, check_count, make_head

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # the enum Reduction of csrc/problem.h


class RowStatistics(NamedTuple):
    """Per-row statistics of the logits `z`, each `[N]`; every softmax loss is a function of them.

    They leave the target out of the other classes, so that a small loss keeps all of its digits:
    it is `softplus(others - target)`. An ignored row has no target, and `others` and `sum` are
    those of all classes. All but `rank` are float32 (float64 for float64 features) and
    differentiable.
    """

    others: Tensor
    """`log sum_{c != y} exp z_nc`; -inf where there is no other class, and with Hopper's kernels
    also where all others are more than 87 below the target, whose loss is then under 1e-37"""
    cosine: Tensor
    """the cosine of feature and target class, before its margins; 0 for an ignored row"""
    target: Tensor
    """`z'`, the target's logit, made of `cosine` with the margins; 0 for an ignored row"""
    sum: Tensor
    """`sum_{c != y} weight_c z_nc` with the class weights"""
    rank: Tensor
    """int64: the number of classes whose `phi + bias` is above the target's before its margins; -1
    for an ignored row. The target is not among the best k classes where `rank >= k`; see
    `error_at`."""

    @property
    def lse(self) -> Tensor:
        """`log sum_c exp z_nc` over all classes, with the target's logit `z'`"""
        return torch.where(self.rank < 0, self.others, torch.logaddexp(self.others, self.target))


def check_loss_options(reduction: str, label_smoothing: float) -> None:
    if not isinstance(label_smoothing, (int, float, Real)):
        raise TypeError(f"label_smoothing must be a number, got {type(label_smoothing).__name__}")
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def explained(error: RuntimeError) -> RuntimeError:
    """Names the way out where torch says that torch.func or forward mode is not implemented."""
    unsupported = "setup_context" in str(error) or "jvp" in str(error)
    return NotImplementedError(ops.ONCE) if unsupported else error


# (1 - c)(1 + c) = sin^2 theta below which the square root of the angular margin becomes a straight
# line, as in csrc/loss.h.
_SMALLEST_SQUARED_SINE = 1e-12


def _with_margins(
    cosine: Tensor, cosine_margin: float | Tensor, angular_margin: float | Tensor
) -> Tensor:
    """`cos(theta + angular_margin) - cosine_margin`, with the rules of csrc/loss.h."""
    if isinstance(angular_margin, Tensor) or angular_margin != 0:
        a = torch.as_tensor(angular_margin, dtype=cosine.dtype, device=cosine.device)
        cos_a, sin_a = a.cos(), a.sin()
        squared = (1 - cosine) * (1 + cosine)
        line = (squared + _SMALLEST_SQUARED_SINE) / (2 * _SMALLEST_SQUARED_SINE**0.5)
        root = squared.clamp_min(_SMALLEST_SQUARED_SINE).sqrt()
        sine = torch.where(squared < _SMALLEST_SQUARED_SINE, line, root)
        moved = cosine * cos_a - sine * sin_a
        moved = torch.where(cosine < -cos_a, -2 - moved, moved)
        cosine = torch.where(a == 0, cosine, moved)
    return cosine - cosine_margin


def target_logits(head: ops.Head, cosine: Tensor) -> Tensor:
    """`z'` of each row, made of its target's cosine: 0 for an ignored row or, in a shard, for the
    class of another, and NaN, without a gradient, for a label that names no class."""
    target, dtype = head.target, cosine.dtype
    ignored = target == head.ignore_index
    valid = (target >= 0) & (target < head.weight.shape[0]) & ~ignored
    column = torch.where(valid, target, 0)

    def of_target(values: Tensor | None, otherwise: float) -> float | Tensor:
        if values is None:
            return otherwise
        values = values.to(dtype)
        return values[column] if values.dim() == 1 and values.shape[0] > 1 else values.reshape(())

    scale = of_target(head.scale, head.scale_value)
    if isinstance(scale, Tensor) and head.softplus_scale:
        scale = F.softplus(scale) + 1
    kappa = of_target(head.kappa, head.kappa_value)
    moved = _with_margins(
        torch.where(valid, cosine, 0),
        of_target(head.cosine_margin, head.cosine_margin_value),
        of_target(head.angular_margin, head.angular_margin_value),
    )
    gap = 1 - moved
    score = (moved - kappa * gap) / (1 + kappa * gap) + of_target(head.bias, 0.0)
    logit = scale * score + of_target(head.prior, 0.0)
    without = ignored if head.target_score is None else torch.ones_like(ignored)
    return torch.where(valid, logit, torch.where(without, 0.0, torch.nan).to(dtype))


def in_compute_dtype(value: Any, input: Any) -> Any:
    if isinstance(value, SoftplusScale):
        return SoftplusScale(in_compute_dtype(value.s, input))
    if isinstance(value, Tensor) and isinstance(input, Tensor) and value.dtype in ops.DTYPES:
        return value.to(ops.compute_dtype(input.dtype))
    return value


def row_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    kappa: float | Tensor = 16.0,
    scale: float | Tensor | SoftplusScale = 1.0,
    cosine_margin: float | Tensor = 0.0,
    angular_margin: float | Tensor = 0.0,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    prior: Tensor | None = None,
) -> RowStatistics:
    """Row statistics of the logits `z_nc = scale (phi(x_n, w_c; kappa_c) + bias_c) + prior_c`.

    The arguments are those of `tvmf_cross_entropy`, and no `[N, C]` tensor is made. A loss is made
    of the result with `loss_of_statistics` or a few lines of PyTorch, for example with a
    z-loss `1e-4 * (statistics.lse ** 2).mean()`.
    """
    # The operator and the target's logit each have a part of these gradients. The parts are added
    # before they are rounded to the dtype of the parameter.
    head, kept = make_head(
        input,
        linear_weight,
        target,
        in_compute_dtype(kappa, input),
        in_compute_dtype(scale, input),
        in_compute_dtype(linear_bias, input),
        prior,
        weight,
        ignore_index,
        cosine_margin,
        angular_margin,
    )
    try:
        others, cosine, total, rank = ops.row_statistics(*head, True, kept)
    except RuntimeError as error:
        raise explained(error) from None
    return RowStatistics(others, cosine, target_logits(head, cosine), total, rank)


def tvmf_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    kappa: float | Tensor = 16.0,
    scale: float | Tensor | SoftplusScale = 1.0,
    cosine_margin: float | Tensor = 0.0,
    angular_margin: float | Tensor = 0.0,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    prior: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy over t-vMF similarities (Kobayashi, CVPR 2021), without the logits.

    With the cosine `c` of feature and class weight, `phi = (1 + c) / (1 + kappa (1 - c)) - 1`, the
    logit is `scale (phi + bias) + prior`, and the rest is `torch.nn.functional.cross_entropy`. The
    target's cosine first takes the margins: `cos(theta + angular_margin) - cosine_margin`.

    The loss and its gradients keep their digits however small the loss is, where `lse - target`
    would lose all of them.

    Args:
        input: the features `[N, D]` in float16, bfloat16, float32 or float64, with any strides.
        linear_weight: the class vectors `[C, D]`. Their dtype may differ from the features'.
        target: the class indices `[N]`, int64.
        kappa: the concentration, above -1/2: a float, or a tensor `[]`, `[1]` or `[C]`. With 0 the
            similarity is the cosine.
        scale: above 0: a float, a tensor `[]` or `[1]`, or the `SoftplusScale` of such a tensor.
        cosine_margin: at least 0, subtracted from the target's cosine (CosFace; `[C]`: LDAM): a
            float, or a tensor `[]`, `[1]` or `[C]`. It has no gradient.
        angular_margin: in [0, pi], added to the angle of the target's cosine (ArcFace), likewise.
            Where the angle passes pi the cosine is continued by `-2 - cos`, so that it keeps
            falling. With margins kappa must be above `-1 / (3 - cos a + m)`.
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
    if ops.is_compiling() and label_smoothing > 0:
        # The operator would take the number for a constant of the compiled code.
        statistics = row_statistics(
            input,
            linear_weight,
            target,
            kappa=kappa,
            scale=scale,
            cosine_margin=cosine_margin,
            angular_margin=angular_margin,
            linear_bias=linear_bias,
            weight=weight,
            ignore_index=ignore_index,
            prior=prior,
        )
        return loss_of_statistics(
            statistics,
            target,
            num_classes=linear_weight.shape[0],
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    head, kept = make_head(
        input,
        linear_weight,
        target,
        kappa,
        scale,
        linear_bias,
        prior,
        weight,
        ignore_index,
        cosine_margin,
        angular_margin,
    )
    try:
        return ops.cross_entropy(*head, float(label_smoothing), _REDUCTIONS[reduction], kept)
    except RuntimeError as error:
        raise explained(error) from None


def check_targets(device: torch.device | str | int | None = None) -> None:
    """Raises if an earlier call on a CUDA device had a target that names no class.

    A call on CUDA does not wait for the device, so that the next call raises for a bad target. The
    replay of a CUDA graph is no call. After replays, ask here, for example once an epoch.

    On the CPU, where each call has raised for its own targets, there is nothing to ask.

    Args:
        device: the device, by default the current CUDA device if there is one. The function waits
            for its work.

    Raises:
        IndexError: a target was outside [0, C) and not ignore_index. Later calls do not raise for
            it again.
    """
    if device is None and not torch.cuda.is_available():
        return
    given = torch.device("cuda" if device is None else device)
    if given.type == "cpu":
        return
    if not (ops.HAS_CUDA and torch.cuda.is_available() and given.type == "cuda"):
        raise NotImplementedError(
            f"check_targets needs a build with CUDA kernels and a GPU that it can use, got {given}"
        )
    torch.cuda.synchronize(given)
    index = torch.cuda.current_device() if given.index is None else given.index
    torch.ops.tvmf_ext.check_targets(index)


def row_losses(
    statistics: RowStatistics,
    valid: Tensor,
    row_weight: Tensor,
    total_weight: float | Tensor,
    label_smoothing: float,
    smooth: float,
) -> Tensor:
    """The loss of each row, `[N]`, and 0 where it is not `valid`.

    `row_weight` is the class weight of its target, `total_weight` the sum of all class weights, and
    `smooth` is `label_smoothing / C`.
    """
    # The statistics of an ignored row may be NaN, which must not reach the sum.
    others = torch.where(valid, statistics.others, 0)
    target_logit = torch.where(valid, statistics.target, 0)
    # Above its threshold F.softplus returns its argument.
    softplus = F.softplus(others - target_logit, threshold=40)
    loss = (1 - label_smoothing) * row_weight * softplus
    if label_smoothing > 0:
        lse, total = torch.logaddexp(others, target_logit), torch.where(valid, statistics.sum, 0)
        of_all = lse * total_weight - total - row_weight * target_logit
        loss = loss + smooth * torch.where(valid, of_all, 0)
    return loss


def loss_of_statistics(
    statistics: RowStatistics,
    target: Tensor,
    *,
    num_classes: int | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of `tvmf_cross_entropy`, made of row statistics; `[]`, or `[N]` for `"none"`.

    `target`, `weight` and `ignore_index` must be those that the statistics were made with.
    `num_classes` is needed for label smoothing without class weights.
    """
    check_loss_options(reduction, label_smoothing)
    classes = num_classes if weight is None else weight.shape[0]
    if label_smoothing > 0 and classes is None:
        raise ValueError("num_classes must be given for label smoothing, got None")
    valid = target != (IGNORE_INDEX if ignore_index is None else ignore_index)
    row_weight = valid.to(statistics.others.dtype)
    total_weight: float | Tensor = classes or 0
    if weight is not None:
        # A label that names no class has a loss of NaN already, and must not be looked up.
        named = valid & (target >= 0) & (target < weight.shape[0])
        row_weight = row_weight * weight.to(row_weight.dtype)[torch.where(named, target, 0)]
        total_weight = weight.sum().to(row_weight.dtype)
    smooth = label_smoothing / (classes or 1)
    loss = row_losses(statistics, valid, row_weight, total_weight, label_smoothing, smooth)
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
        TypeError, ValueError: k is no int, or below 1.
    """
    check_count("k", k)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    rank = statistics.rank
    return (rank >= k).sum() / (rank >= 0).sum()
