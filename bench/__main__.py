"""`python -m bench`: the fused head beside eager PyTorch and torch.compile, in one process.

Every variant computes the loss and its gradients by features, weight and scale from the same
tensors. Variants take turns, so that a slow moment of the machine falls on all of them; figures are
medians, with the ratio to the fused head. `products` is the three bare matrix products of such a
step: the floor of any implementation that is made of library products.

`--device cuda` measures a GPU with CUDA events. `--dtype bfloat16` is for features of that dtype
with a float32 weight, which eager PyTorch rounds first.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import tvmf_ext
from tvmf_ext import reference

ROOT = Path(__file__).parent.parent
SHAPES = [(256, 1000, 512), (256, 8142, 2048), (256, 21841, 768), (256, 100000, 512)]
CUDA_SHAPES = [(256, 1000, 512), (256, 8142, 2048), (1024, 21841, 768), (256, 100000, 512)]
SMALL = (1, 8, 8)
VARIANTS = ("fused", "eager", "compile", "products")
MARKERS = ("<!-- bench -->", "<!-- /bench -->")


def problem(N, C, D, device, dtype):
    """Features and weights like those of a trained net, that is with targets that stand out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(C, D, generator=generator)
    target = torch.randint(C, (N,), generator=generator)
    input = 0.5 * weight[target] + torch.randn(N, D, generator=generator)
    input, weight, target = input.to(device, dtype), weight.to(device), target.to(device)
    return input.requires_grad_(), weight.requires_grad_(), target


def eager(input, weight, target, **options):
    return reference.tvmf_cross_entropy(input, weight.to(input.dtype), target, **options)


def step(function, input, weight, target):
    """A function of no arguments that returns loss and gradients."""
    scale = torch.tensor(16.0, device=input.device, requires_grad=True)
    leaves = (input, weight, scale)

    def run():
        loss = function(input, weight, target, kappa=16.0, scale=scale)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return run


def products(input, weight):
    x, w = input.detach(), weight.detach().to(input.dtype)
    gradient = torch.randn(x.shape[0], w.shape[0]).to(x)

    def run():
        return x @ w.t(), gradient @ w, gradient.t() @ x

    return run


def error(got, wanted):
    """Largest relative error of the loss and the gradients."""
    return max(((g - w).norm() / w.norm()).item() for g, w in zip(got, wanted, strict=True))


def seconds_of(run, device):
    """Of one call; its result is freed outside."""
    if device == "cpu":
        begin = time.perf_counter()
        result = run()
        return time.perf_counter() - begin, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, result


