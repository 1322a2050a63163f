"""A report on runs of the driver: curves, errors by class size, cosines, and a table over seeds.

    python -m train.report RUN [RUN ...] [--out DIR] [--markdown]

Runs that differ only in their seed are one group. DIR/index.html holds its pictures in itself.
"""

import argparse
import base64
import contextlib
import json
import re
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from train.config import NO_RESULT, TrainError
from train.metrics import FIGURES

NOTE = """All figures are in % of the test set. Many, medium, few: error@1 of classes with more than
100, 20 to 100, fewer than 20 training images. ±, whiskers: sample standard deviation over seeds."""
# Keys that a group's label does not name: they do not set experiments apart, or the label always
# says them (head and kappa).
APART = (*NO_RESULT, "seed", "head", "kappa")
STAGES = {"stage1": 1, "stage2": 2}
STYLE = {"palette": "colorblind", "hue": "group", "col": "stage", "height": 3, "aspect": 1.8}
FACETS = {"sharex": "col", "sharey": "row", "margin_titles": True}


def load_run(path: Path) -> dict:
    """{"path": the directory, "epochs": the records of metrics.jsonl in order}, and the content of
    result.json, or {"config": {}} for an unfinished run. Raises TrainError if there is neither
    file, or if result.json holds no result."""
    log, file = path / "metrics.jsonl", path / "result.json"
    if not log.is_file() and not file.is_file():
        raise TrainError(f"RUN: got {path}, wanted a directory with metrics.jsonl or result.json")
    records, result = {}, {"config": {}}
    # A killed run may leave half a record, and the resumed run then writes on in the same line.
    for part in re.split(r'\n|(?={"stage")', log.read_text("latin-1") if log.is_file() else ""):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(part)
            records[record["stage"], record["epoch"]] = record  # the last, if it was repeated
    if file.is_file():
        with contextlib.suppress(ValueError):
            result = json.loads(file.read_text("utf-8"))
        if not isinstance(result, dict) or not {"config", "dataset"} <= set(result):
            raise TrainError(f"{file}: got no JSON with config and dataset, wanted a run's result")
    return {"path": path, "epochs": [records[key] for key in sorted(records)], **result}


