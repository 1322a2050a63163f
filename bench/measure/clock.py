"""The time of one call, by the CPU's clock or by events on the GPU; statistics of many times."""

import statistics
import time
from itertools import pairwise

import torch


class Clock:
    """Marks moments in the work of a device and tells the seconds between them."""

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
    """[forward] or [forward, backward] seconds of one call; freeing its results is not timed."""
    input, weight, _, scale = tensors
    marks = [clock.mark()]
    state = variant.forward(*tensors)
    marks.append(clock.mark())
    if backward:
        gradients = variant.backward(state, input, weight, scale)
        marks.append(clock.mark())
        del gradients
    return clock.seconds(marks)


def summary(values, parts=4):
    """The median, the quartiles, and the lowest and highest median of `parts` successive parts.

    The last pair shows how far a median moves when the machine becomes slower or faster.
    """
    parts = min(parts, len(values))
    cuts = [len(values) * i // parts for i in range(parts + 1)]
    medians = [statistics.median(values[i:j]) for i, j in pairwise(cuts)]
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "quartiles": [low, high],
        "medians": [min(medians), max(medians)],
    }
