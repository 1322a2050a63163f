"""The command as a user gives it, what it leaves in OUT, and what it refuses."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.train.image_files import write_lists
from tests.train.runs import (
    FLAGS,
    FOLDER,
    ROOT,
    equal,
    finish,
    launch,
    left,
    lines,
    load_state,
    main,
    records,
    wait_for,
    write_folder,
)
from train import checkpoint, command
from train.config import TrainError


@pytest.fixture(scope="module")
def command_run(folder, tmp_path_factory):
    """The command as a user gives it: OUT, what it prints, and the modules that it imports."""
    out = tmp_path_factory.mktemp("command") / "out"
    flags = [*FLAGS, "--data", folder, "--out", out, "--epochs", 10, "--stage2-epochs", 5]
    settings = {"COLUMNS": "120", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "train", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


def test_command_trains_a_folder_with_lists(command_run):
    out, printed, _ = command_run
    result = json.loads((out / "result.json").read_text())
    assert result["dataset"]["counts"] == list(FOLDER)
    assert (result["dataset"]["train"], result["dataset"]["test"]) == (286, 60)
    table = [line.replace("│", " ").split() for line in printed.splitlines()]
    for stage in ("stage1", "stage2"):
        report = result[stage]
        names = ("error1", "adjusted_error1", "error5", "many", "medium", "few")
        figures = [report[name] for name in names]
        assert all(0 <= figure <= 100 for figure in figures)
        assert report["selected_on"] == "last epoch"
        marked = ["(!)"] if report["warning"] else []
        row = [stage[-1], *marked, *(f"{figure:.1f}" for figure in figures), "last", "epoch"]
        assert row in table
        # Each class has 5 test images; 1 class has more than 100 images, 3 have 20 to 100.
        groups = report["many"] * 5 + report["medium"] * 15 + report["few"] * 40
        assert groups / 60 == pytest.approx(report["error1"])
        assert report["error1"] * 60 / 100 == pytest.approx(round(report["error1"] * 60 / 100))
        assert report["error1"] < 70  # chance is 92
    assert lines(out) == 10 and lines(out, 2) == 5
    assert not (out / "features").exists()


def test_records_and_results_agree(command_run):
    out, *_ = command_run
    result, logged = json.loads((out / "result.json").read_text()), records(out)
    for stage in (1, 2):
        mine = [record for (number, _), record in logged.items() if number == stage]
        assert mine[-1]["test"]["error1"] == result[f"stage{stage}"]["error1"]
        assert mine[-1]["test"]["loss"] == pytest.approx(result[f"stage{stage}"]["loss"])


def test_saved_models_are_those_of_the_result(command_run, folder):
    out, *_ = command_run
    result = json.loads((out / "result.json").read_text())
    for stage in ("stage1", "stage2"):
        folders = ["--data", str(folder), "--out", str(out), "--model", str(out / f"{stage}.pt")]
        main([*FLAGS, *folders, "--evaluate"])
        report = json.loads((out / "evaluation.json").read_text())["model"]
        assert report["selected_on"] == "as given"
        assert {k: report[k] for k in ("error1", "error5", "many", "medium", "few")} == {
            k: result[stage][k] for k in ("error1", "error5", "many", "medium", "few")
        }
    assert (out / "checkpoint.pt").exists() and (out / "result.json").exists()


def test_resuming_a_finished_run_changes_nothing(command_run, folder):
    out, *_ = command_run
    before, log = left(out), (out / "metrics.jsonl").read_bytes()
    result = json.loads((out / "result.json").read_text())
    flags = [*FLAGS, "--data", folder, "--out", out, "--epochs", 10, "--stage2-epochs", 5]
    main([*flags, "--resume"])
    assert equal(left(out), before)
    assert (out / "metrics.jsonl").read_bytes() == log
    again = json.loads((out / "result.json").read_text())
    assert again.pop("config") | {"resume": False} == result.pop("config")
    assert again == result


def test_new_run_removes_what_an_older_one_left(folder, tmp_path):
    made = ["checkpoint.pt", "stage1.pt", "result.json", "metrics.jsonl"]
    old = [*made, "checkpoint.previous.pt", "stage2.pt"]
    old += [f"stage{n}.analysis.json" for n in (1, 2)]
    for name in old:
        (tmp_path / name).write_text("old")
    flags = [*FLAGS, "--data", folder, "--out", tmp_path, "--epochs", 1, "--stage2-epochs", 0]
    main(flags)
    left = [*made, "stage1.analysis.json"]
    assert [name for name in old if (tmp_path / name).exists()] == left
    assert "old" not in (tmp_path / "metrics.jsonl").read_text()
    assert "stage2" not in json.loads((tmp_path / "result.json").read_text())


def test_refused_run_leaves_an_older_one_alone(folder, tmp_path):
    flags = [*FLAGS, "--data", folder, "--out", tmp_path, "--epochs", 1, "--stage2-epochs", 0]
    flags = [*map(str, flags)]
    main(flags)

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
            main([*flags, *more])
        assert kept() == before


def test_two_runs_in_one_directory_are_refused(folder, tmp_path):
    flags = [*FLAGS, "--data", folder, "--out", tmp_path, "--epochs", 50, "--stage2-epochs", 0]
    first = launch(tmp_path / "log.txt", *flags)
    wait_for(first, lambda: lines(tmp_path) >= 1)
    with pytest.raises(TrainError, match="where a run goes on"):
        main([*flags, "--epochs", "1"])
    first.kill()
    finish(first, -signal.SIGKILL)
    main([*flags, "--epochs", "1"])
    assert lines(tmp_path) == 1


@pytest.mark.parametrize(
    "size, flags, net",
    [(64, [], "gridnet"), (65, [], "resnet10"), (8, ["--net", "resnet50"], "resnet50")],
)
def test_image_size_decides_on_the_net(tmp_path, monkeypatch, size, flags, net):
    class Chosen(Exception):
        pass

    def session(config, *others):
        raise Chosen(config.net)

    monkeypatch.setattr(command, "Session", session)
    write_lists(tmp_path, (size, size), train=[0, 1], test=[0])
    args = ["--dataset", "list", "--data", str(tmp_path), "--device", "cpu", *flags]
    with pytest.raises(Chosen, match=f"^{net}$"):
        main(args)


def test_bad_images(tmp_path):
    data = write_folder(tmp_path / "data", train=(12, 6, 3), test=(3, 3, 3))
    bad = [data / "train/1/14.png", data / "test/2/7.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:60])
    bad[1].write_text("no image")
    flags = [*FLAGS, "--data", data, "--epochs", 2, "--stage2-epochs", 1, "--batch-size", 8]
    pipelines = {"memory": [], "files": ["--augment", "inat", "--image-size", 16]}
    pipelines["files"] += ["--net", "convnet", "--workers", 0]
    for name, pipeline in pipelines.items():
        with pytest.raises(TrainError, match=rf"images that cannot be read, .*{bad[0]} \("):
            main([*flags, *pipeline, "--out", tmp_path / name])


def test_bad_images_are_named_together(tmp_path, monkeypatch):
    monkeypatch.setattr("train.images.NAMED", 2)
    data = write_folder(tmp_path / "data", train=(12, 6, 3), test=(3, 3, 3))
    bad = [data / f"train/0/{i}.png" for i in (1, 4, 9)]
    for path in bad:
        path.write_text("no image")
    named = rf"got 3 of 21 train images .*in their place: {bad[0]} \(.*\); {bad[1]} \([^;]*\)$"
    with pytest.raises(TrainError, match=named):
        main([*FLAGS, "--data", data, "--out", tmp_path / "out"])


def test_full_disk_is_told_by_the_command(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "clear", lambda out: None)
    (tmp_path / "result.json.tmp").symlink_to("/dev/full")
    flags = [*FLAGS, "--data", folder, "--out", tmp_path, "--epochs", 1, "--stage2-epochs", 0]
    with pytest.raises(TrainError, match=r"No space left on device.*result\.json"):
        main(flags)
    assert load_state(tmp_path / "checkpoint.pt")["epoch"] == 1
    assert not (tmp_path / "result.json").exists()


def imported(importtime):
    """Which heavy libraries are in the output of `python -X importtime`."""
    heavy = {"torch", "torchvision", "matplotlib", "plotly", "scipy", "sklearn", "timm"}
    return heavy & {line.rpartition("|")[2].strip() for line in importtime.splitlines()}


def test_imports_of_a_run(command_run):
    """A run imports no library of plots or tables."""
    assert imported(command_run[2]) == {"torch", "torchvision"}


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not imported(done.stderr) and "tyro" in done.stderr
