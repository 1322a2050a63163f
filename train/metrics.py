"""Top-1 error over all classes and over groups of classes of similar training size."""

from torch import Tensor

# Training images of a class, as in Liu et al. (OLTR, 2019) and Kang et al. (2020).
GROUPS = {"many": (101, float("inf")), "medium": (20, 100), "few": (0, 19)}


def error_report(wrong: Tensor, labels: Tensor, counts: Tensor) -> dict[str, float | None]:
    """Error@1 in percent: overall and of each group; None for a group without test images.

    wrong [M] bool, labels [M] the true classes, counts [C] training images of each class.
    """
    size = counts[labels]
    report = {"error1": 100 * wrong.double().mean().item()}
    for name, (low, high) in GROUPS.items():
        member = (size >= low) & (size <= high)
        report[name] = 100 * wrong[member].double().mean().item() if member.any() else None
    return report
