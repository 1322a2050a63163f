"""The report's figures. Each function draws one quantity for one stage, with a trace for each group
that has it, or returns None where no group has. traces.py has what they share.
"""

import math
import statistics
from itertools import pairwise

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from train.metrics import BINS, GROUPS, SIZES
from train.report.runs import Group, change, class_errors
from train.report.traces import (
    ANGLE,
    CHANGE,
    COUNT,
    DEGREES,
    ERROR,
    band,
    class_points,
    color_of,
    drawn,
    epoch_axis,
    figure,
    line,
    mean_and_deviation,
)

KEYS = ("all", *GROUPS)
LABELS = ["all", *(f"{name}<br>{size}" for name, size in SIZES.items())]


def curve(groups: list[Group], stage: int, key: str, title: str) -> go.Figure | None:
    """A quantity over epochs: means over seeds, with a band of one standard deviation. Training is
    dashed, val or test solid. A star is at the epoch whose model is the result."""
    fig = figure("epoch", title, hovermode="x unified")
    most = 1
    for i, group in enumerate(groups):
        records = [r for run in group.runs for r in run["epochs"] if r["stage"] == stage]
        chosen = {result.get("epoch") for result in group.results(stage)}
        for split in (None, "val", "test"):
            points: dict[int, list[float]] = {}
            for record in records:
                value = (record.get(split) or {} if split else record).get(key)
                if value is not None:
                    points.setdefault(record["epoch"], []).append(value)
            if not points:
                continue
            x = sorted(points)
            mean, spread = mean_and_deviation(points[epoch] for epoch in x)
            most = max(most, x[-1])
            if any(spread):
                fig.add_trace(band(i, x, mean, spread))
            about = f"{group.label}, {split or 'training'}" if key in ("error1", "loss") else ""
            dash = "dash" if split is None and key in ("error1", "loss") else "solid"
            seeds = [f" ± {s:.3g}" if s else "" for s in spread]
            trace = line(i, x, mean, about or group.label, dash, seeds)
            stars = [epoch in chosen and split is not None for epoch in x]
            if any(stars):
                trace.marker.symbol = ["star" if star else "circle" for star in stars]
                trace.marker.size = [11 if star else trace.marker.size for star in stars]
            fig.add_trace(trace)
    epoch_axis(fig, most)
    if key in ("lr", "loss"):
        fig.update_yaxes(rangemode="tozero")
    return drawn(fig)


def size_bars(groups: list[Group], stage: int) -> go.Figure | None:
    """Error by the size of the class: means, and whiskers of one standard deviation over seeds."""
    rows = []
    for group in groups:
        results = group.results(stage)
        names = ("error1", *GROUPS)
        rows.append([[r[n] for r in results if r.get(n) is not None] for n in names])
    return bars(groups, rows, ERROR, "{:.1f} %")


def bars(groups: list[Group], rows: list, title: str, form: str) -> go.Figure | None:
    """Bars of each group for all images and for each size of class; rows [group][size] hold the
    values of the seeds."""
    fig = figure(COUNT, title, barmode="group").update_xaxes(showgrid=False)
    for i, (group, values) in enumerate(zip(groups, rows, strict=True)):
        if not any(values):
            continue
        mean = [statistics.fmean(v) if v else None for v in values]
        spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
        text = [
            "" if m is None else form.format(m) + (f" ± {s:.1f}" if s else "")
            for m, s in zip(mean, spread, strict=True)
        ]
        fig.add_bar(
            x=LABELS,
            y=mean,
            error_y={"array": spread, "visible": any(spread), "thickness": 1.2, "width": 3},
            marker_color=color_of(i),
            customdata=text,
            hovertemplate=f"{group.label}<br>%{{x}}: %{{customdata}}<extra></extra>",
            meta={"group": i},
        )
    return drawn(fig)


def each_class(groups: list[Group], stage: int) -> go.Figure | None:
    """The error of each class against its number of training images."""
    return class_points(groups, lambda run: class_errors(run, stage), ERROR)


