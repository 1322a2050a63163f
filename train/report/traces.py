"""What the report's figures share: colours, axes, lines over seeds, and points of classes."""

import math
import statistics
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative

from train.report.runs import Group

# Okabe and Ito's colours, which people with any colour vision tell apart, then more.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"]
COLORS += qualitative.Dark24
COUNT = "training images of the class"
ERROR = "error@1 (%)"
CHANGE = "change of error@1 (points)"
ANGLE = "angle to own weight (°)"
DEGREES = {"dtick": 30, "ticksuffix": "°"}
GREY, AXIS, INK = "#dfe3e8", "#aab2bd", "#222b36"


def color_of(group: int) -> str:
    return COLORS[group % len(COLORS)]


def figure(x: str, y: str, into: go.Figure | None = None, **layout: Any) -> go.Figure:
    """An empty figure with named axes, in the page's style. Its legend is the page's list of
    groups, which finds the traces of a group by their meta."""
    fig = into if into is not None else go.Figure()
    axis = {
        "gridcolor": GREY,
        "zerolinecolor": AXIS,
        "linecolor": AXIS,
        "ticks": "outside",
        "tickcolor": AXIS,
        "automargin": True,
        "title_standoff": 8,
    }
    fig.update_layout(
        template="none",
        showlegend=False,
        margin={"l": 56, "r": 12, "t": 12, "b": 44},
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK},
        hoverlabel={"align": "left", "namelength": -1},
        **layout,
    )
    fig.update_xaxes(**axis, title=x or None)
    fig.update_yaxes(**axis, title=y or None)
    return fig


def drawn(fig: go.Figure) -> go.Figure | None:
    """The figure, or None where nothing is in it."""
    return fig if fig.data else None


def marker(group: int, size: int, opacity: float = 1.0) -> dict[str, Any]:
    return {"color": color_of(group), "size": size, "opacity": opacity, "line": {"width": 0}}


def line(
    group: int, x: list, y: list, name: str, dash: str, seeds: list[str] | None = None
) -> go.Scatter:
    """A line with its points, which a line of a single point needs to be seen."""
    return go.Scatter(
        x=x,
        y=[significant(value) for value in y],
        name=name,
        mode="lines+markers",
        line={"color": color_of(group), "dash": dash, "width": 1.8},
        marker=marker(group, 7 if len(x) == 1 else 4),
        customdata=seeds,
        hovertemplate="%{y:.4g}" + ("%{customdata}" if seeds else ""),
        meta={"group": group},
    )


def band(group: int, x: list, mean: list[float], spread: list[float]) -> go.Scatter:
    """The area within one standard deviation of the mean."""
    upper = [significant(m + s) for m, s in zip(mean, spread, strict=True)]
    lower = [significant(m - s) for m, s in zip(mean, spread, strict=True)]
    return go.Scatter(
        x=x + x[::-1],
        y=upper + lower[::-1],
        fill="toself",
        fillcolor=color_of(group),
        opacity=0.18,
        mode="none",
        hoverinfo="skip",
        meta={"group": group},
    )


def significant(value: float | None) -> float | None:
    """Five significant digits, which keep the page small."""
    return None if value is None else float(f"{value:.5g}")


def mean_and_deviation(values: Iterable[list[float]]) -> tuple[list[float], list[float]]:
    """The mean of each list, and its sample standard deviation, 0 for a single value."""
    lists = list(values)
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in lists]
    return [statistics.fmean(v) for v in lists], spread


def epoch_axis(fig: go.Figure, epochs: int) -> None:
    """Ticks at whole epochs alone."""
    steps = [1, 2, 5, 10, 20, 50, 100, 200, 500]
    step = next((step for step in steps if epochs / step <= 10), 1000)
    fig.update_xaxes(dtick=step, tick0=0, tickformat="d", range=[0.5, epochs + 0.5])
    fig.update_layout(xaxis_hoverformat="d")


def class_points(
    groups: list[Group],
    values_of: Callable[[dict[str, Any]], list[float | None] | None],
    title: str,
    zero: bool = False,
    form: str = ".1f",
) -> go.Figure | None:
    """A point for each class, the mean over seeds, against the number of its training images; a
    line through the means of classes of similar size, each from a power of two to the next."""
    fig = figure(COUNT, title, hovermode="closest")
    for i, group in enumerate(groups):
        found = [(run, values) for run in group.runs if (values := values_of(run))]
        if not found:
            continue
        counts = found[0][0]["dataset"]["counts"]
        about, x, y = class_names(found[0][0]), [], []
        texts = []
        for c, seeds in enumerate(zip(*(values for _, values in found), strict=True)):
            if known := [value for value in seeds if value is not None]:
                texts.append(about[c])
                x.append(max(counts[c], 0.5))
                y.append(significant(statistics.fmean(known)))
        if not x:
            continue
        fig.add_trace(trend(i, x, y))
        fig.add_scatter(
            x=x,
            y=y,
            mode="markers",
            marker=marker(i, 7 if len(x) < 200 else 4, 0.55),
            customdata=texts,
            hovertemplate=f"<b>%{{customdata}}</b><br>%{{y:{form}}}<extra>{group.label}</extra>",
            meta={"group": i},
        )
    if zero:
        fig.add_hline(y=0, line={"color": INK, "width": 1})
    ticks = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
    fig.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks])
    return drawn(fig)


def class_names(run: dict[str, Any]) -> list[str]:
    """What a point says of its class: its name, and how many images of it there are."""
    counts = run["dataset"]["counts"]
    analysis = next(iter(run["analysis"].values()), {})
    names = analysis.get("names") or [f"class {c}" for c in range(len(counts))]
    tested = [f", {n:,} test" for n in analysis.get("tested", ())] or [""] * len(counts)
    return [
        f"{escape(name)}</b><br>{count:,} training{test} images<b>"
        for name, count, test in zip(names, counts, tested, strict=True)
    ]


def trend(group: int, x: list[float], y: list[float]) -> go.Scatter:
    """A line through the means of classes of similar size."""
    sizes: dict[int, list[tuple[float, float]]] = {}
    for count, value in zip(x, y, strict=True):
        sizes.setdefault(math.floor(math.log2(count)), []).append((math.log(count), value))
    parts = [sizes[at] for at in sorted(sizes)]
    middle = [math.exp(statistics.fmean(size for size, _ in part)) for part in parts]
    average = [statistics.fmean(value for _, value in part) for part in parts]
    found = line(group, middle, average, "", "solid")
    return found.update(mode="lines", hoverinfo="skip", hovertemplate=None)