def group_runs(runs: list[dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables: a row for each epoch of each run, and one for each stage of each finished run.

    Each row has the label of its group. Runs of one configuration, whatever their seed, are a
    group; an unfinished run is one by itself. Raises TrainError if a group has a seed twice, which
    would look like agreement between seeds.
    """
    configs = pd.DataFrame([run["config"] for run in runs if run["config"]])
    told = [k for k in configs if configs[k].nunique(dropna=False) > 1 or "test" in set(configs[k])]
    found = {}
    for run in runs:
        config = {"head": f"unfinished: {run['path']}", "kappa": np.inf, "seed": 0} | run["config"]
        # The configuration has a kappa for the other heads, too, which do not use it.
        order = {"softmax": -2, "cosine": -1}.get(config["head"], config["kappa"])
        head = f"t-vMF κ={order:g}" if config["head"] == "tvmf" else config["head"]
        more = [f"{k}={config[k]}" for k in told if k in config and k not in APART]
        key = order, ", ".join([head, *more]), config["seed"]
        if key in found:
            raise TrainError(f"RUN: got seed {key[2]} twice for {key[1]}, wanted each seed once")
        found[key] = {"group": key[1], **run}
    runs = [found[key] for key in sorted(found)]
    epochs = [{"group": run["group"], **record} for run in runs for record in run["epochs"]]
    results = [{**run, **run[s], "stage": n} for run in runs for s, n in STAGES.items() if s in run]
    return pd.json_normalize(epochs), pd.json_normalize(results)


def make_table(results: pd.DataFrame) -> pd.DataFrame:
    """The table's cells, as text: mean ± sample standard deviation over seeds."""
    groups = results.astype(dict.fromkeys(FIGURES, float)).groupby(["group", "stage"], sort=False)
    mean, std = groups[[*FIGURES]].mean(), groups[[*FIGURES]].std()
    table = (mean.map("{:.1f}".format) + std.map(" ± {:.1f}".format)).rename(columns=FIGURES)
    table = table.replace({" ± nan": "", "^nan": "-"}, regex=True)
    table.insert(0, "seeds", groups.size())
    table["selected on"] = groups["selected_on"].first().replace("test", "TEST")
    return table.reset_index(names=["head", "stage"]).astype(str)


def curves(epochs: pd.DataFrame) -> sns.FacetGrid:
    """Learning rate, scale (softmax has none), loss (nats) and error@1 (%): means over seeds."""
    shown = epochs.filter(regex=r"^(val\.|test\.)?(lr|scale|loss|error1)$").columns
    rows = epochs.melt(["group", "stage", "epoch"], shown, "name", "").dropna()
    rows[["split", "row"]] = rows["name"].str.extract(r"(?:(\w+)\.)?(\w+)")
    rows = rows.fillna({"split": "training"}).replace({"row": FIGURES}).astype({"": float})
    lines = {"kind": "line", "errorbar": None, "marker": ".", "ms": 5, "mew": 0}
    panels = {"row": "row", "style": "split", "facet_kws": FACETS}
    return sns.relplot(rows, x="epoch", y="", **panels, **lines, **STYLE)


def frequency(results: pd.DataFrame) -> sns.FacetGrid:
    """Error@1 of classes with a similar number of training images; 64 stands for 64 to 127."""
    x, y, each = "training images of the class", "error@1 (%)", ["group", "stage", "config.seed"]
    rows = results.explode(["dataset.counts", "class_accuracy"]).dropna(subset="class_accuracy")
    rows[x] = 2 ** np.log2(rows["dataset.counts"].astype(int).clip(lower=1)).astype(int)
    rows[y] = 100 - rows["class_accuracy"].astype(float)
    rows = rows.groupby([*each, x], sort=False)[y].mean().reset_index()
    dodge = 0.08 * (rows["group"].nunique() - 1)
    return sns.catplot(rows, x=x, y=y, kind="point", errorbar="sd", lw=1.5, dodge=dodge, **STYLE)


def bars(results: pd.DataFrame) -> sns.FacetGrid:
    """Error@1 by the number of training images of the class."""
    x, y = "classes", "error@1 (%)"
    rows = results.melt(["group", "stage"], ["error1", "many", "medium", "few"], x, y)
    rows = rows.replace({x: {"error1": "all"}}).astype({y: float})
    return sns.catplot(rows, x=x, y=y, kind="bar", errorbar="sd", **STYLE)


def histograms(results: pd.DataFrame) -> sns.FacetGrid:
    """Cosine of a test image's feature with the weight of its own class (target) and with that of
    the nearest other class: % of the panel's images, all seeds of a group together."""
    edges = results["cosine_histogram.edges"].iloc[0]
    shown = results.filter(regex=r"^cosine_histogram\.[to]").columns
    rows = results.melt(["group", "stage"], shown, "name", "images")
    rows["cosine"] = [edges[:-1]] * len(rows)
    rows = rows.explode(["cosine", "images"], ignore_index=True).infer_objects().query("images > 0")
    rows[["class", "size"]] = rows["name"].str.extract(r"(target|other)\.(\w+)")
    rows["stage"] = rows["stage"].astype(str) + ", " + rows["size"]
    rows["group"] = rows["group"].str.wrap(14)
    panels = {"row": "group", "col": "stage", "height": 1.6, "facet_kws": FACETS}
    bins = {"bins": edges, "element": "step", "stat": "percent", "common_norm": False}
    return sns.displot(rows, x="cosine", weights="images", hue="class", **panels, **bins)


def similarity(results: pd.DataFrame) -> sns.FacetGrid:
    """The similarity φ = (1 + c) / (1 + κ(1 - c)) - 1 of a cosine c; for κ = 0 it is the cosine."""
    angle = pd.Index(np.linspace(0, 180, 361), name="angle between feature and weight (°)")
    c = np.cos(np.radians(angle))
    kappas = sorted({0.0, *results["config.kappa"][results["config.head"] == "tvmf"]})
    phi = {f"κ = {kappa:g}": (1 + c) / (1 + kappa * (1 - c)) - 1 for kappa in kappas}
    return sns.relplot(pd.DataFrame(phi, angle), kind="line", dashes=False).set_ylabels("φ")


def describe(runs: list[dict]) -> str:
    """How many runs there are, on which data, and which of them are unfinished."""
    text = "{config[dataset]}, {config[net]}: {dataset[train]} train, {dataset[test]} test images"
    done = dict.fromkeys(text.format(**run) for run in runs if run["config"])
    left = [f"unfinished: {r['path']} ({len(r['epochs'])} epochs)" for r in runs if not r["config"]]
    return "; ".join([f"{len(runs)} runs", *done, *left]) + "."


def draw(plot: Callable[[pd.DataFrame], sns.FacetGrid], frame: pd.DataFrame, path: Path) -> str:
    """Writes a plot to a PNG; returns it as HTML, under its docstring."""
    # A dollar sign in a path must not begin a formula.
    with plt.rc_context(sns.axes_style("whitegrid") | {"text.parse_math": False}):
        grid = plot(frame).set_titles(None, "{row_name}", "stage {col_name}")
        grid.savefig(path, dpi=110)
        plt.close(grid.figure)
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return f'<p>{plot.__doc__}<p><img alt="{path.stem}" src="{data}">'


def write_page(
    out: Path, about: str, table: pd.DataFrame, epochs: pd.DataFrame, results: pd.DataFrame
) -> None:
    """Writes OUT/index.html and the plots' PNGs beside it."""
    with pd.option_context("display.max_colwidth", None):
        html = table.to_html(index=False).replace(">TEST<", "><mark>TEST</mark><")
    page = "<!doctype html><meta charset=utf-8><title>Runs</title><body style='font-family: Arial'>"
    page += "<style>img { max-width: 100% }</style><h1>Runs</h1>"
    page += f"<p>{escape(about)}{html}<p>{NOTE}"
    plots = {curves: epochs} | dict.fromkeys((frequency, bars, histograms, similarity), results)
    plt.switch_backend("agg")  # needs no screen
    try:
        out.mkdir(parents=True, exist_ok=True)
        for plot, frame in plots.items():
            page += draw(plot, frame, out / f"{plot.__name__}.png") if len(frame) else ""
        (out / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise TrainError(f"--out: got {error}, wanted a directory to write to") from error


def main(args: list[str] | None = None) -> None:
    """Reads the runs, writes the report and prints its table."""
    parser = argparse.ArgumentParser("python -m train.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--out", type=Path, default=Path("report"), help="default: report")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(args)
    runs = [load_run(path) for path in dict.fromkeys(options.runs)]
    epochs, results = group_runs(runs)
    table = make_table(results) if len(results) else pd.DataFrame({"head": ["no finished run"]})
    write_page(options.out, describe(runs), table, epochs, results)
    if options.markdown:
        for cells in (table.columns, ["---"] * table.shape[1], *table.to_numpy()):
            print("|", " | ".join(cell.replace("|", "\\|") for cell in cells), "|")
    else:
        print(table.to_string(index=False))
    print(f"report: {options.out / 'index.html'}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except TrainError as error:
        sys.exit(f"error: {error}")
