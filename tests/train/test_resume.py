"""Runs that are killed or stopped and resumed end bitwise as the run that nothing disturbed.

A kill is a SIGKILL of a process of its own, or an exception at a chosen call in this one, which
takes less time.
"""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch

from tests.train.runs import (
    FLAGS,
    NOW,
    configure,
    equal,
    finish,
    in_memory,
    kill_in_the_middle_of_writing,
    killed,
    launch,
    left,
    lines,
    load_state,
    mlp,
    pause_in_step,
    signal_in_step,
    train_both,
    wait_for,
)
from train import checkpoint, log, stage2, stages
from train.session import Session, Stopped

VARIANTS = {  # settings, and the net if it is not convnet
    "batch": ({"views": 0, "bn": "batch"}, None),
    "batch, cached": ({"views": 2, "bn": "batch"}, None),
    "batch, views reused": ({"views": 1, "bn": "batch", "stage2_epochs": 3}, None),
    "frozen, dropout, softmax": ({"views": 0, "bn": "frozen", "head": "softmax"}, mlp),
    "frozen, dropout, views reused": ({"views": 2, "bn": "frozen", "stage2_epochs": 3}, mlp),
    "bf16": ({"precision": "bf16", "views": 2}, mlp),
    "bf16, uncached": ({"precision": "bf16", "views": 0}, mlp),
}


@pytest.mark.parametrize("settings, net", VARIANTS.values(), ids=VARIANTS)
def test_killed_after_every_step(monkeypatch, tmp_path, settings, net):
    """A run is killed after its first checkpoint, which follows one step or epoch, and is resumed,
    again and again until it is finished."""
    if net:
        monkeypatch.setattr(stages, "make_net", lambda *_: net(0.3))
    data = in_memory(val=(3, 3, 3, 3))
    whole = configure(tmp_path / "whole", **settings)
    results = train_both(whole, data)
    part = configure(tmp_path / "part", **settings, checkpoint_minutes=NOW)
    lives = 0
    while killed(monkeypatch, part, data, checkpoint, "save", 1):
        part = dataclasses.replace(part, resume=True)
        lives += 1
        assert lives < 40  # every resumed run makes progress
        torch.manual_seed(lives)  # as generators differ in another process
        np.random.seed(lives)  # noqa: NPY002
    # An epoch has 4 steps in stage 1 (26 images) and 3 in stage 2 (24).
    steps = 4 * 2 + 3 * part.stage2_epochs
    assert lives >= steps
    assert equal(left(part.out), left(whole.out))
    assert equal(train_both(part, data), results)
    assert not equal(load_state(part.out / "stage1.pt"), load_state(part.out / "stage2.pt"))


CALLS = {  # which calls of each function a run is killed at
    (log, "write"): (1, 4),
    (Session, "evaluate"): (2, 3, 5, 6),
    (stage2, "Cached"): (1, 3),
    (checkpoint, "save_model"): (1, 2),
    (torch.optim.SGD, "step"): (1, 6, 12),
    (os, "replace"): (1, 3, 4, 5, 8, 9),
    (os, "fsync"): (4, 5, 8),
}
MOMENTS = [(*call, number) for call, numbers in CALLS.items() for number in numbers]


@pytest.mark.parametrize("where, name, number", MOMENTS, ids=lambda v: getattr(v, "__name__", v))
def test_killed_between(monkeypatch, small_net, undisturbed, tmp_path, where, name, number):
    """Killed between any two things that a run does, and then at the next checkpoint."""
    data, results, wanted = undisturbed
    config = configure(tmp_path)
    before = bool(number % 2)
    assert killed(monkeypatch, config, data, where, name, number, before=before)

    def resume():
        saved = any((tmp_path / name).exists() for name in (checkpoint.NAME, checkpoint.PREVIOUS))
        return dataclasses.replace(config, resume=saved)

    killed(monkeypatch, resume(), data, os, "replace", 2)
    assert equal(train_both(resume(), data), results)
    assert equal(left(tmp_path), wanted)


def test_sigkill(folder, tmp_path):
    """A process is killed again and again: while it trains, while it writes, in both stages."""
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


@pytest.mark.parametrize("views", [0, 2])
def test_a_stop_loses_no_step(monkeypatch, small_net, tmp_path, views):
    """A run that is asked to leave in every step still does each step only once."""
    data = in_memory()
    whole, part = (configure(tmp_path / name, views=views) for name in ("whole", "part"))
    results = train_both(whole, data)
    step, steps, running = torch.optim.SGD.step, [], []

    def stop(*args, **kwargs):
        running[-1].stopping = True
        steps.append(None)
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", stop)
    for life in range(20):
        running.append(Session(dataclasses.replace(part, resume=life > 0), data))
        try:
            assert equal(stages.train(running[-1]), results)
            break
        except Stopped:
            if life % 2:  # it is asked again in an evaluation, which then is repeated
                running.append(Session(dataclasses.replace(part, resume=True), data))
                running[-1].stopping = True
                with pytest.raises(Stopped):
                    stages.train(running[-1])
    assert len(steps) == 2 * 4 + 2 * 3
    assert equal(left(part.out), left(whole.out))


def test_sigterm_saves_within_the_epoch(folder, tmp_path):
    flags = [*FLAGS, "--data", folder, "--epochs", 2, "--stage2-epochs", 1]  # 9 steps, 8 in stage 2
    whole = launch(tmp_path / "w.txt", *flags, "--out", tmp_path / "w")
    out, log = tmp_path / "out", tmp_path / "log.txt"
    for resume, step, times, wanted in (([], 5, 1, (1, 0, 5)), (["--resume"], 11, 2, (1, 1, 7))):
        # The second run gets two signals, as torchrun forwards the one that SLURM sends to all.
        flags_now = [*flags, "--out", out, *resume]
        finish(launch(log, *flags_now, before=(signal_in_step, step, times)), 143)
        saved = load_state(out / "checkpoint.pt")
        assert (saved["stage"], saved["epoch"], saved["step"]) == wanted
        assert "--resume goes on" in log.read_text()
    finish(launch(log, *flags, "--out", out, "--resume"))
    finish(whole)
    assert equal(left(out), left(tmp_path / "w"))


def test_file_pipeline_with_workers(folder, tmp_path):
    """A run gets SIGKILL, then SIGTERM for its whole group of processes, as torchrun and SLURM send
    it. The undisturbed run has no workers."""
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
    assert load_state(out / "checkpoint.pt")["step"]
    assert not (out / "result.json").exists()

    finish(launch(log, *flags, "--resume"))
    finish(whole)
    assert equal(left(out), left(tmp_path / "w"))
