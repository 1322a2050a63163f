"""A head whose classes are spread over the ranks of a DeviceMesh: `ShardedTvMFLoss`.

Every rank sees the features of all ranks and compares them with its own classes. The statistics of
a row are merged over the ranks, and make the loss that one process has for the joined batch.
"""

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from . import ops
from .collectives import (
    GatherRows,
    Group,
    MergeShards,
    OwnRows,
    SumGradients,
    Total,
    exchange,
    gather,
    own_part,
    total,
)
from .functional import (
    RowStatistics,
    in_compute_dtype,
    row_losses,
)
from .gradients import GradScaler as GradScaler
from .gradients import clip_grad_norm_ as clip_grad_norm_
from .head import SoftplusScale, autocast_input, check_count
from .layout import ClassShards, check_mesh
from .logits import topk, tvmf_logits
from .part_steps import step_in_parts
from .partial import Call, Pending, Sample
from .shard import LabelCheck, RowCheck, shard_statistics, target_scores

_MARGINS = ("cosine_margin", "angular_margin")


class _Rows(NamedTuple):
    """The rows of all ranks of a group."""

    statistics: RowStatistics
    valid: Tensor
    weight: Tensor
    """the class weight of a row's target, 0 for an ignored row"""


def _with_summed_gradients(
    tensors: dict[str, Tensor], groups: tuple[Group, ...]
) -> dict[str, Tensor]:
    """The tensors, with gradients that are summed over the groups."""
    names = [name for name, value in tensors.items() if value.requires_grad]
    # The class vectors alone are large: they are not joined with the rest into one tensor.
    vectors = [name for name in names if name == "linear_weight"]
    for together in (vectors, [name for name in names if name not in vectors]):
        if together and groups:
            summed = SumGradients.apply(groups, *(tensors[name] for name in together))
            tensors = tensors | dict(zip(together, summed, strict=True))
    return tensors


