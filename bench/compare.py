"""`python -m bench.compare A.json B.json`: what became slower, larger or wrong from A to B.

Two runs are two moments of a machine, or two machines, so their times do not compare. Ratios of
variants that took turns do. A variant's time is therefore divided by that of another, which no
change of ours affects: `--by products` (the default) or eager; `--by time` compares times as they
are. A change counts if its size is more than `--least` and the two ranges do not overlap, each of
which spans the quartiles and the medians of successive parts of a run. Times of a few milliseconds
still differ by a tenth and more between processes: measure again before you believe such a change.
The exit status is 1 if something became worse.
"""

import argparse
import json
import sys
from pathlib import Path

from bench.show.tables import PASSES, table
from bench.show.units import shape_of, with_unit
from bench.variants import NAMES

# Bytes of extra memory that come and go, because the resident set changes by whole pages.
MEMORY = 1 << 20


def key(case):
    """The properties that a case of A and a case of B must share to be compared."""
    about = (case.get(name) for name in ("kappa", "dtype", "pass", "device", "threads", "sweep"))
    return *case["shape"], *about


def limits(figures):
    """(low, median, high)"""
    ends = [*figures["quartiles"], *figures["medians"]]
    return min(ends), figures["median"], max(ends)


def relative(case, name, by):
    """(low, median, high) of a variant's time divided by another's, or in ms by itself; None if
    one of the two was not timed."""
    own, base = (case["results"].get(n, {}).get(PASSES[case["pass"]]) for n in (name, by))
    if own is None or (base is None and by != "time"):
        return None
    low, middle, high = limits(own)
    if by == "time":
        return low, middle, high
    if name == "fused":  # these ratios were taken turn by turn, others were not
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


def compare_case(was, case, name, by, least):
    """A row of the table for one variant of one case, and whether it became worse."""
    row = {"(N, C, D)": shape_of(was), "kappa": f"{was['kappa']:g}", "dtype": was["dtype"]}
    a, b = was["results"][name], case["results"].get(name)
    if b is None:
        return row | {"verdict": "LOST: not in B"}, True
    worse = False
    times = [relative(c, name, by) for c in (was, case)]
    if None in times:
        worse = times[0] is not None
        why = b.get("refused") or ("wrong" if b.get("wrong") else f"no time of {by}")
        row["verdict"] = f"LOST: {why}" if worse else "not compared"
    else:
        word, change = verdict(*times, least)
        worse = word == "slower"
        row |= {
            "A": f"{times[0][1]:.3g}",
            "B": f"{times[1][1]:.3g}",
            "change": f"{change:+.1%}",
            "verdict": word.upper() if worse else word,
        }
    sizes = [result.get("extra_bytes") for result in (a, b)]
    if None not in sizes:
        row["extra memory"] = " -> ".join(with_unit(size, "B") for size in sizes)
        if sizes[1] > 1.1 * sizes[0] + MEMORY:
            row["extra memory"] += " LARGER"
            worse = True
    return row, worse


def compare(old, new, name, by, least):
    """Rows of the table for one variant, and whether one of them is worse."""
    after = {key(case): case for case in new["cases"]}
    found = [
        compare_case(was, after.get(key(was), {"results": {}}), name, by, least)
        for was in old["cases"]
        if name in was["results"]
    ]
    return [row for row, _ in found], any(worse for _, worse in found)


def read(path, parser):
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"got {path} ({error}), wanted a file of python -m bench --json")
    if not isinstance(report, dict) or not {"suite", "cases"} <= set(report):
        parser.error(f"got {path}, wanted a file of python -m bench --json")
    return report


def main(args=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("a", type=Path, metavar="A.json")
    add("b", type=Path, metavar="B.json")
    add("--variant", choices=NAMES, default="fused", help="(default fused)")
    add("--by", choices=("products", "eager", "time"), default="products")
    add("--least", type=float, default=0.1, help="the least change that counts (default 0.1)")
    options = parser.parse_args(args)
    if not options.least >= 0:
        parser.error(f"--least wants >= 0, got {options.least}")
    if options.variant == options.by:
        parser.error(f"--by wants another variant than --variant, got {options.by} for both")
    old, new = (read(path, parser) for path in (options.a, options.b))
    for letter, report in zip("AB", (old, new), strict=True):
        where = report["cpu"] if report["device"] == "cpu" else report["device"]
        print(f"{letter}: {report['commit']}, {report['date']}, {where}, torch {report['torch']}")
    rows, worse = compare(old, new, options.variant, options.by, options.least)
    if not rows:
        parser.error(f"got no case of {options.variant} in A, wanted one")
    unit = "ms" if options.by == "time" else f"time divided by that of {options.by}"
    print(f"\n{options.variant}, {unit}\n\n{table(rows)}")
    sys.exit(int(worse))


if __name__ == "__main__":
    main()
