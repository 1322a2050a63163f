"""Warnings about a stage that ended badly, each with the flag to change."""

import math
from typing import Any

from train.config import Config

FEW_STEPS = 1500  # with fewer, a training error of more than BAD says that training was too short
BAD = 5.0  # percent
WORSE = 10.0  # points of training error that the class balance of stage 2 may cost


def too_short(config: Config, history: list[dict], steps: int) -> str | None:
    """Whether stage 1 was too short, by its steps and its training error."""
    error = history[-1]["error1"]
    if steps >= FEW_STEPS or error <= BAD:
        return None
    flag = "a smaller --batch-size" if config.batch_size > 16 else "more --epochs"
    return f"stage 1 ended with a training error of {error:.1f} % after {steps:,} steps; try {flag}"


def stage2_spoilt(
    config: Config, classes: int, history: list[dict], results: dict[str, dict]
) -> str | None:
    """What shows, without images for selection, that stage 2 spoilt the classifier."""
    last, signs = history[-1], []
    if last["scale"] < 0.9 * config.scale_start:
        signs.append(f"its scale fell from {config.scale_start:.2f} to {last['scale']:.2f}")
    if last["loss"] > math.log(classes):
        signs.append(
            f"its loss of {last['loss']:.2f} is above that of guessing, {math.log(classes):.2f}"
        )
    before = results.get("stage1", {}).get("train_error1")
    if before is not None and last["error1"] > before + WORSE:
        signs.append(
            f"its training error of {last['error1']:.1f} % is above the {before:.1f} % of stage 1"
        )
    if not signs:
        return None
    return (
        f"stage 2 may be worse than stage 1: {', and '.join(signs)}; try --stage2-start means, a "
        "smaller --stage2-batch-size or more --stage2-epochs"
    )


def worse_than_stage1(report: dict[str, Any], results: dict[str, dict]) -> str | None:
    """Whether stage 2 lost to stage 1 on the images that select the model."""
    before = results.get("stage1", {}).get("selection_error1")
    after = report["selection_error1"]
    if before is None or after is None or after <= before:
        return None
    return (
        f"stage 2 is worse than stage 1 on {report['selected_on']}: {after:.1f} % against "
        f"{before:.1f} %; use stage1.pt, or try --stage2-start means or --sampling sqrt"
    )
