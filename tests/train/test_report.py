"""train.report: reading and grouping runs, the table, what the figures show, and the page."""

import base64
import json
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from train import report
from train.config import TrainError
from train.report import group_runs, load_run, main, make_table

FIGURES = {"curves", "frequency", "bars", "histograms", "similarity"}


def epoch(stage, number, **changes):
    record = {"stage": stage, "epoch": number, "epochs": 2, "lr": 0.1, "scale": 2.0, "loss": 1.0}
    record |= {"error1": 50.0 / number, "val": {"error1": 60.0}, "test": {"error1": 70.0}}
    return record | changes


def write_run(path, head="tvmf", kappa=16.0, seed=0, error1=10.0, select="val", **config):
    """A finished run of two epochs a stage; its last class has no test images."""
    path.mkdir()
    log = [epoch(stage, n, loss=1.0 + seed) for stage in (1, 2) for n in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    bins = {"many": [0] * 49 + [4], "medium": [1, 3] + [0] * 48, "few": [0] * 50}
    stage = {"error1": error1, "error5": 1.0, "many": 8.0, "medium": 20.0, "few": None}
    stage |= {"macro_f1": 77.0, "ece": 3.0, "selected_on": select}
    stage |= {"class_accuracy": [90.0, 80.0, 60.0, None]}
    edges = np.linspace(-1, 1, 51).tolist()
    stage["cosine_histogram"] = {"edges": edges, "target": bins, "other": bins}
    fixed = {"dataset": "digits", "net": "convnet", "head": head, "kappa": kappa, "seed": seed}
    data = {"classes": 4, "train": 410, "val": 40, "test": 30, "counts": [200, 150, 50, 10]}
    result = {"config": fixed | {"out": str(path), "select": select} | config, "dataset": data}
    (path / "result.json").write_text(json.dumps(result | {"stage1": stage, "stage2": stage}))
    return path


@pytest.fixture
def paths(tmp_path):
    """Three seeds of a t-vMF head, one of a softmax head, and an unfinished run."""
    tvmf = [write_run(tmp_path / f"t{s}", seed=s, error1=10.0 + 2 * s) for s in range(3)]
    killed = tmp_path / "killed<b>$_$"
    killed.mkdir()
    (killed / "metrics.jsonl").write_text(json.dumps(epoch(1, 1, scale=None)) + '\n{"stage')
    return [*tvmf, write_run(tmp_path / "softmax", "softmax", kappa=4.0), killed]


def frames(paths):
    return group_runs([load_run(path) for path in paths])


def test_log_of_a_killed_and_resumed_run(tmp_path):
    old, *new = map(json.dumps, (epoch(1, 2, loss=7.0), epoch(1, 1), epoch(2, 1), epoch(1, 2)))
    text = old + '\n{"stage": 1, "epo' + "\n".join(new) + '\n{"stage": 2, "epoch": 2'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert load_run(tmp_path)["epochs"] == [epoch(1, 1), epoch(1, 2), epoch(2, 1)]


def test_groups_and_labels(tmp_path):
    def seeds(paths):
        return [*frames(paths)[1].groupby("group", sort=False)["config.seed"].nunique().items()]

    runs = {"a": {"kappa": -0.25}, "b": {"device": "cuda"}}
    runs |= {"c": {"workers": 8, "data": "x", "seed": 1}, "d": {"head": "softmax", "kappa": 1.0}}
    runs |= {"e": {"head": "softmax", "kappa": 2.0, "seed": 1}, "f": {"head": "cosine"}}
    paths = [write_run(tmp_path / name, lr=0.1, **config) for name, config in runs.items()]
    order = [("softmax", 2), ("cosine", 1), ("t-vMF κ=-0.25", 1), ("t-vMF κ=16", 2)]
    assert seeds(paths) == order
    paths = [paths[1], write_run(tmp_path / "g", lr=0.2), write_run(tmp_path / "h", select="test")]
    assert seeds(paths[:2]) == [("t-vMF κ=16, lr=0.1", 1), ("t-vMF κ=16, lr=0.2", 1)]
    assert seeds(paths[2:]) == [("t-vMF κ=16, select=test", 1)]  # a label always says so


def test_table(paths):
    one = ["10.0", "1.0", "8.0", "20.0", "-", "77.0", "3.0", "val"]
    three = ["12.0 ± 2.0", "1.0 ± 0.0", "8.0 ± 0.0", "20.0 ± 0.0", "-", "77.0 ± 0.0", "3.0 ± 0.0"]
    expected = [["softmax", stage, "1", *one] for stage in "12"]
    expected += [["t-vMF κ=16", stage, "3", *three, "val"] for stage in "12"]
    assert make_table(frames(paths)[1]).to_numpy().tolist() == expected


@matplotlib.rc_context({"text.parse_math": False})
def test_what_the_figures_show(paths):
    def heights(axis):
        return [line.get_ydata().tolist() for line in axis.lines if len(line.get_ydata())]

    epochs, results = frames(paths)
    panels = report.curves(epochs).axes_dict
    # Lines: softmax; the mean over three seeds; the unfinished run, which has no scale.
    assert heights(panels["loss", 1]) == [[1.0, 1.0], [2.0, 2.0], [1.0]]
    assert heights(panels["scale", 1]) == [[2.0, 2.0], [2.0, 2.0]]
    assert heights(panels["error@1", 2]) == 2 * [[50.0, 25.0], [60.0, 60.0], [70.0, 70.0]]
    axis = report.frequency(results).axes[0, 0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["32", "128"]
    assert np.allclose([axis.lines[0].get_ydata(), axis.lines[3].get_ydata()], [40, 15])
    axis = report.bars(results).axes[0, 0]
    assert [bar.get_height() for bar in axis.containers[1]] == [12, 8, 20]
    assert [10.0, 14.0] in heights(axis)  # 12 ± 2
    axis = report.histograms(results).axes_dict["t-vMF κ=16", "1, medium"]
    outline = axis.collections[0].get_paths()[0].vertices
    assert {(-1, 25), (-0.96, 75), (-0.92, 75), (-0.92, 0)} <= {*map(tuple, outline.round(2))}
    line = report.similarity(results).ax.lines[1]
    assert line.get_ydata()[line.get_xdata() == 60] == pytest.approx(1.5 / 9 - 1)
    plt.close("all")


def test_page(paths, tmp_path, capsys):
    settings = dict(matplotlib.rcParams) | {"backend": ""}
    other = write_run(tmp_path / "other", select="test", net="timm:" + "|" * 60)
    main([*map(str, paths), str(other), "--out", str(tmp_path / "report"), "--markdown"])
    assert dict(matplotlib.rcParams) | {"backend": ""} == settings and not plt.get_fignums()
    out, err = capsys.readouterr()
    assert err == f"report: {tmp_path}/report/index.html\n" and out.count(" | TEST |\n") == 2
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in out.splitlines()] == 8 * [12]
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    sources = re.findall(r'alt="(\w+)" src="data:image/png;base64,([^"]+)"', page)
    for name, data in sources:
        assert base64.b64decode(data) == (tmp_path / "report" / f"{name}.png").read_bytes()
    assert {name for name, _ in sources} == FIGURES
    assert len(re.findall("src=|href=|<script", page)) == len(FIGURES)
    assert "killed&lt;b&gt;$_$ (1 epochs)" in page and "killed<b>$_$" not in page
    assert "<mark>TEST</mark>" in page and "|" * 60 in page and page.count("<tr") == 7


def test_one_group_or_none(paths, tmp_path):
    for path, figures in ((paths[0], FIGURES), (paths[-1], {"curves"})):
        main([str(path), "--out", str(tmp_path / path.stem)])
        assert {png.stem for png in (tmp_path / path.stem).glob("*.png")} == figures


def test_errors(paths, tmp_path):
    half, old, twin = (write_run(tmp_path / name, seed=2) for name in ("half", "old", "twin"))
    (half / "result.json").write_text('{"config": ')
    (old / "result.json").write_text('{"stage1": {}}')
    for runs, out, message in (
        ([tmp_path], "out", r"got .*, wanted .* metrics.jsonl or result.json"),
        ([half], "out", r"half/result.json: got no JSON with .*, wanted"),
        ([old], "out", r"old/result.json: got no JSON with config .*, wanted"),
        ([paths[2], twin], "out", r"got seed 2 twice .*κ=16, wanted"),
        ([twin], "twin/result.json", r"--out: got .*result.json.*, wanted"),
    ):
        with pytest.raises(TrainError, match=message):
            main([*map(str, runs), "--out", str(tmp_path / out)])
    assert not (tmp_path / "out").exists()
