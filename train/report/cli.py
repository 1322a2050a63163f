"""The command that writes the report."""

import argparse
import sys
from pathlib import Path

from train.config import TrainError

ABOUT = "A report on runs of the driver: one page of curves, errors, angles, and a table over seeds"
NOTE = """Rates are in % of the test images. Many, medium, few: error@1 of classes with more than
100, 20 to 100, fewer than 20 training images. Adjusted: error@1 after the logarithm of each class's
frequency is subtracted from its logit. ±: sample standard deviation over seeds. The best
mean of each stage is marked. A click on a heading sorts."""


def main(args: list[str] | None = None) -> None:
    """Reads the runs, writes the report and prints its table."""
    parser = argparse.ArgumentParser("python -m train.report", description=ABOUT)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--out", type=Path, default=Path("report"), help="default: report")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--pictures", action="store_true", help="write a PNG of each section, too; needs Chromium"
    )
    options = parser.parse_args(args)
    from train.report import browser, table  # here, so that --help need not wait for libraries
    from train.report.page import make_page
    from train.report.runs import describe, group_runs, load_run

    runs = [load_run(path) for path in dict.fromkeys(options.runs)]
    groups = group_runs(runs)
    page = make_page(groups, describe(runs), NOTE)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "index.html").write_text(page, encoding="utf-8")
        if options.pictures:
            browser.pictures(options.out / "index.html")
    except OSError as error:
        raise TrainError(f"--out: got {error}, wanted a directory to write to") from error
    rows = table.make_rows(groups)
    print(table.to_text(rows, options.markdown) if rows else "no finished run")
    print(f"report: {options.out / 'index.html'}", file=sys.stderr)
