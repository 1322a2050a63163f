"""Pictures of the figures. matplotlib is imported here alone, since measuring does not need it."""

import sys
from contextlib import contextmanager

from bench.show.tables import TITLES, time_of
from bench.show.units import shape_of
from bench.variants import NAMES

SUFFIXES = (".png", ".pdf", ".svg")
PASS_NAMES = {"fwd": "forward", "bwd": "backward", "full": "forward and backward"}


def pyplot():
    """matplotlib's pyplot without windows; ends the program in one line where it is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("error: a plot needs the package matplotlib: pip install matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


@contextmanager
def picture(path, *rows_and_columns, **options):
    """A figure and its axes, which are saved to the path at the end."""
    figure, axes = pyplot().subplots(*rows_and_columns, layout="constrained", **options)
    yield figure, axes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def draw_ratios(axis, cases, colours, which):
    """Bars: the time of each variant divided by the fused head's, a group for each case."""
    for row, case in enumerate(cases):
        over = {
            name: result["over_fused"]["median"]
            for name, result in case["results"].items()
            if "over_fused" in result
        }
        width = 0.8 / len(over)
        for i, (name, value) in enumerate(over.items()):
            place = row + (i - len(over) / 2 + 0.5) * width
            axis.barh(place, value, width, color=colours[name])
    ticks = [f"{shape_of(case)}{', κ = 0' if case['kappa'] == 0 else ''}" for case in cases]
    axis.set_yticks(range(len(cases)), ticks)
    axis.invert_yaxis()
    axis.axvline(1, color="black", lw=0.8)
    axis.set_xlabel(f"time / time of the fused head ({PASS_NAMES[which]})")


def draw_sweep(axis, cases, colours, names, figure_of, title):
    """Lines: a figure of each variant against the number of classes."""
    for name in names:
        pairs = [(c["shape"][1], figure_of(c, name)) for c in cases if figure_of(c, name)]
        if pairs:
            axis.loglog(*zip(*pairs, strict=True), ".-", color=colours[name])
    axis.set_xlabel("classes C, at N = {}, D = {}".format(*cases[0]["shape"][::2]))
    axis.set_ylabel(title)
    axis.grid(alpha=0.3)


def plot(report, path):
    """Time of each variant over the fused head's; time and extra memory against C."""
    found = [case for case in report["cases"] if time_of(case, "fused")]
    sweep = [case for case in found if case.get("sweep")]
    names = [name for name in NAMES if any(time_of(case, name) for case in found)]
    palette = [*pyplot().get_cmap("tab10").colors, "black"]
    colours = dict(zip(NAMES, palette, strict=True))
    size = {"figsize": (16 if sweep else 7, 5), "squeeze": False}
    with picture(path, 1, 3 if sweep else 1, **size) as (figure, axes):
        bars, *lines = axes[0]
        plain = [case for case in found if not case.get("sweep")]
        draw_ratios(bars, plain, colours, report["cases"][0]["pass"])
        if sweep:
            draw_sweep(lines[0], sweep, colours, names, time_of, "time, ms")
            memory = extra_megabytes
            draw_sweep(lines[1], sweep, colours, names, memory, "extra memory, MB")
        patches = [pyplot().Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
        titles = [TITLES.get(name, name) for name in names]
        columns = len(names) if sweep else 3  # as many as the width of the figure holds
        place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        figure.legend(patches, titles, **place)


def extra_megabytes(case, name):
    return (case["results"].get(name, {}).get("extra_bytes") or 0) / 1e6
