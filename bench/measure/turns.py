"""Variants take turns, so that a slow moment of the machine falls on all of them.

torch.utils.benchmark and triton.testing time one function after another. On a machine whose speed
changes from second to second only turns compare fairly, which is why the loop is written here.
"""

import time

import torch

from bench import variants
from bench.measure.clock import summary, timed


def take_turns(clock, running, tensors, backward, seconds, tick):
    """The times of each variant in each turn, as `timed` returns them; at least five turns.

    Each turn starts with another variant, so that none is always first, and each call takes the
    next copy of the operands, so that no variant finds in the GPU's L2 cache what another left.
    `tick` is told how much of the time is spent.
    """
    times, names = {name: [] for name in running}, [*running]
    start, turn = time.perf_counter(), 0
    while names and (turn < 5 or time.perf_counter() - start < seconds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            copy = tensors[name][(turn * len(names) + i) % len(tensors[name])]
            times[name].append(timed(clock, running[name], copy, backward))
        turn += 1
        tick(completed=min(1.0, (time.perf_counter() - start) / seconds))
    return times


def captured(variant, tensors):
    """The forward and backward pass as a CUDA graph."""
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
    # A capture that fails leaves its own stream current; the outer context restores the old one.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        call()
    return graph


def replays(clock, running, tensors, results, turns):
    """Adds to the results the time in which a CUDA graph of each variant replays, in turns.

    Peers are left out, because they read values from the device between their kernels. A replay
    has the same operands each time, so they stay in the L2 cache if they fit.
    """
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
