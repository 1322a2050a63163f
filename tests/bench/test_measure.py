"""Each figure is what its name says, and a wrong result is noticed."""

from types import SimpleNamespace

import pytest
import torch

from bench import variants
from bench.measure import case as case_module
from bench.measure import clock, machine, memory, turns
from bench.measure.case import measure
from bench.measure.oracle import error, exact, problem
from bench.show.tables import PASSES, case_text, overview
from tvmf_ext import reference

SHAPE = (24, 300, 40)
rates = machine.rates


class HalfSecondClock:
    """Every call takes half a second."""

    def mark(self):
        return 0

    def seconds(self, marks):
        return [0.5] * (len(marks) - 1)


def test_figures_of_known_times(monkeypatch):
    """The clock is told how long forward and backward take: fused 1 + 2 ms, eager 2 + 10 ms, the
    products 0.5 + 1 ms."""
    taken = {"fused": (1e-3, 2e-3), "eager": (2e-3, 10e-3), "products": (5e-4, 1e-3)}
    names = {}
    make = variants.make

    def named(name, *args):
        variant = make(name, *args)
        names[id(variant)] = name
        return variant

    monkeypatch.setattr(variants, "make", named)
    monkeypatch.setattr(turns, "timed", lambda clock, v, *_: list(taken[names[id(v)]]))
    monkeypatch.setattr(case_module, "extra_memory", lambda *_: 5_000_000)
    monkeypatch.setattr(case_module, "launches", lambda *_: 7)
    found = {}
    for which in PASSES:
        case = {"shape": (100, 1000, 50), "kappa": 16.0}
        found[which] = measure(case, [*taken], 1e-9, which, "cpu", torch.float32)
    # 100 x 1000 x 50 x 6 operations at 1e11 a second take 0.3 ms, longer than two transfers of a
    # weight of 200 kB at 1e10 bytes/s.
    floors = {"fwd": 0.1, "bwd": 0.2, "full": 0.3}
    fused = {which: case["results"]["fused"] for which, case in found.items()}
    for which, floor in floors.items():
        assert found[which]["floor_ms"] == pytest.approx(floor)
    assert [fused[w]["of_floor"] for w in floors] == pytest.approx([0.1, 0.1, 0.1])
    assert [fused[w]["tflops"] for w in floors] == pytest.approx([0.01] * 3)
    results = {which: case["results"] for which, case in found.items()}
    over = {w: r["eager"]["over_fused"]["median"] for w, r in results.items()}
    assert over == pytest.approx({"fwd": 2, "bwd": 5, "full": 4})
    assert results["full"]["fused"]["over_eager"]["median"] == pytest.approx(0.25)
    assert results["full"]["products"]["over_fused"]["median"] == pytest.approx(0.5)
    assert results["full"]["fused"]["extra_bytes"] == 5_000_000
    assert results["full"]["fused"]["launches"] == 7


def test_floors_take_the_larger_of_operations_and_bytes():
    speed = {"flops_per_s": 1e9, "bytes_per_s": 1e9}
    assert machine.floors((1, 10, 100), speed) == pytest.approx([4e-6, 8e-6, 8e-6])
    assert machine.floors((100, 10, 100), speed) == pytest.approx([2e-4, 4e-4, 6e-4])
    # A weight of 4000 bytes that leaves the cache is read by both passes.
    small = speed | {"cache_bytes": 3999}
    assert machine.floors((1, 10, 100), small) == pytest.approx([4e-6, 8e-6, 12e-6])


def test_the_cpu_s_clock_tells_the_seconds_between_marks(monkeypatch):
    moments = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(moments))
    cpu = clock.Clock("cpu")
    assert cpu.seconds([cpu.mark() for _ in range(3)]) == [0.5, 2.5]


def test_a_timed_call_runs_both_passes():
    calls = []

    class Variant:
        def forward(self, *tensors):
            calls.append("forward")

        def backward(self, *_):
            calls.append("backward")

    assert clock.timed(HalfSecondClock(), Variant(), (None,) * 4, True) == [0.5, 0.5]
    assert clock.timed(HalfSecondClock(), Variant(), (None,) * 4, False) == [0.5]
    assert calls == ["forward", "backward", "forward"]


def test_variants_and_copies_take_turns():
    seen = []

    class Variant:
        def __init__(self, name):
            self.name = name

        def forward(self, *tensors):
            seen.append((self.name, tensors[0]))

        def backward(self, *_):
            pass

    running = {name: Variant(name) for name in "ab"}
    copies = {name: [(i, None, None, None) for i in range(4)] for name in "ab"}
    turns.take_turns(HalfSecondClock(), running, copies, True, 1e-9, lambda completed: None)
    assert seen[:4] == [("a", 0), ("b", 1), ("b", 2), ("a", 3)] and len(seen) == 10


