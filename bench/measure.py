"""How a case is measured: one process, the same tensors, variants in turns.

torch.utils.benchmark and triton.testing time one function after another; on a machine whose speed
changes from second to second only turns compare fairly, so the loop is here.
"""

import ctypes
import gc
import platform
import resource
import statistics
import subprocess
import time
from datetime import date
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import tvmf_ext
from bench import variants
from tvmf_ext import reference

ROOT = Path(__file__).parent.parent
SCALE = 16.0
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRAPH_MOST = 1 << 22  # cosines of a case that launches may bound


def about(device):
    """Where and with what figures were taken."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    found = {
        "device": "cpu", "cpu": cpu, "isa": tvmf_ext.build_info().cpu,
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "tvmf_ext": tvmf_ext.__version__,
        "cuda": torch.version.cuda, "peers": variants.versions(),
        "commit": commit or "unknown", "date": date.today().isoformat(),
    }  # fmt: skip
    if device == "cuda":
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        found["device"] = torch.cuda.get_device_name()
        found["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
        found["driver"] = subprocess.run(driver, capture_output=True, text=True).stdout.strip()
    return found


def problem(N, C, D, device, dtype):
    """Features and weights like those of a trained net, that is with targets that stand out."""
    draw = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    weight = torch.randn(C, D, **draw)
    target = torch.randint(C, (N,), **draw)
    input = (0.5 * weight[target] + torch.randn(N, D, **draw)).to(dtype)
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    return input.requires_grad_(), weight.requires_grad_(), target, scale


def exact(tensors, kappa, classes=1 << 14):
    """Loss and gradients in float64 (the weight's kept in float32), some classes at a time."""
    input, weight, target, scale = (t.detach() for t in tensors)
    x, s = input.double().requires_grad_(), scale.double().requires_grad_()
    blocks = range(0, len(weight), classes)

    def block(begin):
        w = weight[begin : begin + classes].double().requires_grad_()
        return w, reference.tvmf_logits(x, w, kappa=kappa, scale=s)

    with torch.no_grad():
        lse = torch.stack([block(begin)[1].logsumexp(1) for begin in blocks]).logsumexp(0)
    loss, dx, ds, dw = 0.0, torch.zeros_like(x), torch.zeros_like(s), torch.empty_like(weight)
    for begin in blocks:
        w, logits = block(begin)
        mine = torch.where((target >= begin) & (target < begin + len(w)))[0]
        with torch.no_grad():
            upstream = (logits - lse[:, None]).exp()
            upstream[mine, target[mine] - begin] -= 1
            upstream /= len(x)
            loss += (lse[mine] - logits[mine, target[mine] - begin]).sum() / len(x)
        gradients = torch.autograd.grad(logits, (x, w, s), upstream)
        dx += gradients[0]
        dw[begin : begin + len(w)] = gradients[1]
        ds += gradients[2]
    return loss, dx, dw, ds


def error(got, wanted, rows=64):
    """Largest relative error, by norm, of the loss and of each `rows` rows of the gradients: a norm
    over a whole gradient would hide a tail that is wrong. Against zero the error is absolute."""

    def blocks(t):
        return t.split(rows) if t.dim() else [t]

    worst = 0.0
    for g, w in zip(got, wanted, strict=False):  # the forward pass alone has a loss alone
        norms = [((a.double() - b).norm(), b.double().norm())
                 for a, b in zip(blocks(g), blocks(w), strict=True)]  # fmt: skip
        off, size = (torch.stack(column).double() for column in zip(*norms, strict=True))
        found = (off / torch.where(size > 0, size, 1)).max().item()
        worst = found if not found <= worst else worst  # NaN stays
    return worst


class Clock:
    """Marks in a device's work, and the seconds between them."""

    def __init__(self, device):
        self.cuda = device == "cuda"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks):
        if not self.cuda:
            return [b - a for a, b in pairwise(marks)]
        marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def timed(clock, variant, tensors, backward):
    """[forward, backward] seconds of one call, whose result is freed outside."""
    input, weight, _, scale = tensors
    marks = [clock.mark()]
    state = variant.forward(*tensors)
    marks.append(clock.mark())
    if backward:
        gradients = variant.backward(state, input, weight, scale)
        marks.append(clock.mark())
        del gradients
    return clock.seconds(marks)


def captured(variant, tensors):
    """Forward and backward pass as a CUDA graph's replay."""
    input, weight, _, scale = tensors

    def call():
        return variant.backward(variant.forward(*tensors), input, weight, scale)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its own stream current; the outer context puts back this one.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        call()
    return graph


