"""`python -m bench`: the fused head beside what a user could take instead, in one process.

Every variant makes the loss and its gradients with respect to features, weight and scale from the
same tensors. Variants take turns, so that a slow moment of the machine falls on all of them; times
are medians. A variant that cannot run a case is listed with its reason. A variant whose error
against float64 is more than twice eager PyTorch's, plus a tolerance, is shown as wrong and not
timed.

    python -m bench                              a small shape and a ragged one, 2 minutes
    python -m bench --suite cpu --document       the tables and the picture of docs/measurements.md
    python -m bench --suite gpu --document       the same on a GPU, 2 to 3 minutes
    python -m bench --suite gpu-more --json PATH     more shapes on a GPU, and max-autotune
    python -m bench --shape 256 8142 2048        one shape
    python -m bench.compare A.json B.json        what became slower from one file to another
    python -m bench.end_to_end                   a whole training step
    python -m bench.scaling                      time and memory against N, C and D
    python -m bench.kernel_times                 each kernel on a GPU
    python -m bench.train                        the training driver's loop
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from bench import variants
from bench.measure.case import measure
from bench.measure.machine import about
from bench.show import documents, plots
from bench.show.results import save
from bench.show.tables import case_text, overview_text, time_of
from bench.show.units import shape_of
from bench.suite import KAPPA, SUITES, cases

# With any other flag the command that the document names would not make the same tables.
BESIDE_DOCUMENT = {"suite", "load", "document"}


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="variants:\n"
        + "\n".join(f"  {name:<18}{text}" for name, text in variants.ABOUT.items()),
    )
    add = parser.add_argument
    add("--suite", choices=SUITES, default="quick", help="which cases to measure (default quick)")
    add("--shape", nargs=3, type=int, metavar=("N", "C", "D"), help="measure this shape alone")
    add("--kappa", type=float, help="kappa of --shape (default 16); 0 adds the other packages")
    add("--variants", nargs="+", choices=variants.NAMES, help="what to compare (default all)")
    add(
        "--pass",
        choices=("fwd", "bwd", "full"),
        default="full",
        dest="which",
        help="the pass that ratios are about (default full); fwd runs no backward pass",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the features (default: the suite's)",
    )
    add("--device", choices=("cpu", "cuda"), help="where to measure (default: the suite's)")
    add("--seconds", type=float, help="how long to measure each case (default: the suite's)")
    add(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="threads on the CPU (default %(default)s here)",
    )
    add("--json", type=Path, metavar="PATH", help="write the figures there")
    add("--load", type=Path, metavar="PATH", help="show a file of --json, measure nothing")
    add("--plot", type=Path, metavar="PATH", help="draw the figures there (PNG, PDF, SVG)")
    add(
        "--document",
        action="store_true",
        help=f"write the tables into {documents.MEASUREMENTS}, the picture beside it, and the "
        "figures into bench/results/SUITE.json",
    )
    return parser


def check(options, parser):
    """Refuses options that make no sense, in one line with got and wanted."""
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    if options.shape and min(options.shape) < 1:
        parser.error(f"--shape wants positive N C D, got {options.shape}")
    if options.kappa is not None and not -0.5 < options.kappa < math.inf:
        parser.error(f"--kappa wants a finite value > -1/2, got {options.kappa}")
    if options.kappa is not None and not options.shape:
        parser.error(f"--kappa {options.kappa} wants a --shape")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds wants > 0, got {options.seconds}")
    if options.threads < 1:
        parser.error(f"--threads wants > 0, got {options.threads}")
    if options.document and options.suite not in ("cpu", "gpu"):
        parser.error(f"--document wants --suite cpu or gpu, got {options.suite}")
    if options.document and given - BESIDE_DOCUMENT:
        more = ", ".join(sorted(given - BESIDE_DOCUMENT))
        parser.error(f"--document wants no option beside --suite and --load, got {more}")
    only_peers = options.variants and set(options.variants) <= set(variants.PEERS)
    if only_peers and options.shape and options.kappa != 0:
        parser.error(f"--variants {' '.join(options.variants)} wants --kappa 0")
    if options.plot and options.plot.suffix not in plots.SUFFIXES:
        parser.error(f"--plot wants .png, .pdf or .svg, got {options.plot}")


def check_outputs(options, parser):
    """Finds out before anything is measured whether the results can be written."""
    if options.plot or options.document:
        plots.pyplot()
    try:
        for path in filter(None, (options.json, options.plot)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
    except OSError as error:
        parser.error(f"got {path} ({error.strerror}), wanted a file to write to")


def load(options, parser):
    """The report that `--load` names."""
    try:
        report = json.loads(options.load.read_text())
        suite, _ = report["suite"], report["cases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--load got {error}, wanted a file of python -m bench --json")
    if options.document and suite != options.suite:
        parser.error(f"--load got figures of {suite}, wanted those of {options.suite}")
    return report


def parse(args):
    """The options, complete and checked; `options.load` becomes the report itself."""
    parser = make_parser()
    options = parser.parse_args(args)
    check(options, parser)
    for name in ("device", "seconds"):
        if getattr(options, name) is None:
            setattr(options, name, SUITES[options.suite][name])
    if not options.variants:
        leave_out = {"max-autotune"} if options.device == "cpu" else set()
        options.variants = [name for name in variants.NAMES if name not in leave_out]
    if options.device == "cuda" and not options.load and not torch.cuda.is_available():
        parser.error("--device cuda wants a GPU, got none")
    if options.load:
        options.load = load(options, parser)
    check_outputs(options, parser)
    return options


def print_text(console, text):
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def run(options, console):
    """Measures the cases, prints each as soon as it is done, and returns the report."""
    torch.set_num_threads(options.threads)
    suite = "shape" if options.shape else options.suite
    report = {"suite": suite, **about(options.device), "cases": []}
    todo = SUITES[options.suite]["cases"]
    if options.shape:
        todo = cases([options.shape], KAPPA if options.kappa is None else options.kappa)
    with Progress(console=console, transient=True) as progress:
        whole = progress.add_task("cases", total=len(todo))
        for case in todo:
            task = progress.add_task(shape_of(case), total=1.0)
            torch.set_num_threads(case.get("threads", options.threads))
            peers = variants.PEERS if case["kappa"] != 0 else ()
            leave_out = {*case.get("leave_out", ()), *peers}
            result = measure(
                case,
                [name for name in options.variants if name not in leave_out],
                options.seconds,
                options.which,
                options.device,
                getattr(torch, options.dtype or case.get("dtype", SUITES[options.suite]["dtype"])),
                partial(progress.update, task),
            )
            torch.set_num_threads(options.threads)
            progress.remove_task(task)
            progress.advance(whole)
            print_text(console, case_text(result))
            report["cases"].append(result)
            save(report, options.json)  # after each case, so that a crash loses one case alone
    return report


def main(args=None):
    options, console = parse(args), Console()
    if options.document:
        options.json = documents.results_path(options.suite)
    if options.load:
        report = options.load
        for case in report["cases"]:
            print_text(console, case_text(case))
    else:
        report = run(options, console)
    print_text(console, overview_text(report))
    save(report, options.json)
    if options.plot:
        plots.plot(report, options.plot)
    if options.document:
        documents.write_suite(report)
    for case in report["cases"]:
        if "fused" in case["results"] and not time_of(case, "fused"):
            sys.exit(f"error: the fused head is wrong or refused at {shape_of(case)}")
