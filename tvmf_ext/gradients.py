"""Gradients of DTensors and of plain parameters together, as a sharded head and its backbone have
them: their norm and their clipping, and the check of a GradScaler that all of them are finite.
"""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for plain parameters and DTensors together.

    All ranks must call it together. A plain gradient must be the same on all ranks, as it is after
    DistributedDataParallel; it counts once.

    Returns:
        The norm of all gradients before they were clipped, the same on all ranks.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    kinds: dict[Any, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            kind = (p.grad.device_mesh, p.grad.placements) if isinstance(p.grad, DTensor) else None
            kinds.setdefault(kind, []).append(p)
    norms = []
    for same in kinds.values():
        norm = get_total_norm([p.grad for p in same if p.grad is not None], norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return torch.tensor(0.0)
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]), norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"the norm of the gradients must be finite, got {norm.item()}")
    for same in kinds.values():
        clip_grads_with_norm_(same, max_norm, norm)
    return norm


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` for an optimizer of plain parameters and DTensors.

    All ranks must use it together, with the same arguments. If a gradient of any rank is not
    finite, all ranks skip the step and scale the next loss alike.
    """

    def _unscale_grads_(self, optimizer: Any, *args: Any) -> dict[torch.device, Tensor]:
        # The operator that unscales refuses the two kinds together, but takes a rank's own parts.
        sharded, own = [], []
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if isinstance(p, DTensor):
                part = p.to_local().detach()
                part.grad = p.grad.to_local() if isinstance(p.grad, DTensor) else None
                sharded.append(p)
            own.append(part if isinstance(p, DTensor) else p)
        parts: Any = SimpleNamespace(param_groups=[{"params": own}])
        found = super()._unscale_grads_(parts, *args)
        for mesh in {p.device_mesh for p in sharded}:
            device = next(p.device for p in sharded if p.device_mesh == mesh)
            of_mesh = found.setdefault(device, torch.zeros(1, device=device))
            for dim in range(mesh.ndim):
                dist.all_reduce(of_mesh, group=mesh.get_group(dim))
        return found
