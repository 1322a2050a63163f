"""`python -m bench.end_to_end`: both heads train alike; shares, rates and memory are right."""

import json

import pytest
from rich.progress import Progress

from bench import end_to_end
from tvmf_ext import reference


class KnownClock:
    """A step with the fused head takes 2 s, of which the head takes 0.5 s; with eager PyTorch's
    head it takes 6 s, of which the head takes 3 s."""

    times = (2.0, 0.5, 6.0, 3.0)

    def __init__(self, device):
        self.calls = -1

    def mark(self):
        return 0

    def seconds(self, marks):
        self.calls += 1
        return [self.times[self.calls % 4]]


def test_end_to_end_trains_both_heads_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(end_to_end, "CASES", {"small": ("convnet", 300, 4, 4)})
    monkeypatch.setattr(end_to_end, "Clock", KnownClock)
    calls, function = [], reference.tvmf_logits

    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(reference, "tvmf_logits", counted)
    path = tmp_path / "steps.json"
    end_to_end.main(["--quick", "--json", str(path)])
    (case,) = json.loads(path.read_text())["cases"]
    assert case["shape"] == [2, 300, 128]
    fused, eager = (case["results"][name] for name in end_to_end.HEADS)
    assert fused["loss"] == pytest.approx(eager["loss"], rel=1e-2)  # two steps later
    # The calls are eager's alone: a step and a head in each run and in the turn that warms up, and
    # three steps before.
    assert len(calls) == 2 * fused["runs"] + 2 + 3
    assert case["eager_over_fused"]["median"] == 3
    assert fused["head_share"]["median"] == 0.25 and eager["head_share"]["median"] == 0.5
    assert fused["images_per_s"]["median"] == 1 and eager["step_ms"]["median"] == 6000
    text = capsys.readouterr().out
    assert "1 ± 0" in text and "3.00x" in text and "25.0%" in text and "50.0%" in text


def test_end_to_end_counts_gradients_as_memory():
    """The gradient of 60,000 x 128 weights is 31 MB."""
    with Progress(disable=True) as progress:
        case = end_to_end.measure("", "convnet", 60_000, 2, 32, 0, "cpu", progress)
    fused, eager = (case["results"][name]["extra_bytes"] for name in end_to_end.HEADS)
    if fused is None:
        pytest.skip("this system does not tell the peak")
    assert 29e6 < fused < eager
