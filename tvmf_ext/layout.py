"""The parameters of a head whose classes are spread over the ranks of a DeviceMesh: which classes a
rank has, their first values, and what a checkpoint of one process has of them.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .collectives import Group, total
from .modules import TvMFLoss

# The first weights are drawn for so many classes at a time, each time from a seed of its own, so
# that they do not depend on the number of ranks.
_INIT_CLASSES = 4096


def check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim not in (1, 2):
        raise ValueError(f"mesh must have one or two dimensions, got {mesh.ndim}")


def _group(mesh: DeviceMesh, dim: int) -> Group:
    group = mesh.get_group(dim)
    return Group(group.group_name, mesh.size(dim), mesh.get_local_rank(dim))


class ClassShards(TvMFLoss):
    """A `TvMFLoss` of which every rank has the parameters of its own classes alone.

    The ranks of the mesh's last dimension share the classes, in `torch.chunk`'s layout, which
    DTensor has. Those of a first dimension hold the same classes.
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        mesh: DeviceMesh,
        weight: Tensor | None,
        device: torch.device | str | None,
        **options: Any,
    ) -> None:
        if device is None and torch.get_default_device().type != "meta":
            device = mesh.device_type
        # TvMFLoss's constructor makes the parameters and buffers by the layout that is set here.
        self.mesh = mesh
        *self._data_groups, self._group = (_group(mesh, dim) for dim in range(mesh.ndim))
        self._groups = (*self._data_groups, self._group)
        self._world: int = mesh.size()
        self._chunk = -(-num_classes // self._group.size)
        self.first_class = min(self._group.rank * self._chunk, num_classes)
        self.own_classes = min(self._chunk, num_classes - self.first_class)
        super().__init__(in_features, num_classes, weight=weight, device=device, **options)

    def _per_class(self, *size: int, **options: Any) -> Tensor:
        local = torch.empty(self.own_classes, *size[1:], **options)
        return self._as_sharded(local, torch.Size(size))

    def _as_sharded(self, local: Tensor, size: torch.Size) -> DTensor:
        placements: list[Placement] = [Replicate() for _ in self._data_groups]
        placements.append(Shard(0))
        stride = torch.empty(size, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=size, stride=stride
        )

    def _own(self, values: Tensor) -> Tensor:
        return values[self.first_class : self.first_class + self.own_classes].clone()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives all parameters and buffers the values that the constructor gives them.

        All ranks must call it together. The weight and the bias have the distribution of
        `nn.Linear`'s. They follow from the first rank's seed, whatever the number of ranks is.
        """
        if not self.weight.is_meta:
            # All ranks draw, so that their generators stay alike, and the first rank's draw counts.
            seed = torch.zeros(1, dtype=torch.int64).random_(1 << 62)
            if any(group.rank for group in self._groups):
                seed.zero_()
            first = int(total(seed.to(self.weight.device), *self._groups))
            bound = 1 / math.sqrt(self.in_features)
            for number, values in enumerate((self.weight, self.bias)):
                if isinstance(values, DTensor):
                    self._draw(values.to_local(), bound, first + (number << 62))
        self._restore(self._initial)

    def _draw(self, values: Tensor, bound: float, seed: int) -> None:
        """Fills the own classes' part of what the seed gives to all classes."""
        begin, end = self.first_class, self.first_class + self.own_classes
        generator = torch.Generator(values.device)
        for block in range(begin // _INIT_CLASSES, -(-end // _INIT_CLASSES)):
            first = block * _INIT_CLASSES
            drawn = values.new_empty(_INIT_CLASSES, *values.shape[1:])
            drawn.uniform_(-bound, bound, generator=generator.manual_seed(seed + block))
            low, high = max(begin, first), min(end, first + _INIT_CLASSES)
            values[low - begin : high - begin] = drawn[low - first : high - first]

    @torch.no_grad()
    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            values, now = self._initial[name], getattr(self, name)
            if values is not None:
                now = now.to_local() if isinstance(now, DTensor) else now
                now.copy_(values)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes also the tensors of all classes that a `TvMFLoss` has."""
        for name in ("weight", "bias", "kappa"):
            now, loaded = getattr(self, name), state_dict.get(prefix + name)
            sharded = isinstance(now, DTensor) and not isinstance(loaded, DTensor)
            if sharded and loaded is not None and loaded.shape == now.shape:
                own = self._own(loaded).to(loaded.device if now.is_meta else now.device)
                state_dict[prefix + name] = self._as_sharded(own, loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
