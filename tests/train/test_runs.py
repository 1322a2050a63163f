"""Runs of the training driver: results, kills, damaged and full disks, many processes, stage 2.

A kill is a SIGKILL of a process of its own, or an exception at a chosen call in this one, which
is cheaper. Whatever was killed must end, resumed, bitwise as the run that nothing disturbed.
"""

import copy
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train.__main__ as script
from train import checkpoint, distributed
from train.config import Config, TrainError
from train.data import LongTailed, Split
from train.features import Cached

ROOT = Path(__file__).parents[2]
NOW = 1e-9  # minutes between checkpoints: one after every step
SIZES, TESTED = (13, 7, 4, 2), (5, 4, 4, 2)
FOLDER = (110, 60, 40, 25, 16, 10, 8, 6, 4, 3, 2, 2)
FLAGS = ("--dataset", "list", "--device", "cpu", "--batch-size", "32", "--lr", "0.1")

# Processes are forked from one that has imported what takes seconds.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["torch.utils.tensorboard", "torch.nn.parallel", "torchvision.transforms.v2", "tvmf_ext",
     "tensorboard.backend.event_processing.event_accumulator", "timm", "tyro", "pydantic",
     "rich.progress", "rich.table", "typeguard", "pytest"]
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quiet_process(monkeypatch):
    """On the CPU, where runs are bitwise equal; with the signal handlers put back."""
    monkeypatch.setattr(script, "CHEAP", 0)  # save after every epoch, short as they are here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


# Data, nets, configurations


def pixels(sizes, seed, side=8, channels=1):
    """Noise over a pattern of the class's own, uint8, and the classes."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    shape = (channels, side, side)
    patterns = torch.rand(len(sizes), *shape, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
    return (200 * patterns[labels] + 55 * noise).to(torch.uint8), labels


def in_memory(sizes=SIZES, tested=TESTED, val=None, **shape):
    splits = [counts and Split(*pixels(counts, seed, **shape))
              for seed, counts in enumerate((sizes, tested, val), 1)]  # fmt: skip
    counts, side = torch.tensor(sizes), splits[0].images.shape[-1]
    return LongTailed(*splits, len(sizes), counts, "small", side)


def write_folder(root, **splits):
    """PNGs of 12 pixels and list files of the splits, given by their class sizes."""
    for seed, (name, sizes) in enumerate(splits.items()):
        lines = []
        for i, (image, label) in enumerate(zip(*pixels(sizes, seed, 12, 3), strict=True)):
            path = root / name / str(int(label)) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            lines.append(f"{path.relative_to(root)} {label}\n")
        (root / f"{name}.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"), train=FOLDER, test=(5,) * len(FOLDER))


def mlp(dropout=0.0):
    layers = (nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
    net = nn.Sequential(nn.Flatten(), *layers)
    net.num_features = 16
    return net


@pytest.fixture
def small_net(monkeypatch):
    """A net that is faster than convolutions, whatever --net says."""
    monkeypatch.setattr(script, "make_net", lambda *_: mlp())


def configure(out, **changes):
    out.mkdir(exist_ok=True)
    settings = {"dataset": "list", "net": "convnet", "epochs": 2, "stage2_epochs": 2, "lr": 0.1}
    return Config(**settings | {"batch_size": 8, "device": "cpu", "out": out} | changes)


def train(config, data):
    return script.train(script.Run(config, data))


# Kills and what is compared


class Killed(BaseException):
    """Passes through every `except Exception`, as a kill would."""


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
    """Trains until then; whether it came to that."""
    with monkeypatch.context() as patch:
        kill(patch, *kill_at, before=before)
        try:
            train(config, data)
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


def load(path):
    return torch.load(path, weights_only=True)


def records(out):
    """metrics.jsonl without times; of an epoch that was done again, the last line."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_s")
    return {(r["stage"], r["epoch"]): {k: v for k, v in r.items() if k not in timed} for r in lines}


def left(out):
    """All that a run ends with and a kill must not change."""
    files = [load(out / name) for name in ("stage1.pt", "stage2.pt", "checkpoint.pt")]
    return [*files, dict(sorted(records(out).items()))]


def images_in(report):
    """The number of images that its histogram counts."""
    return sum(sum(counts) for counts in report["cosine_histogram"]["target"].values())


def feat(path):
    return load(path)["feat_state_dict"]


# Processes


def command(log, flags, before, environment):
    """`python -m train FLAGS`, as the rest of a forked process."""
    multiprocessing.set_start_method(None, force=True)  # workers are forked, as they would be
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
    process = FORK.Process(target=command, args=(log, [*map(str, flags)], before, environment))
    process.start()
    return process


def finish(process, code=0):
    process.join(60)
    if process.is_alive():
        process.kill()
        pytest.fail("does not end")
    assert process.exitcode == code


def wait_for(process, condition):
    """Waits until it holds in a process that still runs."""
    alive = process.is_alive if hasattr(process, "is_alive") else lambda: process.poll() is None
    end = time.monotonic() + 60
    while not condition():
        assert alive() and time.monotonic() < end, "never came to that"
        time.sleep(0.002)


def lines(out, stage=1):
    """Epochs of a stage that are logged."""
    path = out / "metrics.jsonl"
    return path.read_text().count(f'"stage": {stage},') if path.exists() else 0


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("localhost", 0))
        return str(any_port.getsockname()[1])


def ranks_environment(world):
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


# What a run leaves


@pytest.fixture(scope="module")
def command_run(folder, tmp_path_factory):
    """The command as a user gives it."""
    out = tmp_path_factory.mktemp("command") / "out"
    flags = [*FLAGS, "--data", folder, "--out", out, "--epochs", 10, "--stage2-epochs", 5]
    settings = {"COLUMNS": "120", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "train", *map(str, flags)], cwd=ROOT, env=os.environ | settings,
        capture_output=True, text=True, encoding="utf-8", timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_command_trains_a_folder_with_lists(command_run):
    out, printed = command_run
    result = json.loads((out / "result.json").read_text())
    assert result["dataset"]["counts"] == list(FOLDER)
    assert (result["dataset"]["train"], result["dataset"]["test"]) == (286, 60)
    table = [line.replace("│", " ").split() for line in printed.splitlines()]
    for stage in ("stage1", "stage2"):
        report = result[stage]
        names = ("error1", "error5", "many", "medium", "few")
        figures = [report[name] for name in names]
        assert all(0 <= figure <= 100 for figure in figures)
        assert report["selected_on"] == "last epoch"
        row = [stage[-1], *(f"{figure:.1f}" for figure in figures), "last", "epoch"]
        assert row in table
        # 5 test images a class; 1 class has more than 100 images, 3 have 20 to 100.
        groups = report["many"] * 5 + report["medium"] * 15 + report["few"] * 40
        assert groups / 60 == pytest.approx(report["error1"])
        assert report["error1"] * 60 / 100 == pytest.approx(round(report["error1"] * 60 / 100))
        assert report["error1"] < 70  # chance is 92
    assert lines(out) == 10 and lines(out, 2) == 5
    assert not (out / "features").exists()


