"""The files in OUT. A kill at any moment leaves the old file or the new one, never half of it.

A model file has the keys of the paper's code: feat_state_dict and fc_state_dict.
"""

import fcntl
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from torch import nn

from train.config import Config, TrainError

# The paper's code's names of our backbones.
ARCHITECTURES = {"resnet10": "ResNet10Feature", "resnet50": "ResNet50Feature"}
NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
SHARDS = "checkpoint"  # then a number: a directory of the head in shards; see sharded.py
FIELDS = {"config", "stage", "epoch", "step", "net", "head", "optimizer"}
FIELDS |= {"totals", "history", "best", "results", "shards"}


def lock(config: Config, rank: int) -> TextIO:
    """Makes OUT; as long as the returned file is open, another run in OUT is refused."""
    out = config.out.resolve()
    if config.model and not config.evaluate and config.model.parent.resolve() == out:
        raise TrainError(f"--out: got that of {config.model}, wanted another than --model's")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        file = open(config.out / "lock", "w")  # noqa: SIM115
        if rank == 0:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its workers do not inherit it
        return file
    except BlockingIOError:
        raise TrainError(f"--out: got {config.out}, where a run goes on, wanted another") from None
    except OSError as error:
        raise TrainError(
            f"--out: got {config.out} ({error.strerror}), wanted a directory to write to"
        ) from error


