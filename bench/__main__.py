"""`python -m bench`: the fused head beside what a user would pick instead, in one process.

Every variant makes the loss and its gradients by features, weight and scale from the same tensors,
in turns, so that a slow moment of the machine falls on all. Times are medians. A variant that
refuses a shape is listed with its reason; one whose result is off (further from float64 than
twice eager PyTorch's, and a tolerance) is shown as wrong and not timed.

    python -m bench                              a small shape and a ragged one, 2 minutes
    python -m bench --suite cpu --readme         the table and the picture of the README
    python -m bench --suite gpu --readme         the same on a GPU, 2 to 3 minutes
    python -m bench --suite gpu-more --json PATH     other shapes there, and max-autotune
    python -m bench --shape 256 8142 2048        one shape
    python -m bench.compare A.json B.json        what became slower
    python -m bench.end_to_end                   what the head is of a training step
    python -m bench.scaling                      time and memory against N, C and D
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

from bench import show, variants
from bench.measure import about, measure

KAPPA = 16.0


def cases(shapes, kappa=KAPPA, **more):
    return [{"shape": list(shape), "kappa": kappa, **more} for shape in shapes]


# `sweep` cases are plotted against C; `leave_out` is what would take too long.
UNTUNED = {"leave_out": ["max-autotune"]}
UNCOMPILED = {"leave_out": ["max-autotune", "compile", "pml"]}
DESIGN = [(256, 1000, 512), (256, 8142, 2048), (1024, 21841, 768), (1024, 10**6, 512)]
SUITES = {
    "quick": {
        "device": "cpu", "dtype": "float32", "seconds": 3,
        "cases": [
            *cases([(256, 1000, 512), (127, 1003, 130)]),
            *cases([(256, 1000, 512)], kappa=0.0),
        ],
    },
    "cpu": {
        "device": "cpu", "dtype": "float32", "seconds": 7,
        "cases": [
            *cases([(256, 1000, 512), (256, 8142, 2048), (256, 21841, 768), (256, 100_000, 512)]),
            *cases([(1, 8, 8)], threads=1),
            *cases([(127, 8143, 511), (33, 1003, 2047)]),
            *cases([(256, 1000, 512), (256, 8142, 2048), (1024, 8142, 512)], kappa=0.0),
            *cases([(64, 10**i, 512) for i in (3, 4, 5, 6)], sweep=True),
        ],
    },
    # torch.compile takes 10 to 20 s a shape, which is most of this suite's time.
    "gpu": {
        "device": "cuda", "dtype": "bfloat16", "seconds": 1,
        "cases": [
            *cases(DESIGN, **UNTUNED),
            *cases(DESIGN, kappa=0.0, **UNCOMPILED),
            *cases([(256, 10**i, 512) for i in (3, 4, 5, 6)], sweep=True, **UNCOMPILED),
        ],
    },
    "gpu-more": {
        "device": "cuda", "dtype": "bfloat16", "seconds": 2,
        "cases": [
            *cases(DESIGN),
            *cases([(8192, 128_256, 2304), (127, 8143, 511), (1000, 21_839, 1001)], **UNTUNED),
            *cases(DESIGN, kappa=0.0, **UNTUNED),
            *cases([(8192, 128_256, 2304)], kappa=0.0, **UNTUNED),
        ],
    },
}  # fmt: skip
BESIDE_README = {"suite", "load", "readme"}  # with another flag its command would not do it again


def parse(args):
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:<14}{text}" for name, text in variants.ABOUT.items()),
    )  # fmt: skip
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "C", "D"), help="only this")
    parser.add_argument("--kappa", type=float, help="of --shape (default 16); 0 brings the peers")
    parser.add_argument("--variants", nargs="+", choices=variants.NAMES, help="default: all")
    parser.add_argument("--pass", choices=("fwd", "bwd", "full"), default="full", dest="which",
                        help="what ratios are of (full); fwd runs no backward pass")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of features")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, help="of measurement for each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument("--load", type=Path, metavar="PATH", help="show a JSON, measure nothing")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw them there (PNG, PDF, SVG)")
    parser.add_argument("--readme", action="store_true", help="rewrite its tables and picture, "
                        "and bench/results/SUITE.json")  # fmt: skip
    options = parser.parse_args(args)
    given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    if options.shape and min(options.shape) < 1:
        parser.error(f"--shape wants positive N C D, got {options.shape}")
    if options.kappa is not None and not -0.5 < options.kappa < math.inf:
        parser.error(f"--kappa wants > -1/2, got {options.kappa}")
    if options.kappa is not None and not options.shape:
        parser.error(f"--kappa {options.kappa} wants a --shape")
    suite = SUITES[options.suite]
    for name in ("device", "dtype", "seconds"):
        if getattr(options, name) is None:
            setattr(options, name, suite[name])
    if not options.variants:
        on_gpus = {"max-autotune"} if options.device == "cpu" else set()
        options.variants = [name for name in variants.NAMES if name not in on_gpus]
    if not options.seconds > 0 or options.threads < 1:
        parser.error(
            f"--seconds and --threads want > 0, got {options.seconds}, {options.threads}"
        )  # fmt: skip
    if options.device == "cuda" and not options.load and not torch.cuda.is_available():
        parser.error("--device cuda wants a GPU, got none")
    if options.readme and (set(vars(options)) - BESIDE_README) & set(given):
        parser.error("--readme wants --suite cpu or gpu, and at most --load beside it")
    if options.readme and options.suite not in ("cpu", "gpu"):
        parser.error(f"--readme wants --suite cpu or gpu, got {options.suite}")
    peers = [name for name in options.variants if name in variants.PEERS]
    if peers == options.variants and options.shape and options.kappa != 0:
        parser.error(f"--variants {' '.join(peers)} wants --kappa 0")
    if options.plot and options.plot.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot wants .png, .pdf or .svg, got {options.plot}")
    try:  # before anything is measured
        for path in filter(None, (options.json, options.plot)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
    except OSError as error:
        parser.error(f"got {path} ({error.strerror}), wanted a file to write to")
    if options.load:
        try:
            options.load = json.loads(options.load.read_text())
            suite = options.load["suite"], options.load["cases"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--load got {error}, wanted a file of python -m bench --json")
        if options.readme and suite[0] != options.suite:
            parser.error(f"--load got figures of {suite[0]}, wanted those of {options.suite}")
    return options


def print_text(console, text):
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def run(options, console):
    torch.set_num_threads(options.threads)
    report = {"suite": "shape" if options.shape else options.suite, **about(options.device),
              "cases": []}  # fmt: skip
    todo = SUITES[options.suite]["cases"]
    if options.shape:
        todo = cases([options.shape], KAPPA if options.kappa is None else options.kappa)
    with Progress(console=console, transient=True) as progress:
        whole = progress.add_task("cases", total=len(todo))
        for case in todo:
            label = "({}, {}, {})".format(*case["shape"])
            task = progress.add_task(label, total=1.0)
            torch.set_num_threads(case.get("threads", options.threads))
            out = {*case.get("leave_out", ()), *(variants.PEERS if case["kappa"] != 0 else ())}
            names = [name for name in options.variants if name not in out]
            result = measure(
                case, names, options.seconds, options.which, options.device,
                getattr(torch, options.dtype), partial(progress.update, task),
            )  # fmt: skip
            torch.set_num_threads(options.threads)
            progress.remove_task(task)
            progress.advance(whole)
            print_text(console, show.case_text(result))
            report["cases"].append(result)
            show.save(report, options.json)  # what is measured stays, whatever comes
    return report


def main(args=None):
    options, console = parse(args), Console()
    if options.readme:
        options.json = show.ROOT / f"bench/results/{options.suite}.json"
    if options.load:
        report = options.load
        for case in report["cases"]:
            print_text(console, show.case_text(case))
    else:
        report = run(options, console)
    print_text(console, show.overview_text(report))
    show.save(report, options.json)
    if options.plot:
        show.plot(report, options.plot)
    if options.readme:
        show.rewrite_readme(report)
    for case in report["cases"]:
        if "fused" in case["results"] and not show.milliseconds(case, "fused"):
            sys.exit(f"error: the fused head is wrong or refused at {show.shape_of(case)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
