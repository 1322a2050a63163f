"""`python -m bench.scaling`: how time and memory of the fused head grow with N, C and D.

One of the three grows from a middle size. A power is fitted to the larger half of each series, and
the plan's prediction stands beside it: on the CPU the plan's operations at the rate of a large
matrix product measured here, on a GPU the plan's own time. `--paper` measures nothing: it predicts,
with `tvmf_ext.plan`, a head whose classes are spread over many H200s. `--processes 1,2,4` measures
such a head on this machine.
"""

import argparse
import statistics
from math import log
from pathlib import Path

import torch
from rich.progress import Progress

from bench import processes
from bench.measure.case import measure
from bench.measure.machine import about
from bench.show import documents, plots
from bench.show.results import load, save
from bench.show.tables import table
from bench.show.units import milliseconds, with_unit
from tvmf_ext import plan
from tvmf_ext.collectives import GATHERED_RANKS

MIDDLE = {"cpu": (256, 8192, 512), "cuda": (1024, 131_072, 512)}
SIZES = {
    "cpu": {
        "N": [32, 64, 128, 256, 512, 1024],
        "C": [1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072],
        "D": [64, 128, 256, 512, 1024, 2048],
    },
    "cuda": {
        "N": [64, 128, 256, 512, 1024, 2048, 4096],
        "C": [1024, 4096, 16_384, 65_536, 262_144, 1_048_576],
        "D": [64, 128, 256, 512, 1024, 2048],
    },
}
# Bytes/s of a GPU in each direction, by the data sheets: NVLink within a node of 8 GPUs, and a
# network adapter of 400 Gbit/s beyond.
NVLINK, NETWORK, NODE = 450e9, 50e9, 8
ROWS_PER_GPU, FEATURES = 64, 512


def predicted(shape, dtype, device, speed):
    """Seconds and extra bytes of the forward and backward pass by the plan."""
    found = plan(*shape, dtype=dtype, weight_dtype=torch.float32, device=device)
    if device == "cuda":
        return found.forward_seconds + found.backward_seconds, found.saved + found.workspace
    seconds = (found.forward_flops + found.backward_flops) / speed["flops_per_s"]
    return seconds, found.saved + found.workspace


def point(shape, size, dtype, device, seconds):
    """Time and memory of one shape, measured and predicted."""
    case = measure({"shape": shape, "kappa": 16.0}, ["fused"], seconds, "full", device, dtype)
    fused = case["results"]["fused"]
    if "full_ms" not in fused:
        raise RuntimeError(f"{shape}: {fused.get('refused', 'a wrong result')}")
    time, memory = predicted(shape, dtype, device, case["machine"])
    return {
        "size": size,
        "ms": fused["full_ms"],
        "bytes": fused["extra_bytes"],
        "predicted_ms": 1e3 * time,
        "predicted_bytes": memory,
    }


def series(device, dtype, seconds, sizes, progress):
    """The points of each of N, C and D."""
    found, task = {}, progress.add_task("points", total=sum(map(len, sizes.values())))
    for axis, name in enumerate("NCD"):
        found[name] = []
        for size in sizes[name]:
            shape = list(MIDDLE[device])
            shape[axis] = size
            found[name].append(point(shape, size, dtype, device, seconds))
            progress.advance(task)
    return found