class ShardedTvMFLoss(ClassShards):
    """`TvMFLoss` for more classes than one device holds.

    `head(features, labels)` takes the rank's own rows, equally many on every rank, and labels in
    `[0, C)`. It returns the loss that `TvMFLoss` has for the batch of all ranks, the same on every
    rank; for `reduction="none"` it returns the losses of the own rows. `row_statistics`, `logits`
    and `topk` are of the own rows, too.

    The gradients are those of the mean over ranks of what the ranks return, which is the rule of
    DistributedDataParallel: the backbone belongs in one, and the head does not. The features'
    gradient is that of one process, times the number of ranks, by which the backbone's average
    divides it again. The gradients of the head's parameters are final.

    `weight`, `bias` and a kappa for each class are DTensors, sharded over the classes. No rank ever
    holds all class vectors. `s_` and a single kappa are plain tensors, and equal on all ranks.

    Args:
        in_features, num_classes: as for `TvMFLoss`.
        mesh: the ranks, a DeviceMesh. If it has two dimensions, the classes are spread over the
            ranks of the last one, and each of these groups has a copy of the head and sees rows of
            its own.
        sample_rate: the share of its classes that a rank compares the rows with in training
            (PartialFC, An et al., CVPR 2022): the targets of all rows, and a uniform sample of the
            rest. Their logits are raised by `-log q` with the chance q of being drawn, so that the
            sum of the exponentials is right in the mean. A rank counts in the sample. Below 1 an
            optimizer must be attached; see `attach`.
        sample_seed: the sample follows from it, from `sample_step`, which counts the calls in
            training, and from the rank.
        gradient_blocks: in how many blocks the gradient of the own classes is made, of which only
            one is held at a time. Above 1 an optimizer must be attached; see `attach`.
        reduce_dtype: the dtype in which the gradient of the features is summed over ranks, by
            default float32 (float64 for float64 features). torch.bfloat16 sends half as much.
        device: by default that of the mesh.
        weight, options: as for `TvMFLoss`. Values for each class, `[C]`, are given for all classes
            on every rank, and each rank keeps those of its own classes.

    Raises:
        IndexError: a label of any rank is neither in [0, C) nor ignore_index. Every rank raises; on
            CUDA the next call does.
        ValueError: in the first call, that the ranks have different numbers of rows.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        mesh: DeviceMesh,
        sample_rate: float = 1.0,
        sample_seed: int = 0,
        gradient_blocks: int = 1,
        reduce_dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        check_mesh(mesh)
        if reduce_dtype not in (None, *ops.DTYPES):
            raise ValueError(f"reduce_dtype must be a floating-point dtype, got {reduce_dtype}")
        if not isinstance(sample_rate, (int, float, Real)):
            raise TypeError(f"sample_rate must be a number, got {type(sample_rate).__name__}")
        check_count("sample_seed", sample_seed)
        check_count("gradient_blocks", gradient_blocks)
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
        if gradient_blocks < 1:
            raise ValueError(f"gradient_blocks must be at least 1, got {gradient_blocks}")
        if sample_rate < 1 and (gradient_blocks > 1 or mesh.ndim > 1):
            raise ValueError(
                "sample_rate below 1 needs one block of gradients and a mesh of one dimension, got "
                f"gradient_blocks = {gradient_blocks} and {mesh.ndim} dimensions"
            )
        super().__init__(in_features, num_classes, mesh, weight, device, **options)
        self.sample_rate, self.sample_seed, self.sample_step = sample_rate, sample_seed, 0
        self.gradient_blocks = gradient_blocks
        self._pending: Pending | None = None
        self._attached = False
        self.reduce_dtype = reduce_dtype
        self._check_rows, self._check_labels = RowCheck(), LabelCheck()
        self._total_weight = (
            float(num_classes)
            if weight is None
            else float(torch.as_tensor(weight, device="cpu").double().sum())
        )

    def _gathered(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features and labels of the group's ranks, and which of the labels name no class."""
        self._check_rows(input, target, self.in_features, self._group)
        input = autocast_input(input)
        dtype = self.reduce_dtype or ops.compute_dtype(input.dtype)
        rows, labels = GatherRows.apply(input, target, self._group, self._world, dtype)
        C, ignored = self.num_classes, self.ignore_index
        wrong = (labels != ignored) & ((labels < 0) | (labels >= C))
        wanted = f"a class in [0, {C}) or ignore_index {ignored}"
        self._check_labels(labels, wrong, wanted, self._group.size)
        return rows, labels, wrong

    def _arguments(self, input: Tensor, rows: Tensor | None = None) -> dict[str, Any]:
        """The arguments of the head for the own classes, or for some `rows` of them.

        The gradients of what other ranks hold, too, are summed over these ranks.
        """
        pick = (lambda values: values) if rows is None else (lambda values: values[rows])
        found: dict[str, Any] = {"linear_bias": None}
        parameters = {"linear_weight": self.weight, "kappa": self.kappa, "scale": self.s_}
        if self.bias is not None:
            parameters["linear_bias"] = self.bias
        shared, per_class = {}, {}
        for name, value in parameters.items():
            if isinstance(value, DTensor):
                per_class[name] = pick(value.to_local())
            else:
                shared[name] = value
        if rows is not None or self.gradient_blocks > 1:
            # The parameters themselves get no gradients.
            per_class = {name: values.detach() for name, values in per_class.items()}
            learnt = {n: t for n, t in per_class.items() if parameters[n].requires_grad}
            if rows is not None:
                for values in learnt.values():
                    values.requires_grad_()
            if torch.is_grad_enabled():
                if self._pending is not None and self._pending.has_gradients and not self._attached:
                    raise RuntimeError(
                        "sample_rate below 1 and gradient_blocks above 1 want attach(optimizer), "
                        "got a second call after a backward pass without it"
                    )
                self._pending = Pending(rows, learnt)
        for tensors, groups in ((shared, self._groups), (per_class, self._data_groups)):
            for name, value in tensors.items():
                if name != "linear_weight":
                    tensors[name] = in_compute_dtype(value, input)
            found |= _with_summed_gradients(tensors, tuple(groups))
        for name in ("prior", "class_weight", *_MARGINS):
            value = getattr(self, name)
            found[name] = pick(value) if isinstance(value, Tensor) else value
        return found | {"scale": SoftplusScale(found["scale"])}

    def _statistics(self, input: Tensor, target: Tensor, with_sum: bool) -> _Rows:
        """The statistics of all rows of the group over all classes."""
        rows, labels, wrong = self._gathered(input, target)
        dtype = ops.compute_dtype(rows.dtype)
        valid = labels != self.ignore_index
        own = labels - self.first_class
        mine = (own >= 0) & (own < self.own_classes) & valid
        column, sample, count = torch.where(mine, own, 0), None, self.own_classes
        if self.training and self.sample_rate < 1:
            sample = self._draw_sample(column, mine)
            column, count = sample.columns(column), len(sample.rows)
        arguments = self._arguments(rows, None if sample is None else sample.rows)
        class_weight = arguments["class_weight"]
        if sample is not None:
            arguments |= sample.corrected(arguments, dtype)
        more: list[Tensor] = []
        if self.class_weight is not None:
            more.append(torch.zeros(len(rows), dtype=dtype, device=rows.device))
        score = torch.zeros(len(rows), dtype=dtype, device=rows.device)
        if count:
            score = target_scores(rows, column, mine, arguments)
            if more:
                more[0] = torch.where(mine, class_weight.to(dtype)[column], 0)
        score = total(score, self._group)
        # Any number but a class of the shard says that the class is another shard's.
        local = torch.where(valid, torch.where(mine, column, count), -1)
        others, logit, cosine, sum_, rank = shard_statistics(
            rows, local, arguments, score, with_sum
        )
        if sample is not None and with_sum:
            sum_ = sum_ + sample.sum_offset
        if self.gradient_blocks > 1 and torch.is_grad_enabled():
            assert self._pending is not None
            call = Call(rows.detach(), local, arguments, score, with_sum, others.detach())
            others, logit, cosine, sum_ = self._pending.capture(
                call, self.gradient_blocks, self._data_groups, others, logit, cosine, sum_
            )
        if with_sum:
            more.append(sum_)
        merged = MergeShards.apply(self._group, others, logit, cosine, rank, *more)
        others, logit, cosine, rank, *more = merged
        sum_ = more.pop() if with_sum else others.new_empty(0)
        weight = more[0] if more else valid.to(dtype)
        logit = torch.where(wrong, torch.nan, logit)
        return _Rows(RowStatistics(others, cosine, logit, sum_, rank), valid, weight)

    def _reduced(
        self, losses: Tensor, weight: Tensor, groups: tuple[Group, ...], count: int
    ) -> Tensor:
        """The sum or the mean of the losses of the rows, summed over the ranks of the groups."""
        value = Total.apply(losses.sum(), groups, self._groups, count)
        if self.reduction == "mean":
            value = value / total(weight.sum(), *groups)
        return value

    def _losses(self, statistics: RowStatistics, valid: Tensor, weight: Tensor) -> Tensor:
        e = self.label_smoothing
        return row_losses(statistics, valid, weight, self._total_weight, e, e / self.num_classes)

    def _draw_sample(self, column: Tensor, mine: Tensor) -> Sample:
        """The classes of the next step: all targets, and a uniform sample of the rest."""
        step = self.sample_step * self._group.size + self._group.rank
        self.sample_step += 1
        return Sample.draw(
            column, mine, self.own_classes, self.sample_rate, (self.sample_seed << 40) + step
        )

    def attach(self, optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
        """Lets the optimizer's `step` also step `weight`, `bias` and a kappa for each class where
        their gradients are those of a sample or of blocks. Their `grad` stays None.

        The step changes the rows of the sample alone: others keep their values, their momentum and
        their weight decay. With blocks, one block after the other gets its gradient, from one more
        forward and backward pass over it, and its step. The optimizer must change each element by
        itself, as SGD, Adam and AdamW do. Gradients of several calls are not added, and those of
        the class vectors have no part in clipping.

        Args:
            optimizer: it has these parameters, in a group apart from plain ones.
            scaler: the GradScaler that scales the loss. A step that it skips is skipped here, too.

        Raises:
            TypeError: no optimizer.
            ValueError: the optimizer lacks one of these parameters, which would never be stepped.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"attach wants an optimizer, got {type(optimizer).__name__}")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self.named_parameters():
            sharded = isinstance(parameter, DTensor) and parameter.requires_grad
            if sharded and id(parameter) not in held:
                raise ValueError(f"attach wants an optimizer with the head's {name}, got none")

        def step_rest(*_: Any) -> None:
            pending, self._pending = self._pending, None
            if pending is not None:
                own = {"linear_weight": "weight", "linear_bias": "bias", "kappa": "kappa"}
                parameters = {name: getattr(self, own[name]) for name in pending.leaves}
                scale = 1.0 if scaler is None else scaler.get_scale()
                step_in_parts(optimizer, parameters, pending.parts(shard_statistics), scale)

        optimizer.register_step_post_hook(step_rest)
        self._attached = True

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of the rows of all ranks; for `reduction="none"` the losses of the own rows."""
        rows = self._statistics(input, target, self.label_smoothing > 0)
        losses = self._losses(rows.statistics, rows.valid, rows.weight)
        if self.reduction == "none":
            return OwnRows.apply(losses, self._group, self._world)
        return self._reduced(losses, rows.weight, tuple(self._data_groups), self._world)

    def row_statistics(self, input: Tensor, target: Tensor) -> RowStatistics:
        """`others, cosine, target, sum, rank` of the own rows, over all classes."""
        rows = self._statistics(input, target, with_sum=True)
        *values, rank = rows.statistics
        others, cosine, logit, sum_ = OwnRows.apply(torch.stack(values), self._group, self._world)
        return RowStatistics(others, cosine, logit, sum_, own_part(self._group, rank))

    def loss(self, statistics: RowStatistics, target: Tensor) -> Tensor:
        """The loss that `forward` returns, made of the own rows' statistics."""
        valid = target != self.ignore_index
        weight = valid.to(statistics.others.dtype)
        if self.class_weight is not None:
            weight = own_part(self._group, self._row_weights(target, weight.dtype))
        losses = self._losses(statistics, valid, weight)
        return (
            losses if self.reduction == "none" else self._reduced(losses, weight, self._groups, 1)
        )

    def _row_weights(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """The class weights of the targets of all ranks."""
        (labels,) = gather(self._group, target)
        own = labels - self.first_class
        mine = (own >= 0) & (own < self.own_classes) & (labels != self.ignore_index)
        weight = torch.zeros(len(labels), dtype=dtype, device=labels.device)
        if self.own_classes:
            assert self.class_weight is not None
            weight = torch.where(mine, self.class_weight.to(dtype)[torch.where(mine, own, 0)], 0)
        return total(weight, self._group)

    def _features_of_all(self, input: Tensor) -> Tensor:
        self._check_rows(input, None, self.in_features, self._group)
        return gather(self._group, input)[0]

    def _own_logit_arguments(self, input: Tensor) -> dict[str, Any]:
        found = self._arguments(input)
        return {name: found[name] for name in ("linear_weight", "kappa", "scale", "linear_bias")}

    @torch.no_grad()
    def logits(self, input: Tensor) -> Tensor:
        """The logits `[N, C]` of the own rows, without the prior and without gradients."""
        rows = self._features_of_all(input)
        dtype = ops.compute_dtype(rows.dtype)
        padded = rows.new_zeros(len(rows), self._chunk, dtype=dtype)
        if self.own_classes:
            padded[:, : self.own_classes] = tvmf_logits(rows, **self._own_logit_arguments(rows))
        parts = exchange(self._group, padded).view(self._group.size, len(input), self._chunk)
        return parts.transpose(0, 1).flatten(1)[:, : self.num_classes]

    @torch.no_grad()
    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of the own rows, without the prior, and their classes."""
        check_count("k", k)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be from 1 to C = {self.num_classes}, got {k}")
        rows = self._features_of_all(input)
        size = (len(rows), min(k, self._chunk))
        values = rows.new_full(size, -torch.inf, dtype=ops.compute_dtype(rows.dtype))
        classes = torch.full(size, -1, dtype=torch.int64, device=rows.device)
        if self.own_classes:
            found = min(k, self.own_classes)
            best, own = topk(rows, k=found, **self._own_logit_arguments(rows))
            values[:, :found], classes[:, :found] = best, own + self.first_class
        parts = [exchange(self._group, t) for t in (values, classes)]
        shape = (self._group.size, len(input), size[1])
        values, classes = (t.view(shape).transpose(0, 1).flatten(1) for t in parts)
        values, order = values.topk(k, dim=1)
        return values, classes.gather(1, order)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mesh={tuple(self.mesh.shape)}"
