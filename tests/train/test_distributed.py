"""Two processes: the same results as one process, and stops that both agree on."""

import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from tests.train.runs import (
    FORK,
    ROOT,
    configure,
    equal,
    finish,
    images_in,
    in_memory,
    launch,
    left,
    lines,
    load_state,
    ranks_environment,
    records,
    signal_in_step,
    train_both,
    wait_for,
)
from train import distributed, stages
from train.session import Session

ODD = (5, 3, 2, 1)
JOBS = {  # a run's settings, and test images of each class
    "plain": ({}, ODD),
    "uncached": ({"views": 0, "head": "softmax"}, ODD),
    "one step": ({"epochs": 1, "stage2_epochs": 0, "batch_size": 28}, ODD),
    "batch norm": ({"net": "convnet", "views": 0, "stage2_epochs": 1, "lr": 0.3}, ODD),
    "one image": ({"net": "convnet", "epochs": 1, "stage2_epochs": 1}, (1, 0, 0, 0)),
}


def job(out, name, **changes):
    settings, sizes = JOBS[name]
    # 28 images make batches of 20 and 8.
    data = in_memory((13, 8, 4, 3), sizes, side=32, channels=3)
    settings = {"net": "timm:test_convnext", "batch_size": 20, "views": 2} | settings | changes
    return configure(out / name, **settings), data


def join(out, environment):
    """Runs all jobs as one of the processes, and writes their results to a file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    rank, world, device = distributed.start("cpu")
    results = {n: stages.train(Session(*job(out, n), rank, world, device)) for n in JOBS}
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
    """Compares the tensors of two states, each relative to its norm. In the one number of the
    scale terms of both signs cancel, so that roundings weigh more."""
    assert list(a) == list(b)
    for name in a:
        if a[name].is_floating_point():
            difference = (a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-6)
            allowed = tolerance * (10 if a[name].numel() == 1 else 1)
            assert difference <= allowed, (name, a[name].shape, difference)


@pytest.mark.parametrize("name", ["plain", "uncached", "one image"])
def test_two_processes_agree_with_one(two_processes, tmp_path, name):
    out, results = two_processes
    config, data = job(tmp_path, name)
    wanted = train_both(config, data)
    size = len(data.test)
    for stage in ("stage1", "stage2"):
        for key in ("feat_state_dict", "fc_state_dict"):
            if config.net != "convnet":  # whose batch norm sees half of the images in each process
                a, b = (
                    load_state(path / f"{stage}.pt")[key] for path in (out / name, tmp_path / name)
                )
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
    """After one step the momentum is the gradient, weight decay included."""
    config, data = job(tmp_path, "one step")
    train_both(config, data)
    a, b = (load_state(path / "one step/checkpoint.pt") for path in (two_processes[0], tmp_path))
    assert len(a["optimizer"]["state"]) > 50

    def momenta(state):
        return {n: s["momentum_buffer"] for n, s in state["optimizer"]["state"].items()}

    close(momenta(a), momenta(b))
    assert a["totals"].tolist() == b["totals"].tolist() == [0] * 4
    mine, theirs = records(two_processes[0] / "one step"), records(tmp_path / "one step")
    assert mine[1, 1]["loss"] == pytest.approx(theirs[1, 1]["loss"], rel=1e-6)


def test_batch_norm_is_one_in_two_processes(two_processes):
    """The last epoch is evaluated with the running statistics that the model file has."""
    out, results = two_processes
    logged = records(out / "batch norm")
    for stage, epoch in ((1, 2), (2, 1)):
        seen, report = logged[stage, epoch]["test"], results["batch norm"][f"stage{stage}"]
        assert seen == {key: report[key] for key in seen}


def test_torchrun(folder, tmp_path):
    """SIGTERM to torchrun saves within the epoch. Its processes, when resumed, leave bitwise the
    same files as processes that nothing disturbed."""
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
            time.sleep(0.1)  # the checkpoint of that epoch is then written
            process.terminate()
            assert process.wait(60)
        finally:
            process.kill()
    printed = (tmp_path / "torchrun.txt").read_text()
    assert "stopped by a signal" in printed
    assert "2 process(es), cpu" in printed
    saved = load_state(out / "checkpoint.pt")
    assert saved["stage"] == 1 and saved["step"] in (
        0,
        8,
        16,
    )  # of 24 steps; processes agree every 8
    assert lines(out) == saved["epoch"] and not (out / "result.json").exists()

    def both(code, *more, before=()):
        for one in [
            launch(tmp_path / f"{env['RANK']}.txt", *flags, *more, before=at, **env)
            for env, at in itertools.zip_longest(ranks_environment(2), before)
        ]:
            finish(one, code)

    # A signal to one process stops both, at the same step.
    both(143, "--out", out, "--resume", before=(None, (signal_in_step, 3)))
    again = load_state(out / "checkpoint.pt")
    done = [24 * state["epoch"] + state["step"] for state in (saved, again)]
    assert done[1] == done[0] + 8 >= 32 and (saved["step"] or again["step"])
    both(0, "--out", out, "--resume")
    assert "%" in (tmp_path / "0.txt").read_text()
    assert "%" not in (tmp_path / "1.txt").read_text()  # the first process alone prints
    both(0, "--out", tmp_path / "w")
    assert equal(left(out), left(tmp_path / "w"))