def test_records_and_tensorboard_agree(command_run):
    out, _ = command_run
    result, logged = json.loads((out / "result.json").read_text()), records(out)
    for stage in (1, 2):
        mine = [record for (number, _), record in logged.items() if number == stage]
        assert mine[-1]["test"]["error1"] == result[f"stage{stage}"]["error1"]
        assert mine[-1]["test"]["loss"] == pytest.approx(result[f"stage{stage}"]["loss"])
        events = EventAccumulator(str(out / f"logs/stage{stage}"))
        events.Reload()
        wanted = {"LearningRate": [record["lr"] for record in mine]}
        wanted["Scale"] = [record["scale"] for record in mine]
        for tag, key in (("Loss", "loss"), ("Error_1", "error1"), ("Error_5", "error5")):
            wanted[f"{tag}/train"] = [record[key] for record in mine]
            wanted[f"{tag}/test"] = [record["test"][key] for record in mine]
        assert set(events.Tags()["scalars"]) == set(wanted)
        for tag, values in wanted.items():
            scalars = events.Scalars(tag)
            assert [scalar.step for scalar in scalars] == list(range(len(mine)))
            assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=1e-6)
        (hparams,) = [path for path in (out / f"logs/stage{stage}").iterdir() if path.is_dir()]
        events = EventAccumulator(str(hparams))
        events.Reload()
        assert events.Scalars("best/err_1")[0].value == pytest.approx(mine[-1]["test"]["error1"])
        assert "_hparams_/session_start_info" in events.summary_metadata


def test_saved_models_are_those_of_the_result(command_run, folder):
    out, _ = command_run
    result = json.loads((out / "result.json").read_text())
    for stage in ("stage1", "stage2"):
        folders = ["--data", str(folder), "--out", str(out), "--model", str(out / f"{stage}.pt")]
        script.main([*FLAGS, *folders, "--evaluate"])
        report = json.loads((out / "evaluation.json").read_text())["model"]
        assert report["selected_on"] == "as given"
        assert {k: report[k] for k in ("error1", "error5", "many", "medium", "few")} == {
            k: result[stage][k] for k in ("error1", "error5", "many", "medium", "few")
        }
    assert (out / "checkpoint.pt").exists() and (out / "result.json").exists()


def test_resuming_a_finished_run_changes_nothing(command_run, folder):
    out, _ = command_run
    before, log = left(out), (out / "metrics.jsonl").read_bytes()
    result = json.loads((out / "result.json").read_text())
    flags = [*FLAGS, "--data", folder, "--out", out, "--epochs", 10, "--stage2-epochs", 5]
    script.main([*map(str, flags), "--resume"])
    assert equal(left(out), before)
    assert (out / "metrics.jsonl").read_bytes() == log
    again = json.loads((out / "result.json").read_text())
    assert again.pop("config") | {"resume": False} == result.pop("config")
    assert again == result


def test_new_run_removes_what_an_older_one_left(folder, tmp_path):
    old = ["checkpoint.pt", "checkpoint.previous.pt", "stage1.pt", "stage2.pt", "result.json",
           "metrics.jsonl", "logs/stage1/events.old"]  # fmt: skip
    (tmp_path / "logs/stage1").mkdir(parents=True)
    for name in old:
        (tmp_path / name).write_text("old")
    flags = [*FLAGS, "--data", folder, "--out", tmp_path, "--epochs", 1, "--stage2-epochs", 0]
    script.main([*map(str, flags)])
    assert [name for name in old if (tmp_path / name).exists()] == [
        "checkpoint.pt", "stage1.pt", "result.json", "metrics.jsonl"
    ]  # fmt: skip
    assert "old" not in (tmp_path / "metrics.jsonl").read_text()
    assert "stage2" not in json.loads((tmp_path / "result.json").read_text())


# Which epoch is the result


def test_refused_run_leaves_an_older_one_alone(folder, tmp_path):
    flags = [*FLAGS, "--data", folder, "--out", tmp_path, "--epochs", 1, "--stage2-epochs", 0]
    flags = [*map(str, flags)]
    script.main(flags)

    def kept():
        return [(tmp_path / n).read_bytes() for n in (checkpoint.NAME, "stage1.pt", "result.json")]

    before = kept()
    for more, wanted in (
        (["--select", "val"], "there are no images of val"),
        (["--net", "timm:nix"], "wanted a name of timm"),
        (["--batch-size", "1"], "wanted 2 for each"),
        (
            ["--model", str(tmp_path / "stage1.pt"), "--stage2-epochs", "1"],
            "another than --model's",
        ),
    ):
        with pytest.raises(TrainError, match=wanted):
            script.main([*flags, *more])
        assert kept() == before


def test_two_runs_in_one_directory_are_refused(folder, tmp_path):
    flags = [*FLAGS, "--data", folder, "--out", tmp_path, "--epochs", 50, "--stage2-epochs", 0]
    first = launch(tmp_path / "log.txt", *flags)
    wait_for(first, lambda: lines(tmp_path) >= 1)
    with pytest.raises(TrainError, match="where a run goes on"):
        script.main([*map(str, flags), "--epochs", "1"])
    first.kill()
    finish(first, -signal.SIGKILL)
    script.main([*map(str, flags), "--epochs", "1"])
    assert lines(tmp_path) == 1


@pytest.fixture
def unlearning(monkeypatch, small_net):
    """Three epochs down the loss and three up; the labels of the test set are wrong, so that its
    best epoch is a late one."""
    monkeypatch.setattr(script, "cosine_lr", lambda lr, epoch, _: lr if epoch < 3 else -lr)
    monkeypatch.setattr(script, "still_rises", lambda *_: False)
    data = in_memory((24, 24, 24, 24), (9, 9, 9, 9), (9, 9, 9, 9))
    data.test.labels = (data.test.labels + 1) % 4
    return data


