"""A rank that ends: the others end with an error within the group's timeout, and never hang."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.ranks import FORK
from tvmf_ext.distributed import ShardedTvMFLoss

SECONDS = 8  # the timeout of the group


def step_until_one_ends(rank, folder, way):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=3,
        timeout=timedelta(seconds=SECONDS),
    )
    head = ShardedTvMFLoss(4, 7, mesh=init_device_mesh("cpu", (3,)))
    input, target = torch.randn(2, 4, requires_grad=True), torch.tensor([0, 6])
    head(input, target).backward()
    (folder / f"{rank}.stepped").touch()
    # A rank that ended now could take messages with it that others need for their first step.
    while rank == 1 and len(list(folder.glob("*.stepped"))) < 3:
        time.sleep(0.01)
    if rank == 1 and way == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and way == "raises":
        input = input[:, :3]  # is refused before anything is sent
    if rank == 1 and way == "stops":
        time.sleep(10 * SECONDS)
    try:
        head(input, target).backward()
    except Exception as error:
        (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        # Whoever closes the group waits for the others, and so does a process that merely ends.
        os._exit(3)


@pytest.mark.parametrize("way", ["is killed", "raises", "stops"])
def test_the_others_end_with_an_error(tmp_path, way):
    ranks = [
        FORK.Process(target=step_until_one_ends, args=(rank, tmp_path, way)) for rank in range(3)
    ]
    for each in ranks:
        each.start()
    try:
        for rank in (0, 2):
            ranks[rank].join(60)
            assert (tmp_path / f"{rank}.stepped").exists()
            assert ranks[rank].exitcode == 3
            assert "Error" in (tmp_path / f"{rank}.error").read_text()
    finally:
        for each in ranks:
            each.kill()
            each.join()
    if way == "raises":
        assert "input must have shape [N, 4], got [2, 3]" in (tmp_path / "1.error").read_text()
