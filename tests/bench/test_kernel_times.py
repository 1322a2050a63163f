"""`python -m bench.kernel_times`: kernels are told apart, measured, and shown from a file."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench import kernel_times, variants
from bench.measure import turns

SHAPE = (24, 300, 40)


def run_of(**more):
    """A run of one shape, as a GPU's file has it: 2 ms in a graph over a floor of 0.5 ms."""

    def figures(value):
        return {"median": value, "least": 0.9 * value, "most": 1.1 * value}

    case = {
        "shape": [10, 100, 50],
        "kappa": 16.0,
        "graph_ms": figures(2.0),
        "predicted_ms": 0.75,
        "fused_ms": figures(3.0),
        "eager_ms": figures(12.0),
        "kernels": {
            "gradient": {"launches": 79.0, "us": 57.8},
            "statistics": {"launches": 1.0, "us": 2381.0},
        },
    }
    return {
        "device": "NVIDIA H200",
        "driver": "580.1",
        "torch": "2.11.0",
        "date": "2026-11-26",
        "commit": "c0ffee",
        "dtype": "bfloat16",
        "kappa": 16.0,
        "machine": {"flops_per_s": 6e8, "bytes_per_s": 1e12},
        "cases": [case],
        **more,
    }


def rows_of(text):
    """The rows of the tables in a text, by their first cell."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def test_kernels_are_shown_from_a_file(tmp_path, capsys):
    refused = run_of(note="of a forerunner", commit="decaf")
    del refused["cases"][0]["eager_ms"]
    refused["cases"][0]["eager_refused"] = "OutOfMemoryError: much"
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps([run_of(), refused]))
    kernel_times.main(["--load", str(path)])
    text = capsys.readouterr().out
    first, second = text.split("commit decaf")
    rows = rows_of(first.split("| kernel")[0]) | rows_of(first.split("\n\n")[2])
    whole = ["2 ms", "750 us", "4.0x", "3 ms", "12 ms", "4.0x"]
    assert rows["(10, 100, 50)"] == whole
    assert rows["gradient"] == ["79 x 57.8 us"] and rows["statistics"] == ["1 x 2.38 ms"]
    assert "NVIDIA H200, driver 580.1" in first and "commit c0ffee" in first
    assert "of a forerunner" in second and "eager refused: OutOfMemoryError: much" in second


def test_kernels_are_told_apart_by_name():
    def event(start, name, microseconds):
        span = SimpleNamespace(start=start, elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, time_range=span)

    names = [
        "void tvmf::sm90::(anonymous namespace)::gradient<(tvmf::Math)1, float>(Params)",
        "void tvmf::<unnamed>::class_gradient<1>(P<tvmf::T>)",
        "void tvmf::<unnamed>::class_gradient<1>(P<tvmf::T>)",
        "Memset (Device)",
    ]
    events = [event(10 * i, names[i % 4], 1.0 + i % 4) for i in reversed(range(8))]
    assert kernel_times.by_kernel(events, 2) == {
        "Memset": {"launches": 1, "us": 4},
        "class_gradient+weight": {"launches": 1, "us": 3},
        "class_gradient": {"launches": 1, "us": 2},
        "gradient": {"launches": 1, "us": 1},
    }


def test_a_shape_s_kernels_are_measured(monkeypatch):
    """On the CPU: the graph, the profiler and the plan's GPU are replaced."""
    problem, plan = kernel_times.problem, kernel_times.plan
    cpu = {"activities": [ProfilerActivity.CPU]}
    for module, name, replacement in (
        (kernel_times, "problem", lambda N, C, D, _, t: problem(N, C, D, "cpu", t)),
        (kernel_times, "plan", lambda *a, **k: plan(*a, **{**k, "device": "H200"})),
        (kernel_times, "profile", lambda **_: profile(**cpu)),
        (kernel_times, "SECONDS", 1e-9),
        (turns, "captured", lambda *_: SimpleNamespace(replay=lambda: None)),
        (torch.cuda, "synchronize", lambda: None),
    ):
        monkeypatch.setattr(module, name, replacement)
    case = kernel_times.case_of(SHAPE)
    assert case["shape"] == list(SHAPE) and case["kernels"] == {}
    for key, milliseconds in (("fused_ms", 2), ("eager_ms", 2), ("graph_ms", 1)):
        assert [*case[key].values()] == pytest.approx([milliseconds] * 3)
    assert 0 < case["predicted_ms"] < 1
    monkeypatch.setattr(variants, "eager", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in kernel_times.case_of(SHAPE)["eager_refused"]


@pytest.mark.parametrize(
    "args",
    [[], ["--shape", "0", "1", "1"], ["--load", "/no/such.json"], ["--load", __file__]],
    ids=["no GPU", "no rows", "no file", "no JSON"],
)
def test_kernels_want_a_gpu_or_a_file(args, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        kernel_times.main(args)
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "got" in said and "want" in said