@pytest.mark.parametrize(
    "select, val, told, shown",
    [
        ("auto", True, "val", "val"),
        ("val", True, "val", "val"),
        ("auto", False, "last epoch", "test"),
        ("last", True, "last epoch", "val"),
        ("test", True, "test", "test"),
        ("test", False, "test", "test"),
    ],
)
def test_selection(monkeypatch, unlearning, tmp_path, capsys, select, val, told, shown):
    data, states = unlearning, {}
    data.val = data.val if val else None
    save = checkpoint.save

    def keep(out, state):
        if not state["step"]:
            states[state["stage"], state["epoch"]] = copy.deepcopy(state)
        save(out, state)

    monkeypatch.setattr(checkpoint, "save", keep)
    config = configure(tmp_path, epochs=6, stage2_epochs=3, head="softmax", select=select)
    run = script.Run(config, data)
    results = script.train(run)
    errors = [record[shown]["error1"] for (s, _), record in records(tmp_path).items() if s == 1]
    best = 1 + errors.index(min(errors)) if told in ("val", "test") else 6
    assert errors[2] != errors[5]
    assert {"val": best <= 3, "test": best > 3}.get(told, True)
    assert not any(("test" if shown == "val" else "val") in r for r in records(tmp_path).values())

    for stage, last in ((1, best), (2, results["stage2"]["epoch"])):
        report, model = results[f"stage{stage}"], load(tmp_path / f"stage{stage}.pt")
        assert (report["selected_on"], report["epoch"], model["epoch"]) == (told, last, last)
        assert equal(model["fc_state_dict"], dict(states[stage, last]["head"]))
        assert equal(model["feat_state_dict"], dict(states[stage, last]["net"]))
    net = mlp().eval()
    net.load_state_dict(feat(tmp_path / "stage1.pt"))
    mean, std = script.channel_statistics(data.train.images)
    with torch.no_grad():
        features = net((data.test.images / 255 - mean) / std)
    head = script.head_of_state(load(tmp_path / "stage1.pt")["fc_state_dict"])
    wrong = head.logits(features).argmax(1) != data.test.labels
    assert results["stage1"]["error1"] == pytest.approx(100 * wrong.double().mean().item())
    script.print_table(results, run)
    assert capsys.readouterr().out.count(told) >= 2  # a row each


def test_selection_on_val_needs_val(unlearning, tmp_path):
    unlearning.val = None
    with pytest.raises(TrainError, match="--select: got val"):
        train(configure(tmp_path, select="val"), unlearning)


# Kills


VARIANTS = {  # settings, and the net where it is no convnet
    "batch": ({"views": 0, "bn": "batch"}, None),
    "batch, cached": ({"views": 2, "bn": "batch", "accumulate": 2}, None),
    "shift": ({"views": 0, "bn": "shift", "accumulate": 2}, None),
    "shift, views reused": ({"views": 1, "bn": "shift", "stage2_epochs": 3}, None),
    "frozen, dropout, softmax": ({"views": 0, "bn": "frozen", "head": "softmax"}, mlp),
    "frozen, dropout, views reused": ({"views": 2, "bn": "frozen", "stage2_epochs": 3}, mlp),
    "bf16": ({"precision": "bf16", "views": 2}, mlp),
    "fp16": ({"precision": "fp16", "views": 0}, mlp),
}


@pytest.mark.parametrize("settings, net", VARIANTS.values(), ids=VARIANTS)
def test_killed_after_every_step(monkeypatch, tmp_path, settings, net):
    """One checkpoint a life, after each step and each epoch, until a life ends by itself."""
    if net:
        monkeypatch.setattr(script, "make_net", lambda *_: net(0.3))
    data = in_memory(val=(3, 3, 3, 3))
    whole = configure(tmp_path / "whole", **settings)
    results = train(whole, data)
    part = configure(tmp_path / "part", **settings, checkpoint_minutes=NOW)
    lives = 0
    while killed(monkeypatch, part, data, checkpoint, "save", 1):
        part = dataclasses.replace(part, resume=True)
        lives += 1
        assert lives < 40  # each goes on where the last one ended
        torch.manual_seed(lives)  # another process would have other states
        np.random.seed(lives)  # noqa: NPY002
    # 26 images and 24 make 3 steps; the rest of 2 is too few for --accumulate 2.
    steps = (3 if settings.get("accumulate") else 4) * 2 + 3 * part.stage2_epochs
    assert lives >= steps
    assert equal(left(part.out), left(whole.out))
    assert equal(train(part, data), results)
    assert not equal(load(part.out / "stage1.pt"), load(part.out / "stage2.pt"))