def stage_change(groups: list[Group]) -> go.Figure | None:
    """What stage 2 changes for each class."""

    def values(run):
        return change(class_errors(run, 2), class_errors(run, 1))

    return class_points(groups, values, CHANGE, zero=True)


def prior_change(groups: list[Group], stage: int) -> go.Figure | None:
    """What the prior adjustment would change for each class."""

    def values(run):
        return change(class_errors(run, stage, adjusted=True), class_errors(run, stage))

    return class_points(groups, values, CHANGE, zero=True)


def stage_change_bars(groups: list[Group]) -> go.Figure | None:
    """What stage 2 changes by the size of the class; deviations are of the seeds' differences."""
    rows = [
        [(run["stage2"], run["stage1"]) for run in group.runs if {"stage1", "stage2"} <= set(run)]
        for group in groups
    ]
    return change_bars(groups, rows)


def prior_change_bars(groups: list[Group], stage: int) -> go.Figure | None:
    """What the prior adjustment would change by the size of the class."""
    rows = [
        [
            ({"error1": result["adjusted_error1"]} | result["adjusted"], result)
            for result in group.results(stage)
            if "adjusted" in result
        ]
        for group in groups
    ]
    return change_bars(groups, rows)


def change_bars(groups: list[Group], rows: list[list[tuple[dict, dict]]]) -> go.Figure | None:
    """Bars of the differences between two results of each seed; rows [group][seed] hold them."""
    names = ("error1", *GROUPS)
    values = [
        [[a[n] - b[n] for a, b in row if None not in (a.get(n), b.get(n))] for n in names]
        for row in rows
    ]
    return bars(groups, values, CHANGE, "{:+.1f} points")


def calibration(groups: list[Group], stage: int) -> go.Figure | None:
    """Accuracy against confidence, in the bins of the calibration error; all seeds together."""
    fig = figure("confidence (%)", "accuracy (%)")
    for i, group in enumerate(groups):
        bins: dict[int, list[tuple[int, float, float]]] = {}
        for analysis in group.analyses(stage):
            for part in analysis["reliability"]:
                at = math.ceil(part["confidence"] / 100 * BINS)
                row = part["images"], part["confidence"], part["accuracy"]
                bins.setdefault(at, []).append(row)
        if not bins:
            continue
        rows = [pooled(bins[at]) for at in sorted(bins)]
        images, x, y = map(list, zip(*rows, strict=True))
        trace = line(i, x, y, group.label, "solid", [f"<br>{n:,} images" for n in images])
        trace.hovertemplate = (
            f"{group.label}<br>confidence %{{x:.1f}} %, accuracy %{{y:.1f}} %%{{customdata}}"
            "<extra></extra>"
        )
        trace.marker.size = [4 + 10 * math.sqrt(n / max(images)) for n in images]
        fig.add_trace(trace)
    fig.add_shape(type="line", x0=0, y0=0, x1=100, y1=100, line={"color": "#999", "dash": "dot"})
    return drawn(fig.update_xaxes(range=[0, 103]).update_yaxes(range=[0, 103]))


def pooled(rows: list[tuple[int, float, float]]) -> tuple[int, float, float]:
    """One row of (images, confidence, accuracy) for those of several seeds."""
    images = sum(n for n, *_ in rows)
    return images, *(sum(row[0] * row[at] for row in rows) / images for at in (1, 2))


