"""train.report: reading and grouping runs, their labels, the table, and what the figures show."""

import json
import re

import pytest

from tests.train.report_runs import epoch, write_run, write_runs
from train.config import TrainError
from train.report import figures, table
from train.report.cli import main
from train.report.page import make_sections, share_lists
from train.report.runs import group_runs, load_run, typed


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def groups(paths):
    return group_runs([load_run(path) for path in paths])


def groups_of(paths):
    return group_runs([load_run(path) for path in paths])


def labels_of(*paths):
    return [(group.label, len(group.runs)) for group in groups_of(paths)]


def test_log_of_a_killed_and_resumed_run(tmp_path):
    old, *new = map(json.dumps, (epoch(1, 2, loss=7.0), epoch(1, 1), epoch(2, 1), epoch(1, 2)))
    text = old + '\n{"stage": 1, "epo' + "\n".join(new) + '\n{"stage": 2, "epoch": 2'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert load_run(tmp_path)["epochs"] == [epoch(1, 1), epoch(1, 2), epoch(2, 1)]


def test_groups_of_heads(tmp_path):
    """What does not decide a result, and the kappa of a head without one, set no runs apart."""
    runs = {"a": {"kappa": -0.25}, "b": {"device": "cuda"}}
    runs |= {"c": {"workers": 8, "data": "x", "seed": 1}, "d": {"head": "softmax", "kappa": 1.0}}
    runs |= {"e": {"head": "softmax", "kappa": 2.0, "seed": 1}, "f": {"head": "cosine"}}
    paths = [write_run(tmp_path / name, lr=0.1, **config) for name, config in runs.items()]
    order = [("softmax", 2), ("cosine", 1), ("t-vMF κ=-0.25", 1), ("t-vMF κ=16", 2)]
    assert labels_of(*paths) == order
    assert labels_of(paths[1]) == [("t-vMF κ=16", 1)]


def test_labels_say_only_what_differs(tmp_path):
    def run(name, **config):
        return write_run(tmp_path / name, **{"lr": 0.1, "epochs": 20} | config)

    base = run("base")
    assert labels_of(base, run("lr", lr=0.00025)) == [("lr=0.00025", 1), ("lr=0.1", 1)]
    # A run of an older version, which did not know a flag, is as one with its default.
    assert labels_of(base, run("old", seed=1), run("new", seed=2, views=2)) == [("t-vMF κ=16", 3)]
    assert labels_of(base, run("views", views=0)) == [("views=0", 1), ("views=2", 1)]
    # A flag that is gone.
    odd = labels_of(base, run("gone", gone=3))
    assert sorted(odd) == [(f"t-vMF κ=16 ({tmp_path}/{name})", 1) for name in ("base", "gone")]
    both = labels_of(base, run("cosine", head="cosine", epochs=100))
    assert both == [("cosine, epochs=100", 1), ("t-vMF κ=16, epochs=20", 1)]
    # The rest of a recipe follows from the data set.
    other = labels_of(base, run("recipe", dataset="list", epochs=90, net="resnet10"))
    assert other == [("dataset=digits", 1), ("dataset=list", 1)]
    assert labels_of(run("test", select="test")) == [("t-vMF κ=16, select=test", 1)]
    assert [*map(typed, (0.1, 1.0, 1e-5, 20, True, 1 / 3))] == [
        "0.1",
        "1",
        "1e-05",
        "20",
        "True",
        "0.3333333333333333",
    ]


def test_table(groups):
    rows = table.make_rows(groups)
    known = {"error1": "error@1", "few": "few", "macro_f1": "macro-F1"}
    assert known.items() <= dict(zip(rows[0].cells, table.headings()[3:], strict=False)).items()
    assert [(row.label, row.stage, row.seeds) for row in rows] == [
        ("softmax", 1, 1),
        ("softmax", 2, 1),
        ("t-vMF κ=16", 1, 3),
        ("t-vMF κ=16", 2, 3),
    ]
    for row, error, best in zip(rows, ["11.0"] * 2 + ["12.0 ± 2.0"] * 2, [1, 1, 0, 0], strict=True):
        assert str(row.cells["error1"]) == error and row.cells["error1"].best == best
        assert str(row.cells["few"]) == "-" and not row.cells["few"].best
        assert row.cells["macro_f1"].best and row.selected_on == "val"  # all are equal
        assert str(row.cells[table.TRAINING]).startswith("25.0")  # that of the chosen epoch


