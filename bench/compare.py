"""`python -m bench.compare A.json B.json`: what became slower, larger or wrong from A to B.

Times of two runs are of two moments of a machine, or of two machines; ratios of variants that took
turns are not. So a variant's time is compared as it stood to another's, `--by products`, which no
change of ours moves (or eager, or as it is: `--by time`). A change counts where neither quartiles
of A and B nor medians of their successive parts meet, and medians are more than `--least` apart.
Times of a few milliseconds still differ by a tenth and more from process to process: what is said
to be slower there, measure again. Exit status 1 if something is worse.
"""

import argparse
import json
import sys
from pathlib import Path

from tabulate import tabulate

from bench.show import PASSES, bytes_of, shape_of
from bench.variants import NAMES

MEMORY = 1 << 20  # bytes of extra memory that come and go with pages


def key(case):
    about = (case.get(name) for name in ("kappa", "dtype", "pass", "device", "threads", "sweep"))
    return *case["shape"], *about


def limits(figures):
    """(low, median, high)"""
    ends = [*figures["quartiles"], *figures["medians"]]
    return min(ends), figures["median"], max(ends)


def relative(case, name, by):
    """(low, median, high) of a variant's time by another's, or in ms; None where one has none."""
    own, base = (case["results"].get(n, {}).get(PASSES[case["pass"]]) for n in (name, by))
    if own is None or (base is None and by != "time"):
        return None
    low, middle, high = limits(own)
    if by == "time":
        return low, middle, high
    if name == "fused":  # of the same turns
        ends = limits(case["results"][by]["over_fused"])
        return tuple(1 / ratio for ratio in reversed(ends))
    return tuple(value / base["median"] for value in (low, middle, high))


def verdict(a, b, least):
    """Whether b is slower than a, faster or the same, and the change of the median."""
    change = b[1] / a[1] - 1
    apart = b[0] > a[2] or b[2] < a[0]
    if not apart or abs(change) < least:
        return "same", change
    return "slower" if change > 0 else "faster", change


def compare(old, new, name, by, least):
    """Rows of the table for one variant, and whether one of them is worse."""
    after, rows, worse = {key(case): case for case in new["cases"]}, [], False
    for was in old["cases"]:
        if name not in was["results"]:
            continue
        case = after.get(key(was), {"results": {}})
        a, b = was["results"][name], case["results"].get(name)
        row = {"": shape_of(was), "kappa": f"{was['kappa']:g}", "dtype": was["dtype"]}
        if b is None:
            rows.append(row | {"verdict": "LOST: not in B"})
            worse = True
            continue
        times = [relative(c, name, by) for c in (was, case)]
        if None in times:
            lost = times[0] is not None
            told = b.get("refused") or ("wrong" if b.get("wrong") else f"no time of {by}")
            row["verdict"] = f"LOST: {told}" if lost else "not compared"
            worse |= lost
        else:
            told, change = verdict(*times, least)
            row |= {
                "A": f"{times[0][1]:.3g}",
                "B": f"{times[1][1]:.3g}",
                "change": f"{change:+.1%}",
            }
            row["verdict"] = told.upper() if told == "slower" else told
            worse |= told == "slower"
        sizes = [result.get("extra_bytes") for result in (a, b)]
        if None not in sizes:
            row["memory"] = " -> ".join(map(bytes_of, sizes))
            if sizes[1] > 1.1 * sizes[0] + MEMORY:
                row["memory"] += " LARGER"
                worse = True
        rows.append(row)
    return rows, worse


def main(args=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--variant", choices=NAMES, default="fused", help="(default fused)")
    parser.add_argument("--by", choices=("products", "eager", "time"), default="products")
    parser.add_argument("--least", type=float, default=0.1, help="change of a median (default 0.1)")
    options = parser.parse_args(args)
    if not options.least >= 0:
        parser.error(f"--least wants >= 0, got {options.least}")
    if options.variant == options.by:
        parser.error(f"--by wants another than --variant, got {options.by} for both")
    reports = []
    for path in (options.a, options.b):
        try:
            reports.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"got {path} ({error}), wanted a file of python -m bench --json")
        if not isinstance(reports[-1], dict) or not {"suite", "cases"} <= set(reports[-1]):
            parser.error(f"got {path}, wanted a file of python -m bench --json")
    old, new = reports
    for letter, report in zip("AB", reports, strict=True):
        where = report["cpu"] if report["device"] == "cpu" else report["device"]
        print(f"{letter}: {report['commit']}, {report['date']}, {where}, torch {report['torch']}")
    rows, worse = compare(old, new, options.variant, options.by, options.least)
    if not rows:
        parser.error(f"got no case of {options.variant} in A, wanted one")
    unit = "ms" if options.by == "time" else f"time over that of {options.by}"
    print(f"\n{options.variant}, {unit}\n\n{tabulate(rows, headers='keys', disable_numparse=True)}")
    sys.exit(int(worse))


if __name__ == "__main__":
    main()
