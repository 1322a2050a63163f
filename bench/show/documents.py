"""The places in the documents that commands of the benchmark rewrite with `--document`.

Each place is between two markers, `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import sys
import textwrap

from bench.measure.machine import ROOT
from bench.show import plots
from bench.show.tables import TINY, TITLES, overview, time_of
from bench.show.units import milliseconds, ratio, shape_of

MEASUREMENTS = "docs/measurements.md"
SCALING = "docs/scaling.md"  # the prediction for many GPUs


def results_path(name):
    return ROOT / "bench/results" / f"{name}.json"


def picture_path(name):
    return ROOT / "docs" / f"{name}.png"


def write_between(document, name, text):
    """Replaces the text between the markers of that name."""
    begin, end = (f"<!-- {slash}{name} -->" for slash in ("", "/"))
    path = ROOT / document
    if begin not in path.read_text():
        sys.exit(f"error: got {path} without {begin} and {end}, wanted a place for the table")
    before, rest = path.read_text().split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def paragraph(text):
    """A text in lines of at most 100 characters, as the documents have them."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def conditions(report):
    """The paragraph that says what was measured, where, and what the columns mean."""
    device = f"{report['cpu']} ({report['isa']}), {report['threads']} threads"
    if report["device"] != "cpu":
        device = f"{report['device']}, driver {report['driver']}"
    text = (
        f"Loss and gradients of features ({report['cases'][0]['dtype']}), weight (float32) and "
        f"scale on {device}, torch {report['torch']}, {report['date']}. Variants took turns in "
        "one process, and times are medians. The columns after the extra memory are times divided "
        "by the fused head's: more than 1 means slower than the fused head. "
    )
    if report["device"] != "cpu":
        text += (
            "Times are taken between events on the GPU. Where launches take longer than kernels, "
            "the replay of a CUDA graph shows what the kernels take. "
        )
    return paragraph(
        text + "Extra memory is the peak beyond operands and gradients. The floor is the longer "
        "of two times: the operations at the rate of a large matrix product, and the weight's "
        "bytes at the rate of a copy; both rates were measured in the same run."
    )


def markdown(report):
    """The tables of a suite, as the document has them."""
    large = [case for case in report["cases"] if min(case["shape"][:2]) > TINY]
    plain = [case for case in large if case["kappa"] != 0 and not case.get("sweep")]
    cosine = [case for case in large if case["kappa"] == 0]
    parts = [conditions(report), "At kappa 16:"]
    for dtype in dict.fromkeys(case["dtype"] for case in plain):
        if len(parts) > 2:
            parts.append(f"With features in {dtype}:")
        parts.append(overview([case for case in plain if case["dtype"] == dtype]))
    for case in report["cases"]:
        if case not in large:
            others = [
                f"{name} {ratio(case['results'][name]['over_fused'])}"
                for name in ("eager", "compile")
                if time_of(case, name)
            ]
            text = (
                f"At {shape_of(case)}, on one thread, function calls take nearly all of the "
                f"time: fused {milliseconds(time_of(case, 'fused'))}, {', '.join(others)}."
            )
            parts.append(paragraph(text))
    if cosine:
        parts.append("At kappa 0, the plain cosine head, which other packages have as well:")
        parts.append(overview(cosine))
    refused = {n: r["refused"] for c in cosine for n, r in c["results"].items() if "refused" in r}
    if refused:
        reasons = [f"{TITLES.get(name, name)} ({why})" for name, why in refused.items()]
        text = f"Packages that did not run at all of these shapes: {', '.join(reasons)}."
        parts.append(paragraph(text))
    suite = report["suite"]
    parts.append(f"![time and memory against classes](bench-{suite}.png)")
    parts.append(
        f"`python -m bench --suite {suite} --document` measures this again; all figures are in\n"
        f"[bench/results/{suite}.json](../bench/results/{suite}.json)."
    )
    return "\n\n".join(parts)


def write_suite(report):
    """Draws the picture of a suite and writes its tables."""
    plots.plot(report, picture_path(f"bench-{report['suite']}"))
    write_between(MEASUREMENTS, f"bench {report['suite']}", markdown(report))
