"""What is told of a model, from one row a test image: errors, calibration, cosines."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import TrainError
from tvmf_ext import tvmf_logits

# Training images of a class, as in Liu et al. (OLTR, 2019) and Kang et al. (2020).
GROUPS = {"many": (101, float("inf")), "medium": (20, 100), "few": (0, 19)}
COLUMNS = ("known", "loss", "rank", "predicted", "confidence", "target_cosine", "other_cosine")
BINS, EDGES = 15, torch.linspace(-1, 1, 51)


@torch.no_grad()
def image_rows(head: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    """[B, COLUMNS] float64 for features [B, D] and labels [B]; zeros where the label is < 0."""
    logits = head.logits(features).float()
    cosine = tvmf_logits(features, head.weight, kappa=0.0)
    at = labels.clamp(min=0)[:, None]
    loss = F.cross_entropy(logits, at[:, 0], reduction="none")
    # As the heads count: a class that ties with the target is no error, NaN is one.
    rank = (~(logits <= logits.gather(1, at))).sum(1)
    confidence, predicted = logits.softmax(1).nan_to_num(0).max(1)
    own = cosine.gather(1, at)[:, 0]
    other = cosine.scatter(1, at, -1.0).amax(1)
    columns = (torch.ones_like(loss), loss, rank, predicted, confidence, own, other)
    rows = torch.stack([c.double() for c in columns], 1)
    return torch.where((labels >= 0)[:, None], rows, 0)


def percent(wrong: Tensor) -> float | None:
    return 100 * wrong.double().mean().item() if wrong.numel() else None


def error_report(rows: Tensor) -> dict[str, float]:
    """Loss and error@1, error@5 in percent, of rows that are known."""
    known = rows[:, 0] > 0
    if not known.any():
        raise TrainError("--data: got no image for evaluation that can be read, wanted one or more")
    rank = rows[known, 2]
    loss = rows[known, 1].mean().item()
    return {"error1": percent(rank >= 1), "error5": percent(rank >= 5), "loss": loss}


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error in percent over 15 bins of equal width (Guo et al., ICML 2017)."""
    bins = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
    gap = torch.zeros(BINS, dtype=torch.float64)
    gap.index_add_(0, bins, confidence - right.double())
    return 100 * gap.abs().sum().item() / len(confidence)


def cosine_report(own: Tensor, other: Tensor, labels: Tensor) -> dict[str, float] | None:
    """Mean cosine to the own class's weight, its spread about each class's mean, and the mean
    cosine to the nearest other class."""
    if not len(own):
        return None
    size = torch.bincount(labels).clamp(min=1)
    mean = torch.bincount(labels, own) / size
    spread = (own - mean[labels]).square().mean().sqrt()
    return {
        "target_mean": own.mean().item(),
        "target_spread": spread.item(),
        "other_mean": other.mean().item(),
    }


def full_report(rows: Tensor, labels: Tensor, counts: Tensor) -> dict[str, Any]:
    """All of result.json's figures; rates and errors in percent, None where there is no image.

    rows [M, COLUMNS], labels [M] the true classes, counts [C] training images of each class.
    """
    known = rows[:, 0] > 0
    report = error_report(rows)
    rows, labels = rows[known], labels[known]
    _, _, rank, predicted, confidence, own, other = rows.t()
    predicted, right, size = predicted.long(), rank < 1, counts[labels]
    member = {g: (size >= low) & (size <= high) for g, (low, high) in GROUPS.items()}
    report |= {name: percent(~right[m]) for name, m in member.items()}

    classes = len(counts)
    tested = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels[right], minlength=classes)
    chosen = torch.bincount(predicted, minlength=classes)
    f1 = 200 * hits / (tested + chosen).clamp(min=1)
    accuracy = (100 * hits / tested).tolist()
    histogram = {
        kind: {g: torch.histogram(cosine[m].float().clamp(-1, 1), EDGES).hist.int().tolist()
               for g, m in member.items()}
        for kind, cosine in (("target", own), ("other", other))
    }  # fmt: skip
    return report | {
        "macro_f1": f1[tested > 0].mean().item(),
        "ece": calibration_error(confidence, right),
        "cosine": {
            g: cosine_report(own[m], other[m], labels[m])
            for g, m in ({"overall": torch.ones_like(right)} | member).items()
        },
        "cosine_histogram": {"edges": EDGES.tolist()} | histogram,
        "class_accuracy": [
            a if n else None for a, n in zip(accuracy, tested.tolist(), strict=True)
        ],
    }
