"""The same functions in eager PyTorch: the oracle of the tests and the baseline of the benchmark.

They take any dtype and follow the formulas of the paper. Nothing of the package is imported here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def tvmf_similarity(cosine: Tensor, kappa: float | Tensor) -> Tensor:
    """The t-vMF similarity (Kobayashi, CVPR 2021): `(1 + c) / (1 + kappa (1 - c)) - 1`.

    With `kappa = 0` it is the cosine.
    """
    return (1 + cosine) / (1 + kappa * (1 - cosine)) - 1


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
    score = tvmf_similarity(cosine, kappa)
    if linear_bias is not None:
        score = score + linear_bias
    logits = scale * score
    return logits if prior is None else logits + prior


def tvmf_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    kappa: float | Tensor = 16.0,
    scale: float | Tensor = 1.0,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    prior: Tensor | None = None,
) -> Tensor:
    """The loss of `tvmf_ext.tvmf_cross_entropy`, made of PyTorch's operators."""
    logits = tvmf_logits(
        input, linear_weight, kappa=kappa, scale=scale, linear_bias=linear_bias, prior=prior
    )
    return F.cross_entropy(
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def row_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    kappa: float | Tensor = 16.0,
    scale: float | Tensor = 1.0,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    prior: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(lse, target, sum, rank)` of each row, as in `tvmf_ext.row_statistics`."""
    logits = tvmf_logits(
        input, linear_weight, kappa=kappa, scale=scale, linear_bias=linear_bias, prior=prior
    )
    score = tvmf_logits(input, linear_weight, kappa=kappa, linear_bias=linear_bias)
    valid = target != ignore_index
    column = torch.where(valid, target, 0)[:, None]
    target_logit = torch.where(valid, logits.gather(1, column)[:, 0], 0)
    class_weight = torch.ones_like(logits[0]) if weight is None else weight
    rank = (score > score.gather(1, column)).sum(1)
    rank = torch.where(valid, rank, -1)
    return logits.logsumexp(1), target_logit, logits @ class_weight, rank
