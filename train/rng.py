"""The random generators of Python, numpy and torch's CPU: seeding, saving, restoring."""

# ruff: noqa: NPY002 (libraries that draw with numpy draw from its global generator)

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def get_rng() -> dict[str, Any]:
    """The three states, in types that torch.load(weights_only=True) accepts."""
    name, keys, *rest = np.random.get_state()
    numpy_state = (name, keys.tolist(), *rest)
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}


def set_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
