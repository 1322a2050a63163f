"""Stage 2's frozen backbone: its batch norm, and its features, computed once for the head."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from train import distributed, sharded
from train.features import Cached
from train.session import Session


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