MOMENTS = [
    (script, "log_epoch", 1), (script, "log_epoch", 4), (script, "evaluate", 2),
    (script, "evaluate", 3), (script, "evaluate", 5), (script, "evaluate", 6),
    (script, "Cached", 1), (script, "Cached", 3), (script, "shift_statistics", 1),
    (checkpoint, "save_model", 1), (checkpoint, "save_model", 2),
    (torch.optim.SGD, "step", 1), (torch.optim.SGD, "step", 6), (torch.optim.SGD, "step", 12),
    (os, "replace", 1), (os, "replace", 3), (os, "replace", 4), (os, "replace", 5),
    (os, "replace", 8), (os, "replace", 9), (os, "fsync", 4), (os, "fsync", 5), (os, "fsync", 9),
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run with the net of small_net: data, settings, results, what it left."""
    out, data = tmp_path_factory.mktemp("runs") / "undisturbed", in_memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_net", lambda *_: mlp())
        settings = {"bn": "shift"}
        results = train(configure(out, **settings), data)
    return data, settings, results, left(out)


@pytest.mark.parametrize("where, name, number", MOMENTS, ids=lambda v: getattr(v, "__name__", v))
def test_killed_between(monkeypatch, small_net, undisturbed, tmp_path, where, name, number):
    """Between any two things that a run does; then at the first checkpoint after that."""
    data, settings, results, wanted = undisturbed
    config = configure(tmp_path, **settings)
    before = bool(number % 2)
    assert killed(monkeypatch, config, data, where, name, number, before=before)

    def resume():
        saved = any((tmp_path / name).exists() for name in (checkpoint.NAME, checkpoint.PREVIOUS))
        return dataclasses.replace(config, resume=saved)

    killed(monkeypatch, resume(), data, os, "replace", 2)
    assert equal(train(resume(), data), results)
    assert equal(left(tmp_path), wanted)


def kill_in_the_middle_of_writing(number):
    """SIGKILL when half of the number-th checkpoint is on disk."""
    save, calls = torch.save, itertools.count(1)

    def save_half(state, file):
        save(state, file)
        if "optimizer" in state and next(calls) == number:
            file.flush()
            os.ftruncate(file.fileno(), file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half


def test_sigkill(folder, tmp_path):
    """Of a process, time and again: while it trains, while it writes, in both stages."""
    flags = [*FLAGS, "--data", folder, "--epochs", 6, "--stage2-epochs", 25, "--views", 2]
    flags += ["--checkpoint-minutes", 0.0005]
    out, whole = tmp_path / "out", launch(tmp_path / "whole.txt", *flags, "--out", tmp_path / "w")
    log, resume = tmp_path / "log.txt", ["--out", out, "--resume"]

    def kill_when(process, condition):
        wait_for(process, condition)
        process.kill()
        finish(process, -signal.SIGKILL)

    kill_when(launch(log, *flags, "--out", out), lambda: lines(out) >= 2)
    writing = (kill_in_the_middle_of_writing, 3)
    finish(launch(log, *flags, *resume, before=writing), -signal.SIGKILL)
    assert not list(out.glob("*.json")) and list(out.glob("*.tmp"))
    kill_when(launch(log, *flags, *resume), lambda: lines(out, 2) >= 1)
    kill_when(launch(log, *flags, *resume), lambda: lines(out, 2) >= 8)
    assert not (out / "result.json").exists()
    finish(launch(log, *flags, *resume))
    finish(whole)
    assert equal(left(out), left(tmp_path / "w"))
    a, b = (json.loads((path / "result.json").read_text()) for path in (out, tmp_path / "w"))
    assert (a["stage1"], a["stage2"]) == (b["stage1"], b["stage2"])


# SIGTERM


@pytest.mark.parametrize("views", [0, 2])
def test_a_stop_loses_no_step(monkeypatch, small_net, tmp_path, views):
    """A run that is asked to leave in every step does each step once."""
    data = in_memory()
    whole, part = (configure(tmp_path / name, views=views) for name in ("whole", "part"))
    results = train(whole, data)
    step, steps, running = torch.optim.SGD.step, [], []

    def stop(*args, **kwargs):
        running[-1].stopping = True
        steps.append(None)
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", stop)
    for life in range(20):
        running.append(script.Run(dataclasses.replace(part, resume=life > 0), data))
        try:
            assert equal(script.train(running[-1]), results)
            break
        except script.Stopped:
            if life % 2:  # and one that is asked in an evaluation does it again
                running.append(script.Run(dataclasses.replace(part, resume=True), data))
                running[-1].stopping = True
                with pytest.raises(script.Stopped):
                    script.train(running[-1])
    assert len(steps) == 2 * 4 + 2 * 3
    assert equal(left(part.out), left(whole.out))


def in_step(number, act):
    step, calls = torch.optim.SGD.step, itertools.count(1)

    def acting(*args, **kwargs):
        if next(calls) == number:
            act()
        return step(*args, **kwargs)

    torch.optim.SGD.step = acting


def signal_in_step(number, times=1):
    in_step(number, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(times)])


def pause_in_step(number, marker):
    """As the leader of a group of processes; a file tells where it is."""
    os.setsid()
    in_step(number, lambda: [marker.touch(), time.sleep(0.5)])


def test_sigterm_saves_within_the_epoch(folder, tmp_path):
    flags = [*FLAGS, "--data", folder, "--epochs", 2, "--stage2-epochs", 1]  # 9 steps, 8 in stage 2
    whole = launch(tmp_path / "w.txt", *flags, "--out", tmp_path / "w")
    out, log = tmp_path / "out", tmp_path / "log.txt"
    for resume, step, times, wanted in (([], 5, 1, (1, 0, 5)), (["--resume"], 11, 2, (1, 1, 7))):
        # Twice, for torchrun forwards what SLURM has sent already.
        flags_now = [*flags, "--out", out, *resume]
        finish(launch(log, *flags_now, before=(signal_in_step, step, times)), 143)
        saved = load(out / "checkpoint.pt")
        assert (saved["stage"], saved["epoch"], saved["step"]) == wanted
        assert "--resume goes on" in log.read_text()
    finish(launch(log, *flags, "--out", out, "--resume"))
    finish(whole)
    assert equal(left(out), left(tmp_path / "w"))


def test_file_pipeline_with_workers(folder, tmp_path):
    """SIGKILL, then SIGTERM to the whole group of processes, as torchrun and SLURM send it. The
    undisturbed run has no workers."""
    flags = [*FLAGS, "--data", folder, "--augment", "imagenet", "--image-size", 16]
    flags += ["--net", "convnet", "--epochs", 4, "--stage2-epochs", 2, "--views", 1]
    flags += ["--checkpoint-minutes", 0.001]
    whole = launch(tmp_path / "w.txt", *flags, "--out", tmp_path / "w", "--workers", 0)
    out, log = tmp_path / "out", tmp_path / "log.txt"
    flags += ["--out", out, "--workers", 2]

    first = launch(log, *flags)
    wait_for(first, lambda: lines(out) >= 1)
    first.kill()
    finish(first, -signal.SIGKILL)

    marker = tmp_path / "marker"
    second = launch(log, *flags, "--resume", before=(pause_in_step, 5, marker))
    wait_for(second, marker.exists)
    os.killpg(second.pid, signal.SIGTERM)
    finish(second, 143)
    assert "stopped by a signal" in log.read_text()
    assert load(out / "checkpoint.pt")["step"]
    assert not (out / "result.json").exists()

    finish(launch(log, *flags, "--resume"))
    finish(whole)
    assert equal(left(out), left(tmp_path / "w"))


# Damage


@pytest.fixture
def interrupted(monkeypatch, small_net, undisturbed, tmp_path):
    """A run killed in stage 1, with two checkpoints; and what it should become."""
    data, settings, _, wanted = undisturbed
    config = configure(tmp_path / "run", **settings, checkpoint_minutes=NOW)
    assert killed(monkeypatch, config, data, checkpoint, "save", 3)
    return dataclasses.replace(config, resume=True), data, wanted


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": lambda content: flip(content, len(content) // 2),
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint(interrupted, capsys, damage):
    config, data, wanted = interrupted
    path = config.out / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    train(config, data)
    assert "going on from the one before" in " ".join(capsys.readouterr().out.split())
    assert equal(left(config.out), wanted)


def test_any_flipped_bit_is_seen_or_harmless(interrupted):
    config, _, _ = interrupted
    path = config.out / "checkpoint.pt"
    good, content = checkpoint.read(path), path.read_bytes()
    seen, places = 0, np.linspace(0, len(content) - 1, 300).astype(int)
    for place in places:
        path.write_bytes(flip(content, place))
        try:
            assert equal(checkpoint.read(path), good), place
        except AssertionError:
            raise
        except Exception:
            seen += 1
    assert seen > 0.5 * len(places)  # the rest is padding


def test_both_checkpoints_damaged(interrupted):
    config, data, _ = interrupted
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        path = config.out / name
        path.write_bytes(DAMAGES["flipped"](path.read_bytes()))
    with pytest.raises(TrainError) as error:
        train(config, data)
    message = str(error.value)
    assert message.count("unreadable (wrong checksum") == 2
    assert checkpoint.NAME in message and checkpoint.PREVIOUS in message


def test_other_configuration_and_no_checkpoint(interrupted, tmp_path):
    config, data, _ = interrupted
    with pytest.raises(TrainError, match=r"another configuration: kappa: got 4\.0, was 16\.0"):
        train(dataclasses.replace(config, kappa=4.0), data)
    with pytest.raises(TrainError, match=r"another configuration: epochs.*seed: got 1, was 0"):
        train(dataclasses.replace(config, epochs=3, seed=1), data)
    with pytest.raises(TrainError, match=r"got no checkpoint at .*elsewhere"):
        train(dataclasses.replace(config, out=tmp_path / "elsewhere"), data)


@pytest.mark.parametrize("name", ["checkpoint.pt.tmp", "stage1.pt.tmp", "metrics.jsonl"])
def test_full_disk(interrupted, name):
    """Writing to /dev/full fails as on a full disk."""
    config, data, wanted = interrupted
    good = {path: path.read_bytes() for path in config.out.glob("checkpoint*.pt")}
    assert len(good) == 2
    (config.out / name).symlink_to("/dev/full")
    with pytest.raises(TrainError, match=r"--out: got .*No space left on device.*--resume goes on"):
        train(config, data)
    if name == "checkpoint.pt.tmp":
        assert {path: path.read_bytes() for path in config.out.glob("checkpoint*.pt")} == good
    (config.out / name).unlink(missing_ok=True)
    train(config, data)
    assert equal(left(config.out), wanted)


def test_full_disk_under_features(interrupted):
    config, data, wanted = interrupted
    (config.out / "features").mkdir()
    (config.out / "features/view 1, rank 0").symlink_to("/dev/full")
    with pytest.raises(TrainError, match=r"--views: got No space left .*view 1.*--views 0"):
        train(config, data)
    assert load(config.out / "checkpoint.pt")["stage"] == 1
    train(config, data)  # the link is gone
    assert equal(left(config.out), wanted)


def test_full_disk_is_told_by_the_command(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "clear", lambda config: None)
    (tmp_path / "result.json.tmp").symlink_to("/dev/full")
    flags = [*FLAGS, "--data", folder, "--out", tmp_path, "--epochs", 1, "--stage2-epochs", 0]
    with pytest.raises(TrainError, match=r"No space left on device.*result\.json"):
        script.main([*map(str, flags)])
    assert load(tmp_path / "checkpoint.pt")["epoch"] == 1
    assert not (tmp_path / "result.json").exists()


def finite(state):
    tensors = [*state["net"].values(), *state["head"].values()]
    tensors += [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
    return all(t.isfinite().all() for t in tensors)


def test_divergence(small_net, tmp_path):
    data = in_memory()
    with pytest.raises(TrainError, match=r"--lr: got 1e\+20.* loss became (nan|inf) in epoch 1"):
        train(configure(tmp_path / "a", lr=1e20, head="softmax"), data)
    assert not (tmp_path / "a/checkpoint.pt").exists()


@pytest.mark.parametrize("minutes", [15.0, NOW])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("number", [6, 8, 11])  # in the 2nd epoch, in its last step, in stage 2
def test_nan(monkeypatch, undisturbed, small_net, tmp_path, minutes, poison, number):
    """A NaN in one step: of the loss, or of the gradient alone, which shows a step later."""
    data, settings, _, wanted = undisturbed
    config = configure(tmp_path, **settings, checkpoint_minutes=minutes)
    forward, calls = script.Classifier.forward, itertools.count(1)

    def poisoned(*args):
        loss, counts = forward(*args)
        if next(calls) == number:
            if poison == "gradient":
                loss.register_hook(lambda gradient: gradient * math.nan)
            else:
                loss = loss * math.nan
        return loss, counts

    with monkeypatch.context() as patch, pytest.raises(TrainError, match="became nan in epoch"):
        patch.setattr(script.Classifier, "forward", poisoned)
        train(config, data)
    assert not (tmp_path / "result.json").exists()
    saved = load(tmp_path / "checkpoint.pt")
    assert finite(saved)
    train(dataclasses.replace(config, resume=True), data)
    assert equal(left(tmp_path)[:3], wanted[:3])


# Trust


class Executed:
    """A pickle that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_torch_load_is_only_called_with_weights_only():
    calls = [
        call
        for path in (ROOT / "train").glob("*.py")
        for call in re.findall(r"torch\.load\([^()]*\)|pickle\.|np\.load", path.read_text())
    ]
    assert len(calls) >= 2
    assert all("weights_only=True" in call for call in calls), calls


def test_pickles_are_not_executed(interrupted, tmp_path):
    config, data, _ = interrupted
    trap = tmp_path / "executed"
    model = {"feat_state_dict": Executed(trap), "fc_state_dict": {}}
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Executed(trap)))
    for name in ("model.pt", "bare.pt"):
        changed = {"model": tmp_path / name, "resume": False}
        with pytest.raises(TrainError, match=r"--model: got .*unreadable"):
            train(dataclasses.replace(config, **changed), data)
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        torch.save(load(config.out / name) | {"net": Executed(trap)}, config.out / name)
    with pytest.raises(TrainError, match=r"unreadable .*unreadable "):
        train(config, data)
    assert not trap.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert trap.exists()  # the trap works


