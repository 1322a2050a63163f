"""Splits of a data set, and what changes them: long-tailed class sizes, subsets, label noise."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from train.config import TrainError


class Paths:
    """Paths of image files below a folder, kept as one string of bytes: a million of them as Python
    objects would take 120 MB, in each process that reads images.

    Path i is `text[begin[i]:end[i]]`.
    """

    def __init__(self, root: str, text: bytes, begin: np.ndarray, end: np.ndarray):
        self.root, self.text, self.begin, self.end = root, text, begin, end

    @classmethod
    def of(cls, root: str, names: list[str]) -> "Paths":
        """Paths relative to `root`."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([0, *map(len, encoded)])
        return cls(root, b"".join(encoded), ends[:-1], ends[1:])

    def __len__(self) -> int:
        return len(self.begin)

    def __getitem__(self, i: int) -> str:
        name = os.fsdecode(self.text[self.begin[i] : self.end[i]])
        return os.path.normpath(os.path.join(self.root, name))

    def names(self) -> Iterator[bytes]:
        """The paths relative to `root`, as they were given."""
        for first in range(0, len(self), 4096):  # numbers as Python objects take memory, too
            part = slice(first, first + 4096)
            for begin, end in zip(self.begin[part].tolist(), self.end[part].tolist(), strict=True):
                yield self.text[begin:end]


@dataclasses.dataclass
class Split:
    """Images, as files or in memory, and their classes."""

    images: Paths | Tensor
    """Paths, or [N, channels, height, width] uint8."""
    labels: Tensor
    """[N] int64"""
    source: str = ""
    """The file that lists the images; messages name an image by it and its number in `lines`."""
    lines: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, i: int) -> str:
        """How an error message names an image."""
        return str(self.images[i]) if self.lines is None else f"{self.source}{self.lines[i]}"

    def take(self, index: Tensor) -> "Split":
        """The images at these indices, in their order."""
        at, images, lines = index.numpy(), self.images, self.lines
        if isinstance(images, Tensor):
            images = images[index]
        else:
            images = Paths(images.root, images.text, images.begin[at], images.end[at])
        return Split(images, self.labels[index], self.source, None if lines is None else lines[at])


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
    names: list[str] | None = None
    """[C]: names of the classes, where each has a folder of its own."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What the user should know about the files."""

    def splits(self) -> Iterator[tuple[str, Split]]:
        """The name and content of each split that there is."""
        for name in ("train", "val", "test"):
            if (split := getattr(self, name)) is not None:
                yield name, split

    def summary(self) -> str:
        """The number of classes, and the sizes and a digest of the splits, by which --resume sees
        that the data set is another one."""
        sizes, digest = [], hashlib.blake2b(digest_size=8)
        for name, split in self.splits():
            in_memory = isinstance(split.images, Tensor)
            sizes.append(f"{len(split)} images of {name}")
            for part in [split.images.contiguous().numpy()] if in_memory else split.images.names():
                digest.update(part)
            digest.update(split.labels.numpy())
        return f"{self.num_classes} classes, {', '.join(sizes)}, digest {digest.hexdigest()}"


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


def class_names(split: Split, num_classes: int) -> list[str] | None:
    """The folder of each class's images where each class has one of its own; the number of a class
    without images."""
    if isinstance(split.images, Tensor):
        return None
    folders = (name.rpartition(b"/")[0].rpartition(b"/")[2] for name in split.images.names())
    pairs = set(zip(folders, split.labels.tolist(), strict=True))
    owners = {label: os.fsdecode(folder) for folder, label in pairs}
    if not len(pairs) == len(owners) == len(set(owners.values())) or not all(owners.values()):
        return None
    return [owners.get(c, str(c)) for c in range(num_classes)]


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
