"""Figures as tables for a terminal and the README, and as a picture."""

import json
import statistics
import sys

from tabulate import tabulate

from bench.measure import ROOT
from bench.variants import NAMES

PASSES = {"fwd": "forward_ms", "bwd": "backward_ms", "full": "full_ms"}
TITLES = {"products": "three bare products", "linear_ce": "torch's linear_cross_entropy",
          "linear_ce_chunked": "the same, chunked",
          "pml": "NormalizedSoftmaxLoss", "cce": "cut-cross-entropy", "liger": "Liger"}  # fmt: skip
BUSY = 200  # a second: more often no core was taken on a machine with nothing else to do
TINY = 8  # rows or classes: such a case is all calls, and in no mean


def shape_of(case):
    return "({}, {}, {})".format(*case["shape"])


def bytes_of(count):
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def memory_of(case, name):
    """Extra memory; of the CPU's a megabyte comes and goes with pages."""
    count = case["results"].get(name, {}).get("extra_bytes")
    low = count is not None and count < 1e6 and case["device"] == "cpu"
    return "< 1 MB" if low else bytes_of(count)


def milliseconds(case, name):
    """Median time of a variant in the pass that the case is of, or None."""
    found = case["results"].get(name, {}).get(PASSES[case["pass"]])
    return found and found["median"]


def with_spread(figures):
    """Median, and half of what is between the quartiles."""
    low, high = figures["quartiles"]
    return f"{figures['median']:.3g} ± {(high - low) / 2:.1g}"


def ratio(figures):
    return f"{figures['median']:.2f}x"


def case_text(case):
    """A case: a row for each variant that ran, a line for each that did not."""
    rows, lines = [], []
    for name, result in case["results"].items():
        if "refused" in result:
            lines.append(f"{name} refused: {result['refused']}")
        elif result.get("wrong"):
            lines.append(f"{name} is WRONG by {result['error']:.1e} and was not timed")
        else:
            row = {"": name}
            for key in (*PASSES.values(), "graph_ms"):
                if key in result:
                    row[key.replace("_", " ")] = with_spread(result[key])
            if "over_eager" in result:
                row["speed-up"] = f"{1 / result['over_eager']['median']:.2f}x"
            row |= {"TFLOP/s": f"{result['tflops']:.3g}", "of floor": f"{result['of_floor']:.0%}"}
            row["extra memory"] = memory_of(case, name)
            row["operators" if case["device"] == "cpu" else "launches"] = result["launches"]
            row["error"] = f"{result['error']:.1e}" if "error" in result else "-"
            rows.append(row)
            told = [key for key in ("warned", "graph_refused") if key in result]
            lines += [f"{name} {key.replace('_', ' ')}: {result[key]}" for key in told]
    speed = case["machine"]
    title = (
        f"{shape_of(case)}, kappa {case['kappa']:g}, {case['dtype']}, {case['threads']} threads; "
        f"a product here {speed['flops_per_s'] / 1e12:.3g} TFLOP/s, "
        f"a copy {speed['bytes_per_s'] / 1e9:.3g} GB/s, floor {case['floor_ms']:.3g} ms"
    )
    table = tabulate(rows, headers="keys", disable_numparse=True)
    if case["preempted_per_s"] > BUSY:
        lines.append(
            f"BUSY: other work took a core {case['preempted_per_s']:.0f} times a second; "
            "these times are not to be trusted"
        )
    return "\n".join(["", title, "", table, *lines])


def in_graph(case, name):
    found = case["results"].get(name, {}).get("graph_ms")
    return f"{found['median']:.3g}" if found else "-"


def overview(cases, style="simple"):
    """A row for each case: the fused head's figures, then the others' times over its."""
    graphs = any("graph_ms" in result for case in cases for result in case["results"].values())
    tried = {name for case in cases for name, r in case["results"].items() if "refused" not in r}
    others = [name for name in NAMES[1:] if name in tried]
    rows, ratios = [], {name: [] for name in others}
    for case in cases:
        results = case["results"]
        fused = results.get("fused", {})
        time = milliseconds(case, "fused")
        memory = (memory_of(case, name) for name in ("fused", "eager"))
        row = {
            "(N, C, D)": shape_of(case) + (", kappa 0" if case["kappa"] == 0 else ""),
            "fused": f"{time:.3g} ms" if time else "wrong" if fused.get("wrong") else "-",
            **(
                {
                    "in a graph, fused / eager, ms": " / ".join(
                        in_graph(case, name) for name in ("fused", "eager")
                    )
                }
                if graphs
                else {}
            ),
            "of the floor": f"{fused['of_floor']:.0%}" if time else "-",
            "extra memory, fused / eager": " / ".join(memory),
        }
        for name in others:
            result = results.get(name, {})
            over = result.get("over_fused")
            if over and min(case["shape"][:2]) > TINY:
                ratios[name].append(over["median"])
            note = "refused" if "refused" in result else "wrong" if result.get("wrong") else "-"
            row[TITLES.get(name, name)] = ratio(over) if over else note
        rows.append(row)
    if len(cases) > 1:
        means = {TITLES.get(n, n): f"{statistics.geometric_mean(r):.2f}x"
                 for n, r in ratios.items() if len(r) > 1}  # fmt: skip
        rows += [{"(N, C, D)": "geometric mean", **means}] if means else []
    return tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)


def overview_text(report):
    title = "times over the fused head's; larger is slower than it"
    return "\n".join(["", title, "", overview(report["cases"])])