# Two processes


ODD = (5, 3, 2, 1)
JOBS = {  # settings of a run, its data, and --accumulate of the run in one process
    "plain": ({}, ODD, 1),
    "accumulate": ({"accumulate": 2}, ODD, 4),
    "uncached": ({"views": 0, "head": "softmax"}, ODD, 1),
    "one step": ({"epochs": 1, "stage2_epochs": 0, "batch_size": 28}, ODD, 1),
    "batch norm": ({"net": "convnet", "views": 0, "stage2_epochs": 1, "lr": 0.3}, ODD, None),
    "one image": ({"net": "convnet", "epochs": 1, "stage2_epochs": 1}, (1, 0, 0, 0), 1),
}


def job(out, name, **changes):
    settings, sizes, _ = JOBS[name]
    # 28 images in batches of 20: the rest of 8 is enough for 4 parts.
    data = in_memory((13, 8, 4, 3), sizes, side=32, channels=3)
    settings = {"net": "timm:test_convnext", "batch_size": 20, "views": 2} | settings | changes
    return configure(out / name, **settings), data


def join(out, environment):
    """One of the processes: all jobs, and its results in a file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    rank, world, device = distributed.start("cpu")
    results = {n: script.train(script.Run(*job(out, n), rank, world, device)) for n in JOBS}
    (out / f"{rank}.json").write_text(json.dumps(results))
    distributed.finish()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    processes = [FORK.Process(target=join, args=(out, env)) for env in ranks_environment(2)]
    for process in processes:
        process.start()
    for process in processes:
        finish(process)
    results = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    return out, results[0]


def close(a, b, tolerance=1e-5):
    """Tensors of two states, each relative to its norm."""
    assert list(a) == list(b)
    for name in a:
        if a[name].is_floating_point():
            difference = (a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-6)
            assert difference <= tolerance, (name, difference)


@pytest.mark.parametrize("name", ["plain", "accumulate", "uncached", "one image"])
def test_two_processes_agree_with_one(two_processes, tmp_path, name):
    out, results = two_processes
    config, data = job(tmp_path, name, accumulate=JOBS[name][2])
    wanted = train(config, data)
    size = len(data.test)
    for stage in ("stage1", "stage2"):
        for key in ("feat_state_dict", "fc_state_dict"):
            if config.net != "convnet":  # batch norm sees half the images
                a, b = (load(path / f"{stage}.pt")[key] for path in (out / name, tmp_path / name))
                close(a, b)
        report = results[name][stage]
        assert images_in(report) == size
        assert report["error1"] * size / 100 == pytest.approx(round(report["error1"] * size / 100))
        if config.net != "convnet":
            for key in ("error1", "error5", "many", "medium", "few"):
                assert report[key] == wanted[stage][key]
            assert report["loss"] == pytest.approx(wanted[stage]["loss"], rel=1e-5)
            assert report["cosine"]["overall"] == pytest.approx(
                wanted[stage]["cosine"]["overall"], rel=1e-4, abs=1e-5
            )
    if config.net != "convnet":
        mine, theirs = records(out / name), records(tmp_path / name)
        assert list(mine) == list(theirs) and len(mine) == 4
        for key in mine:
            figures = {k: mine[key][k] for k in ("loss", "error1", "error5", "lr")}
            assert figures == pytest.approx({k: theirs[key][k] for k in figures}, rel=1e-5)
            scale = theirs[key]["scale"]  # a softmax head has none
            assert mine[key]["scale"] == (scale and pytest.approx(scale, rel=1e-5))


def test_gradients_of_two_processes(two_processes, tmp_path):
    """After one step the momentum is the gradient, and weight decay's part of it."""
    config, data = job(tmp_path, "one step")
    train(config, data)
    a, b = (load(path / "one step/checkpoint.pt") for path in (two_processes[0], tmp_path))
    assert len(a["optimizer"]["state"]) > 50

    def momenta(state):
        return {n: s["momentum_buffer"] for n, s in state["optimizer"]["state"].items()}

    close(momenta(a), momenta(b))
    assert a["totals"].tolist() == b["totals"].tolist() == [0] * 4
    mine, theirs = records(two_processes[0] / "one step"), records(tmp_path / "one step")
    assert mine[1, 1]["loss"] == pytest.approx(theirs[1, 1]["loss"], rel=1e-6)


