"""`python -m bench.heads TABLE`: what a head, a margin or a prior is worth on one data set.

A row is a set of flags of the driver. All rows of a table are trained with the same seeds, and a
seed fixes the images, wrong labels, the backbone's first weights and the order of the batches. So
each run is compared with the baseline's run of its seed, which takes away a part of the noise.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from bench.measure.machine import ROOT, about
from bench.show import documents
from bench.show.plots import picture
from bench.show.results import save
from bench.show.tables import table

BASELINE = "cosine"
RESULTS = documents.results_path("heads")
# Half of a 95 % interval of a mean, in standard errors, for each number of seeds (Student's t).
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
FIGURES = ("error1", "adjusted_error1", "few", "train_error1", "scale", "kappa")


@dataclass(frozen=True)
class Table:
    """Rows by name, with the flags that tell one from the other, and what all of them have."""

    title: str
    seeds: int
    flags: str
    rows: dict[str, str]


HEADS = {
    "softmax": "--head softmax",
    BASELINE: "--head cosine",
    "t-vMF κ=16": "--kappa 16",
}
FASHION = "--dataset fashion-mnist-lt --imbalance 1 --stage2-epochs 0"
LIST = "--dataset list --stage2-epochs 5"
TABLES = {
    "small": Table(
        "Fashion-MNIST, 60 images of each class",
        5,
        f"{FASHION} --subset 0.01 --batch-size 16 --epochs 40 --eval-every 40",
        HEADS,
    ),
    "noise": Table(
        "Fashion-MNIST, 300 images of each class, 40 % wrong labels",
        5,
        f"{FASHION} --subset 0.05 --label-noise 0.4 --batch-size 16 --epochs 10 --eval-every 10",
        HEADS,
    ),
    "characters": Table(
        "94 characters, 303 to 3 images of each",
        3,
        f"{LIST} --epochs 10 --batch-size 32 --eval-every 10",
        {
            **HEADS,
            "cosine, prior 1": "--head cosine --prior 1",
            "t-vMF κ=16, prior 1": "--kappa 16 --prior 1",
            "cosine, scale 20": "--head cosine --scale-start 20 --scale-lr 0",
            "cosine, LDAM": "--head cosine --scale-start 20 --scale-lr 0 --ldam 0.5",
        },
    ),
    "icons": Table(
        "617 icons, 11 to 1 images of each",
        3,
        f"{LIST} --epochs 15 --batch-size 16 --eval-every 15",
        {
            BASELINE: "--head cosine",
            "t-vMF κ=16": "--kappa 16",
            "cosine, prior 1": "--head cosine --prior 1",
        },
    ),
}


def command_of(name: str, row: str, seed: int, data: Path, out: Path) -> list[str]:
    """The command that trains a row with a seed; margins are made by an example."""
    flags = shlex.split(TABLES[name].rows[row])
    module = "examples.margins" if "--ldam" in flags else "train"
    flags += [*shlex.split(TABLES[name].flags), "--seed", str(seed)]
    return [sys.executable, "-m", module, *flags, "--data", str(data), "--out", str(out)]


def train(name: str, row: str, seed: int, data: Path, out: Path) -> dict:
    """The figures of a row's run, which is trained unless it has finished in OUT before."""
    result = out / "result.json"
    if not result.exists():
        out.mkdir(parents=True, exist_ok=True)
        command = command_of(name, row, seed, data, out)
        with open(out / "log.txt", "w") as log:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode
        if code:
            sys.exit(f"error: {shlex.join(command)} failed, see {out}/log.txt")
    report = json.loads(result.read_text())
    stages = [stage for stage in ("stage1", "stage2") if stage in report]
    return {stage: {key: report[stage][key] for key in FIGURES} for stage in stages}


def values(runs: list[dict], stage: str, key: str) -> list[float]:
    return [run[stage][key] for run in runs if run.get(stage, {}).get(key) is not None]


def with_deviation(numbers: list[float]) -> str:
    """Mean ± sample standard deviation over seeds."""
    return f"{statistics.fmean(numbers):.1f} ± {statistics.stdev(numbers):.1f}"


