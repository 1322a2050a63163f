"""Collectives of a sharded head, with the gradients that the head needs.

A group goes by its name, because torch.compile cannot keep a ProcessGroup. All ranks return losses,
and every gradient here is one of the mean of what the ranks return, as in DistributedDataParallel.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_c10d = torch.ops._c10d_functional


class Group(NamedTuple):
    """A dimension of a DeviceMesh."""

    name: str
    size: int
    rank: int


def gather(group: Group, *tensors: Tensor) -> list[Tensor]:
    """Each tensor of all ranks, joined along its first dimension in the order of the ranks."""
    parts = [t.contiguous() for t in tensors]
    joined = _c10d.all_gather_into_tensor_coalesced(parts, group.size, group.name)
    return [_c10d.wait_tensor(t) for t in joined]


def total(tensor: Tensor, *groups: Group) -> Tensor:
    """The sum over the ranks of the groups."""
    for group in groups:
        tensor = _c10d.wait_tensor(_c10d.all_reduce(tensor.contiguous(), "sum", group.name))
    return tensor


def exchange(group: Group, tensor: Tensor) -> Tensor:
    """Sends part p of the first dimension, of P equal parts, to rank p; returns what was sent here,
    in the order of the ranks."""
    sizes = [len(tensor) // group.size] * group.size
    return _c10d.wait_tensor(_c10d.all_to_all_single(tensor.contiguous(), sizes, sizes, group.name))


def scattered_total(group: Group, tensor: Tensor) -> Tensor:
    """This rank's part of the sum over ranks; the first dimension has P equal parts."""
    return _c10d.wait_tensor(
        _c10d.reduce_scatter_tensor(tensor.contiguous(), "sum", group.size, group.name)
    )


def own_part(group: Group, tensor: Tensor) -> Tensor:
    """This rank's part of a last dimension of P equal parts."""
    count = tensor.shape[-1] // group.size
    return tensor.narrow(-1, group.rank * count, count)


class GatherRows(torch.autograd.Function):
    """The features and labels of all ranks.

    The gradient of the features is summed over the ranks in `dtype`, and multiplied by `world`: the
    backbone's gradients are then averaged over so many ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, group: Group, world: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.world, ctx.dtype, ctx.own_dtype = group, world, dtype, input.dtype
        rows, labels = gather(group, input, target)
        ctx.mark_non_differentiable(labels)
        return rows, labels

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        own = scattered_total(ctx.group, grad.to(ctx.dtype))
        return (own * ctx.world).to(ctx.own_dtype), None, None, None, None


class SumGradients(torch.autograd.Function):
    """Tensors that the ranks of some groups hold alike: their gradients are summed over them."""

    @staticmethod
    def forward(ctx: Any, groups: tuple[Group, ...], *tensors: Tensor) -> Any:
        ctx.groups = groups
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if len(grads) == 1:
            return None, total(grads[0], *ctx.groups)
        joined = total(torch.cat([g.reshape(-1) for g in grads]), *ctx.groups)
        parts = joined.split([g.numel() for g in grads])
        return None, *(p.view_as(g) for p, g in zip(parts, grads, strict=True))


class Total(torch.autograd.Function):
    """A value's sum over the ranks of some groups, from which every rank makes its loss.

    The gradient is the sum of the losses' gradients over `all_groups`, divided by `count`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        groups: tuple[Group, ...],
        all_groups: tuple[Group, ...],
        count: int,
    ) -> Tensor:
        ctx.groups, ctx.count = all_groups, count
        return total(value.view_as(value), *groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return total(grad / ctx.count, *ctx.groups), None, None, None


class OwnRows(torch.autograd.Function):
    """This rank's part of values of all rows, `[..., N]`, of which every rank makes a loss.

    The gradient of all rows is gathered, and divided by `world`.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Group, world: int) -> Tensor:
        ctx.group, ctx.world = group, world
        return own_part(group, values).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # The rows are the first dimension of what is gathered.
        (joined,) = gather(ctx.group, grad.movedim(-1, 0))
        return joined.movedim(0, -1) / ctx.world, None, None


# Up to so many ranks, each gets the statistics of every shard in one gather. Their bytes grow with
# the ranks times the rows. Beyond, each rank merges a part of the rows, and the results are
# gathered.
GATHERED_RANKS = 32


def _merged(group: Group, floats: Tensor, ranks: Tensor) -> list[Tensor]:
    """The merged statistics `[N, k]` and ranks `[N]`, the same on every rank of the group."""
    in_parts = group.size > GATHERED_RANKS
    found = (
        [exchange(group, t) for t in (floats, ranks)] if in_parts else gather(group, floats, ranks)
    )
    floats, ranks = found[0].view(group.size, -1, floats.shape[1]), found[1].view(group.size, -1)
    others = floats[:, :, :1].logsumexp(0)
    # An ignored row has the rank -1 in every shard.
    merged = [torch.cat([others, floats[:, :, 1:].sum(0)], 1), ranks.sum(0).clamp_min(-1)]
    return gather(group, *merged) if in_parts else merged


class MergeShards(torch.autograd.Function):
    """Row statistics of all classes, made of those of the shards, each `[N]`.

    `others` is the logarithm of a sum, and the rest are sums. Only a row's owner knows `target`,
    `cosine` and the class weight, and the other shards pass 0. All ranks add in the order of the
    ranks, so that they get the same bits. Their gradients are already those of all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        group: Group,
        others: Tensor,
        target: Tensor,
        cosine: Tensor,
        rank: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        floats = torch.stack([others, target, cosine, *rest], 1)
        joined, ranks = _merged(group, floats, rank)
        merged, target, cosine, *more = joined.unbind(1)
        # The share of this shard in the sum of exponentials; 0 where it has no class to add.
        share = torch.where(others == -torch.inf, 0, (others - merged).exp())
        ctx.save_for_backward(share)
        ctx.mark_non_differentiable(ranks)
        return merged, target, cosine, ranks, *more

    @staticmethod
    def backward(
        ctx: Any, others: Tensor, target: Tensor, cosine: Tensor, _: Any, *more: Tensor
    ) -> Any:
        (share,) = ctx.saved_tensors
        return None, others * share, target, cosine, None, *more


class EmptyShard(torch.autograd.Function):
    """`others`, `cosine`, `sum` and `rank` of a shard without classes, with gradients of 0 for the
    features and the head's parameters, so that this rank joins in every collective."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dtype: torch.dtype, *parameters: Any) -> Any:
        ctx.save_for_backward(input, *(p for p in parameters if isinstance(p, Tensor)))
        ctx.is_tensor = [isinstance(p, Tensor) for p in parameters]
        others = input.new_full((len(input),), -torch.inf, dtype=dtype)
        rank = torch.zeros_like(others, dtype=torch.int64)
        ctx.mark_non_differentiable(rank)
        return others, torch.zeros_like(others), torch.zeros_like(others), rank

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        input, *tensors = (torch.zeros_like(t) for t in ctx.saved_tensors)
        rest = iter(tensors)
        return input, None, *(next(rest) if each else None for each in ctx.is_tensor)
