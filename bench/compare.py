"""`python -m bench.compare A.json B.json`: what became slower, larger or wrong from A to B.

Times of two runs are of two moments of a machine, or of two machines; ratios of variants that took
turns are not. So a variant's time is compared as it stood to another's, `--by products`, which no
change of ours moves (or eager, or as it is: `--by time`). A change counts where the quartiles
of A and B do not meet and the medians are more than `--least` apart. Exit status 1 if one is worse.
"""

import argparse
import json
import sys
from pathlib import Path

from tabulate import tabulate

from bench.show import PASSES, bytes_of, shape_of

MEMORY = 1 << 20  # bytes of extra memory that come and go with pages


def key(case):
    return *case["shape"], case["kappa"], case["dtype"], case["pass"], case["threads"]


def relative(case, name, by):
    """(low, median, high) of a variant's time by another's, or in ms; None where one has none."""
    own = case["results"].get(name, {}).get(PASSES[case["pass"]])
    if own is None or by == "time":
        return own and (own["quartiles"][0], own["median"], own["quartiles"][1])
    # Both took turns with the fused head; the quotient's spread is at most both spreads together.
    (low, high), middle = own["quartiles"], own["median"]
    base = case["results"].get(by, {}).get(PASSES[case["pass"]])
    if base is None:
        return None
    if name == "fused" and "over_fused" in case["results"][by]:  # of the same turns
        over = case["results"][by]["over_fused"]
        return 1 / over["quartiles"][1], 1 / over["median"], 1 / over["quartiles"][0]
    return low / base["median"], middle / base["median"], high / base["median"]


def verdict(a, b, least):
    """ "slower", "faster" or "same", and the change of the median."""
    change = b[1] / a[1] - 1
    apart = b[0] > a[2] or b[2] < a[0]
    if not apart or abs(change) < least:
        return "same", change
    return "slower" if change > 0 else "faster", change


def compare(old, new, name, by, least):
    """Rows of the table for one variant, and whether one of them is worse."""
    before, rows, worse = {key(case): case for case in old["cases"]}, [], False
    for case in new["cases"]:
        was = before.get(key(case))
        if was is None or name not in case["results"] or name not in was["results"]:
            continue
        a, b = was["results"][name], case["results"][name]
        row = {"": shape_of(case), "kappa": f"{case['kappa']:g}", "dtype": case["dtype"]}
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
    parser.add_argument("--variant", default="fused", help="(default fused)")
    parser.add_argument("--by", choices=("products", "eager", "time"), default="products")
    parser.add_argument("--least", type=float, default=0.05, help="of a median (default 0.05)")
    options = parser.parse_args(args)
    reports = []
    for path in (options.a, options.b):
        try:
            reports.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"got {path} ({error}), wanted a file of python -m bench --json")
        if not {"cases", "commit", "date"} <= set(reports[-1]):
            parser.error(f"got {path}, wanted a file of python -m bench --json")
    old, new = reports
    for letter, report in zip("AB", reports, strict=True):
        where = report["cpu"] if report["device"] == "cpu" else report["device"]
        print(f"{letter}: {report['commit']}, {report['date']}, {where}, torch {report['torch']}")
    rows, worse = compare(old, new, options.variant, options.by, options.least)
    if not rows:
        parser.error(f"got no case of {options.variant} that both files have, wanted one")
    unit = "ms" if options.by == "time" else f"time over that of {options.by}"
    print(f"\n{options.variant}, {unit}\n\n{tabulate(rows, headers='keys', disable_numparse=True)}")
    sys.exit(int(worse))


if __name__ == "__main__":
    main()