def difference(runs: list[dict], baseline: list[dict], stage: str) -> str:
    """Mean of a row's errors less those of the baseline with the same seeds, and half of its 95 %
    interval; bold where the interval leaves out 0."""
    pairs = zip(values(runs, stage, "error1"), values(baseline, stage, "error1"), strict=True)
    found = [ours - theirs for ours, theirs in pairs]
    mean = statistics.fmean(found)
    half = STUDENT[len(found)] * statistics.stdev(found) / len(found) ** 0.5
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text


def rows_of(report: dict) -> list[dict[str, str]]:
    """The rows of the Markdown table."""
    compared = report["rows"][BASELINE]
    stages = [stage for stage in ("stage1", "stage2") if stage in compared[0]]
    rows = []
    for name, runs in report["rows"].items():
        row = {"": name}
        for stage in stages:
            title = f"stage {stage[-1]}, " if len(stages) > 1 else ""
            row[f"{title}error@1"] = with_deviation(values(runs, stage, "error1"))
            own = name == BASELINE
            row[f"{title}difference"] = "" if own else difference(runs, compared, stage)
            if stage == "stage1" and len(stages) > 1:
                row["adjusted"] = with_deviation(values(runs, stage, "adjusted_error1"))
            elif values(runs, stage, "few"):
                row["few"] = with_deviation(values(runs, stage, "few"))
            if len(stages) == 1:
                row["training error"] = with_deviation(values(runs, stage, "train_error1"))
        rows.append(row)
    return rows


def draw(reports: dict[str, dict], path: Path) -> None:
    """A point for each seed: a row's error@1 after the last stage less the baseline's."""
    heights = [len(report["rows"]) for report in reports.values()]
    size = {"figsize": (8, 0.9 + 0.32 * sum(heights)), "height_ratios": heights}
    with picture(path, len(reports), 1, squeeze=False, sharex=True, **size) as (_, axes):
        for (name, report), axis in zip(reports.items(), axes[:, 0], strict=True):
            baseline = report["rows"][BASELINE]
            stage = max(baseline[0])
            names = [row for row in report["rows"] if row != BASELINE]
            for place, row in enumerate(names):
                errors = (values(r, stage, "error1") for r in (report["rows"][row], baseline))
                found = [ours - theirs for ours, theirs in zip(*errors, strict=True)]
                axis.plot(found, [place] * len(found), "o", color="tab:blue", alpha=0.5)
                axis.plot(statistics.fmean(found), place, "|", color="black", ms=14, mew=2)
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.axvline(0, color="black", lw=0.8)
            axis.grid(axis="x", alpha=0.3)
            axis.set_title(TABLES[name].title, fontsize="medium", loc="left")
        axes[-1, 0].set_xlabel(
            "error@1 less that of the baseline with the same seed, in points; bar: mean"
        )


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.heads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--data", type=Path, required=True, help="the driver's --data for this table")
    add("--out", type=Path, default=Path("runs"), help="where the runs go; finished ones are kept")
    text = (
        f"write the table into {documents.MEASUREMENTS}, the figures into bench/results/heads.json"
    )
    add("--document", action="store_true", help=f"{text} and the picture into docs/heads.png")
    options = parser.parse_args(args)
    name, plan = options.table, TABLES[options.table]
    rows = {row: [] for row in plan.rows}
    runs = [(seed, row) for seed in range(plan.seeds) for row in plan.rows]
    for seed, row in track(runs, "runs", transient=True):
        out = options.out / name / f"{list(plan.rows).index(row)}-seed{seed}"
        rows[row].append(train(name, row, seed, options.data.resolve(), out.resolve()))
    report = {"flags": plan.flags, **about("cpu"), "rows": rows}
    text = table(rows_of(report))
    print(text)
    if options.document:
        reports = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        reports = {
            key: (reports | {name: report})[key] for key in TABLES if key in {*reports, name}
        }
        save(reports, RESULTS)
        draw(reports, documents.picture_path("heads"))
        documents.write_between(documents.MEASUREMENTS, f"heads {name}", text)


if __name__ == "__main__":
    main()
