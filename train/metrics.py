"""The figures of result.json: errors, calibration and cosines, from a row for each test image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train import sharded
from tvmf_ext import ShardedTvMFLoss, tvmf_logits

# Training images of a class in each group, as in Liu et al. (OLTR, 2019) and Kang et al. (2020).
GROUPS = {"many": (101, float("inf")), "medium": (20, 100), "few": (0, 19)}
SIZES = {"many": "> 100", "medium": "20..100", "few": "< 20"}
# The figures in percent, each with its heading in tables; train.report shows all of them.
FIGURES = {"error1": "error@1", "adjusted_error1": "adjusted", "error5": "error@5"}
FIGURES |= {name: name for name in GROUPS} | {"macro_f1": "macro-F1", "ece": "ECE"}
COLUMNS = ("loss", "rank", "predicted", "confidence", "target_cosine", "other_cosine")
COLUMNS += ("adjusted_rank", "adjusted_predicted", "norm")
BINS, EDGES = 15, torch.linspace(-1, 1, 51)


def columns(head: nn.Module, features: Tensor, labels: Tensor, prior: Tensor) -> tuple:
    """COLUMNS but the last."""
    logits = head.logits(features).float()
    cosine = tvmf_logits(features, head.weight, kappa=0.0)
    at = labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    # As in both heads, a class that ties with the target is no error, and a NaN is one.
    rank = (~(logits <= logits.gather(1, at))).sum(1)
    confidence, predicted = logits.softmax(1).nan_to_num(0).max(1)
    own = cosine.gather(1, at)[:, 0]
    other = cosine.scatter(1, at, -1.0).amax(1)
    adjusted = logits - prior
    adjusted_rank = (~(adjusted <= adjusted.gather(1, at))).sum(1)
    return loss, rank, predicted, confidence, own, other, adjusted_rank, adjusted.argmax(1)


@torch.no_grad()
def image_rows(head: nn.Module, features: Tensor, labels: Tensor, prior: Tensor) -> Tensor:
    """[B, COLUMNS] float64 for features [B, D] and labels [B]. The adjusted columns come from the
    logits less `prior` [C], the logarithms of the class frequencies: logit adjustment after
    training (Menon et al., ICLR 2021). The norm is that of the feature."""
    of = sharded.columns if isinstance(head, ShardedTvMFLoss) else columns
    found = *of(head, features, labels, prior), features.double().norm(dim=1)
    return torch.stack([column.double() for column in found], 1)


def percent(wrong: Tensor) -> float | None:
    """The share of wrong images in percent; None where there is no image."""
    return 100 * wrong.double().mean().item() if wrong.numel() else None


def error_report(rows: Tensor) -> dict[str, float]:
    """Mean loss, and error@1 and error@5 in percent, of all images."""
    loss, rank = rows[:, 0].mean().item(), rows[:, 1]
    return {"error1": percent(rank >= 1), "error5": percent(rank >= 5), "loss": loss}


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error in percent over 15 bins of equal width (Guo et al., ICML 2017)."""
    bins = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
    gap = torch.zeros(BINS, dtype=torch.float64)
    gap.index_add_(0, bins, confidence - right.double())
    return 100 * gap.abs().sum().item() / len(confidence)


def cosine_report(own: Tensor, other: Tensor, labels: Tensor) -> dict[str, float] | None:
    """The mean cosine of a feature with its own class's weight, the spread of that cosine about
    each class's mean, and the mean cosine with the nearest other class's weight."""
    if not len(own):
        return None
    size = torch.bincount(labels).clamp(min=1)
    mean = torch.bincount(labels, own) / size
    spread = (own - mean[labels]).square().mean().sqrt()
    report = {"target_mean": own.mean(), "target_spread": spread, "other_mean": other.mean()}
    return {name: figure.item() for name, figure in report.items()}


def class_figures(
    rank: Tensor, predicted: Tensor, labels: Tensor, groups: dict[str, Tensor], num_classes: int
) -> dict[str, Any]:
    """Errors, overall and of the images in each of `groups`, macro-F1 over the classes that have
    test images, and each class's accuracy, in percent."""
    right = rank < 1
    tested = torch.bincount(labels, minlength=num_classes)
    hits = torch.bincount(labels[right], minlength=num_classes)
    chosen = torch.bincount(predicted.long(), minlength=num_classes)
    f1 = 200 * hits / (tested + chosen).clamp(min=1)
    accuracy = zip((100 * hits / tested).tolist(), tested.tolist(), strict=True)
    return {
        "error1": percent(~right),
        "error5": percent(rank >= 5),
        **{name: percent(~right[member]) for name, member in groups.items()},
        "macro_f1": f1[tested > 0].mean().item(),
        "class_accuracy": [figure if images else None for figure, images in accuracy],
    }


def histogram(cosine: Tensor) -> list[int]:
    return torch.histogram(cosine.float().clamp(-1, 1), EDGES).hist.int().tolist()


def full_report(rows: Tensor, labels: Tensor, counts: Tensor) -> dict[str, Any]:
    """All of result.json's figures for a model; None where there is no image.

    rows [M, COLUMNS], labels [M] the true classes, counts [C] training images of each class.
    """
    report = error_report(rows)
    _, rank, predicted, confidence, own, other, adjusted_rank, adjusted_predicted, *_ = rows.t()
    size, classes = counts[labels], len(counts)
    groups = {g: (size >= low) & (size <= high) for g, (low, high) in GROUPS.items()}
    adjusted = class_figures(adjusted_rank, adjusted_predicted, labels, groups, classes)
    every = {"overall": torch.ones_like(labels, dtype=torch.bool)} | groups
    return report | {
        **class_figures(rank, predicted, labels, groups, classes),
        "adjusted_error1": adjusted.pop("error1"),
        "adjusted": adjusted,
        "ece": calibration_error(confidence, rank < 1),
        "cosine": {g: cosine_report(own[m], other[m], labels[m]) for g, m in every.items()},
        "cosine_histogram": {
            "edges": EDGES.tolist(),
            "target": {g: histogram(own[m]) for g, m in groups.items()},
            "other": {g: histogram(other[m]) for g, m in groups.items()},
        },
    }