def extra_memory(device, call, gradients):
    """Peak bytes of a call beyond what was there and the gradients that it returns: of the
    allocator on a GPU, of the resident set on the CPU (None where the system does not tell)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return max(0, torch.cuda.max_memory_allocated() - before - gradients)
    status = Path("/proc/self/status")

    def resident(key):
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must be asked for again
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        call()
        return max(0, resident("VmHWM") - before - gradients)
    except (OSError, AttributeError, StopIteration):
        return None


def launches(device, call):
    """Kernels and copies that a call starts on a GPU; on the CPU, operators that call no other."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as found:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        return sum(
            event.device_type == DeviceType.CUDA and not event.is_user_annotation
            for event in found.events()
        )
    return sum("::" in event.name and not event.cpu_children for event in found.events())


@cache
def drawn(size):
    """Drawn on the CPU, where it takes a second: a failed capture can leave the GPU's generator
    unusable."""
    return [torch.randn(size, size) for _ in range(2)]


def machine(device, dtype, clock):
    """What a large matrix product (operations/s) and a large copy (bytes read and written/s)
    reach here and now: medians. On the CPU the product is float32's where that is faster."""
    size, length = (1024, 1 << 24) if device == "cpu" else (8192, 1 << 28)
    a, b = (t.to(device) for t in drawn(size))
    source, copy = (torch.zeros(length, device=device) for _ in range(2))
    calls = [partial(copy.copy_, source)]
    for kind in {dtype, torch.float32} if device == "cpu" else {dtype}:
        x, y = a.to(kind), b.to(kind)
        calls.append(partial(torch.mm, x, y, out=torch.empty_like(x)))
    medians = []
    for call in calls:
        call()
        times, start = [], time.perf_counter()
        while not times or (len(times) < 9 and time.perf_counter() - start < 1):
            begin = clock.mark()
            call()
            times += clock.seconds([begin, clock.mark()])
        medians.append(statistics.median(times))
    copied, *products = medians
    return {"flops_per_s": 2 * size**3 / min(products), "bytes_per_s": 8 * length / copied}


def operations(shape):
    """Of forward, backward and full pass, by the products alone."""
    N, C, D = shape
    return 2 * N * C * D, 4 * N * C * D, 6 * N * C * D


def floors(shape, speed):
    """Seconds below which no forward, backward and full pass can be: operations over a product's
    rate, or the float32 weight, read in each pass, and its gradient, written, over a copy's."""
    weight = 4 * shape[1] * shape[2] / speed["bytes_per_s"]
    work = [count / speed["flops_per_s"] for count in operations(shape)]
    return [max(pair) for pair in zip(work, (weight, 2 * weight, 2 * weight), strict=True)]


