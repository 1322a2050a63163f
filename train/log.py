"""The record of each epoch: a line in metrics.jsonl and on the terminal, TensorBoard's scalars."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from train.checkpoint import in_utf8, no_room
from train.session import Session


def has_tensorboard(out: Path) -> bool:
    """Whether TensorBoard is there and can write to OUT: it takes no path that is not UTF-8."""
    return bool(importlib.util.find_spec("tensorboard")) and in_utf8(out)


class Log:
    """Writes the records of a stage, in the first process; the others have none."""

    def __init__(self, session: Session, stage: int, first_epoch: int):
        self.session, self.writer = session, None
        if has_tensorboard(session.config.out):
            from torch.utils.tensorboard import SummaryWriter  # takes seconds; --help must not

            logs = session.config.out / "logs" / f"stage{stage}"
            self.writer = SummaryWriter(str(logs), purge_step=first_epoch)

    def write(self, record: dict[str, Any]) -> None:
        out = self.session.config.out
        try:
            with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self.writer:
                self.write_scalars(record)
            self.session.say(line_of(record))
        except OSError as error:
            raise no_room(out, error) from None

    def write_scalars(self, record: dict[str, Any]) -> None:
        step = record["epoch"] - 1
        scalars = {"LearningRate": record["lr"]}
        for split, figures in ({"train": record} | evaluations_of(record)).items():
            for tag, key in (("Loss", "loss"), ("Error_1", "error1"), ("Error_5", "error5")):
                scalars[f"{tag}/{split}"] = figures[key]
        if record["scale"] is not None:  # a softmax head has none
            scalars["Scale"] = record["scale"]
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def close(self, report: dict[str, Any]) -> None:
        """Adds the stage's result to TensorBoard's table of hyperparameters."""
        if not self.writer:
            return
        config = self.session.config
        inputs = ("dataset", "net", "batch_size", "head", "kappa", "seed")
        outputs = {
            "best/err_1": report["error1"],
            "best/err_5": report["error5"],
            "best/epoch": report["epoch"],
        }
        self.writer.add_hparams({k: getattr(config, k) for k in inputs}, outputs)
        self.writer.close()


def evaluations_of(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of validation and test, as far as the record has them."""
    return {name: record[name] for name in ("val", "test") if name in record}


def line_of(record: dict[str, Any]) -> str:
    """The terminal's line for an epoch."""
    text = f"stage {record['stage']}, epoch {record['epoch']}/{record['epochs']}: "
    text += f"loss {record['loss']:.3f}, error@1 {record['error1']:.1f} %"
    for split, figures in evaluations_of(record).items():
        text += f", {split} {figures['error1']:.1f} %"
    text += f", lr {record['lr']:.2g}"
    text += f", scale {record['scale']:.2f}" if record["scale"] is not None else ""
    return f"{text}, {record['images_per_s']:.0f} images/s"
