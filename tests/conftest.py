"""Fixtures that the tests share. problem.py has the problems, the oracle and the error rule."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# A graph in the cache has the shapes that the operators of another build returned.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

# By default the examples are the same every time; `--hypothesis-profile=explore` tries others.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", max_examples=60, derandomize=True, database=None, **_common)
settings.register_profile("explore", max_examples=2000, **_common)
settings.load_profile("fixed")


@pytest.fixture(scope="module")
def one_thread():
    """One thread, for models so small that two would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """A function that sets the number of threads. The test's end restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
