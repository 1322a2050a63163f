"""Stage 2's frozen backbone: its batch norm, and its features, computed once for the head."""

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train import distributed, sharded
from train.config import TrainError
from train.session import Session


class Cached:
    """Batches of features [B, D] and labels [B], numbered as they were written to disk; they are
    mapped into memory, so that the head trains without images."""

    def __init__(self, path: Path, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device):
        labels, sizes, self.device = [], [], device
        try:
            # The file is written before it is mapped: a full disk then raises OSError, whereas a
            # write to a mapping would end in a bus error.
            with open(path, "wb") as file:
                for features, label in batches:
                    file.write(features.contiguous().cpu().view(torch.uint8).numpy().data)
                    labels.append(label.cpu())
                    sizes.append(len(label))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise TrainError(
                f"--views: got {error.strerror} on writing features to {path}, wanted room for "
                "them; --views 0 needs none"
            ) from None
        if not sizes:  # there are more processes than images
            return
        # torch.from_file takes no path that is not UTF-8.
        content = torch.from_numpy(np.memmap(path, mode="c"))
        self.features = content.view(features.dtype).view(sum(sizes), -1)
        self.labels, self.ends = torch.cat(labels), [0, *accumulate(sizes)]

    def batch(self, i: int) -> list[Tensor]:
        """Features and labels of the i-th batch, on the device."""
        rows = slice(self.ends[i], self.ends[i + 1])
        return [t[rows].to(self.device, non_blocking=True) for t in (self.features, self.labels)]


def freeze(net: nn.Module, bn: str) -> None:
    """Puts the net into evaluation mode. With --bn batch its batch norm stays in training mode."""
    net.eval()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.train(bn == "batch")


@torch.no_grad()
def start_from_means(session: Session, net: nn.Module, head: nn.Module) -> None:
    """Sets the weight of each class in the head to the mean direction of its training features.
    A class without an image keeps its random weight."""
    net.eval()
    weight, first = sharded.own_classes(head)
    sums = torch.zeros_like(weight)
    rows = -(-session.config.batch_size // session.world)
    # The epoch after the last of stage 1: every image once, with an augmentation of its own.
    epoch = session.epoch(1, session.config.epochs)
    for features, labels in session.features(net, "train", *epoch):
        if session.mesh:
            features, labels = sharded.rows_of_all(features, labels, rows, session.mesh)
        own = labels - first
        known = (own >= 0) & (own < len(sums))
        sums.index_add_(0, own[known], F.normalize(features[known].to(sums.dtype)))
    sums = sums if session.mesh else distributed.total(sums)
    found = sums.any(1)
    weight[found] = F.normalize(sums[found])


@torch.no_grad()
def cache_features(session: Session, net: nn.Module) -> dict[str, Any]:
    """Features of `views` epochs of stage 2 under "train", a list, and those of each split for
    evaluation under its name. The backbone's output in stage 2 does not depend on the head, so
    that as many views as epochs change nothing."""
    config, data = session.config, session.data
    folder = config.out / "features"
    folder.mkdir(exist_ok=True)
    views = [f"view {view}" for view in range(min(config.views, config.stage2_epochs))]
    epochs = {name: session.epoch(2, view) for view, name in enumerate(views)}
    tested = {n: session.test_epoch(len(split)) for n, split in data.splits() if n != "train"}
    with session.progress() as progress:

        def cache(name: str, split: str, epoch: tuple) -> Cached:
            features, steps = session.features(net, split, *epoch), len(epoch[1])
            features = progress.track(features, steps, description=f"features, {name}")
            return Cached(folder / f"{name}, rank {session.rank}", features, session.device)

        freeze(net, config.bn)
        # In the order of the epochs, which batch norm's running statistics follow.
        cached = {"train": [cache(name, "train", epoch) for name, epoch in epochs.items()]}
        distributed.average_buffers(net)
        net.eval()
        return cached | {name: cache(name, name, epoch) for name, epoch in tested.items()}
