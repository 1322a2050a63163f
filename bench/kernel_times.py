"""`python -m bench.kernel_times`: how long each kernel of the fused head takes on a GPU.

A pass is loss and gradients of bfloat16 features and a float32 weight. For each shape it shows the
time in which a CUDA graph of the pass replays, beside the plan's prediction; the time of the pass
and of eager PyTorch's with all their launches, in turns, which at small shapes is the host's time;
and the time of each kernel by torch's profiler.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

import torch
from rich.progress import Progress
from torch.profiler import ProfilerActivity, profile

from bench.measure import machine, turns
from bench.measure.case import first_calls
from bench.measure.clock import Clock, timed
from bench.measure.launches import gpu_events
from bench.measure.oracle import problem
from bench.show import documents
from bench.show.results import save
from bench.show.tables import table
from bench.show.units import milliseconds, shape_of, with_unit
from bench.suite import GPU_SHAPES, KAPPA
from tvmf_ext import plan

SECONDS, REPLAYS, PROFILED_PASSES = 1, 50, 10
DTYPE = torch.bfloat16


def spread(seconds):
    values = [1e3 * value for value in seconds]
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def short(name):
    """A kernel's name without namespaces and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", name)
    return re.sub(r"[<(].*", "", name).removeprefix("void ").split("::")[-1].strip()


def by_kernel(events, passes):
    """The launches per pass and the mean time of each kernel, the longest first.

    On the portable path class_gradient runs twice for a chunk of classes; the second run makes the
    weight's gradient and has a line of its own.
    """
    found, last = {}, None
    for event in sorted(events, key=lambda event: event.time_range.start):
        name = short(event.name)
        name += "+weight" if name == last == "class_gradient" else ""
        last = name
        found.setdefault(name, []).append(event.time_range.elapsed_us())
    rows = sorted(found.items(), key=lambda pair: -sum(pair[1]))
    return {
        name: {"launches": len(times) / passes, "us": statistics.fmean(times)}
        for name, times in rows
    }


def case_of(shape):
    """The figures of a shape, as the JSON file has them."""
    clock, tensors = Clock("cuda"), problem(*shape, "cuda", DTYPE)
    case = {"shape": list(shape), "kappa": KAPPA}
    results, running = first_calls(case, ("fused", "eager"), tensors, True, DTYPE)
    if "fused" not in running:
        raise RuntimeError(f"{shape}: {results['fused'].get('refused', 'a wrong result')}")
    copies, tick = {name: [tensors] for name in running}, lambda completed: None
    times = turns.take_turns(clock, running, copies, True, SECONDS, tick)
    for name, pairs in times.items():
        case[f"{name}_ms"] = spread(map(sum, pairs))
    if "eager" not in running:
        case["eager_refused"] = results["eager"].get("refused", "a wrong result")
    graph = turns.captured(running["fused"], tensors)
    marks = [clock.mark()]
    for _ in range(REPLAYS):
        graph.replay()
        marks.append(clock.mark())
    case["graph_ms"] = spread(clock.seconds(marks))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(PROFILED_PASSES):
            timed(clock, running["fused"], tensors, True)
        torch.cuda.synchronize()
    case["kernels"] = by_kernel(gpu_events(found), PROFILED_PASSES)
    predicted = plan(*shape, dtype=DTYPE, weight_dtype=torch.float32, device="cuda")
    case["predicted_ms"] = 1e3 * (predicted.forward_seconds + predicted.backward_seconds)
    return case


def pass_table(run):
    """A row for each shape: the pass as a whole."""
    rows = []
    for case in run["cases"]:
        graph, fused = case["graph_ms"]["median"], case["fused_ms"]["median"]
        eager = case.get("eager_ms", {}).get("median")
        floor = 1e3 * machine.floors(case["shape"], run["machine"])[2]
        rows.append(
            {
                "(N, C, D)": shape_of(case),
                "CUDA graph": milliseconds(graph),
                "predicted": milliseconds(case["predicted_ms"]),
                "graph / floor": f"{graph / floor:.1f}x",
                "with launches": milliseconds(fused),
                "eager": milliseconds(eager) if eager else "-",
                "eager / with launches": f"{eager / fused:.1f}x" if eager else "-",
            }
        )
    return table(rows)


def kernel_table(run):
    """A row for each kernel and a column for each shape: launches per pass x mean time."""
    rows = []
    for name in dict.fromkeys(name for case in run["cases"] for name in case["kernels"]):
        row = {"kernel": name}
        for case in run["cases"]:
            kernel = case["kernels"].get(name)
            if kernel:
                time = with_unit(kernel["us"] / 1e6, "s")
                row[shape_of(case)] = f"{kernel['launches']:g} x {time}"
        rows.append(row)
    return table(rows)


def conditions(run):
    return (
        f"{run['device']}, driver {run['driver']}, torch {run['torch']}, {run['date']}, commit "
        f"{run['commit']}; {run['dtype']}, kappa {run['kappa']:g}; rates in the same run: a large "
        f"product {with_unit(run['machine']['flops_per_s'], 'FLOP/s')}, a copy "
        f"{with_unit(run['machine']['bytes_per_s'], 'B/s')}"
    )


def text_of(run):
    notes = [run["note"]] if "note" in run else []
    notes += [
        f"{shape_of(case)}: eager refused: {case['eager_refused']}"
        for case in run["cases"]
        if "eager_refused" in case
    ]
    return "\n".join([conditions(run), *notes, "", pass_table(run), "", kernel_table(run), ""])


def markdown(run):
    return f"{pass_table(run)}\n\n{documents.paragraph(conditions(run) + '.')}"


def parse(args):
    """The options, and the runs of the file that they name."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernel_times",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    metavar = ("N", "C", "D")
    text = "measure this shape alone; may be given several times"
    add("--shape", nargs=3, type=int, action="append", metavar=metavar, help=text)
    add("--json", type=Path, metavar="PATH", help="add the run to the runs of that file")
    add("--load", type=Path, metavar="PATH", help="show a file of --json, measure nothing")
    text = f"write the last run's table into {documents.MEASUREMENTS}"
    add("--document", action="store_true", help=text)
    options = parser.parse_args(args)
    path = options.load or options.json
    if options.shape and min(map(min, options.shape)) < 1:
        parser.error(f"--shape wants positive N C D, got {options.shape}")
    if options.shape and options.document:
        parser.error("--document wants all shapes, got --shape")
    if not options.load and not torch.cuda.is_available():
        parser.error("got no GPU, wanted one; --load shows figures from a file")
    try:
        runs = json.loads(path.read_text()) if options.load or (path and path.exists()) else []
        for run in runs:
            text_of(run)  # raises if the file is of another kind, before anything is measured
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"got {error} in {path}, wanted a file of --json")
    return options, runs


def measure(shapes, runs, path):
    """Measures the shapes and saves the run after each of them, behind the earlier runs."""
    run = {
        **machine.about("cuda"),
        "kappa": KAPPA,
        "dtype": str(DTYPE).removeprefix("torch."),
        "machine": machine.rates("cuda", DTYPE, Clock("cuda")),
        "cases": [],
    }
    with Progress(transient=True) as progress:
        for shape in progress.track(shapes, description="shapes"):
            run["cases"].append(case_of(shape))
            save([*runs, run], path)
    return run


def main(args=None):
    options, runs = parse(args)
    if not options.load:
        runs = [measure(options.shape or GPU_SHAPES, runs, options.json)]
    print("\n".join(map(text_of, runs)))
    if options.document:
        documents.write_between(documents.MEASUREMENTS, "kernel times", markdown(runs[-1]))


if __name__ == "__main__":
    main()
