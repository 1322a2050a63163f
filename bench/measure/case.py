"""All variants of one case: a first call that is checked, then turns that are timed."""

import statistics
import time
from functools import partial

import torch

from bench import variants
from bench.measure import machine, turns
from bench.measure.clock import Clock, summary, timed
from bench.measure.launches import launches
from bench.measure.memory import extra_memory
from bench.measure.oracle import TOLERANCE, error, exact, problem

# Cosines of the largest case whose launches may take longer than its kernels.
GRAPH_MOST = 1 << 22


def first_call(name, case, tensors, wanted, backward, dtype):
    """A variant and what its first call showed; raises whatever the variant raises."""
    device = tensors[0].device.type
    variant, result = variants.make(name, case["shape"], case["kappa"], device, dtype), {}
    if variant.transposed:
        tensors = transposed(tensors)
    got, warning = variants.first_call(variant, tensors, backward)
    returned = sum(g.nbytes for g in got[1:])
    if name != "products":
        if variant.transposed and backward:
            got = (got[0], got[1], got[2].t(), got[3])
        result["error"] = error(got, wanted)
    del got
    call = partial(timed, Clock(device), variant, tensors, backward)
    times = 3 if device == "cpu" else 1  # the GPU's allocator counts exactly
    extra = [extra_memory(device, call, returned) for _ in range(times)]
    result["extra_bytes"] = None if None in extra else statistics.median(extra)
    result["launches"] = launches(device, call)
    if warning:
        result["warned"] = warning
    return variant, result


def first_calls(case, names, tensors, backward, dtype):
    """The result of each variant's first call, and the variants that may be timed.

    A variant that raised is refused. A variant whose error is larger than the tolerance plus twice
    eager PyTorch's error is wrong, and is not timed. The error of the fused head may also be no
    larger than three tolerances, because eager PyTorch in 16 bits is far off.
    """
    wanted = exact(tensors, case["kappa"])
    torch._dynamo.reset()  # torch.compile gives up after too many compilations of one function
    results, running, allowed = {}, {}, TOLERANCE[dtype]
    for name in sorted(names, key=variants.ORDER):
        try:
            variant, result = first_call(name, case, tensors, wanted, backward, dtype)
        except Exception as refusal:  # a peer may raise anything
            results[name] = {"refused": variants.reason(refusal)}
            continue
        results[name] = result
        if name == "eager" and result["error"] == result["error"]:  # not NaN
            allowed += 2 * result["error"]
        most = min(allowed, 3 * TOLERANCE[dtype]) if name == "fused" else allowed
        if name != "products" and not result["error"] <= most:
            result["wrong"] = True
        else:
            running[name] = variant
    return {name: results[name] for name in sorted(results, key=variants.NAMES.index)}, running


def transposed(tensors):
    """The same operands with the weight stored as [D, C]."""
    x, w, y, s = tensors
    return [x, w.detach().t().contiguous().requires_grad_(), y, s]


def operand_copies(first, device):
    """Copies of the operands; on a GPU as many as twice the L2 cache holds, at most 65."""
    if device != "cuda":
        return [first]
    once = first[0].nbytes + first[1].nbytes
    more = 2 * torch.cuda.get_device_properties(0).L2_cache_size // once
    return [first] + [
        [t.detach().clone().requires_grad_(t.requires_grad) for t in first]
        for _ in range(min(more, 64))
    ]


def add_times(results, times, which, floor, work):
    """Adds to the results the times of the turns, their rates, and ratios of variants.

    A ratio is taken turn by turn, because a slow moment of the machine is then in both times.
    """
    totals = {}
    for name, taken in times.items():
        passes = dict(zip(("forward_ms", "backward_ms"), zip(*taken, strict=True), strict=False))
        if which != "fwd":
            passes["full_ms"] = [sum(pair) for pair in taken]
        for key, values in passes.items():
            results[name][key] = summary([1e3 * value for value in values])
        totals[name] = [*passes.values()][{"fwd": 0, "bwd": 1, "full": 2}[which]]
        median = statistics.median(totals[name])
        results[name] |= {
            "runs": len(taken),
            "tflops": work / median / 1e12,
            "of_floor": floor / median,
        }
    for name, values in totals.items():
        for other in {"fused", "eager"} & set(totals):
            ratios = [v / o for v, o in zip(values, totals[other], strict=True)]
            results[name][f"over_{other}"] = summary(ratios)


def measure(case, names, seconds, which, device, dtype, tick=lambda completed: None):
    """The figures of a case (`shape`, `kappa`) for every variant, as the JSON files hold them.

    Variants take turns for `seconds`, at least five turns. `which` is the pass that ratios and
    rates are about: "fwd" (which skips the backward pass), "bwd" or "full".
    """
    shape, backward = case["shape"], which != "fwd"
    clock, first = Clock(device), problem(*shape, device, dtype)
    results, running = first_calls(case, names, first, backward, dtype)
    copies = operand_copies(first, device)
    swapped = [transposed(c) for c in copies] if any(v.transposed for v in running.values()) else []
    tensors = {name: swapped if v.transposed else copies for name, v in running.items()}

    speed = machine.rates(device, dtype, clock)
    start, before = time.perf_counter(), machine.preempted()
    times = turns.take_turns(clock, running, tensors, backward, seconds, tick)
    preemptions = (machine.preempted() - before) / (time.perf_counter() - start)
    again = machine.rates(device, dtype, clock)
    speed = {key: (speed[key] + again[key]) / 2 for key in speed}

    column = {"fwd": 0, "bwd": 1, "full": 2}[which]
    floor, work = machine.floors(shape, speed)[column], machine.operations(shape)[column]
    add_times(results, times, which, floor, work)
    if device == "cuda" and backward and shape[0] * shape[1] <= GRAPH_MOST:
        turns.replays(clock, running, tensors, results, 100)
    return {
        **case,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": which,
        "device": device,
        "threads": torch.get_num_threads(),
        "copies": len(copies),
        "machine": speed,
        "preempted_per_s": preemptions,
        "floor_ms": 1e3 * floor,
        "results": results,
    }