def test_batch_norm_is_one_in_two_processes(two_processes):
    """The last epoch was evaluated with the statistics that its model file has."""
    out, results = two_processes
    logged = records(out / "batch norm")
    for stage, epoch in ((1, 2), (2, 1)):
        seen, report = logged[stage, epoch]["test"], results["batch norm"][f"stage{stage}"]
        assert seen == {key: report[key] for key in seen}


def test_torchrun(folder, tmp_path):
    """SIGTERM to torchrun saves within the epoch; what its processes end with, resumed, is bitwise
    what they would have."""
    flags = ["--dataset", "list", "--device", "cpu", "--batch-size", 12, "--data", folder]
    flags += ["--lr", 0.05, "--net", "timm:test_convnext", "--augment", "small"]
    flags += ["--image-size", 32, "--epochs", 3, "--stage2-epochs", 1, "--views", 1]
    out = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "-m", "train", *flags, "--out", out]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "torchrun.txt", "w") as log:
        process = subprocess.Popen(
            [*map(str, torchrun)], cwd=ROOT, env=settings, stdout=log, stderr=log
        )
        try:
            wait_for(process, lambda: lines(out) >= 1)
            time.sleep(0.1)  # past the checkpoint of that epoch
            process.terminate()
            assert process.wait(60)
        finally:
            process.kill()
    printed = (tmp_path / "torchrun.txt").read_text()
    assert "stopped by a signal" in printed
    assert "2 process(es), cpu" in printed
    saved = load(out / "checkpoint.pt")
    assert saved["stage"] == 1 and saved["step"] in (0, 8, 16)  # of 24
    assert lines(out) == saved["epoch"] and not (out / "result.json").exists()

    def both(code, *more, before=()):
        for one in [
            launch(tmp_path / f"{env['RANK']}.txt", *flags, *more, before=at, **env)
            for env, at in itertools.zip_longest(ranks_environment(2), before)
        ]:
            finish(one, code)

    # A signal to one process stops both, at the same step.
    both(143, "--out", out, "--resume", before=(None, (signal_in_step, 3)))
    again = load(out / "checkpoint.pt")
    done = [24 * state["epoch"] + state["step"] for state in (saved, again)]
    assert done[1] == done[0] + 8 >= 32 and (saved["step"] or again["step"])
    both(0, "--out", out, "--resume")
    assert "%" in (tmp_path / "0.txt").read_text()
    assert "%" not in (tmp_path / "1.txt").read_text()  # only the first tells
    both(0, "--out", tmp_path / "w")
    assert equal(left(out), left(tmp_path / "w"))


# Waiting for the device


