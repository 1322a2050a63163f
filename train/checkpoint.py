"""Checkpoints that a kill at any moment leaves whole: the old file or the new one, never half."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from train.config import Config, TrainError
from train.rng import get_rng

FIELDS = {"config", "stage", "epoch", "net", "head", "optimizer", "results", "rng"}


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` on a temporary file beside `path`, then puts that in the place of `path`."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(
    path: Path, config: Config, stage: int, epoch: int, states: dict[str, Any], results: dict
) -> None:
    """Saves a run after `epoch` epochs of `stage`; `states` has the state_dict of each value."""
    state = {name: part.state_dict() for name, part in states.items()}
    state |= {"config": config.identity(), "stage": stage, "epoch": epoch, "results": results}
    state["rng"] = get_rng()
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, config: Config) -> dict[str, Any]:
    """Reads what save_checkpoint wrote for the same configuration; anything else is refused."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainError(
            f"--resume: got no checkpoint at {path}, wanted one that an earlier run wrote there; "
            "to start anew, leave --resume out"
        ) from None
    except Exception as error:  # a damaged file fails in many ways, none of them documented
        reason = str(error).split("\n")[0]
        raise TrainError(
            f"--resume: got an unreadable checkpoint {path} ({reason}), wanted one that this "
            "script wrote; to start anew, leave --resume out"
        ) from None
    found = set(state) if isinstance(state, dict) else type(state).__name__
    if found != FIELDS:
        raise TrainError(f"--resume: got {found} in {path}, wanted the fields {sorted(FIELDS)}")
    saved, wanted = state["config"], config.identity()
    if saved != wanted:
        keys = sorted(k for k in saved | wanted if saved.get(k) != wanted.get(k))
        odd = ", ".join(f"{k}: got {saved.get(k)}, wanted {wanted.get(k)}" for k in keys)
        raise TrainError(f"--resume: {path} was written by another configuration: {odd}")
    return state
