"""Eager PyTorch, any dtype: the oracle of the tests and the baseline of the benchmark.

Written for plainness, in the order of the paper's formulas; nothing else of the package imports it.
"""

import torch
import torch.nn.functional as F


def tvmf_similarity(cosine, kappa):
    """t-vMF similarity (Kobayashi, CVPR 2021): `(1 + c) / (1 + kappa (1 - c)) - 1`.

    `kappa = 0` gives the cosine back.
    """
    return (1 + cosine) / (1 + kappa * (1 - cosine)) - 1


def tvmf_logits(input, linear_weight, *, kappa=16.0, scale=1.0, linear_bias=None, prior=None):
    """Logits `[N, C]` of features `[N, D]` against class weights `[C, D]`."""
    cosine = F.linear(F.normalize(input, dim=1), F.normalize(linear_weight, dim=1))
    score = tvmf_similarity(cosine, kappa)
    if linear_bias is not None:
        score = score + linear_bias
    logits = scale * score
    return logits if prior is None else logits + prior


def tvmf_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    kappa=16.0,
    scale=1.0,
    linear_bias=None,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    prior=None,
):
    """`tvmf_ext.tvmf_cross_entropy` as a composite of PyTorch's operators."""
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
    input,
    linear_weight,
    target,
    *,
    kappa=16.0,
    scale=1.0,
    linear_bias=None,
    weight=None,
    ignore_index=-100,
    prior=None,
):
    """`(lse, target, sum, rank)` per row, as `tvmf_ext.row_statistics`."""
    logits = tvmf_logits(
        input, linear_weight, kappa=kappa, scale=scale, linear_bias=linear_bias, prior=prior
    )
    score = tvmf_logits(input, linear_weight, kappa=kappa, linear_bias=linear_bias)
    valid = target != ignore_index
    column = torch.where(valid, target, 0)[:, None]
    target_logit = torch.where(valid, logits.gather(1, column)[:, 0], 0)
    omega = torch.ones_like(logits[0]) if weight is None else weight
    rank = (score > score.gather(1, column)).sum(1)
    return logits.logsumexp(1), target_logit, logits @ omega, torch.where(valid, rank, -1)
