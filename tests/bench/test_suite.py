"""The suites name devices, dtypes and variants that exist, and cases that can be told apart."""

import pytest
import torch

from bench import variants
from bench.compare import key
from bench.suite import SUITES, cases


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_can_be_run(name):
    suite = SUITES[name]
    assert suite["device"] in ("cpu", "cuda") and suite["seconds"] > 0
    assert isinstance(getattr(torch, suite["dtype"]), torch.dtype)
    for case in suite["cases"]:
        assert len(case["shape"]) == 3 and min(case["shape"]) > 0 and case["kappa"] > -0.5
        assert isinstance(getattr(torch, case.get("dtype", suite["dtype"])), torch.dtype)
        assert set(case.get("leave_out", ())) <= set(variants.NAMES)
    keys = [key(case) for case in suite["cases"]]
    assert len(set(keys)) == len(keys)


def test_a_case_has_a_shape_a_kappa_and_what_it_is_given():
    assert cases([(1, 2, 3)], kappa=0.0, sweep=True) == [
        {"shape": [1, 2, 3], "kappa": 0.0, "sweep": True}
    ]
