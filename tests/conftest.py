"""Fixtures that the tests share; the problems, the oracle and the error rule are in problem.py."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# A cached graph holds the shapes that another build's operators returned.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

# `--hypothesis-profile=explore` looks further than the same examples every time.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", max_examples=60, derandomize=True, database=None, **_common)
settings.register_profile("explore", max_examples=2000, **_common)
settings.load_profile("fixed")


@pytest.fixture(scope="module")
def one_thread():
    """For models too small for two threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """Sets the number of threads; the test's end puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