def measure(shape, names, seconds, progress, device, dtype):
    """Seconds per call of each variant, in turns; a wrong one is reported and not timed."""
    N, C, D = shape
    tensors = problem(N, C, D, device, dtype)
    functions = {
        "fused": tvmf_ext.tvmf_cross_entropy,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    runs = {
        name: products(*tensors[:2]) if name == "products" else step(functions[name], *tensors)
        for name in names
    }
    exact_tensors = [t.detach().double().requires_grad_() for t in tensors[:2]]
    exact = step(eager, *exact_tensors, tensors[2])()
    eager_error = error(step(eager, *tensors)(), exact)
    results = {}
    for name in list(runs):
        got = runs[name]()  # warms up, too
        if name == "products":
            results[name] = {"error": None}
            continue
        results[name] = {"error": error(got, exact)}
        if not results[name]["error"] <= 2 * eager_error + 1e-5:
            results[name]["wrong"] = True
            del runs[name]
        del got
    del exact, exact_tensors

    times = {name: [] for name in runs}
    task = progress.add_task(f"{N} x {C} x {D}", total=seconds)
    start = time.perf_counter()
    while times and (time.perf_counter() - start < seconds or len(next(iter(times.values()))) < 5):
        for name, run in runs.items():
            taken, result = seconds_of(run, device)
            times[name].append(taken)
            del result  # freeing it is nobody's time
        progress.update(task, completed=time.perf_counter() - start)
    progress.remove_task(task)
    for name, values in times.items():
        quarter = statistics.quantiles(values, n=4)
        results[name] |= {
            "median_ms": statistics.median(values) * 1e3,
            "quartiles_ms": [quarter[0] * 1e3, quarter[2] * 1e3],
            "runs": len(values),
        }
    return results


def hardware():
    try:
        model = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return model


def commit():
    run = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return run.stdout.strip() or "unknown"


def geometric_mean(values):
    return statistics.geometric_mean(values) if values else float("nan")


def rows_of(report):
    """Cells of the table: shape, fused time, then every other variant's time over the fused."""
    others = [name for name in VARIANTS[1:] if name in report["variants"]]
    rows, ratios = [], {name: [] for name in others}
    for case in report["cases"]:
        results = case["results"]
        fused = results["fused"].get("median_ms")
        cells = ["({}, {}, {})".format(*case["shape"]), f"{fused:.3g} ms" if fused else "wrong"]
        for name in others:
            if fused is None or "median_ms" not in results[name]:
                cells.append("wrong" if results[name].get("wrong") else "-")
                continue
            ratio = results[name]["median_ms"] / fused
            if tuple(case["shape"]) != SMALL:
                ratios[name].append(ratio)
            cells.append(f"{ratio:.2f}x")
        rows.append(cells)
    if len(report["cases"]) > 2:
        means = [f"{geometric_mean(ratios[name]):.2f}x" for name in others]
        rows.append(["geometric mean, without the last", "", *means])
    names = {"products": "three bare products"}
    head = ["(N, C, D)", "fused", *(names.get(name, name) for name in others)]
    return head, rows


def markdown(report):
    head, rows = rows_of(report)
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    about = (
        f"Loss and gradients of features, weight and scale; float32, {report['threads']} threads, "
        f"{report['cpu']} ({report['isa']}), torch {report['torch']}, {report['date']}. Medians; "
        "times of the others over the fused head's, larger is slower. The last row is one thread. "
        "Again: `python -m bench --readme`."
    )
    return f"{MARKERS[0]}\n{table}\n\n{about}\n{MARKERS[1]}"


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "C", "D"), help="only this")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=10, help="of measurement per shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    args = parser.parse_args()
    if args.shape and min(args.shape) < 1:
        parser.error(f"--shape wants positive N C D, got {args.shape}")
    if args.seconds <= 0 or args.threads < 1:
        parser.error(f"--seconds and --threads want > 0, got {args.seconds}, {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda wants a GPU, got none")
    if args.readme and (args.device, args.dtype) != ("cpu", "float32"):
        parser.error(f"--readme wants cpu and float32, got {args.device} and {args.dtype}")
    cuda = args.device == "cuda"
    names = [name for name in VARIANTS if name in {"fused", *args.variants}]
    shapes = [tuple(args.shape)] if args.shape else CUDA_SHAPES if cuda else [*SHAPES, SMALL]

    report = {
        "variants": names,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": args.dtype,
        "cpu": hardware(),
        "isa": tvmf_ext.build_info().cpu,
        "threads": args.threads,
        "torch": torch.__version__,
        "tvmf_ext": tvmf_ext.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
        "cases": [],
    }
    console = Console()
    with Progress(console=console, transient=True) as progress:
        for shape in shapes:
            torch.set_num_threads(1 if shape == SMALL else args.threads)
            dtype = getattr(torch, args.dtype)
            results = measure(shape, names, args.seconds, progress, args.device, dtype)
            report["cases"].append({"shape": shape, "results": results})

    head, rows = rows_of(report)
    table = Table(*head, title="time over the fused head's (larger is slower)")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    for case in report["cases"]:
        for name, result in case["results"].items():
            if result.get("wrong"):
                console.print(f"{case['shape']}: {name} is wrong by {result['error']:.1e}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.readme:
        readme = ROOT / "README.md"
        text = readme.read_text()
        begin, end = text.index(MARKERS[0]), text.index(MARKERS[1]) + len(MARKERS[1])
        readme.write_text(text[:begin] + markdown(report) + text[end:])


if __name__ == "__main__":
    main()
