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
        """Paths relative to `root`, each in a line of its own."""
        lines = [os.fsencode(name) + b"\n" for name in names]
        begin = np.cumsum([0, *map(len, lines)])
        return cls(root, b"".join(lines), begin[:-1], begin[1:] - 1)

    def __len__(self) -> int:
        return len(self.begin)

    def __getitem__(self, i: int) -> str:
        name = os.fsdecode(self.text[self.begin[i] : self.end[i]])
        return os.path.normpath(os.path.join(self.root, name))

    def names(self) -> Iterator[bytes]:
        """The paths relative to `root`, as they were given."""
        # A memoryview makes its numbers one by one; a list of a million takes 40 MB.
        for begin, end in zip(memoryview(self.begin), memoryview(self.end), strict=True):
            yield self.text[begin:end]

    def line(self, i: int) -> int:
        """The number of the line that holds path i, from 1 on."""
        return self.text.count(b"\n", 0, self.begin[i]) + 1


@dataclasses.dataclass
class Split:
    """Images, as files or in memory, and their classes."""

    images: Paths | Tensor
    """Paths, or [N, channels, height, width] uint8."""
    labels: Tensor
    """[N] int64"""
    source: str = ""
    """The file that lists the images; messages name an image by it and its line."""

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, i: int) -> str:
        """How an error message names an image."""
        return f"{self.source}{self.images.line(i)}" if self.source else str(self.images[i])

    def take(self, index: Tensor) -> "Split":
        """The images at these indices, in their order."""
        images, at = self.images, index.numpy()
        if isinstance(images, Tensor):
            images = images[index]
        else:
            images = Paths(images.root, images.text, images.begin[at], images.end[at])
        return Split(images, self.labels[index], self.source)


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


def members_of_classes(labels: Tensor, num_classes: int = 0) -> tuple[Tensor, ...]:
    """The indices of each class's images, in their order; of `num_classes` classes at least."""
    return labels.argsort(stable=True).split(labels.bincount(minlength=num_classes).tolist())


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
    for members in members_of_classes(split.labels):
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
