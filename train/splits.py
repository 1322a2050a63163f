"""Splits of a data set, and what changes them: long-tailed class sizes, subsets, label noise."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from train.config import TrainError


@dataclasses.dataclass
class Split:
    """Images, as files or in memory, and their classes."""

    images: list[str] | Tensor
    """Paths, or [N, channels, height, width] uint8."""
    labels: Tensor
    """[N] int64"""
    where: list[str] | None = None
    """How an error message names each image: list file and line."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        """The images at these indices, in their order."""

        def some(items):
            return [items[i] for i in index.tolist()] if isinstance(items, list) else items

        images = self.images[index] if isinstance(self.images, Tensor) else some(self.images)
        return Split(images, self.labels[index], some(self.where))


@dataclasses.dataclass
class LongTailed:
    """A data set: its splits, the training images of each class, and how images are prepared."""

    train: Split
    test: Split
    val: Split | None
    num_classes: int
    counts: Tensor | None = None
    """[C]: training images of each class, after --subset and before --label-noise."""
    augment: str = "small"
    image_size: int = 0
    bad_images: int = 0
    """Images left out while small images were read; Session counts those that it meets later."""

    def splits(self) -> Iterator[tuple[str, Split]]:
        """The name and content of each split that there is."""
        for name in ("train", "val", "test"):
            if (split := getattr(self, name)) is not None:
                yield name, split


def exponential_profile(largest: int, imbalance: float, num_classes: int) -> list[int]:
    """Class sizes n_c = floor(largest * (1 / imbalance) ** (c / (C - 1))), as in CIFAR-LT
    (Cui et al., CVPR 2019)."""
    sizes = [int(largest * (1 / imbalance) ** (c / (num_classes - 1))) for c in range(num_classes)]
    if sizes[-1] < 1:
        raise TrainError(
            f"--imbalance: got {imbalance}, which leaves the last class empty; "
            f"wanted at most {largest}"
        )
    return sizes


def first_of_each_class(labels: Tensor, sizes: list[int]) -> Tensor:
    """Indices of the first sizes[c] images of each class c, in the order of classes."""
    return torch.cat([torch.where(labels == c)[0][:size] for c, size in enumerate(sizes)])


def thin_out(split: Split, share: float, seed: int) -> Split:
    """A random share of the images of each class, at least one of each."""
    draw = torch.Generator().manual_seed(seed)
    keep = []
    for c in split.labels.unique():
        members = torch.where(split.labels == c)[0]
        size = max(1, round(share * len(members)))
        keep.append(members[torch.randperm(len(members), generator=draw)[:size]])
    return split.take(torch.cat(keep).sort().values)


def add_label_noise(labels: Tensor, share: float, num_classes: int, seed: int) -> Tensor:
    """A copy of `labels` in which round(share * N) of them name another class, drawn uniformly."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=draw)[: round(share * len(labels))]
    step = torch.randint(1, num_classes, (len(chosen),), generator=draw)
    noisy = labels.clone()
    noisy[chosen] = (noisy[chosen] + step) % num_classes
    return noisy