def test_graphs_are_replayed_in_turns_without_the_peers(monkeypatch):
    replayed = []

    def captured(variant, tensors):
        if variant == "compile's":
            raise RuntimeError("not while capturing")
        return SimpleNamespace(replay=lambda: replayed.append((variant, tensors)))

    monkeypatch.setattr(turns, "captured", captured)
    running = {name: f"{name}'s" for name in ("fused", "eager", "compile", "liger")}
    copies = {name: ["first", "second"] for name in running}
    results = {name: {} for name in running}
    turns.replays(HalfSecondClock(), running, copies, results, 2)
    assert replayed == [("fused's", "first"), ("eager's", "first")] * 2
    assert results["fused"]["graph_ms"]["median"] == 500
    assert results["compile"] == {"graph_refused": "RuntimeError: not while capturing"}
    assert results["liger"] == {}


@pytest.mark.parametrize("place", range(4))
def test_each_result_is_held_against_float64(place):
    tensors = problem(*SHAPE, "cpu", torch.float32)
    wanted = exact(tensors, 16.0)
    got = [t.float().clone() for t in wanted]
    assert error(got, wanted) < 1e-6
    got[place] *= 1.01
    assert error(got, wanted) > 1e-4


def test_a_tail_that_is_left_out_is_an_error():
    wanted = torch.ones(1000, 8)
    wanted[64:] *= 1e-6
    got = wanted.clone()
    got[-5:] = 0
    assert error([got], [wanted]) > 0.1
    assert error([torch.zeros(3)], [torch.zeros(3)]) == 0
    assert error([torch.ones(2) * float("nan")], [torch.ones(2)]) != 0


def test_a_single_class_is_measured():
    case = {"shape": (3, 1, 2), "kappa": 16.0}
    found = measure(case, ["fused", "eager"], 1e-9, "full", "cpu", torch.float32)
    assert all(result["error"] < 1e-6 for result in found["results"].values())


@pytest.mark.parametrize("kappa", [0.0, 16.0])
def test_exact_is_float64_eager_whatever_the_block(kappa):
    tensors = problem(*SHAPE, "cpu", torch.float32)
    leaves = [t.detach().double().requires_grad_() for t in (tensors[0], tensors[1], tensors[3])]
    loss = reference.tvmf_cross_entropy(*leaves[:2], tensors[2], kappa=kappa, scale=leaves[2])
    wanted = (loss, *torch.autograd.grad(loss, leaves))
    for classes in (7, 1 << 14):
        assert error(exact(tensors, kappa, classes), wanted) < 1e-7


def test_a_wrong_variant_is_shown_and_not_timed(monkeypatch):
    peer = variants.Loss(lambda x, w, y, s: 1.001 * variants.eager(x, w, y, s, 0.0))
    monkeypatch.setitem(variants.PEERS, "linear_ce", lambda: peer)
    case = {"shape": SHAPE, "kappa": 0.0}
    case = measure(case, ["fused", "eager", "linear_ce"], 1e-9, "full", "cpu", torch.float32)
    result = case["results"]["linear_ce"]
    assert result["wrong"] and "full_ms" not in result
    assert "linear_ce is WRONG by 1.0e-03" in case_text(case)
    assert "wrong" in overview([case])


def test_the_rates_of_the_machine_are_operations_and_bytes_a_second():
    # By the clock a product of 1024 x 1024 matrices takes half a second, and so does a copy, which
    # reads and writes 2^24 float32.
    found = rates("cpu", torch.float32, HalfSecondClock())
    assert found["flops_per_s"] == pytest.approx(2 * 1024**3 / 0.5)
    assert found["bytes_per_s"] == pytest.approx(2 * 4 * 2**24 / 0.5)


def test_extra_memory_is_a_call_s_peak():
    def call():
        parts = [torch.ones(1 << 22) for _ in range(3)]
        del parts

    held = torch.ones(1 << 23)
    extra = memory.extra_memory("cpu", call, 1 << 24)
    if extra is None:
        pytest.skip("this system does not tell the peak")
    assert abs(extra - 2 * (1 << 24)) < 1 << 21 and held is not None
    assert memory.extra_memory("cpu", lambda: None, 1 << 24) == 0


def test_a_summary_shows_how_far_the_median_drifts():
    figures = clock.summary([1.0] * 8 + [1.5] * 8)
    assert figures == {"median": 1.25, "quartiles": [1.0, 1.5], "medians": [1.0, 1.5]}
    assert clock.summary([2.0]) == {"median": 2, "quartiles": [2, 2], "medians": [2, 2]}
