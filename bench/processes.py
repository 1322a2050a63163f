"""Time and memory of a sharded head in several processes of this machine, against C.

All processes compare the same number of rows in sum, with one thread each, over gloo.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from bench.measure.machine import ROOT
from bench.measure.memory import extra_memory
from bench.show.tables import table
from bench.show.units import milliseconds, with_unit

CLASSES = (10_000, 100_000, 400_000)
ROWS, FEATURES = 128, 128


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def one_process(classes, seconds):
    """The figures of this rank for each number of classes."""
    from torch.distributed.device_mesh import init_device_mesh

    from tvmf_ext import ShardedTvMFLoss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh, found = init_device_mesh("cpu", (world,)), []
    for C in classes:
        head = ShardedTvMFLoss(FEATURES, C, mesh=mesh)
        input = torch.randn(ROWS // world, FEATURES, requires_grad=True)
        target = torch.randint(C, (ROWS // world,))

        def step(head=head, input=input, target=target):
            head.zero_grad()
            head(input, target).backward()

        step()
        # The gradient of the class vectors is there already, and is no extra memory.
        extra = statistics.median([extra_memory("cpu", step, 0) or 0 for _ in range(3)])
        begin = time.perf_counter()
        step()
        once = torch.tensor(time.perf_counter() - begin)
        dist.all_reduce(once, dist.ReduceOp.MAX)  # the ranks must take the same number of steps
        times = []
        for _ in range(max(3, min(200, int(seconds / once.item())))):
            dist.barrier()
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        weight = head.weight.to_local().nbytes
        found.append(
            {"C": C, "ms": 1e3 * statistics.median(times), "extra": extra, "bytes": weight}
        )
    dist.barrier()
    dist.destroy_process_group()
    return rank, found


def measure(world, classes, seconds):
    """For each number of classes: the median time of the slowest rank, and its memory."""
    with tempfile.TemporaryDirectory() as folder:
        common = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(world),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, "-m", "bench.processes", folder, str(seconds)]
        command += [str(C) for C in classes]
        ranks = [
            subprocess.Popen(command, cwd=ROOT, env={**common, "RANK": str(rank)})
            for rank in range(world)
        ]
        codes = [each.wait() for each in ranks]
        if any(codes):
            raise RuntimeError(f"{world} processes ended with the exit codes {codes}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    return [
        {
            "processes": world,
            "C": points[0]["C"],
            **{key: max(p[key] for p in points) for key in ("ms", "extra", "bytes")},
        }
        for points in zip(*found, strict=True)
    ]


def run(worlds, seconds, classes=CLASSES):
    return [point for world in worlds for point in measure(world, classes, seconds)]


def processes_table(points):
    """A row for each number of classes and of processes."""
    return table(
        [
            {
                "classes": point["C"],
                "processes": point["processes"],
                "forward and backward": milliseconds(point["ms"]),
                "weight a process": with_unit(point["bytes"], "B"),
                "extra memory a process": with_unit(point["extra"], "B"),
            }
            for point in sorted(points, key=lambda p: (p["C"], p["processes"]))
        ]
    )


if __name__ == "__main__":
    folder, seconds, *classes = sys.argv[1:]
    rank, found = one_process([int(C) for C in classes], float(seconds))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