def test_the_larger_score_and_the_smaller_error_are_best(tmp_path, groups):
    rows = table.make_rows(groups)
    for row, value in zip(rows, (80.0, 70.0, 70.0, 80.0), strict=True):
        row.cells["macro_f1"].values, row.cells["ece"].values = [value], [value]
    table.mark_best(rows)
    assert [row.cells["macro_f1"].best for row in rows] == [True, False, False, True]
    assert [row.cells["ece"].best for row in rows] == [False, True, True, False]


def by_group(fig):
    """The traces of each group, whiskers and bands included."""
    found = {}
    for trace in fig.data:
        found.setdefault(trace.meta["group"], []).append(trace)
    return found


def test_curves(groups):
    fig = figures.curve(groups, 1, "loss", "loss (nats)")
    softmax, tvmf, killed = by_group(fig).values()
    assert [list(trace.y) for trace in softmax] == [[1.0, 1.0]]
    area, mean = tvmf  # losses of 1, 2 and 3
    assert list(mean.y) == [2.0, 2.0] and list(area.y) == [3.0, 3.0, 1.0, 1.0]
    assert list(killed[0].x) == [1] and killed[0].marker.size > softmax[0].marker.size
    assert fig.layout.xaxis.dtick == 1 and fig.layout.yaxis.title.text == "loss (nats)"
    errors = by_group(figures.curve(groups, 1, "error1", "error@1 (%)"))[0]
    assert [(t.line.dash, list(t.y)) for t in errors] == [
        ("dash", [50.0, 25.0]),
        ("solid", [60.0, 60.0]),
        ("solid", [70.0, 70.0]),
    ]
    assert [list(t.marker.symbol) for t in errors[1:]] == 2 * [["circle", "star"]]
    # A softmax head has no scale; here all but the unfinished run have one.
    assert set(by_group(figures.curve(groups, 1, "scale", "scale"))) == {0, 1}


