"""Several processes, started by torchrun, share each batch and agree on when to stop.

Without torchrun there is one process, and each function here returns what that process has.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from train.config import TrainError


def start(device: str) -> tuple[int, int, torch.device]:
    """Joins the processes of torchrun; returns this process's rank, their number, its device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainError("--device: got cuda, wanted cpu: PyTorch finds no GPU")
    gpu = torch.cuda.is_available() and device != "cpu"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if gpu and local >= torch.cuda.device_count():
        raise TrainError(
            f"torchrun: got process {local} on a machine of {torch.cuda.device_count()} GPU(s), "
            "wanted one process a GPU at most; or --device cpu"
        )
    where = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(where)
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, where
    # gloo serves tensors on the CPU: processes agree on whether to stop without waiting for GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return dist.get_rank(), dist.get_world_size(), where


def mesh(device: torch.device) -> DeviceMesh:
    """All processes as a mesh; without torchrun this process joins a group of its own."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with gradients that are averaged over the processes."""
    learns = any(p.requires_grad for p in module.parameters())
    if not learns or not dist.is_initialized() or dist.get_world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def finish() -> None:
    """Leaves the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(values: Tensor) -> Tensor:
    """The sum over processes."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def full(values: Tensor) -> Tensor:
    """All of a tensor that may be spread over the processes."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def own(values: Tensor) -> Tensor:
    """This process's part of a tensor that may be spread over the processes."""
    return values.to_local() if isinstance(values, DTensor) else values


def any_of(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process."""
    if not dist.is_initialized():  # a tensor would make every step wait
        return list(flags)
    return total(torch.tensor(flags, dtype=torch.int32)).bool().tolist()


def barrier() -> None:
    """Waits until all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def average_buffers(net: nn.Module) -> None:
    """Replaces batch norm's running statistics by their mean over the processes, each of which
    took them from its own images."""
    if dist.is_initialized():
        for buffer in net.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()
