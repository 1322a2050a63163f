"""A million identities over the processes of torchrun: a made-up face problem, with its memory.

    torchrun --nproc-per-node 2 examples/faces.py

On GPUs it takes one a process and NCCL. `--sample-rate 0.1` compares a batch with a tenth of the
classes, as PartialFC does.
"""

import argparse
import resource

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tvmf_ext import ShardedTvMFLoss
from tvmf_ext.distributed import clip_grad_norm_


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=10**6)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64, help="images a process and step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sample-rate", type=float, default=1.0)
    return parser.parse_args()


def join():
    """Joins the processes; returns the mesh of all of them and this process's device."""
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    if gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    kind = "cuda" if gpu else "cpu"
    return init_device_mesh(kind, (dist.get_world_size(),)), torch.device(kind)


def images(options, device, generator):
    """Noise around a vector of the image's identity, which stands for a photograph."""
    labels = torch.randint(options.classes, (options.rows,), device=device, generator=generator)
    # The vectors of a million identities are not stored: each follows from the identity's number.
    steps = torch.arange(1, options.features + 1, device=device)
    centres = torch.sin(labels[:, None] * 12.9898 + steps * 78.233 + (labels[:, None] % 97) * steps)
    noise = torch.randn(centres.shape, device=device, generator=generator)
    return centres + 0.1 * noise, labels


def memory(device):
    """The most memory that this process has taken so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    options = parse()
    mesh, device = join()
    rank = dist.get_rank()
    D = options.features
    torch.manual_seed(0)  # the same backbone everywhere
    before = memory(device)
    net = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ReLU(), torch.nn.Linear(D, D))
    net = DistributedDataParallel(net.to(device))
    head = ShardedTvMFLoss.cosface(D, options.classes, mesh=mesh, sample_rate=options.sample_rate)
    # Sharded and plain parameters have groups of their own.
    groups = [{"params": [head.weight]}, {"params": net.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4)
    if options.sample_rate < 1:
        head.attach(optimizer)

    generator = torch.Generator(device).manual_seed(rank)  # other images everywhere
    for step in range(options.steps):
        inputs, labels = images(options, device, generator)
        loss = head(net(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_([*net.parameters(), *head.parameters()], 5.0)
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    weight = head.weight.to_local().nbytes
    print(
        f"rank {rank} of {dist.get_world_size()}: {head.own_classes} classes, their vectors take "
        f"{weight / 1e6:.0f} MB; the process grew by {(memory(device) - before) / 1e6:.0f} MB"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
