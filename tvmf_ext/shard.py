"""The part of one shard of the classes in a sharded head: the statistics over its classes, and the
score of the targets that it has. Also the checks of rows and labels, which all ranks make alike."""

from typing import Any

import torch
from torch import Tensor

from . import ops
from .collectives import EmptyShard, Group, gather
from .functional import explained, target_logits
from .head import check_tensor, make_head


def shard_statistics(
    rows: Tensor, local: Tensor, arguments: dict[str, Any], score: Tensor, with_sum: bool
) -> tuple[Tensor, ...]:
    """`others, target, cosine, sum, rank` over the classes of the arguments.

    `local` has their numbers, -1 for an ignored row, and any other number for another class, and
    `score` is `phi + bias` of every row's target.
    """
    if not len(arguments["linear_weight"]):
        tensors = [arguments["scale"].s, *(v for v in arguments.values() if isinstance(v, Tensor))]
        others, cosine, sum_, rank = EmptyShard.apply(rows, score.dtype, *tensors)
        return others, torch.zeros_like(others), cosine, sum_, rank
    head, kept = make_head(
        rows,
        arguments["linear_weight"],
        local,
        arguments["kappa"],
        arguments["scale"],
        arguments["linear_bias"],
        arguments["prior"],
        arguments["class_weight"],
        -1,
        arguments["cosine_margin"],
        arguments["angular_margin"],
        score,
    )
    try:
        others, cosine, sum_, rank = ops.row_statistics(*head, with_sum, kept)
    except RuntimeError as error:
        raise explained(error) from None
    # Without it, `sum` is empty, and the operator's backward pass takes no gradient of it.
    return others, target_logits(head, cosine), cosine, sum_ if with_sum else sum_.detach(), rank


@torch.no_grad()
def target_scores(input: Tensor, column: Tensor, mine: Tensor, arguments: dict[str, Any]) -> Tensor:
    """`phi + bias` of each row's target, before its margins; 0 where another shard has it.

    The roundings are those of the kernels, so that equal classes have equal scores.
    """
    dtype = ops.compute_dtype(input.dtype)
    weight, input = arguments["linear_weight"][column].to(dtype), input.to(dtype)
    product = (input.double() * weight.double()).sum(1).to(dtype)
    rnorm = [1 / t.norm(dim=1).clamp_min(1e-12) for t in (weight, input)]
    cosine = (product * (rnorm[0] * rnorm[1])).clamp(-1, 1)
    kappa, bias = arguments["kappa"], arguments["linear_bias"]
    kappa = kappa[column] if len(kappa) > 1 else kappa
    gap = 1 - cosine
    score = (cosine - kappa * gap) * (1 / (1 + kappa * gap))
    if bias is not None:
        score = score + bias[column]
    return torch.where(mine, score, 0)


class RowCheck:
    """Checks what the collectives cannot: the own rows and, in the first call, that all ranks have
    the same number of them, in the same dtype. Without labels the rows are only compared with the
    classes."""

    def __init__(self) -> None:
        self._ranks_agreed = False

    def __call__(
        self, input: Tensor, target: Tensor | None, in_features: int, group: Group
    ) -> None:
        check_tensor("input", input)
        if input.dim() != 2 or input.shape[1] != in_features:
            raise ValueError(f"input must have shape [N, {in_features}], got {list(input.shape)}")
        if target is not None:
            check_tensor("target", target)
            if target.shape != input.shape[:1] or target.dtype != torch.int64:
                raise ValueError(
                    f"target must be int64 of shape [N] = [{len(input)}], got {target.dtype} of "
                    f"shape {list(target.shape)}"
                )
        if input.dtype not in ops.DTYPES:
            raise ValueError(
                f"input must be float16, bfloat16, float32 or float64, got {input.dtype}"
            )
        if not self._ranks_agreed and not ops.is_recorded():
            self._agree(input, group)
            self._ranks_agreed = True

    @staticmethod
    def _agree(input: Tensor, group: Group) -> None:
        own = torch.tensor([len(input), ops.DTYPES.index(input.dtype)], device=input.device)
        (joined,) = gather(group, own)
        rows, dtypes = joined.view(-1, 2).T.tolist()
        if len(set(rows)) > 1:
            raise ValueError(f"all ranks must have the same number of rows, got {rows}")
        if len(set(dtypes)) > 1:
            names = [str(ops.DTYPES[index]) for index in dtypes]
            raise ValueError(f"input must have the same dtype on all ranks, got {names}")


class LabelCheck:
    """Raises IndexError on every rank alike for a label that names no class.

    A call on CUDA does not wait for the device, so that there the next call raises.
    """

    def __init__(self) -> None:
        self._earlier: tuple[Tensor, torch.cuda.Event] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the head has had no call; an event could not be copied."""
        return {"_earlier": None}

    def __call__(self, labels: Tensor, wrong: Tensor, wanted: str, ranks: int) -> None:
        if ops.is_recorded():
            if ops.is_compiling() and not labels.is_cuda:
                text = f"a target of some rank is wrong, wanted {wanted}"
                torch._assert_async(~wrong.any(), text)
            return
        if not labels.is_cuda:
            if wrong.any():
                row = int(wrong.nonzero()[0])
                rank, row_of_rank = divmod(row, len(labels) // ranks)
                raise IndexError(
                    f"target[{row_of_rank}] of rank {rank} is {labels[row].item()}, wanted {wanted}"
                )
            return
        if torch.cuda.is_current_stream_capturing():
            return
        if self._earlier is not None:
            flag, copied = self._earlier
            copied.synchronize()
            if flag.item():
                self._earlier = None
                raise IndexError(f"a target of an earlier call was wrong, wanted {wanted}")
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(wrong.any(), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._earlier = flag, copied
