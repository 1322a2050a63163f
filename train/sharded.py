"""--shard-classes: each process holds the class vectors of a part of the classes alone.

The backbone is a copy in every process, as always. All vectors come together only in the first
process, on its CPU, when it writes a model file.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from train import distributed
from train.checkpoint import SHARDS, no_room
from train.model import Classifier
from tvmf_ext import ShardedTvMFLoss, TvMFLoss

NO_LABEL = -100  # the heads ignore it


class ShardedClassifier(Classifier):
    """A Classifier whose head needs the same number of rows in every process. Missing rows are
    filled up to `rows` with features that neither the loss nor any figure counts."""

    def __init__(self, net: nn.Module, head: ShardedTvMFLoss, rows: int):
        super().__init__(net, head)
        self.rows = rows

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, counts = self.classify(*filled_up(self.net(images), labels, self.rows))
        # It is the loss of all processes, which the caller adds up over them.
        return loss / self.head.mesh.size(), counts


def filled_up(features: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Features and labels with `rows` rows; the new ones have no label."""
    more = rows - len(labels)
    return F.pad(features, (0, 0, 0, more)), F.pad(labels, (0, more), value=NO_LABEL)


def rows_of_all(features: Tensor, labels: Tensor, rows: int, mesh: DeviceMesh) -> list[Tensor]:
    """Features and labels of all processes, `rows` of each."""
    own = filled_up(features, labels, rows)
    return [DTensor.from_local(values, mesh, [Shard(0)]).full_tensor() for values in own]


def own_classes(head: nn.Module) -> tuple[Tensor, int]:
    """The vectors of the classes that this process holds, and the first of these classes."""
    first = head.first_class if isinstance(head, ShardedTvMFLoss) else 0
    return distributed.own(head.weight), first


def as_tested(
    head: ShardedTvMFLoss, kappa: Tensor, s_: nn.Parameter, bias: Tensor | None = None
) -> ShardedTvMFLoss:
    """The head's class vectors without its margins and its prior."""
    size, mesh = (head.in_features, head.num_classes), head.mesh
    made = ShardedTvMFLoss(*size, mesh=mesh, bias=bias is not None, device="meta")
    made.weight, made.s_, made.kappa = head.weight, s_, kappa.detach()
    made.bias = None if bias is None else nn.Parameter(bias)
    return made.eval()


def columns(head: ShardedTvMFLoss, features: Tensor, labels: Tensor, prior: Tensor) -> tuple:
    """`metrics.columns` without the logits of all classes. All processes must call this, with as
    many images."""
    features, scale = features.float(), head.scale.detach()
    shift = distribute_tensor(-prior / scale, head.mesh, [Shard(0)], src_data_rank=None)
    shift = shift if head.bias is None else shift + head.bias
    tested = as_tested(head, head.kappa, head.s_, head.bias)
    adjusted = as_tested(head, head.kappa, head.s_, shift)
    # The scale softplus(-inf) + 1 makes the logits the cosines.
    one = nn.Parameter(torch.full_like(head.s_, -torch.inf))
    cosines = as_tested(head, torch.zeros_like(head.s_), one)
    with torch.autocast(features.device.type, enabled=False):
        stats = tested.row_statistics(features, labels)
        adjusted_rank = adjusted.row_statistics(features, labels).rank
        best, predicted = (t[:, 0] for t in tested.topk(features, 1))
        adjusted_predicted = adjusted.topk(features, 1)[1][:, 0]
        nearest, classes = cosines.topk(features, min(2, head.num_classes))
    loss = F.softplus(stats.others - stats.target)
    confidence = (best - stats.lse).exp().nan_to_num(0)
    other = nearest.masked_fill(classes == labels[:, None], -1).amax(1)
    found = (loss, stats.rank, predicted, confidence, stats.cosine, other)
    return *found, adjusted_rank, adjusted_predicted


@torch.no_grad()
def whole(head: nn.Module) -> nn.Module | None:
    """A head of all classes on the CPU, in the first process alone. All processes must call this.
    A head that is not sharded is returned as it stands."""
    if not isinstance(head, ShardedTvMFLoss):
        return head
    part, begin = head.weight.to_local().cpu(), head.own_classes
    if dist.get_rank():
        if len(part):
            dist.send(part, 0)
        return None
    size = (head.in_features, head.num_classes)
    made = TvMFLoss(*size, kappa=head.kappa.cpu(), device="meta").to_empty(device="cpu")
    made.kappa.copy_(head.kappa)
    made.s_.copy_(head.s_)
    made.weight[:begin] = part
    # No process has more classes than the first.
    for rank, rows in enumerate(made.weight[begin:].split(begin) if begin < size[1] else (), 1):
        dist.recv(rows, rank)
    return made


def tensors(head: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint of shards holds: the head, and the momentum of all that is trained."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    momenta = {}
    for number, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momenta[str(number)] = state["momentum_buffer"]
    return {"head": head.state_dict(), "momentum": momenta}


def folder(out: Path, number: int) -> Path:
    return out / f"{SHARDS}.{number}"


def save(out: Path, number: int, head: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes the shards of a checkpoint. All processes must call this."""
    if dist.get_rank() == 0:  # a run that was killed may have left a part of them
        shutil.rmtree(folder(out, number), ignore_errors=True)
    distributed.barrier()
    try:
        dcp.save(tensors(head, optimizer), checkpoint_id=folder(out, number))
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))  # the error of a process and its traceback
        raise no_room(folder(out, number), first) from None


def keep(out: Path, number: int) -> None:
    """Removes the shards of all checkpoints but this one and the one before."""
    for path in out.glob(f"{SHARDS}.*"):
        if path.is_dir() and path not in (folder(out, number), folder(out, number - 1)):
            shutil.rmtree(path, ignore_errors=True)


def load(out: Path, number: int, head: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Reads shards, of any number of processes, into a head that is sharded or not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process
        dcp.load(tensors(head, optimizer), checkpoint_id=folder(out, number))


def load_whole(head: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Reads head and optimizer of a checkpoint that has no shards."""
    head.load_state_dict(saved["head"])
    if not isinstance(head, ShardedTvMFLoss):
        optimizer.load_state_dict(saved["optimizer"])
        return
    own = tensors(head, optimizer)["momentum"]
    for number, state in saved["optimizer"]["state"].items():
        now, values = own[str(number)], state["momentum_buffer"]
        if isinstance(now, DTensor):
            values = distribute_tensor(values, now.device_mesh, now.placements, src_data_rank=None)
        now.copy_(values)