def clear(out: Path) -> None:
    """Removes the files of an older run, which must not pass for those of the next one."""
    out.mkdir(parents=True, exist_ok=True)
    stages = (f"stage{n}.{kind}" for n in (1, 2) for kind in ("pt", "analysis.json"))
    for name in (NAME, PREVIOUS, *stages, "result.json", "metrics.jsonl"):
        (out / name).unlink(missing_ok=True)
    for path in filter(Path.is_dir, out.glob(f"{SHARDS}.*")):
        shutil.rmtree(path, ignore_errors=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], before: str = "") -> None:
    """Calls `write` on a temporary file beside `path`, then puts that in the place of `path`, whose
    old content is kept under the name `before` if there is one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            os.replace(path, path.with_name(before))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns the first into the second
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise no_room(path, cause) from None


def no_room(path: Path, error: Exception) -> TrainError:
    """The error for a file that could not be written."""
    return TrainError(
        f"--out: got {first_line(error)} on writing {path}, wanted room for it; "
        "what was saved before is whole: --resume goes on from there"
    )


def save(out: Path, state: dict[str, Any]) -> None:
    """Saves the fields FIELDS; the checkpoint before this one is kept as well."""
    write_atomically(out / NAME, lambda file: torch.save(state, file), before=PREVIOUS)


def read(path: Path, mapped: bool = False) -> Any:
    """Reads a file of torch.save; raises an exception of any kind where it is damaged. What is
    mapped takes no memory before it is used."""
    zipped = zipfile.is_zipfile(path)  # PyTorch before 1.6 wrote no archive, and no checksums
    if zipped:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify them
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
            if any(entry.external_attr for entry in archive.infolist()):
                raise ValueError("an attribute in its directory")  # torch.load would skip the entry
    # torch maps no path with bytes that are not UTF-8, which Python keeps as halves of surrogates.
    mapped = mapped and zipped and not re.search("[\ud800-\udfff]", str(path))
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def load(out: Path, wanted: dict[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    """Reads the newest whole checkpoint in OUT; refuses one of another run than `wanted` names
    (`Session.identity`)."""
    reasons = []
    for path in (out / NAME, out / PREVIOUS):
        try:
            state = read(path)
            if not isinstance(state, dict) or set(state) != FIELDS:
                raise ValueError("its fields are not those of a checkpoint")
            break
        except FileNotFoundError:
            pass
        except Exception as error:  # a damaged file fails in many ways, none of them documented
            reasons.append(f"{path} is unreadable ({first_line(error)})")
    else:
        found = "; ".join(reasons) or f"no checkpoint at {out / NAME}"
        raise TrainError(
            f"--resume: got {found}, wanted one that an earlier run wrote there; to start anew, "
            "leave --resume out"
        )
    if reasons:
        warn(f"{reasons[0]}; going on from the one before, {path}")
    saved = state["config"]
    if saved != wanted:
        keys = sorted(k for k in saved | wanted if saved.get(k) != wanted.get(k))
        odd = ", ".join(f"{k}: got {wanted.get(k)}, was {saved.get(k)}" for k in keys)
        raise TrainError(
            f"--resume: {path} was written by another configuration: {odd}; wanted "
            "the same, or no --resume"
        )
    return state


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    if "weights_only" in str(error):  # PyTorch's message advises to load the file all the same
        return "it is damaged or holds objects that could run code"
    return (str(error).splitlines() or [type(error).__name__])[0]


def save_model(path: Path, net: nn.Module, head: nn.Module, epoch: int, config: Config) -> None:
    """Writes a model that the paper's code can test and go on from, too: it wants the state of an
    optimizer, whose weight decay it takes over, and no kappa in a cosine head."""
    head_state = head.state_dict()
    if not head_state.get("kappa", torch.ones(1)).any():
        del head_state["kappa"]
    trained = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(trained, config.lr, 0.9, weight_decay=config.weight_decay)
    figures = [
        f"{split}_{name}" for split in ("train", "test") for name in ("err1", "err5", "loss")
    ]
    state = {"epoch": epoch, "arch": ARCHITECTURES.get(config.net, config.net)}
    state |= {"feat_state_dict": net.state_dict(), "fc_state_dict": head_state}
    state |= {"optimizer": optimizer.state_dict(), "stats": {name: [] for name in figures}}
    write_atomically(path, lambda file: torch.save(state, file))


def load_model(path: Path, flag: str = "--model") -> tuple[dict[str, Any], dict[str, Any]]:
    """The state_dicts of backbone and head in a model file of ours or of the paper's code."""
    try:
        state = read(path, mapped=True)  # a process may want its own classes alone
        feat, head = state["feat_state_dict"], state["fc_state_dict"]
        for name, tensor in [*feat.items(), *head.items(), ("weight", head["weight"])]:
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{name} is no tensor")
    except FileNotFoundError:
        raise TrainError(f"{flag}: got {path}, which is no file") from None
    except Exception as error:
        raise TrainError(
            f"{flag}: got {path}, unreadable ({first_line(error)}); wanted a file with "
            "feat_state_dict and fc_state_dict: stage1.pt, or a model_best.pth.tar of the paper's "
            "code"
        ) from None
    # The second stage of the paper's code saves the backbone inside DataParallel.
    return {k.removeprefix("module."): v for k, v in feat.items()}, head


def fill(net: nn.Module, path: Path, name: str, flag: str = "--model") -> dict[str, torch.Tensor]:
    """Loads a model file's backbone into net; returns the state_dict of its head."""
    feat, head = load_model(path, flag)
    got, wanted = ({k: list(v.shape) for k, v in s.items()} for s in (feat, net.state_dict()))
    got["num_features"], wanted["num_features"] = head["weight"].shape[1], net.num_features
    if odd := next((k for k in [*wanted, *got] if got.get(k) != wanted.get(k)), None):
        was = read(path, mapped=True).get("arch", "another net")
        raise TrainError(
            f"{flag}: got {path}, a model of {was} whose {odd} is {got.get(odd, 'absent')}; wanted "
            f"one of --net {name}, whose {odd} is {wanted.get(odd, 'absent')}"
        )
    net.load_state_dict(feat)
    return head


def trained_head(path: Path) -> dict[str, Any]:
    """The flags --head and --kappa with which the head in a model file was trained."""
    _, head = load_model(path)
    if "s_" not in head:
        return {"head": "softmax"}
    kappa = head.get("kappa", torch.zeros(1)).flatten()
    return {"head": "tvmf", "kappa": kappa[0].item()} if kappa.any() else {"head": "cosine"}
