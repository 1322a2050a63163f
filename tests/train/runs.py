"""Small runs of the driver, in this process and in others, and comparisons of what they leave."""

import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from train import command, stages
from train.config import Config, parse_config
from train.session import Session
from train.splits import LongTailed, Split

ROOT = Path(__file__).parents[2]
NOW = 1e-9  # minutes between checkpoints: one after every step
SIZES, TESTED = (13, 7, 4, 2), (5, 4, 4, 2)
FOLDER = (110, 60, 40, 25, 16, 10, 8, 6, 4, 3, 2, 2)
FLAGS = ("--dataset", "list", "--device", "cpu", "--batch-size", "32", "--lr", "0.1")
# Processes are forked from one that has imported the modules whose import takes seconds.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        "torch.nn.parallel",
        "torchvision.transforms.v2",
        "tvmf_ext",
        "timm",
        "tyro",
        "pydantic",
        "rich.progress",
        "rich.table",
        "typeguard",
        "pytest",
    ]
)


def pixels(sizes, seed, side=8, channels=1):
    """uint8 images, noise over a pattern of their class, and their classes."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    shape = (channels, side, side)
    patterns = torch.rand(len(sizes), *shape, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
    return (200 * patterns[labels] + 55 * noise).to(torch.uint8), labels


def in_memory(sizes=SIZES, tested=TESTED, val=None, **shape):
    """A data set of `pixels` with these class sizes; `val` may be None."""
    splits = [
        counts and Split(*pixels(counts, seed, **shape))
        for seed, counts in enumerate((sizes, tested, val), 1)
    ]
    counts, side = torch.tensor(sizes), splits[0].images.shape[-1]
    return LongTailed(*splits, len(sizes), counts, "small", side)


def write_folder(root, **splits):
    """Writes PNGs of 12 x 12 pixels and list files for splits with these class sizes."""
    for seed, (name, sizes) in enumerate(splits.items()):
        lines = []
        for i, (image, label) in enumerate(zip(*pixels(sizes, seed, 12, 3), strict=True)):
            path = root / name / str(int(label)) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            lines.append(f"{path.relative_to(root)} {label}\n")
        (root / f"{name}.txt").write_text("".join(lines))
    return root


def mlp(dropout=0.0):
    layers = (nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
    net = nn.Sequential(nn.Flatten(), *layers)
    net.num_features = 16
    return net


def configure(out, **changes):
    """A configuration of two short epochs a stage, with OUT made."""
    out.mkdir(exist_ok=True)
    settings = {"dataset": "list", "net": "convnet", "epochs": 2, "stage2_epochs": 2, "lr": 0.1}
    return Config(**settings | {"batch_size": 8, "device": "cpu", "out": out} | changes)


def train_both(config, data):
    """Trains both stages in this process, and returns their reports."""
    return stages.train(Session(config, data))


def main(flags):
    """`python -m train FLAGS` in this process."""
    command.run(parse_config([*map(str, flags)]))


class Killed(BaseException):
    """Passes through every `except Exception`, so that no code runs after it, as after a kill."""


def kill(patch, where, name, number, before=False):
    """Ends the run at the number-th call of where.name."""
    call, calls = getattr(where, name), itertools.count(1)

    def counted(*args, **kwargs):
        now = next(calls) == number
        if now and before:
            raise Killed
        result = call(*args, **kwargs)
        if now:
            raise Killed
        return result

    patch.setattr(where, name, counted)


def killed(monkeypatch, config, data, *kill_at, before=False):
    """Trains, and kills the run as `kill` says; returns whether it came to that."""
    with monkeypatch.context() as patch:
        kill(patch, *kill_at, before=before)
        try:
            train_both(config, data)
        except Killed:
            return True
    return False


def equal(a, b):
    """Deep equality, bitwise for tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def load_state(path):
    return torch.load(path, weights_only=True)


def records(out):
    """metrics.jsonl without times; an epoch that was repeated has its last line."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_s")
    return {(r["stage"], r["epoch"]): {k: v for k, v in r.items() if k not in timed} for r in lines}


def left(out):
    """All that a run leaves and that a kill must not change."""
    files = [load_state(out / name) for name in ("stage1.pt", "stage2.pt", "checkpoint.pt")]
    return [*files, dict(sorted(records(out).items()))]


def images_in(report):
    """The number of images that a report counts in its histogram."""
    return sum(sum(counts) for counts in report["cosine_histogram"]["target"].values())


def feat(path):
    """The backbone in a model file."""
    return load_state(path)["feat_state_dict"]


def run_command(log, flags, before, environment):
    """Turns a forked process into `python -m train FLAGS`. Before that it calls the function
    before[0] with the other elements of `before` as its arguments."""
    multiprocessing.set_start_method(
        None, force=True
    )  # so that workers are forked, as in a run of a user
    file = open(log, "w", buffering=1)  # noqa: SIM115
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["train", *flags]
    if before:
        before[0](*before[1:])
    runpy.run_module("train", run_name="__main__", alter_sys=True)


def launch(log, *flags, before=None, **environment):
    process = FORK.Process(target=run_command, args=(log, [*map(str, flags)], before, environment))
    process.start()
    return process


def finish(process, code=0):
    """Waits for the end of a process, which must exit with this code."""
    process.join(60)
    if process.is_alive():
        process.kill()
        pytest.fail("does not end")
    assert process.exitcode == code


def wait_for(process, condition):
    """Waits until the condition holds, while the process still runs."""
    alive = process.is_alive if hasattr(process, "is_alive") else lambda: process.poll() is None
    end = time.monotonic() + 60
    while not condition():
        assert alive() and time.monotonic() < end, "never came to that"
        time.sleep(0.002)


def lines(out, stage=1):
    """How many epochs of a stage are in metrics.jsonl."""
    path = out / "metrics.jsonl"
    return path.read_text().count(f'"stage": {stage},') if path.exists() else 0


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("localhost", 0))
        return str(any_port.getsockname()[1])


def ranks_environment(world):
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def kill_in_the_middle_of_writing(number):
    """Sends SIGKILL when half of the number-th checkpoint is on disk."""
    save, calls = torch.save, itertools.count(1)

    def save_half(state, file):
        save(state, file)
        if "optimizer" in state and next(calls) == number:
            file.flush()
            os.ftruncate(file.fileno(), file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half


def in_step(number, act):
    """Calls act() in the number-th step of the optimizer."""
    step, calls = torch.optim.SGD.step, itertools.count(1)

    def acting(*args, **kwargs):
        if next(calls) == number:
            act()
        return step(*args, **kwargs)

    torch.optim.SGD.step = acting


def signal_in_step(number, times=1):
    in_step(number, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(times)])


def pause_in_step(number, marker):
    """Waits there as the leader of a group of processes, and makes a file to say so."""
    os.setsid()
    in_step(number, lambda: [marker.touch(), time.sleep(0.5)])