def markdown(report):
    """What the README has between its markers."""
    large = [case for case in report["cases"] if min(case["shape"][:2]) > TINY]
    plain = [case for case in large if case["kappa"] != 0 and not case.get("sweep")]
    cosine = [case for case in large if case["kappa"] == 0]
    parts = [overview(plain, "github")]
    for case in report["cases"]:
        if case not in large:
            others = (f"{name} {ratio(case['results'][name]['over_fused'])}"
                      for name in ("eager", "compile") if milliseconds(case, name))  # fmt: skip
            parts.append(
                f"A head as small as {shape_of(case)}, on one thread, is all calls: "
                f"{1e3 * milliseconds(case, 'fused'):.3g} us, {', '.join(others)}."
            )
    refused = {n: r["refused"] for c in cosine for n, r in c["results"].items() if "refused" in r}
    if cosine:
        parts.append("The plain cosine head, kappa = 0, which others have as well:")
        parts.append(overview(cosine, "github"))
    if refused:
        told = (f"{TITLES.get(name, name)} ({why})" for name, why in refused.items())
        parts.append(f"Refused: {', '.join(told)}.")
    parts.append(f"![time and memory against classes](docs/bench-{report['suite']}.png)")
    device = f"{report['cpu']} ({report['isa']}), {report['threads']} threads"
    if report["device"] != "cpu":
        device = f"{report['device']}, driver {report['driver']}"
    graphs = ""
    if report["device"] != "cpu":
        graphs = (" Times are between events on the GPU; where launches take longer than kernels a "
                  "CUDA graph's replay, beside, is what the kernels take.")  # fmt: skip
    parts.append(
        f"Loss and gradients of features ({report['cases'][0]['dtype']}), weight (float32) and "
        f"scale, at kappa 16 but for the second table; {device}, torch {report['torch']}, "
        f"{report['date']}. Medians of turns in one process; the others' times are over the fused "
        f"head's: larger is slower than it.{graphs} Extra memory is the peak beyond operands and "
        "gradients. The floor is the operations at the rate of a large matrix product, or the "
        "weight's bytes at that of a copy, both measured beside. Again: "
        f"`python -m bench --suite {report['suite']} --readme`; all figures: "
        f"[bench/results/{report['suite']}.json](bench/results/{report['suite']}.json)."
    )
    return "\n\n".join(parts)


def plot(report, path):
    """Time of each variant over the fused head's; time and extra memory against C."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = [case for case in report["cases"] if milliseconds(case, "fused")]
    plain = [case for case in found if not case.get("sweep")]
    sweep = [case for case in found if case.get("sweep")]
    figure, axes = plt.subplots(1, 3 if sweep else 1, figsize=(16 if sweep else 7, 5),
                                layout="constrained", squeeze=False)  # fmt: skip
    bars, *lines = axes[0]
    shown = [n for n in NAMES if any(milliseconds(case, n) for case in found)]
    colours = dict(zip(NAMES, [*plt.get_cmap("tab10").colors, "black"], strict=True))
    for row, case in enumerate(plain):
        over = {n: r["over_fused"]["median"] for n, r in case["results"].items()
                if "over_fused" in r}  # fmt: skip
        width = 0.8 / len(over)
        for i, (name, value) in enumerate(over.items()):
            place = row + (i - len(over) / 2 + 0.5) * width
            bars.barh(place, value, width, color=colours[name])
    ticks = [f"{shape_of(case)}{', κ = 0' if case['kappa'] == 0 else ''}" for case in plain]
    bars.set_yticks(range(len(plain)), ticks)
    bars.invert_yaxis()
    bars.axvline(1, color="black", lw=0.8)
    bars.set_xlabel(f"time over the fused head's ({report['cases'][0]['pass']} pass)")
    patches = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in shown]
    figure.legend(patches, [TITLES.get(name, name) for name in shown], ncols=len(shown),
                  loc="outside lower center", frameon=False)  # fmt: skip
    figures = {
        "time, ms": milliseconds,
        "extra memory, MB": lambda c, n: (c["results"].get(n, {}).get("extra_bytes") or 0) / 1e6,
    }
    for axis, (title, figure_of) in zip(lines, figures.items(), strict=False):
        for name in shown:
            pairs = [(c["shape"][1], figure_of(c, name)) for c in sweep if figure_of(c, name)]
            if pairs:
                axis.loglog(*zip(*pairs, strict=True), ".-", color=colours[name])
        axis.set_xlabel("classes C, at N = {}, D = {}".format(*sweep[0]["shape"][::2]))
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save(report, path):
    """Writes the JSON whole or not at all; nothing without a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(path)


def load(options, parser):
    """The figures that `--load` names, or None; of the device that `--device` does."""
    if not options.load:
        return None
    try:
        report = json.loads(options.load.read_text())
        device = "cpu" if report["device"] == "cpu" else "cuda"
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--load got {error}, wanted a file of --json")
    if device != options.device or report.get("quick"):
        parser.error(f"--load got figures of {device}, wanted measured ones of {options.device}")
    return report


def write_between(file, name, text):
    """Replaces what a file of the repository has between the markers of that name."""
    begin, end = (f"<!-- {slash}{name} -->" for slash in ("", "/"))
    path = ROOT / file
    if begin not in path.read_text():
        sys.exit(f"error: got {path} without {begin} and {end}, wanted a place for the table")
    before, rest = path.read_text().split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def rewrite_readme(report):
    plot(report, ROOT / f"docs/bench-{report['suite']}.png")
    write_between("README.md", f"bench {report['suite']}", markdown(report))
