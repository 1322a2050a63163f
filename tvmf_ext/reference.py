"""The same functions in eager PyTorch: the oracle of the tests and the baseline of the benchmark.

They take any dtype and follow the formulas of docs/design.md. Nothing of the package is imported
here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this value of sin^2 theta the angular margin's square root becomes a straight line, so that
# its derivative stays finite where feature and weight are parallel.
_SMALLEST_SQUARED_SINE = 1e-12


def tvmf_similarity(cosine: Tensor, kappa: float | Tensor) -> Tensor:
    """The t-vMF similarity (Kobayashi, CVPR 2021): `(1 + c) / (1 + kappa (1 - c)) - 1`.

    It is written so that `kappa = 0` gives exactly the cosine.
    """
    gap = 1 - cosine
    return (cosine - kappa * gap) / (1 + kappa * gap)


def margin_cosine(
    cosine: Tensor, cosine_margin: float | Tensor = 0.0, angular_margin: float | Tensor = 0.0
) -> Tensor:
    """The target's cosine with its margins: `cos(theta + angular_margin) - cosine_margin`.

    Beyond `theta + angular_margin = pi` the cosine would rise again; `-2 - cos(...)` continues it.
    """
    if isinstance(angular_margin, Tensor) or angular_margin != 0:
        a = torch.as_tensor(angular_margin, dtype=cosine.dtype, device=cosine.device)
        squared = (1 - cosine) * (1 + cosine)
        smallest = _SMALLEST_SQUARED_SINE
        sine = torch.where(
            squared < smallest,
            (squared + smallest) / (2 * smallest**0.5),
            squared.clamp_min(smallest).sqrt(),
        )
        moved = cosine * a.cos() - sine * a.sin()
        moved = torch.where(cosine < -a.cos(), -2 - moved, moved)
        cosine = torch.where(a == 0, cosine, moved)
    return cosine - cosine_margin


def tvmf_logits(
    input: Tensor,
    linear_weight: Tensor,
    *,
    kappa: float | Tensor = 16.0,
    scale: float | Tensor = 1.0,
    linear_bias: Tensor | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """The logits `[N, C]` of features `[N, D]` and class vectors `[C, D]`."""
    cosine = F.linear(F.normalize(input, dim=1), F.normalize(linear_weight, dim=1))
    return _logits(cosine, kappa, scale, linear_bias, prior)


def _logits(
    cosine: Tensor,
    kappa: float | Tensor,
    scale: float | Tensor,
    linear_bias: Tensor | None,
    prior: Tensor | None,
) -> Tensor:
    score = tvmf_similarity(cosine, kappa)
    if linear_bias is not None:
        score = score + linear_bias
    logits = scale * score
    return logits if prior is None else logits + prior


class RowStatistics(NamedTuple):
    """The row statistics of `tvmf_ext.row_statistics`, each `[N]`."""

    others: Tensor
    cosine: Tensor
    target: Tensor
    sum: Tensor
    rank: Tensor

    @property
    def lse(self) -> Tensor:
        """`log sum_c exp z_nc` over all classes."""
        return torch.where(self.rank < 0, self.others, torch.logaddexp(self.others, self.target))


def _log_sum_exp(logits: Tensor) -> Tensor:
    """`logsumexp` over the classes, whose gradient is 0 where all logits are -inf."""
    largest = logits.detach().amax(1, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0, largest)
    total = (logits - largest).exp().sum(1)
    none = total == 0
    log = torch.where(none, 1, total).log() + largest[:, 0]
    return torch.where(none, -torch.inf, log)


def row_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    kappa: float | Tensor = 16.0,
    scale: float | Tensor = 1.0,
    cosine_margin: float | Tensor = 0.0,
    angular_margin: float | Tensor = 0.0,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    prior: Tensor | None = None,
) -> RowStatistics:
    """`(others, cosine, target, sum, rank)` of each row, as in `tvmf_ext.row_statistics`."""
    cosine = F.linear(F.normalize(input, dim=1), F.normalize(linear_weight, dim=1))
    valid = target != ignore_index
    column = torch.where(valid, target, 0)[:, None]
    is_target = torch.zeros_like(cosine, dtype=torch.bool).scatter(1, column, valid[:, None])

    # The margins move the target's cosine alone, and then all cosines become logits alike.
    own = cosine.gather(1, column)
    m, a = (
        margin[column] if isinstance(margin, Tensor) and margin.numel() > 1 else margin
        for margin in (cosine_margin, angular_margin)
    )
    moved = torch.where(is_target, margin_cosine(own, m, a), cosine)
    logits = _logits(moved, kappa, scale, linear_bias, prior)
    target_logit = torch.where(valid, logits.gather(1, column)[:, 0], 0)
    others = _log_sum_exp(logits.masked_fill(is_target, -torch.inf))
    class_weight = torch.ones_like(logits[0]) if weight is None else weight
    total = torch.where(is_target, 0, class_weight * logits).sum(1)

    score = _logits(cosine, kappa, 1, linear_bias, None)
    above = (score > score.gather(1, column)).masked_fill(is_target, False)
    rank = torch.where(valid, above.sum(1), -1)
    return RowStatistics(others, torch.where(valid, own[:, 0], 0), target_logit, total, rank)


def loss_of_statistics(
    statistics: RowStatistics,
    target: Tensor,
    *,
    num_classes: int,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of `tvmf_ext.loss_of_statistics`.

    `softplus(others - target)` equals `lse - target`, which would lose every digit of a small loss.
    """
    valid = target != ignore_index
    # The statistics of an ignored row may be NaN, which must not reach the sum or a gradient.
    others, target_logit, total, lse = (
        torch.where(valid, t, 0)
        for t in (statistics.others, statistics.target, statistics.sum, statistics.lse)
    )
    class_weight = torch.ones(num_classes).to(others) if weight is None else weight
    row_weight = class_weight[torch.where(valid, target, 0)] * valid
    # Above its threshold F.softplus returns its argument.
    softplus = F.softplus(others - target_logit, threshold=40)
    loss = (1 - label_smoothing) * row_weight * softplus
    if label_smoothing > 0:
        smooth = lse * class_weight.sum() - total - row_weight * target_logit
        loss = loss + label_smoothing / num_classes * torch.where(valid, smooth, 0)
    if reduction == "none":
        return loss
    return loss.sum() / row_weight.sum() if reduction == "mean" else loss.sum()


def tvmf_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    kappa: float | Tensor = 16.0,
    scale: float | Tensor = 1.0,
    cosine_margin: float | Tensor = 0.0,
    angular_margin: float | Tensor = 0.0,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    prior: Tensor | None = None,
) -> Tensor:
    """The loss of `tvmf_ext.tvmf_cross_entropy`, made of PyTorch's operators."""
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
        num_classes=len(linear_weight),
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