def summary(values, parts=4):
    """Median and quartiles; and the lowest and highest median of successive parts of the turns,
    which is what a drift of the machine does to a median."""
    parts = min(parts, len(values))
    cuts = [len(values) * i // parts for i in range(parts + 1)]
    medians = [statistics.median(values[i:j]) for i, j in pairwise(cuts)]
    low, _, high = (statistics.quantiles(values, n=4, method="inclusive")
                    if len(values) > 1 else values * 3)  # fmt: skip
    return {"median": statistics.median(values), "quartiles": [low, high],
            "medians": [min(medians), max(medians)]}  # fmt: skip


def first_calls(case, names, tensors, swapped, backward, dtype):
    """What each variant answered (refused, its error, wrong), and those that may be timed."""
    shape, kappa, device = case["shape"], case["kappa"], tensors[0].device.type
    wanted = exact(tensors, kappa)
    torch._dynamo.reset()  # it counts compilations, and gives up
    results, running, allowed = {}, {}, TOLERANCE[dtype]
    for name in sorted(names, key=variants.ORDER):
        result = results[name] = {}
        try:
            variant = variants.make(name, shape, kappa, device, dtype)
            mine = swapped if variant.transposed else tensors
            got, told = variants.first_call(variant, mine, backward)
            returned = sum(g.nbytes for g in got[1:])
            if name != "products":
                if variant.transposed and backward:
                    got = (got[0], got[1], got[2].t(), got[3])
                result["error"] = error(got, wanted)
            del got
            call = partial(timed, Clock(device), variant, mine, backward)
            times = 3 if device == "cpu" else 1  # the GPU's allocator counts, and is never off
            extra = [extra_memory(device, call, returned) for _ in range(times)]
            result["extra_bytes"] = None if None in extra else statistics.median(extra)
            result["launches"] = launches(device, call)
        except Exception as refusal:  # a peer may raise anything
            results[name] = {"refused": variants.reason(refusal)}
            continue
        if told:
            result["warned"] = told
        if name == "eager" and result["error"] == result["error"]:
            allowed += 2 * result["error"]  # as far off as it may be whatever is in its place
        # Ours may not be as far off as eager PyTorch is in 16 bits.
        most = min(allowed, 3 * TOLERANCE[dtype]) if name == "fused" else allowed
        if name != "products" and not result["error"] <= most:
            result["wrong"] = True
        else:
            running[name] = variant
    return {name: results[name] for name in sorted(results, key=variants.NAMES.index)}, running


def replays(clock, running, tensors, results, turns):
    """Adds the time of a CUDA graph's replay, of those that can be captured; its operands are the
    same each time, and stay in the L2 cache if they fit. Peers read from the device as they go."""
    graphs, times = {}, {}
    for name, variant in running.items():
        if name in variants.PEERS:
            continue
        try:
            graphs[name], times[name] = captured(variant, tensors[name][0]), []
        except Exception as refusal:
            results[name]["graph_refused"] = variants.reason(refusal)
    for _ in range(turns):
        for name, graph in graphs.items():
            begin = clock.mark()
            graph.replay()
            times[name] += clock.seconds([begin, clock.mark()])
    for name, values in times.items():
        results[name]["graph_ms"] = summary([1e3 * value for value in values])


def take_turns(clock, running, tensors, backward, seconds, tick):
    """[forward, backward] seconds of each variant in each turn. The order and the copy of the
    operands move on, so that none is always first and on a GPU none finds another's in L2."""
    times, start, turn, names = {name: [] for name in running}, time.perf_counter(), 0, [*running]
    while names and (turn < 5 or time.perf_counter() - start < seconds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            copy = tensors[name][(turn * len(names) + i) % len(tensors[name])]
            times[name].append(timed(clock, running[name], copy, backward))
        turn += 1
        tick(completed=min(1.0, (time.perf_counter() - start) / seconds))
    return times


def preempted():
    """Times that another process took a core from this one."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def measure(case, names, seconds, which, device, dtype, tick=lambda completed: None):
    """The figures of a case (`shape`, `kappa`) for every variant, as the JSON files hold them.

    Variants take turns for `seconds`, five turns at least. One that raises is refused with its
    reason, one whose result is off is wrong, and neither is timed. `which` is "fwd", "bwd" or
    "full": the pass that ratios and rates are of; "fwd" does not run the backward pass.
    """
    shape, backward = case["shape"], which != "fwd"
    clock, first = Clock(device), problem(*shape, device, dtype)
    copies = [first]
    if device == "cuda":  # as many as twice the L2 cache holds
        once = first[0].nbytes + first[1].nbytes
        more = 2 * torch.cuda.get_device_properties(0).L2_cache_size // once
        copies += [[t.detach().clone().requires_grad_(t.requires_grad) for t in first]
                   for _ in range(min(more, 64))]  # fmt: skip
    swapped = [
        [x, w.detach().t().contiguous().requires_grad_() if "pml" in names else w, y, s]
        for x, w, y, s in copies
    ]
    results, running = first_calls(case, names, first, swapped[0], backward, dtype)
    tensors = {name: swapped if v.transposed else copies for name, v in running.items()}
    speed, start, others = machine(device, dtype, clock), time.perf_counter(), preempted()
    times = take_turns(clock, running, tensors, backward, seconds, tick)
    others = (preempted() - others) / (time.perf_counter() - start)
    again = machine(device, dtype, clock)
    speed = {key: (speed[key] + again[key]) / 2 for key in speed}

    column = {"fwd": 0, "bwd": 1, "full": 2}[which]
    floor, work = floors(shape, speed)[column], operations(shape)[column]
    totals = {}
    for name, pairs in times.items():
        passes = dict(zip(("forward_ms", "backward_ms"), zip(*pairs, strict=True), strict=False))
        if backward:
            passes["full_ms"] = [sum(pair) for pair in pairs]
        for key, values in passes.items():
            results[name][key] = summary([1e3 * value for value in values])
        totals[name] = [*passes.values()][column]
        median = statistics.median(totals[name])
        results[name] |= {
            "runs": len(pairs),
            "tflops": work / median / 1e12,
            "of_floor": floor / median,
        }
    for name, values in totals.items():
        for other in {"fused", "eager"} & set(totals):  # by turns: a slow moment is in both
            ratios = [v / o for v, o in zip(values, totals[other], strict=True)]
            results[name][f"over_{other}"] = summary(ratios)
    if device == "cuda" and backward and shape[0] * shape[1] <= GRAPH_MOST:
        replays(clock, running, tensors, results, 100)
    return {**case, "dtype": str(dtype).removeprefix("torch."), "pass": which, "device": device,
            "threads": torch.get_num_threads(), "copies": len(copies), "machine": speed,
            "preempted_per_s": others, "floor_ms": 1e3 * floor, "results": results}  # fmt: skip
