"""Fixtures of the benchmark's tests, none of which takes a time."""

from itertools import pairwise

import pytest
import torch

from bench import end_to_end, kernel_times
from bench.measure import case, machine

TICK = 1e-3


class TickingClock:
    """Each mark is a millisecond after the one before, whatever happens between them."""

    now = 0

    def __init__(self, device="cpu"):
        pass

    def mark(self):
        TickingClock.now += 1
        return TickingClock.now

    def seconds(self, marks):
        return [TICK * (b - a) for a, b in pairwise(marks)]


@pytest.fixture(autouse=True)
def no_times(threads, monkeypatch):
    """One thread, a clock that ticks, and rates that are given. torch.compile, which takes a
    minute, is left to CI's run of the quick suite."""
    threads(1)
    for module in (case, end_to_end, kernel_times):
        monkeypatch.setattr(module, "Clock", TickingClock)
    rates = {"flops_per_s": 1e11, "bytes_per_s": 1e10}
    monkeypatch.setattr(machine, "rates", lambda *_: rates)
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function)
