"""A variant that cannot run says why."""

import pytest
import torch

from bench import variants

SHAPE = (24, 300, 40)


def test_a_refusal_says_why(monkeypatch):
    def bare():
        raise AssertionError

    with pytest.raises(AssertionError) as raised:
        bare()
    assert variants.reason(raised.value) == "AssertionError: raise AssertionError"
    assert variants.reason(ValueError("D is odd\nmore")) == "ValueError: D is odd"
    with pytest.raises(variants.Refused, match="kappa = 0"):
        variants.make("linear_ce", SHAPE, 16.0, "cpu", torch.float32)
    with pytest.raises(variants.Refused, match="needs a GPU"):
        variants.make("cce", SHAPE, 0.0, "cpu", torch.float32)
    monkeypatch.setitem(variants.MODULES, "cce", "a_module_that_nobody_has")
    with pytest.raises(variants.Refused, match=r"not installed: pip install '\.\[bench\]'"):
        variants.make("cce", SHAPE, 0.0, "cuda", torch.float32)
