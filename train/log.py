"""The record of each epoch: a line in metrics.jsonl and one on the terminal."""

import json
from typing import Any

from train.checkpoint import no_room
from train.session import Session


def write(session: Session, record: dict[str, Any]) -> None:
    """Writes the record of an epoch; the first process alone calls this."""
    out = session.config.out
    try:
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        session.say(line_of(record))
    except OSError as error:
        raise no_room(out, error) from None


def line_of(record: dict[str, Any]) -> str:
    """The terminal's line for an epoch."""
    text = f"stage {record['stage']}, epoch {record['epoch']}/{record['epochs']}: "
    text += f"loss {record['loss']:.3f}, error@1 {record['error1']:.1f} %"
    for split in ("val", "test"):  # as far as they were evaluated
        text += f", {split} {record[split]['error1']:.1f} %" if split in record else ""
    text += f", lr {record['lr']:.2g}"
    text += f", scale {record['scale']:.2f}" if record["scale"] is not None else ""
    return f"{text}, {record['images_per_s']:.0f} images/s"