def angle_boxes(groups: list[Group], stage: int, key: str = "angles") -> go.Figure | None:
    """Angles between training features and their own class's weight, by the size of the class."""
    fig = figure(COUNT, ANGLE, boxmode="group").update_xaxes(showgrid=False)
    for i, group in enumerate(groups):
        found = [[a[key][k] for a in group.analyses(stage)] for k in KEYS]
        found = [[q for q in seeds if q] for seeds in found]
        shown = [(label, seeds) for label, seeds in zip(LABELS, found, strict=True) if seeds]
        if not shown:
            continue
        low, q1, median, q3, high = (
            [statistics.fmean(q[at] for q in seeds) for _, seeds in shown] for at in range(5)
        )
        fig.add_box(
            x=[label for label, _ in shown],
            lowerfence=low,
            q1=q1,
            median=median,
            q3=q3,
            upperfence=high,
            name=group.label,
            marker_color=color_of(i),
            line={"width": 1.5},
            hoverinfo="y+name",
            yhoverformat=".1f",
            meta={"group": i},
        )
    fig.update_yaxes(**DEGREES)
    return drawn(fig)


def class_angles(groups: list[Group], stage: int) -> go.Figure | None:
    """The median angle of each class's training features against the size of the class."""
    fig = class_values(groups, stage, "angle", "median angle (°)", ".1f")
    return fig and fig.update_yaxes(**DEGREES)


def class_values(
    groups: list[Group], stage: int, key: str, title: str, form: str = ".3g"
) -> go.Figure | None:
    """A quantity of each class, from the analysis, against the size of the class."""

    def values(run):
        return run["analysis"].get(stage, {}).get(key)

    return class_points(groups, values, title, form=form)


def cosines(groups: list[Group], stage: int) -> go.Figure | None:
    """Cosines of the test images' features: with the weight of the own class (solid) and of the
    nearest other class (dotted), in % of the images of large, medium and small classes."""
    titles = [f"{name}: {size} training images" for name, size in SIZES.items()]
    fig = make_subplots(len(SIZES), 1, shared_xaxes=True, vertical_spacing=0.07)
    figure("", "", into=fig)
    for row, size in enumerate(SIZES, 1):
        for i, group in enumerate(groups):
            results = group.results(stage)
            for kind, dash in (("target", "solid"), ("other", "dot")):
                counts = [r["cosine_histogram"][kind][size] for r in results]
                total = [sum(images) for images in zip(*counts, strict=True)]
                if not any(total):
                    continue
                edges = results[0]["cosine_histogram"]["edges"]
                middle = [(a + b) / 2 for a, b in pairwise(edges)]
                share = [100 * images / sum(total) for images in total]
                about = f"{group.label}, {'own class' if kind == 'target' else 'nearest other'}"
                trace = line(i, middle, share, about, dash)
                trace.update(mode="lines", line_shape="hvh")
                trace.hovertemplate = "cosine %{x:.2f}: %{y:.1f} %<extra>" + about + "</extra>"
                fig.add_trace(trace, row, 1)
        fig.add_annotation(
            text=titles[row - 1],
            x=0.01,
            y=1.02,
            xref="x domain",
            yref="y domain",
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
            row=row,
            col=1,
        )
    fig.update_yaxes(title="images (%)", rangemode="tozero")
    fig.update_xaxes(range=[-1, 1])
    fig.update_xaxes(title="cosine", row=len(SIZES), col=1)
    fig.update_layout(height=540, margin_t=24)
    return drawn(fig)


def similarity(groups: list[Group]) -> go.Figure | None:
    """φ = (1 + c) / (1 + κ(1 - c)) - 1 of the cosine c of an angle, for the κ of each group's
    stage 1. For κ = 0 it is the cosine itself, which stage 2 and the cosine head have."""
    fig = figure("angle between feature and class weight", "similarity φ")
    angles = [2 * n for n in range(91)]
    for i, group in enumerate(groups):
        if group.config.get("head") not in ("cosine", "tvmf"):
            continue
        kappa = group.config["kappa"] if group.config["head"] == "tvmf" else 0.0
        cosine = [math.cos(math.radians(angle)) for angle in angles]
        phi = [(1 + c) / (1 + kappa * (1 - c)) - 1 for c in cosine]
        trace = line(i, angles, phi, f"{group.label} (κ = {kappa:g})", "solid")
        fig.add_trace(trace.update(mode="lines"))
    fig.update_xaxes(**DEGREES, range=[0, 180])
    return drawn(fig)
