"""`python -m bench.scaling`: time and memory of the fused head against N, C and D.

From a middle size one of the three changes. Each series is fitted by a power of what changes over
its larger half, and stands beside the plan's prediction: on the CPU the plan's operations at the
rate of a large matrix product measured here, on a GPU the plan's own time. `--paper` predicts, and
measures nothing: a head whose classes are spread over many H200s, from `tvmf_ext.plan`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from tabulate import tabulate

from bench.measure import about, measure
from bench.show import ROOT, bytes_of, load, save, write_between
from tvmf_ext import plan

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
# Per GPU and direction, by the data sheets: NVLink within 8 GPUs, a 400 Gbit/s adapter beyond.
NVLINK, NETWORK, NODE = 450e9, 50e9, 8
ROWS_PER_GPU, FEATURES = 64, 512


def predicted(shape, dtype, device, speed):
    """Seconds and extra bytes of a full pass by the plan."""
    found = plan(*shape, dtype=dtype, weight_dtype=torch.float32, device=device)
    if device == "cuda":
        return found.forward_seconds + found.backward_seconds, found.saved + found.workspace
    N, C, _ = shape
    seconds = (found.forward_flops + found.backward_flops) / speed["flops_per_s"]
    return seconds, found.saved + 4 * N * min(found.class_block, C)


def series(device, dtype, seconds, sizes, progress):
    """Points of each of N, C and D: its size, the time and memory measured and predicted."""
    found, task = {}, progress.add_task("points", total=sum(map(len, sizes.values())))
    for axis, name in enumerate("NCD"):
        points = []
        for size in sizes[name]:
            shape = list(MIDDLE[device])
            shape[axis] = size
            case = {"shape": shape, "kappa": 16.0}
            case = measure(case, ["fused"], seconds, "full", device, dtype)
            fused = case["results"]["fused"]
            if "full_ms" not in fused:
                raise RuntimeError(f"{shape}: {fused.get('refused', 'a wrong result')}")
            time, memory = predicted(shape, dtype, device, case["machine"])
            points.append({
                "size": size, "ms": fused["full_ms"], "bytes": fused["extra_bytes"],
                "predicted_ms": 1e3 * time, "predicted_bytes": memory,
            })  # fmt: skip
            progress.advance(task)
        found[name] = points
    return found


def exponent(points, key):
    """Of the power of the size that fits the larger half best."""
    half = points[len(points) // 2 :]
    values = [p[key]["median"] if key == "ms" else p[key] for p in half]
    if len(half) < 2 or not all(values):
        return float("nan")
    return np.polyfit(np.log([p["size"] for p in half]), np.log(values), 1)[0]


def table(report, style="simple"):
    rows = []
    for name, points in report["series"].items():
        last = points[-1]
        rows.append({
            "": f"{name} {points[0]['size']} to {last['size']}",
            "time at the largest": f"{last['ms']['median']:.3g} ms",
            "predicted": f"{last['predicted_ms']:.3g} ms",
            "time grows as": f"{name}^{exponent(points, 'ms'):.2f}",
            "plan": f"{name}^{exponent(points, 'predicted_ms'):.2f}",
            "extra memory at the largest": bytes_of(last["bytes"]),
            "predicted ": bytes_of(last["predicted_bytes"]),
        })  # fmt: skip
    return tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)


def plot(report, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained", sharey="row")
    for (name, points), column in zip(report["series"].items(), axes.T, strict=True):
        sizes = [p["size"] for p in points]
        measured = [p["ms"]["median"] for p in points]
        column[0].loglog(sizes, measured, "o", label="measured")
        half = len(points) // 2
        power = exponent(points, "ms")
        fit = [measured[-1] * (size / sizes[-1]) ** power for size in sizes[half:]]
        column[0].loglog(sizes[half:], fit, "-", color="C0", label=f"fit, {name}^{power:.2f}")
        column[0].loglog(sizes, [p["predicted_ms"] for p in points], "--", color="C1", label="plan")
        column[1].loglog(sizes, [p["bytes"] / 1e6 for p in points], "o", label="measured")
        more = [p["predicted_bytes"] / 1e6 for p in points]
        column[1].loglog(sizes, more, "--", color="C1", label="plan")
        others = [f"{n} = {m}" for n, m in zip("NCD", report["middle"], strict=True) if n != name]
        column[0].set_title(", ".join(others))
        column[1].set_xlabel(name)
        for axis in column:
            axis.grid(alpha=0.3)
            axis.legend()
    axes[0, 0].set_ylabel("time of a full pass, ms")
    axes[1, 0].set_ylabel("extra memory, MB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def spread_over(classes, gpus):
    """One GPU's part of a step whose classes are spread over `gpus`, with ROWS_PER_GPU images each:
    every GPU compares all rows with its own classes."""
    rows, mine = ROWS_PER_GPU * gpus, -(-classes // gpus)
    found = plan(rows, mine, FEATURES, dtype=torch.bfloat16, weight_dtype=torch.float32,
                 device="H200")  # fmt: skip
    weight = 4 * mine * FEATURES
    part = (gpus - 1) / gpus
    # Gathers bfloat16 features; sums largest logit, sum of exponentials and target's logit, each
    # sent there and back; scatters the sums of float32 gradients of features.
    sent = part * rows * (2 * FEATURES + 2 * 3 * 4 + 4 * FEATURES)
    seconds = found.forward_seconds + found.backward_seconds
    rate = NVLINK if gpus <= NODE else NETWORK
    return {
        "classes": f"1e{len(str(classes)) - 1}",
        "GPUs": gpus,
        "rows": rows,
        "classes a GPU": mine,
        "weight, gradient, momentum": bytes_of(3 * weight),
        "kept and workspace": bytes_of(found.saved + found.workspace),
        "device memory crossed": bytes_of(found.forward_hbm + found.backward_hbm),
        "kernels": f"{1e3 * seconds:.3g} ms",
        "limited by": found.limit("backward"),
        "sent by collectives": bytes_of(sent),
        "which take": f"{1e3 * sent / rate:.3g} ms",
    }


def paper(style="simple"):
    rows = [spread_over(classes, gpus) for classes in (10**7, 10**8)
            for gpus in (8, 16, 32, 64, 128, 256, 512, 1024)]  # fmt: skip
    return tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)


def main(args=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=3, help="of each point (default 3)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument("--load", type=Path, metavar="PATH", help="show a JSON, measure nothing")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw them there")
    parser.add_argument("--paper", action="store_true", help="the prediction for many GPUs")
    parser.add_argument("--docs", action="store_true", help="rewrite the table in docs/scaling.md, "
                        "its picture and bench/results/scaling-DEVICE.json")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="see that it runs, measure nothing")
    options = parser.parse_args(args)
    measures = not options.paper and not options.load
    if options.device == "cuda" and measures and not torch.cuda.is_available():
        parser.error("--device cuda wants a GPU, got none")
    if options.quick and options.docs:
        parser.error("--docs wants figures, --quick measures none")
    if options.paper:
        print(paper())
        if options.docs:
            write_between("docs/scaling.md", "paper", paper("github"))
        return
    sizes, seconds = SIZES[options.device], options.seconds
    if options.quick:
        sizes, seconds = {name: values[:2] for name, values in sizes.items()}, 1e-9
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    report = load(options, parser)
    if not report:
        report = {"quick": options.quick, **about(options.device), "middle": MIDDLE[options.device],
                  "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
        with Progress(transient=True) as progress:
            report["series"] = series(options.device, dtype, seconds, sizes, progress)
    print(table(report))
    if options.docs:
        options.json = options.json or ROOT / f"bench/results/scaling-{options.device}.json"
        options.plot = options.plot or ROOT / f"docs/scaling-{options.device}.png"
    save(report, options.json)
    if options.plot:
        plot(report, options.plot)
    if options.docs:
        picture = f"![time and memory against N, C and D](scaling-{options.device}.png)"
        text = f"{table(report, 'github')}\n\n{picture}"
        write_between("docs/scaling.md", f"scaling {options.device}", text)


if __name__ == "__main__":
    main()
