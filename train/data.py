"""The data set of a configuration: loaded by its name, checked, and prepared for the training."""

import os

import torch
from torch import Tensor

from train.builtin import BUILTIN
from train.config import Config, TrainError
from train.folders import load_folder
from train.images import into_memory, typical_size
from train.lists import PUBLISHED, load_lists
from train.splits import LongTailed, Split, add_label_noise, thin_out

IN_MEMORY = ("small", "affine")  # transforms of images that are kept in memory
SMALL = 64  # pixels: images whose typical size is at most this are kept in memory

# All other data sets are lists of image files.
LOADERS = BUILTIN | {"imagenet": load_folder, "folder": load_folder}


def load_data(config: Config, quiet: bool = False) -> LongTailed:
    """Loads a configuration's data set, checks it, applies --subset and --label-noise, and reads
    small images into memory.

    Raises TrainError where something is missing or wrong, with file and line.
    """
    data = LOADERS.get(config.dataset, load_lists)(config)
    check(data, config)
    if config.subset < 1:
        data.train = thin_out(data.train, config.subset, config.seed)
    choose_transforms(data, config)
    if data.augment in IN_MEMORY and not isinstance(data.train.images, Tensor):
        read_small_images(data, config, quiet)
    data.counts = torch.bincount(data.train.labels, minlength=data.num_classes)
    if config.label_noise:
        if data.num_classes < 2:
            raise TrainError("--label-noise: got a single class, wanted two or more")
        data.train.labels = add_label_noise(
            data.train.labels, config.label_noise, data.num_classes, config.seed
        )
    return data


def check(data: LongTailed, config: Config) -> None:
    """Refuses an empty split, a label out of range, a missing file, an image in two splits, and a
    published set of another size than published."""
    seen, folders = {}, {}
    for name, split in data.splits():
        if not len(split):
            raise TrainError(f"--data: got no image in {name}, wanted at least one")
        out = torch.where((split.labels < 0) | (split.labels >= data.num_classes))[0]
        if len(out):
            where = split.where[out[0]] if split.where else name
            raise TrainError(
                f"{where}: got class {split.labels[out[0]]}, wanted one of the "
                f"{data.num_classes} classes (0 to {data.num_classes - 1})"
            )
        if not isinstance(split.images, Tensor):
            check_files(name, split, seen, folders)
    if config.dataset in PUBLISHED:
        got = (len(data.train.labels.unique()), len(data.train))
        if got != PUBLISHED[config.dataset]:
            classes, images = PUBLISHED[config.dataset]
            raise TrainError(
                f"--data: got {got[1]:,} training images of {got[0]:,} classes, wanted the "
                f"{images:,} of {classes:,} of {config.dataset} as published; for a set of your "
                "own: --dataset list"
            )


def check_files(
    name: str, split: Split, seen: dict[str, tuple[str, str]], folders: dict[str, set[str]]
) -> None:
    """Refuses a file that is missing or in another split.

    Args:
        seen: the split and the list's line of each image so far.
        folders: the content of each folder so far; it is listed once, which is faster than to ask
            for every file.
    """
    for image, where in zip(split.images, split.where, strict=True):
        folder, file = os.path.split(image)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if file not in folders[folder]:
            raise TrainError(f"{where}: got {image}, which is not there; wanted an image")
        other = seen.setdefault(image, (name, where))
        if other[0] != name:
            raise TrainError(
                f"{where}: got {image} for {name}, which {other[1]} names for {other[0]}; "
                "wanted no image in both"
            )


def choose_transforms(data: LongTailed, config: Config) -> None:
    """Sets the transforms and their size, by the size of the images unless flags name them."""
    in_memory = isinstance(data.train.images, Tensor)
    size = data.train.images.shape[-1] if in_memory else config.image_size
    if in_memory and (
        config.augment not in ("auto", *IN_MEMORY) or config.image_size not in (0, size)
    ):
        raise TrainError(
            f"--augment, --image-size: got {config.augment}, {config.image_size}, wanted small or "
            f"affine, {size}: {config.dataset} is in memory as it is"
        )
    size = size or typical_size(data.train.images)
    data.augment = config.augment
    if config.augment == "auto":
        data.augment = "small" if in_memory or size <= SMALL else "imagenet"
    data.image_size = size
    if data.augment not in IN_MEMORY and not config.image_size:
        data.image_size = 224 if config.dataset in PUBLISHED else min(224, max(32, size // 32 * 32))


def read_small_images(data: LongTailed, config: Config, quiet: bool) -> None:
    """Replaces the files of every split by their images in memory."""
    for name, split in list(data.splits()):
        skip = config.bad_images == "skip"
        read = into_memory(split, data.image_size, skip, f"{name} images", quiet)
        if not len(read):
            raise TrainError(f"--data: got no readable image in {name}, wanted at least one")
        data.bad_images += len(split) - len(read)
        setattr(data, name, read)