@pytest.mark.parametrize("epochs, step", [(1, 1), (10, 1), (11, 2), (90, 10), (3000, 500)])
def test_epochs_are_whole_numbers(tmp_path, epochs, step):
    log = [epoch(1, 1), epoch(1, epochs)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    fig = figures.curve(groups_of([tmp_path]), 1, "loss", "loss (nats)")
    assert fig.layout.xaxis.dtick == step and fig.layout.xaxis.tickformat == "d"


def test_errors_by_size_and_by_class(groups):
    bars = by_group(figures.size_bars(groups, 1))
    assert list(bars[1][0].y) == [12.0, 8.0, 20.0, None]
    assert list(bars[1][0].error_y.array) == [2.0, 0.0, 0.0, 0]
    line, points = by_group(figures.each_class(groups, 1))[1]
    assert list(points.x) == [200, 150, 50] and list(points.y) == [10.0, 20.0, 40.0]
    assert points.customdata[1] == "&lt;dog&gt;</b><br>150 training, 10 test images<b>"
    # 200 and 150 lie between the same powers of two.
    assert list(line.y) == [40.0, 15.0] and line.x[1] == pytest.approx((200 * 150) ** 0.5)


def test_what_stage_2_and_the_prior_change(groups):
    _, points = by_group(figures.stage_change(groups))[0]
    assert list(points.y) == [0.0, 0.0, -10.0]
    assert list(by_group(figures.stage_change_bars(groups))[1][0].y) == [0.0, 0.0, 0.0, None]
    _, points = by_group(figures.prior_change(groups, 1))[0]
    assert list(points.y) == [-5.0, -5.0, -5.0]
    bars = by_group(figures.prior_change_bars(groups, 1))[0][0]
    assert list(bars.y) == [-1.0, 1.0, -5.0, None]
    assert bars.customdata[2] == "-5.0 points"


def test_calibration_angles_and_norms(groups):
    (trace,) = by_group(figures.calibration(groups, 2))[1]
    assert list(trace.x) == [50.0, 99.0] and list(trace.y) == [40.0, 95.0]
    assert trace.customdata[0] == "<br>30 images"  # of three seeds
    (box,) = by_group(figures.angle_boxes(groups, 2))[1]
    assert len(box.x) == 3 and list(box.median) == [51.0] * 3 and list(box.q1) == [41.0] * 3
    assert list(box.upperfence) == [71.0] * 3  # means over the seeds
    _, points = by_group(figures.class_angles(groups, 1))[0]
    assert list(points.y) == [40.0, 41.0, 42.0, 43.0]
    _, points = by_group(figures.class_values(groups, 1, "weight_norm", "norm"))[0]
    assert list(points.y) == [4.0, 3.0, 2.0, 1.0]


def test_cosines_and_similarity(groups):
    traces = by_group(figures.cosines(groups, 1))[1]
    target = next(t for t in traces if t.yaxis == "y2" and t.line.dash == "solid")
    assert list(target.y[:3]) == [25.0, 75.0, 0.0] and target.x[0] == pytest.approx(-0.98)
    (line,) = by_group(figures.similarity(groups))[1]
    assert line.y[line.x.index(60)] == pytest.approx(1.5 / 9 - 1, abs=1e-4)
    assert set(by_group(figures.similarity(groups))) == {1}  # softmax has none


def test_every_axis_has_a_name_and_every_section_something_to_show(groups):
    sections = make_sections(groups)
    assert [section.id for section in sections] == [
        "training",
        "errors",
        "stage-2",
        "prior",
        "calibration",
        "angles",
        "cosines",
        "confusions",
        "settings",
    ]
    for section in sections:
        for heading, fig in section.panels:
            assert fig.layout.yaxis.title.text, heading
            assert fig.layout.xaxis.title.text or fig.layout.xaxis3.title.text, heading


def test_runs_of_a_version_without_analysis_or_unfinished_ones(tmp_path, paths):
    old = write_run(tmp_path / "old", analysis=False)
    shown = [section.id for section in make_sections(groups_of([old]))]
    assert shown == ["training", "errors", "stage-2", "prior", "angles", "cosines", "settings"]
    assert [section.id for section in make_sections(groups_of(paths[-1:]))] == ["training"]


def test_page_holds_everything_and_escapes_names(paths, tmp_path, capsys):
    other = write_run(tmp_path / "other", select="test", net="timm:" + "|" * 60)
    main([*map(str, paths), str(other), "--out", str(tmp_path / "report"), "--markdown"])
    out, err = capsys.readouterr()
    assert err == f"report: {tmp_path}/report/index.html\n" and out.count(" | TEST |\n") == 2
    columns = len(table.headings())
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in out.splitlines()] == 8 * [columns + 1]
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:image/|#)|url\(|@import', page)
    assert "killed&lt;b&gt;$_$ (1 epochs)" in page and "killed<b>$_$" not in page
    assert "<b>cat</b> taken for <b>&lt;dog&gt;</b>" in page and "<dog>" not in page
    assert page.count("<mark>TEST</mark>") == 2 and "|" * 60 in page
    assert page.count("<td>TEST") == 0 and len(page) < 3e6


def test_a_list_of_several_traces_is_there_once():
    names, sizes = [f"class {c}" for c in range(30)], list(range(30))

    def chart(y):
        return {"data": [{"x": [*sizes], "y": y, "customdata": [*names]}, {"x": [1], "y": [2]}]}

    charts = [chart(list(range(n, n + 30))) for n in (1, 2)]
    assert share_lists(charts) == [sizes, names]
    for n, found in enumerate(charts, 1):
        trace, single = found["data"]
        assert (trace["x"], trace["customdata"]) == ({"shared": 0}, {"shared": 1})
        assert trace["y"][0] == n and single == {"x": [1], "y": [2]}


def test_text_table_of_unfinished_runs(paths, tmp_path, capsys):
    main([str(paths[-1]), "--out", str(tmp_path / "report")])
    assert capsys.readouterr().out == "no finished run\n"
    main([str(paths[0]), "--out", str(tmp_path / "report")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and len({*map(len, lines)}) == 1 and lines[1].startswith("t-vMF κ=16 ")


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
