"""Runs a function in several processes of a gloo group, as the ranks of a sharded head."""

import multiprocessing
import multiprocessing.connection
import os
import time
import traceback

import torch
import torch.distributed as dist

# A forked process has torch imported already.
FORK = multiprocessing.get_context("fork")


def _rank(function, rank, world, folder, args):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        result = function(rank, world, *args)
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(function, world, folder, *args, seconds=120):
    """What `function(rank, world, *args)` returns on each rank; fails if a rank does."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        FORK.Process(target=_rank, args=(function, rank, world, folder, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], 1)
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + 2)  # the rest would wait for it
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