def exponent(points, key):
    """The exponent of the power of the size that fits the larger half of the points best."""
    half = points[len(points) // 2 :]
    values = [p[key]["median"] if key == "ms" else p[key] for p in half]
    if len(half) < 2 or not all(values):
        return float("nan")
    logarithms = [log(p["size"]) for p in half], [log(value) for value in values]
    return statistics.linear_regression(*logarithms).slope


def growth_table(report):
    rows = []
    for name, points in report["series"].items():
        last = points[-1]
        rows.append(
            {
                "size": f"{name} {points[0]['size']} to {last['size']}",
                "time at the largest": milliseconds(last["ms"]["median"]),
                "predicted time": milliseconds(last["predicted_ms"]),
                "time grows as": f"{name}^{exponent(points, 'ms'):.2f}",
                "predicted growth": f"{name}^{exponent(points, 'predicted_ms'):.2f}",
                "extra memory at the largest": with_unit(last["bytes"], "B"),
                "predicted memory": with_unit(last["predicted_bytes"], "B"),
            }
        )
    return table(rows)


def plot_column(axes, name, points, title):
    """Time above and memory below, measured and predicted, against one of N, C and D."""
    sizes = [p["size"] for p in points]
    measured = [p["ms"]["median"] for p in points]
    axes[0].loglog(sizes, measured, "o", label="measured")
    half, power = len(points) // 2, exponent(points, "ms")
    fit = [measured[-1] * (size / sizes[-1]) ** power for size in sizes[half:]]
    axes[0].loglog(sizes[half:], fit, "-", color="C0", label=f"fit, {name}^{power:.2f}")
    axes[0].loglog(sizes, [p["predicted_ms"] for p in points], "--", color="C1", label="plan")
    axes[1].loglog(sizes, [p["bytes"] / 1e6 for p in points], "o", label="measured")
    memory = [p["predicted_bytes"] / 1e6 for p in points]
    axes[1].loglog(sizes, memory, "--", color="C1", label="plan")
    axes[0].set_title(title)
    axes[1].set_xlabel(name)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()


def plot(report, path):
    with plots.picture(path, 2, 3, figsize=(13, 7), sharey="row") as (_, axes):
        for (name, points), column in zip(report["series"].items(), axes.T, strict=True):
            middle = zip("NCD", report["middle"], strict=True)
            fixed = ", ".join(f"{other} = {size}" for other, size in middle if other != name)
            plot_column(column, name, points, fixed)
        axes[0, 0].set_ylabel("time of forward and backward, ms")
        axes[1, 0].set_ylabel("extra memory, MB")


def spread_over(classes, gpus):
    """One GPU's part of a step whose classes are spread over `gpus`, each with ROWS_PER_GPU images.

    Every GPU compares the rows of all GPUs with its own classes.
    """
    rows, own = ROWS_PER_GPU * gpus, -(-classes // gpus)
    found = plan(
        rows, own, FEATURES, dtype=torch.bfloat16, weight_dtype=torch.float32, device="H200"
    )
    weight = 4 * own * FEATURES
    # A row's features, bfloat16, and label are gathered, and the score of its target is summed. The
    # gradient of its features is scattered in float32.
    row_bytes = 2 * FEATURES + 8 + 2 * 4 + 4 * FEATURES
    # Three float32 statistics and a rank a row: those of all shards or, for more GPUs, there and
    # back.
    gathered = gpus if gpus <= GATHERED_RANKS else 2
    sent = rows * (row_bytes + gathered * (3 * 4 + 8)) * (gpus - 1) / gpus
    seconds = found.forward_seconds + found.backward_seconds
    rate = NVLINK if gpus <= NODE else NETWORK
    return {
        "classes": f"1e{len(str(classes)) - 1}",
        "GPUs": gpus,
        "rows": rows,
        "classes a GPU": own,
        "weight, gradient, momentum": with_unit(3 * weight, "B"),
        "kept and workspace": with_unit(found.saved + found.workspace, "B"),
        "GPU memory traffic": with_unit(found.forward_hbm + found.backward_hbm, "B"),
        "kernels": with_unit(seconds, "s"),
        "limited by": found.limit("backward"),
        "sent by collectives": with_unit(sent, "B"),
        "collectives": with_unit(sent / rate, "s"),
    }


def paper():
    """The table of the prediction for many GPUs."""
    gpus = (8, 16, 32, 64, 128, 256, 512, 1024)
    return table([spread_over(classes, n) for classes in (10**7, 10**8) for n in gpus])


def markdown(report):
    """The table and the picture, as the document has them."""
    device = "cpu" if report["device"] == "cpu" else "cuda"
    picture = f"![time and memory against N, C and D](scaling-{device}.png)"
    return f"{growth_table(report)}\n\n{picture}"


def counts(text):
    """Numbers of processes, which must divide the rows."""
    found = [int(part) for part in text.split(",")]
    if any(count < 1 or processes.ROWS % count for count in found):
        raise argparse.ArgumentTypeError(f"got {text}, wanted divisors of {processes.ROWS}")
    return found


def parse(args):
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--seconds", type=float, default=3, help="how long each point is measured (default 3)")
    add("--json", type=Path, metavar="PATH", help="write the figures there")
    add("--load", type=Path, metavar="PATH", help="show a file of --json, measure nothing")
    add("--plot", type=Path, metavar="PATH", help="draw the figures there")
    add("--paper", action="store_true", help="predict a head over many GPUs, measure nothing")
    text = "measure a sharded head in so many processes, by default 1,2,4, over gloo on the CPU"
    add("--processes", nargs="?", const="1,2,4", type=counts, metavar="P,P,...", help=text)
    text = (
        f"write the table and the picture into {documents.MEASUREMENTS} and the figures into "
        f"bench/results/scaling-DEVICE.json; with --paper or --processes their table into "
        f"{documents.SCALING}"
    )
    add("--document", action="store_true", help=text)
    add("--quick", action="store_true", help="only try that it runs; its times mean nothing")
    options = parser.parse_args(args)
    measures = not options.paper and not options.load and not options.processes
    if options.device == "cuda" and measures and not torch.cuda.is_available():
        parser.error("--device cuda wants a GPU, got none")
    if options.quick and options.document:
        parser.error("--document wants measured figures, got --quick")
    if options.document and not options.processes:
        name = f"scaling-{options.device}"
        options.json = options.json or documents.results_path(name)
        options.plot = options.plot or documents.picture_path(name)
    if options.plot and not options.paper:
        plots.pyplot()  # fails before anything is measured if matplotlib is missing
    options.load = load(options, parser)
    return options


def run(options):
    """Measures all points and returns the report."""
    sizes, seconds = SIZES[options.device], options.seconds
    if options.quick:
        sizes, seconds = {name: values[:2] for name, values in sizes.items()}, 1e-9
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    with Progress(transient=True) as progress:
        points = series(options.device, dtype, seconds, sizes, progress)
    return {
        "quick": options.quick,
        **about(options.device),
        "middle": MIDDLE[options.device],
        "dtype": str(dtype).removeprefix("torch."),
        "series": points,
    }


def main(args=None):
    options = parse(args)
    if options.paper:
        print(paper())
        if options.document:
            documents.write_between(documents.SCALING, "paper", paper())
        return
    if options.processes:
        sizes = {"classes": (1000,)} if options.quick else {}
        found = processes.processes_table(
            processes.run(options.processes, options.seconds, **sizes)
        )
        print(found)
        if options.document:
            documents.write_between(documents.SCALING, "processes", found)
        return
    report = options.load or run(options)
    print(growth_table(report))
    save(report, options.json)
    if options.plot:
        plot(report, options.plot)
    if options.document:
        name = f"scaling {options.device}"
        documents.write_between(documents.MEASUREMENTS, name, markdown(report))


if __name__ == "__main__":
    main()
