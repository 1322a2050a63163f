"""An optimizer's step for some rows of a parameter at a time, whose gradient is never whole.

It serves optimizers that change each element by itself, such as SGD, Adam and AdamW.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Rows of a parameter, as a slice or as distinct indices `[S]`, and the gradients of these rows of
# some parameters, by name.
Part = tuple[slice | Tensor, dict[str, Tensor]]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _zeros_like(parameter: Tensor, local: Tensor) -> Tensor:
    """Zeros in the parameter's shape and sharding, and in the dtype of `local`."""
    zeros = torch.zeros_like(_local(parameter), dtype=local.dtype)
    if not isinstance(parameter, DTensor):
        return zeros
    return DTensor.from_local(
        zeros,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class _Parameter:
    """A parameter of the optimizer, with its options and its state before the step."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        self.optimizer, self.parameter = optimizer, parameter
        groups = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
        self.options = {k: v for k, v in groups[0].items() if k != "params"} if groups else None
        # What is not of the parameter's shape, such as a count of steps, is the same for all parts.
        state = optimizer.state.get(parameter, {})
        self.is_new = not state
        self.shared = {
            name: copy.deepcopy(value)
            for name, value in state.items()
            if not self._per_element(value)
        }

    def _per_element(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape == self.parameter.shape

    def step(self, rows: slice | Tensor, gradient: Tensor) -> None:
        """A step of the rows alone."""
        values = torch.nn.Parameter(_local(self.parameter.detach())[rows])
        values.grad = gradient
        state = self.optimizer.state[self.parameter]
        part: dict[str, Any] = {}
        if not self.is_new:
            part = {name: _local(v)[rows] for name, v in state.items() if self._per_element(v)}
        optimizer = copy.copy(self.optimizer)
        optimizer.param_groups = [{**(self.options or {}), "params": [values]}]
        optimizer.state = defaultdict(dict, {values: part | copy.deepcopy(self.shared)})
        # The step itself, without the hooks and the counting of the schedules.
        type(optimizer).step(optimizer)
        shared_memory = isinstance(rows, slice)
        if not shared_memory:
            _local(self.parameter.detach())[rows] = values.detach()
        for name, value in optimizer.state[values].items():
            if not (isinstance(value, Tensor) and value.shape == values.shape and value.dim()):
                state[name] = value
                continue
            if name not in state:
                state[name] = _zeros_like(self.parameter, value)
            if not (shared_memory and value is part.get(name)):
                _local(state[name])[rows] = value


@torch.no_grad()
def step_in_parts(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, Tensor],
    parts: Iterable[Part],
    gradient_scale: float = 1.0,
) -> None:
    """Steps the rows of each part in turn; nothing else of the parameters or of their states
    changes. Parameters that the optimizer does not have are left out.

    The state of a parameter keeps the form that a step with the whole gradient gives it. Where it
    starts, momentum is 0 for the rows that were in no part yet.
    """
    stepped = {name: _Parameter(optimizer, p) for name, p in parameters.items()}
    for rows, gradients in parts:
        for name, gradient in gradients.items():
            if stepped[name].options is not None:
                gradient = gradient if gradient_scale == 1 else gradient / gradient_scale
                stepped[name].step(rows, gradient)
