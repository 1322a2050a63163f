"""Tables: one for each case, and an overview with a row for each case."""

import statistics

from bench.show.units import milliseconds, ratio, shape_of, with_spread, with_unit
from bench.variants import NAMES

PASSES = {"fwd": "forward_ms", "bwd": "backward_ms", "full": "full_ms"}
TITLES = {
    "products": "three bare products",
    "linear_ce": "torch's linear_cross_entropy",
    "linear_ce_chunked": "linear_cross_entropy, chunked",
    "pml": "NormalizedSoftmaxLoss",
    "cce": "cut-cross-entropy",
    "liger": "Liger",
}
# A process that loses its core more often, in times a second, shares the machine with other work.
BUSY = 200
# A case with as few rows or classes is mostly function calls, and is left out of the means.
TINY = 8


def table(rows):
    """Rows, each a dict from column title to text, as a Markdown table; a missing cell is empty."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    cells = [titles, *([str(row.get(title, "")) for title in titles] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    header, *lines = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells]
    return "\n".join([header, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines])


def time_of(case, name):
    """Median time, in ms, of a variant in the pass that the case is about; None without one."""
    found = case["results"].get(name, {}).get(PASSES[case["pass"]])
    return found and found["median"]


def memory_of(case, name):
    """Extra memory of a variant. On the CPU less than a megabyte cannot be told from nothing,
    because the resident set changes by whole pages."""
    count = case["results"].get(name, {}).get("extra_bytes")
    below = count is not None and count < 1e6 and case["device"] == "cpu"
    return "< 1 MB" if below else with_unit(count, "B")


def row_of(case, name):
    """A variant's row in the table of its case."""
    result = case["results"][name]
    row = {"variant": name}
    for key in (*PASSES.values(), "graph_ms"):
        if key in result:
            row[key.replace("_ms", ", ms")] = with_spread(result[key])
    if "over_eager" in result:
        row["speed-up over eager"] = f"{1 / result['over_eager']['median']:.2f}x"
    return row | {
        "TFLOP/s": f"{result['tflops']:.3g}",
        "floor / time": f"{result['of_floor']:.0%}",
        "extra memory": memory_of(case, name),
        "operators" if case["device"] == "cpu" else "launches": result["launches"],
        "error": f"{result['error']:.1e}" if "error" in result else "-",
    }


def case_text(case):
    """A case: a row for each variant that was timed, and a line for each that was not."""
    rows, lines = [], []
    for name, result in case["results"].items():
        if "refused" in result:
            lines.append(f"{name} refused: {result['refused']}")
        elif result.get("wrong"):
            lines.append(f"{name} is WRONG by {result['error']:.1e} and was not timed")
        else:
            rows.append(row_of(case, name))
            notes = [key for key in ("warned", "graph_refused") if key in result]
            lines += [f"{name} {key.replace('_', ' ')}: {result[key]}" for key in notes]
    speed = case["machine"]
    title = (
        f"{shape_of(case)}, kappa {case['kappa']:g}, {case['dtype']}, {case['threads']} threads; "
        f"rates here: a large product {with_unit(speed['flops_per_s'], 'FLOP/s')}, "
        f"a copy {with_unit(speed['bytes_per_s'], 'B/s')}; floor {milliseconds(case['floor_ms'])}"
    )
    if case["preempted_per_s"] > BUSY:
        lines.append(
            f"BUSY: other work took a core {case['preempted_per_s']:.0f} times a second; "
            "do not trust these times"
        )
    return "\n".join(["", title, "", table(rows), *lines])


def fused_cells(case, graphs, with_dtype):
    """The cells of the overview that are about the fused head, beside eager PyTorch's."""
    results = case["results"]
    notes = ["kappa 0"] if case["kappa"] == 0 else []
    notes += [case["dtype"]] if with_dtype else []
    fused, time = results.get("fused", {}), time_of(case, "fused")

    def in_graph(name):
        found = results.get(name, {}).get("graph_ms")
        return f"{found['median']:.3g}" if found else "-"

    cells = {
        "(N, C, D)": ", ".join([shape_of(case), *notes]),
        "fused": milliseconds(time) if time else "wrong" if fused.get("wrong") else "-",
    }
    if graphs:
        pair = f"{in_graph('fused')} / {in_graph('eager')}"
        cells["CUDA graph, fused / eager, ms"] = pair
    return cells | {
        "floor / time": f"{fused['of_floor']:.0%}" if time else "-",
        "extra memory, fused / eager": f"{memory_of(case, 'fused')} / {memory_of(case, 'eager')}",
    }


def overview(cases):
    """A row for each case: the fused head's figures, then the time of each other variant divided
    by the fused head's."""
    with_dtype = len({case["dtype"] for case in cases}) > 1
    graphs = any("graph_ms" in result for case in cases for result in case["results"].values())
    tried = {name for case in cases for name, r in case["results"].items() if "refused" not in r}
    others = [name for name in NAMES[1:] if name in tried]
    rows, ratios = [], {name: [] for name in others}
    for case in cases:
        row = fused_cells(case, graphs, with_dtype)
        for name in others:
            result = case["results"].get(name, {})
            over = result.get("over_fused")
            if over and min(case["shape"][:2]) > TINY:
                ratios[name].append(over["median"])
            note = "refused" if "refused" in result else "wrong" if result.get("wrong") else "-"
            row[TITLES.get(name, name)] = ratio(over) if over else note
        rows.append(row)
    means = {
        TITLES.get(name, name): f"{statistics.geometric_mean(values):.2f}x"
        for name, values in ratios.items()
        if len(values) > 1
    }
    if means:
        rows.append({"(N, C, D)": "geometric mean", **means})
    return table(rows)


def overview_text(report):
    title = (
        "All cases. The columns after the extra memory are times divided by the fused head's:\n"
        "more than 1 means slower than the fused head."
    )
    return "\n".join(["", title, "", overview(report["cases"])])