class Waits(TorchDispatchMode):
    """Counts what makes the host wait, wherever the tensor is."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__",
                     "__int__", "__index__", "__contains__"):  # fmt: skip
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def call(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waiting = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}
        self.count += function.overloadpacket.__name__ in waiting
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("views", [0, 1])
@pytest.mark.parametrize(
    "settings", [{}, {"head": "softmax", "accumulate": 2}, {"precision": "fp16", "bn": "frozen"}]
)
def test_no_wait_per_step(monkeypatch, small_net, tmp_path, views, settings):
    """In both stages' training of images in memory, loading them included, three times as many
    steps (below LOOK) are no wait more. More epochs are: the count does see waits."""
    fit = script.fit

    def waits(steps, epochs):
        data = in_memory((8 * steps - 4, 2, 1, 1))
        config = configure(tmp_path, epochs=epochs, views=views, **settings)
        with monkeypatch.context() as patch:
            counter = Waits(patch)

            def counted(*args):  # features for stage 2 are written to disk before, not here
                before = counter.count
                with counter:
                    result = fit(*args)
                total.append(counter.count - before)
                return result

            total = []
            patch.setattr(script, "fit", counted)
            train(config, data)
        return sum(total)

    assert waits(4, 2) == waits(12, 2) < waits(4, 4)


# Stage 2


def is_statistic(name):
    return "running" in name or "tracked" in name


@pytest.mark.parametrize("bn", ["frozen", "batch", "shift"])
@pytest.mark.parametrize("views", [0, 2])
def test_stage2_leaves_the_weights_alone(tmp_path, bn, views):
    data = in_memory()
    train(configure(tmp_path, bn=bn, views=views), data)
    before, after = feat(tmp_path / "stage1.pt"), feat(tmp_path / "stage2.pt")
    weights = [name for name in before if not is_statistic(name)]
    assert len(weights) == 9 and len(before) == 18
    assert all(torch.equal(before[name], after[name]) for name in weights)
    moved = [not torch.equal(before[n], after[n]) for n in before if is_statistic(n)]
    assert all(moved) if bn == "batch" else any(moved) == (bn == "shift")
    if bn == "batch":  # 2 epochs of 3 steps, whatever the number of views
        steps = [after[n] - before[n] for n in before if "tracked" in n]
        assert steps == [6, 6, 6]


def test_shift_takes_the_mean_over_balanced_batches(tmp_path):
    data = in_memory()
    config = configure(tmp_path, bn="shift", epochs=3)
    train(config, data)
    run, net = script.Run(config, data), script.make_net("convnet", 1)
    net.load_state_dict(feat(tmp_path / "stage1.pt"))
    norms = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    inputs = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.register_forward_hook(lambda _, x, __, name=name: inputs[name].append(x[0]))
    labels = []
    net.train()
    with torch.no_grad():
        for images, label in run.loaders["train"](*run.epoch(2, 0)):
            net(images)
            labels.append(label)
    assert torch.bincount(torch.cat(labels)).float().std() <= 4  # of 13, 7, 4 and 2 images
    after = feat(tmp_path / "stage2.pt")
    for name, batches in inputs.items():
        assert len(batches) == 3
        mean = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
        var = torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0)
        torch.testing.assert_close(after[f"{name}.running_mean"], mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after[f"{name}.running_var"], var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bn", ["frozen", "batch", "shift"])
def test_as_many_views_as_epochs_change_nothing(tmp_path, bn):
    data = in_memory()
    for views in (0, 3, 5):
        config = configure(tmp_path / str(views), bn=bn, views=views, stage2_epochs=3)
        train(config, data)
    wanted = load(tmp_path / "0/stage2.pt")
    for views in (3, 5):
        assert equal(load(tmp_path / str(views) / "stage2.pt"), wanted)
        a, b = records(tmp_path / str(views)), records(tmp_path / "0")
        assert {k: r["loss"] for k, r in a.items()} == {k: r["loss"] for k, r in b.items()}


def test_cached_features_are_what_the_net_gives(tmp_path):
    data = in_memory(val=(2, 2, 2, 2))
    run = script.Run(configure(tmp_path, bn="frozen", views=2, accumulate=2), data)
    net = script.build_net(run)
    cached = script.cache_features(run, net)
    assert set(cached) == {"train", "test", "val"} and len(cached["train"]) == 2
    seen = []
    for view in range(2):
        batches = list(run.loaders["train"](*run.epoch(2, view)))
        assert len(batches) == 6  # 3 steps of 2 parts
        seen.append(torch.cat([images for images, _ in batches]))
        for i, (images, labels) in enumerate(batches):
            features, theirs = cached["train"][view].batch(i)
            assert torch.equal(features, net(images)) and torch.equal(theirs, labels)
    assert not torch.equal(*seen)
    for name in ("test", "val"):
        split = getattr(data, name)
        images, labels = next(run.loaders[name](*run.test_epoch(len(split))))
        features, theirs = cached[name].batch(0)
        assert torch.equal(features, net(images)) and torch.equal(theirs, split.labels)
        assert torch.equal(labels, split.labels)


def test_views_are_used_again_in_another_order(monkeypatch, small_net, tmp_path):
    batch, asked = Cached.batch, []

    def spy(self, i):
        asked.append((self, i))
        return batch(self, i)

    monkeypatch.setattr(Cached, "batch", spy)
    data = in_memory((60, 30, 4, 2))  # 12 steps
    train(configure(tmp_path, views=2, stage2_epochs=4, eval_every=4), data)
    epochs = [asked[start : start + 12] for start in range(0, 48, 12)]
    order = [[i for _, i in epoch] for epoch in epochs]
    assert order[0] == order[1] == list(range(12))
    assert all(sorted(o) == order[0] for o in order)
    assert order[0] != order[2] != order[3] != order[1]
    views = [{id(cached) for cached, _ in epoch} for epoch in epochs]
    assert views[0] == views[2] != views[1] == views[3] and len(views[0]) == 1


# Checkpoints of the reference


class Block(nn.Module):
    def __init__(self, fan_in, fan_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.downsample = None
        if stride > 1:
            conv = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(fan_out))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (self.downsample(x) if self.downsample else x))


class ResNet10(nn.Module):
    """As in the reference, by its description; features after the final ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        for i in range(4):
            block = Block(widths[i], widths[i + 1], 1 if i == 0 else 2)
            setattr(self, f"layer{i + 1}", nn.Sequential(block))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return x.mean((2, 3))


def write_reference(path, classes, *, prefix="", kappa=16.0, bias=False, linear=False):
    """A model_best.pth.tar, and the logits that its net and head give."""
    torch.manual_seed(0)
    net = ResNet10().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    head = {"weight": torch.randn(classes, 512)}
    if not linear:
        head["s_"] = torch.tensor([2.5])
        head |= {} if kappa is None else {"kappa": torch.tensor([kappa])}
    head |= {"bias": torch.randn(classes) / 4} if bias or linear else {}
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    stats = {"train": [50.0, 40.0], "test": [60.0, 55.5], "lr": [0.1, 0.05]}
    state = {"epoch": 90, "arch": "resnet10", "stats": stats, "optimizer": optimizer.state_dict()}
    state["feat_state_dict"] = {prefix + name: t for name, t in net.state_dict().items()}
    torch.save(state | {"fc_state_dict": head}, path)

    @torch.no_grad()
    def logits(images):
        features = net(images)
        if linear:
            return F.linear(features, head["weight"], head["bias"])
        cosine = F.linear(F.normalize(features), F.normalize(head["weight"]))
        sharp = 0.0 if kappa is None else kappa
        phi = (1 + cosine) / (1 + sharp * (1 - cosine)) - 1
        return (F.softplus(head["s_"]) + 1) * (phi + head.get("bias", 0))

    return logits


REFERENCES = {
    "t-vMF": {},
    "t-vMF, DataParallel, bias": {"prefix": "module.", "kappa": 4.0, "bias": True},
    "CosLoss": {"kappa": None},
    "linear": {"linear": True, "prefix": "module."},
}


@pytest.mark.parametrize("options", REFERENCES.values(), ids=REFERENCES)
def test_reference_checkpoint(tmp_path, options):
    data = in_memory(side=32, channels=3)
    path = tmp_path / "model_best.pth.tar"
    logits = write_reference(path, 4, **options)
    settings = {"net": "resnet10", "model": path, "bn": "frozen", "batch_size": 26}
    config = configure(tmp_path / "out", **settings, stage2_epochs=1, views=1)
    run = script.Run(config, data)
    net = script.build_net(run).eval()
    head = script.head_of_state(checkpoint.fill(net, path, "resnet10"))
    images, labels = next(run.loaders["test"](*run.test_epoch(len(data.test))))
    wanted = logits(images)
    assert wanted.std() > 0.005
    with torch.no_grad():
        torch.testing.assert_close(head.logits(net(images)), wanted, rtol=1e-5, atol=1e-5)
    report = script.test_model(run)["model"]
    assert report["loss"] == pytest.approx(F.cross_entropy(wanted, labels).item(), rel=1e-5)
    wrong = wanted.argmax(1) != labels
    assert report["error1"] == pytest.approx(100 * wrong.double().mean().item())

    if "prefix" in options and "kappa" in options:
        assert list(script.train(run)) == ["stage2"]
        saved = load(path)["feat_state_dict"]
        assert equal(dict(feat(config.out / "stage2.pt")),
                     {name.removeprefix("module."): t for name, t in saved.items()})  # fmt: skip


