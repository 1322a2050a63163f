"""Several runs by one command: some are finished, some are resumed, and all are reported."""

import json
import signal
import subprocess

import pytest

from tests.train.runs import FLAGS, ROOT, finish, kill_in_the_middle_of_writing, launch
from train import checkpoint, compare
from train.config import TrainError
from train.report import cli


def test_compare(monkeypatch, folder, tmp_path):
    """One of two runs has finished, the other was killed."""
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
    monkeypatch.setattr(cli, "main", reported.append)
    monkeypatch.setattr(subprocess, "run", None)  # which no run needs any more
    compare.main(once)
    assert reported == [[*map(str, runs), "--out", str(tmp_path / "report")]]

    def fail(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(TrainError, match=r"tvmf --seed 3 .*failed.*tvmf64-seed3/log\.txt"):
        compare.main([*map(str, flags), "--heads", "tvmf:64", "--seeds", "3", *once[-2:]])
    assert calls[0][-4:] == ["--kappa", "64", "--out", str(tmp_path / "tvmf64-seed3")]
    (
        tmp_path / "tvmf64-seed3/checkpoint.previous.pt"
    ).touch()  # as a kill between two renames leaves it
    with pytest.raises(TrainError):
        compare.main([*map(str, flags), "--heads", "tvmf:64", "--seeds", "3", *once[-2:]])
    assert calls[1] == [*calls[0], "--resume"] and len(reported) == 1
    with pytest.raises(TrainError, match=r"softmax-seed0, a run with \{'epochs': 2\}"):
        compare.main([*once, "--epochs", "3"])
