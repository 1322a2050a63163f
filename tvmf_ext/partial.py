"""The classes of a shard in part: a sample of them for a step, or blocks of their gradient."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .collectives import Group, total
from .head import SoftplusScale
from .part_steps import Part


class Sample(NamedTuple):
    """Some classes of a shard, drawn for one step."""

    rows: Tensor  # [S]  their numbers in the shard, ascending
    log_chance: Tensor  # [S]  log q of a class that is there by chance, 0 for a target
    weighted_offset: list[Tensor]  # what `sum` has too little by the corrected logits; see below

    @staticmethod
    def draw(column: Tensor, mine: Tensor, classes: int, rate: float, seed: int) -> "Sample":
        """All targets of the rows, and a uniform sample of the rest, so that the rate is reached.

        `column` has the class of each row that is `mine`.
        """
        # Rows of other shards mark a place behind the classes.
        target = torch.zeros(classes + 1, dtype=torch.bool, device=column.device)
        target[torch.where(mine, column, classes)] = True
        target = target[:classes]
        targets, wanted = target.sum(), math.ceil(rate * classes)
        if len(column) > wanted:
            wanted = max(wanted, int(targets))
        generator = torch.Generator(column.device).manual_seed(seed % (1 << 63))
        order = torch.rand(classes, generator=generator, device=column.device)
        rows = order.masked_fill(target, 2).topk(wanted, sorted=False).indices.sort().values
        # The chance of a class that is no target.
        chance = (wanted - targets) / (classes - targets).clamp_min(1)
        log_chance = torch.where(target[rows], 0, chance.double().log())
        return Sample(rows, log_chance, [])

    def columns(self, column: Tensor) -> Tensor:
        """The places of classes in the sample; any number for a class that is not there."""
        return torch.searchsorted(self.rows, column).clamp(0, max(len(self.rows) - 1, 0))

    def corrected(self, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Prior and class weights with which sums over the sample have the mean of all classes.

        A logit is raised by `-log q`. `sum` weighs the raised logits by `weight / q`, and what it
        has too much is the same for all rows, because the chance of a target is 1.
        """
        prior, class_weight = arguments["prior"], arguments["class_weight"]
        raised = -self.log_chance if prior is None else prior.double() - self.log_chance
        weight = (-self.log_chance).exp()
        weight = weight if class_weight is None else weight * class_weight
        self.weighted_offset.append((weight * self.log_chance).sum().to(dtype))
        return {"prior": raised.to(dtype), "class_weight": weight.to(dtype)}

    @property
    def sum_offset(self) -> Tensor:
        return self.weighted_offset[0]


class Call(NamedTuple):
    """What the statistics of a shard were made of, and its `others`."""

    rows: Tensor
    local: Tensor
    arguments: dict[str, Any]
    score: Tensor
    with_sum: bool
    others: Tensor


def _constant(value: Any) -> Any:
    """An argument without its gradient. The optimizer steps one scale and one kappa before it comes
    to the blocks, which need their old values."""
    if isinstance(value, SoftplusScale):
        return SoftplusScale(value.s.detach().clone())
    if isinstance(value, Tensor):
        return value.detach().clone() if value.numel() == 1 else value.detach()
    return value


class _Capture(torch.autograd.Function):
    """Statistics as they stand, whose gradients are kept."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kept: list[Tensor], *statistics: Tensor) -> Any:
        ctx.kept = kept
        return tuple(t.view_as(t) for t in statistics)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        ctx.kept[:] = upstream
        return None, None, *upstream


class Pending:
    """The gradients of class parameters between the backward pass and the optimizer's step."""

    def __init__(self, rows: Tensor | None, leaves: dict[str, Tensor]) -> None:
        self.rows, self.leaves = rows, leaves
        self._upstream: list[Tensor] = []
        self._call: Call | None = None

    def capture(
        self, call: Call, blocks: int, groups: Sequence[Group], *statistics: Tensor
    ) -> tuple[Tensor, ...]:
        """The statistics, whose gradients are kept. They have none for the leaves themselves."""
        self._call = call._replace(arguments={n: _constant(v) for n, v in call.arguments.items()})
        self._blocks, self._groups = blocks, groups
        anchor = torch.zeros((), requires_grad=True)
        return _Capture.apply(anchor, self._upstream, *statistics)

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass has been here."""
        return bool(self._upstream) or any(t.grad is not None for t in self.leaves.values())

    def parts(self, statistics: Callable[..., tuple[Tensor, ...]]) -> Iterator[Part]:
        """The gradients of the sample, or of one block after the other."""
        if self._call is not None:
            if self._upstream:
                yield from self._parts_of_blocks(self._call, statistics)
        elif self.rows is not None:
            gradients = {n: t.grad for n, t in self.leaves.items() if t.grad is not None}
            if gradients:
                yield self.rows, gradients

    def _parts_of_blocks(
        self, call: Call, statistics: Callable[..., tuple[Tensor, ...]]
    ) -> Iterator[Part]:
        classes = len(call.arguments["linear_weight"])
        size = max(1, -(-classes // self._blocks))
        for begin in range(0, max(classes, 1), size):
            block = slice(begin, min(begin + size, classes))
            count = block.stop - block.start

            def of_block(values: Any, block: slice = block) -> Any:
                per_class = isinstance(values, Tensor) and values.dim() and len(values) == classes
                return values[block] if per_class else values

            arguments = {n: of_block(v) for n, v in call.arguments.items()}
            leaves = {n: t.detach()[block].requires_grad_() for n, t in self.leaves.items()}
            inside = (call.local >= block.start) & (call.local < block.stop)
            local = torch.where(inside, call.local - block.start, count)
            local = torch.where(call.local == -1, -1, local)
            with torch.enable_grad():
                others, logit, cosine, sum_, _ = statistics(
                    call.rows, local, arguments | leaves, call.score, call.with_sum
                )
                of_others, of_logit, of_cosine, of_sum = self._upstream
                # The share of the block in the shard's sum of exponentials.
                share = (others.detach() - call.others).exp()
                of_others = of_others * torch.where(others == -torch.inf, 0, share)
                pairs = [(others, of_others), (cosine, of_cosine), (logit, of_logit)]
                if call.with_sum:
                    pairs.append((sum_, of_sum))
                pairs = [pair for pair in pairs if pair[0].requires_grad]
                outputs, upstream = zip(*pairs, strict=True)
                found = torch.autograd.grad(
                    outputs, list(leaves.values()), upstream, materialize_grads=True
                )
            yield (
                block,
                {n: total(g, *self._groups) for n, g in zip(leaves, found, strict=True)},
            )