def test_wrong_models_are_refused(folder, tmp_path, capsys):
    path = tmp_path / "model_best.pth.tar"
    write_reference(path, 5)
    (tmp_path / "garbage").write_bytes(b"garbage" * 99)
    torch.save({"state_dict": {}}, tmp_path / "other.pt")

    def evaluate(model, *flags):
        flags = [*FLAGS, "--data", folder, "--out", tmp_path / "out", "--model", model, *flags]
        script.main([*map(str, flags), "--evaluate"])

    with pytest.raises(TrainError, match=r"got .*tar with 5 classes, wanted the 12 of --dataset"):
        evaluate(path, "--net", "resnet10")
    with pytest.raises(TrainError, match=r"got .*tar, which is no --net convnet"):
        evaluate(path)
    with pytest.raises(TrainError, match=r"got .*garbage, unreadable"):
        evaluate(tmp_path / "garbage")
    with pytest.raises(TrainError, match=r"other\.pt, unreadable \('feat_state_dict'\)"):
        evaluate(tmp_path / "other.pt")
    with pytest.raises(TrainError, match="none, which is no file"):
        evaluate(tmp_path / "none")


# The scale


def test_still_rises():
    def history(rise):
        return [1.7 + 10 * rise(t / 20) for t in range(21)]

    assert script.still_rises(history(lambda t: t), 20)  # steadily in epochs
    assert script.still_rises(history(lambda t: math.sin(math.pi * t / 2) ** 1.5), 20)
    assert not script.still_rises(history(lambda t: 1 - math.exp(-9 * t)), 20)  # settled
    assert not script.still_rises(history(lambda t: 0.0), 20)
    assert not script.still_rises(history(lambda t: -t), 20)
    assert not script.still_rises([1.7, 1.75], 1)  # a twentieth is no rise
    assert script.still_rises([1.7, 2.5], 1)


def test_scale_has_a_start_and_a_rate_of_its_own(small_net, tmp_path, capsys):
    data, scales = in_memory((60, 30, 8, 4)), {}

    def printed():
        return " ".join(capsys.readouterr().out.split())

    for name, settings in {
        "reference": {}, "fast": {"scale_lr": 10.0}, "slow": {"scale_lr": 0.1},
        "fixed": {"scale_lr": 0.0, "scale_start": 20.0, "weight_decay": 0.0},
    }.items():  # fmt: skip
        config = configure(tmp_path / name, kappa=4.0, **settings)
        train(config, data)
        scales[name] = [record["scale"] for record in records(config.out).values()]
        warned = "the scale still rose at the end of stage 1" in printed()
        assert warned == (name in ("reference", "fast")), name
    assert scales["fixed"] == pytest.approx([20.0] * 4)
    assert scales["slow"][1] < scales["reference"][1] < scales["fast"][1]
    assert 1 + math.log(2) < scales["slow"][0] < scales["reference"][0]
    # One step of the scale's parameter is scale_lr times as long.
    rise = {n: math.log(math.expm1(scales[n][0] - 1)) for n in ("slow", "reference")}
    assert rise["reference"] / rise["slow"] == pytest.approx(10, rel=0.3)


# Images that cannot be read


def test_bad_images(tmp_path):
    data = write_folder(tmp_path / "data", train=(12, 6, 3), test=(3, 3, 3))
    bad = [data / "train/1/14.png", data / "test/2/7.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:60])
    bad[1].write_text("no image")
    flags = [*FLAGS, "--data", data, "--epochs", 2, "--stage2-epochs", 1, "--batch-size", 8]
    flags += ["--views", 0]  # a finished run, resumed, reads no image of the training again
    pipelines = {"memory": [], "files": ["--augment", "inat", "--image-size", 16]}
    pipelines["files"] += ["--net", "convnet", "--workers", 0]
    for name, pipeline in pipelines.items():
        now = [*map(str, [*flags, *pipeline, "--out", tmp_path / name])]
        with pytest.raises(TrainError, match=rf"{bad[0]}: got an image that cannot be read") as e:
            script.main(now)
        assert "--bad-images skip" in str(e.value)
        script.main([*now, "--bad-images", "skip"])
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["dataset"]["bad_images"] == 2
        for stage in ("stage1", "stage2"):
            assert images_in(result[stage]) == 8  # of 9
        script.main([*now, "--bad-images", "skip", "--resume"])
        again = json.loads((tmp_path / name / "result.json").read_text())
        assert again["dataset"] == result["dataset"]


# Many runs


def test_compare(monkeypatch, folder, tmp_path):
    """One run is finished, one was killed."""
    from train import compare  # with what draws: not for each process above

    flags = [*FLAGS, "--data", folder, "--epochs", 2, "--stage2-epochs", 1, "--views", 1]
    heads = ["--head", "softmax", "--seed"]
    runs = [tmp_path / f"softmax-seed{seed}" for seed in range(2)]
    done = launch(tmp_path / "0.txt", *flags, *heads, 0, "--out", runs[0])
    writing = (kill_in_the_middle_of_writing, 3)
    stopped = launch(tmp_path / "1.txt", *flags, *heads, 1, "--out", runs[1], before=writing)
    finish(stopped, -signal.SIGKILL)
    finish(done)
    before = (runs[0] / "result.json").stat().st_mtime_ns
    assert (runs[1] / checkpoint.NAME).exists() and not (runs[1] / "result.json").exists()
    once = [*map(str, flags), "--heads", "softmax", "--seeds", "0,1", "--out", str(tmp_path)]
    monkeypatch.chdir(ROOT)
    compare.main(once)
    assert (runs[0] / "result.json").stat().st_mtime_ns == before
    assert not (runs[0] / "log.txt").exists()
    configs = [json.loads((run / "result.json").read_text())["config"] for run in runs]
    assert [config["resume"] for config in configs] == [False, True]
    assert [config["seed"] for config in configs] == [0, 1]
    page = tmp_path / "report/index.html"
    assert page.exists()

    reported, calls = [], []
    monkeypatch.setattr(compare.report, "main", reported.append)
    monkeypatch.setattr(subprocess, "run", None)  # nothing is run again
    compare.main(once)
    assert reported == [[*map(str, runs), "--out", str(tmp_path / "report")]]

    def fail(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(TrainError, match=r"tvmf --seed 3 .*failed.*tvmf64-seed3/log\.txt"):
        compare.main([*map(str, flags), "--heads", "tvmf:64", "--seeds", "3", *once[-2:]])
    assert calls[0][-4:] == ["--kappa", "64", "--out", str(tmp_path / "tvmf64-seed3")]
    (tmp_path / "tvmf64-seed3/checkpoint.previous.pt").touch()  # killed between two renames
    with pytest.raises(TrainError):
        compare.main([*map(str, flags), "--heads", "tvmf:64", "--seeds", "3", *once[-2:]])
    assert calls[1] == [*calls[0], "--resume"] and len(reported) == 1
    with pytest.raises(TrainError, match=r"softmax-seed0, a run with \{'epochs': 2\}"):
        compare.main([*once, "--epochs", "3"])
