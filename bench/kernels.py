"""`python -m bench.kernels`: what the fused head's kernels take on a GPU, one by one.

Of loss and gradients, bfloat16 features and a float32 weight: the median of a CUDA graph's replay
beside the plan's prediction, then each kernel's launches a pass and mean time, by torch.profiler.
Between events the same pass and eager PyTorch's, in turns: each with its launches, which at small
shapes take longer than the kernels, so that those times are the host's.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

import torch
from rich.progress import Progress
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import measure
from bench.__main__ import DESIGN, KAPPA
from bench.show import save, shape_of
from tvmf_ext import plan

SECONDS, REPLAYS, PASSES = 1, 50, 10
DTYPE = torch.bfloat16


def spread(seconds):
    values = [1e3 * value for value in seconds]
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def short(name):
    """A kernel's name without its namespaces and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", name)
    return re.sub(r"[<(].*", "", name).removeprefix("void ").split("::")[-1].strip()


def by_kernel(events, passes):
    """Launches a pass and mean time, longest first. The portable path's second class_gradient of
    a chunk, which makes the weight gradient, has its own line."""
    found, last = {}, None
    for event in sorted(events, key=lambda event: event.time_range.start):
        name = short(event.name)
        name += "+weight" if name == last == "class_gradient" else ""
        last = name
        found.setdefault(name, []).append(event.time_range.elapsed_us())
    rows = sorted(found.items(), key=lambda pair: -sum(pair[1]))
    return {name: {"launches": len(times) / passes, "us": statistics.fmean(times)}
            for name, times in rows}  # fmt: skip


def case_of(shape):
    """The figures of a shape, as the JSON has them."""
    clock, tensors = measure.Clock("cuda"), measure.problem(*shape, "cuda", DTYPE)
    case = {"shape": list(shape), "kappa": KAPPA}
    results, running = measure.first_calls(case, ("fused", "eager"), tensors, tensors, True, DTYPE)
    if "fused" not in running:
        raise RuntimeError(f"{shape}: {results['fused'].get('refused', 'a wrong result')}")
    copies, tick = {name: [tensors] for name in running}, lambda completed: None
    times = measure.take_turns(clock, running, copies, True, SECONDS, tick)
    for name, pairs in times.items():
        case[f"{name}_ms"] = spread(map(sum, pairs))
    if "eager" not in running:
        case["eager_refused"] = results["eager"].get("refused", "a wrong result")
    graph = measure.captured(running["fused"], tensors)
    marks = [clock.mark()]
    for _ in range(REPLAYS):
        graph.replay()
        marks.append(clock.mark())
    case["graph_ms"] = spread(clock.seconds(marks))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(PASSES):
            measure.timed(clock, running["fused"], tensors, True)
        torch.cuda.synchronize()
    events = [event for event in found.events()
              if event.device_type == DeviceType.CUDA and not event.is_user_annotation]  # fmt: skip
    case["kernels"] = by_kernel(events, PASSES)
    told = plan(*shape, dtype=DTYPE, weight_dtype=torch.float32, device="cuda")
    case["predicted_ms"] = 1e3 * (told.forward_seconds + told.backward_seconds)
    return case


def time_of(milliseconds):
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{1e3 * milliseconds:.3g} us"


def table(run, style="simple"):
    """A row for each shape: the pass as a whole."""
    rows = []
    for case in run["cases"]:
        graph, fused = case["graph_ms"]["median"], case["fused_ms"]["median"]
        eager = case.get("eager_ms", {}).get("median")
        floor = 1e3 * measure.floors(case["shape"], run["machine"])[2]
        rows.append({
            "(N, C, D)": shape_of(case),
            "in a graph": time_of(graph),
            "predicted": time_of(case["predicted_ms"]),
            "over its floor": f"{graph / floor:.1f}x",
            "with launches": time_of(fused),
            "eager": time_of(eager) if eager else "-",
            "eager over it": f"{eager / fused:.1f}x" if eager else "-",
        })  # fmt: skip
    return tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)


def kernel_table(run, style="simple"):
    """A row for each kernel, a column for each shape: launches a pass x mean time."""
    rows = []
    for name in dict.fromkeys(name for case in run["cases"] for name in case["kernels"]):
        row = {"kernel": name}
        for case in run["cases"]:
            kernel = case["kernels"].get(name)
            text = f"{kernel['launches']:g} x {time_of(kernel['us'] / 1e3)}" if kernel else ""
            row[shape_of(case)] = text
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)


def text_of(run):
    speed = run["machine"]
    title = (
        f"{run['device']}, driver {run['driver']}, torch {run['torch']}, {run['date']}, commit "
        f"{run['commit']}: {run['dtype']}, kappa {run['kappa']:g}; a product here "
        f"{speed['flops_per_s'] / 1e12:.3g} TFLOP/s, a copy {speed['bytes_per_s'] / 1e12:.3g} TB/s"
    )
    told = [run["note"]] if "note" in run else []
    told += [f"{shape_of(case)}: eager refused: {case['eager_refused']}"
             for case in run["cases"] if "eager_refused" in case]  # fmt: skip
    return "\n".join([title, *told, "", table(run), "", kernel_table(run), ""])


def main(args=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--shape", nargs=3, type=int, action="append", metavar=("N", "C", "D"),
                        help="only this; may be given again")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="add the run to those there")
    parser.add_argument("--load", type=Path, metavar="PATH", help="show a JSON, measure nothing")
    options = parser.parse_args(args)
    shapes, path = options.shape or DESIGN, options.load or options.json
    if min(map(min, shapes)) < 1:
        parser.error(f"--shape wants positive N C D, got {options.shape}")
    if not options.load and not torch.cuda.is_available():
        parser.error("got no GPU, wanted one; --load shows figures from a file")
    try:
        runs = json.loads(path.read_text()) if options.load or (path and path.exists()) else []
        texts = [text_of(run) for run in runs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"got {error} in {path}, wanted a file of --json")
    if options.load:
        print("\n".join(texts))
        return
    run = {**measure.about("cuda"), "kappa": KAPPA, "dtype": str(DTYPE).removeprefix("torch."),
           "machine": measure.machine("cuda", DTYPE, measure.Clock("cuda")),
           "cases": []}  # fmt: skip
    with Progress(transient=True) as progress:
        for shape in progress.track(shapes, description="shapes"):
            run["cases"].append(case_of(shape))
            save([*runs, run], options.json)  # what is measured stays, whatever comes
    print(text_of(run))


if __name__ == "__main__":
    main()
