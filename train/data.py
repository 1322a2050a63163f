"""The data set of a configuration: loaded by its name, checked, and prepared for the training."""

import os
import unicodedata
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from train.builtin import BUILTIN
from train.config import Config, TrainError
from train.folders import load_folder
from train.images import into_memory, typical_size
from train.lists import PUBLISHED, find_lists, load_lists
from train.splits import LongTailed, Split, add_label_noise, class_names, thin_out

SMALL = 64  # pixels: images whose typical size is at most this are kept in memory


def load_imagenet(config: Config) -> LongTailed:
    """ImageNet by lists where there are some, else by its folders."""
    return load_lists(config) if find_lists(config) else load_folder(config)


# All other data sets are lists of image files.
LOADERS = BUILTIN | {"imagenet": load_imagenet, "folder": load_folder}


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
    data.names = class_names(data.train, data.num_classes)
    if data.augment == "small" and not isinstance(data.train.images, Tensor):
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
    """Refuses an empty split, a label out of range, a missing file, an image in two splits or of
    two classes, and a published set of another size than published."""
    for name, split in data.splits():
        if not len(split):
            raise TrainError(f"--data: got no image in {name}, wanted at least one")
        out = torch.where(split.labels >= data.num_classes)[0]
        if len(out):
            raise TrainError(
                f"{split.where(int(out[0]))}: got class {split.labels[out[0]]}, wanted one of the "
                f"{data.num_classes} classes (0 to {data.num_classes - 1})"
            )
    if not isinstance(data.train.images, Tensor):
        check_files(data)
    got = (len(data.train.labels.unique()), len(data.train))
    classes, images, _ = PUBLISHED.get(config.dataset, (*got, ""))
    if got != (classes, images):
        raise TrainError(
            f"--data: got {got[1]:,} training images of {got[0]:,} classes, wanted the "
            f"{images:,} of {classes:,} of {config.dataset} as published; for a set of your own: "
            "--dataset list"
        )


def keys_of(split: Split, folders: set[bytes]) -> np.ndarray:
    """For each image of a split the hash of its folder and its name, int64 [N]: a set of paths
    would take 200 bytes an image. The folders are added to `folders`."""
    known, root = {}, os.fsencode(split.images.root)

    def keys() -> Iterator[int]:
        for path in split.images.names():
            folder, _, name = path.rpartition(b"/")
            if folder not in known:
                known[folder] = os.path.normpath(os.path.join(root, folder))
            yield hash((known[folder], name))

    found = np.fromiter(keys(), np.int64, len(split))
    folders.update(known.values())
    return found


def check_files(data: LongTailed) -> None:
    """Refuses files that are missing, and an image of two splits or classes; notes images that a
    split has twice."""
    folders, splits = set(), list(data.splits())
    keys = [keys_of(split, folders) for _, split in splits]
    # A folder is listed once, which is faster than to ask for every file.
    listed = ((folder, os.listdir(folder)) for folder in folders if os.path.isdir(folder))
    there = (hash((folder, name)) for folder, names in listed for name in names)
    there = np.sort(np.fromiter(there, np.int64))
    for (_, split), key in zip(splits, keys, strict=True):
        order = key.argsort()  # in which a search is fast; np.isin would take 90 MB for a million
        key = key[order]
        missing = order[there.searchsorted(key) == there.searchsorted(key, "right")]
        if len(missing):
            image, where = split.images[missing.min()], split.where(missing.min())
            raise TrainError(
                f"{where}: got {image}, which is not there{other_form(image)}; wanted an image"
            )

    keys, ends = np.concatenate(keys), np.cumsum([len(split) for _, split in splits])
    order = keys.argsort(kind="stable")
    again = keys[order[:-1]] == keys[order[1:]]

    def named(i: int) -> tuple[str, str, str]:
        """The path, the list's line, and the split and class of the i-th of all images."""
        part = np.searchsorted(ends, i, "right")
        (name, split), i = splits[part], i - ends[part]  # counted from the split's end
        return split.images[i], split.where(i), f"{name}, class {split.labels[i]}"

    for i, j in zip(order[:-1][again], order[1:][again], strict=True):
        (_, first, kind), (image, where, other_kind) = named(i), named(j)
        if kind != other_kind:
            raise TrainError(
                f"{where}: got {image} for {other_kind}, which {first} names for {kind}; wanted "
                "one split and one class for an image"
            )
    if again.any():
        image, where, _ = named(order[1:][again].min())
        data.notes.append(
            f"{again.sum()} images are named more than once, such as {image} ({where})"
        )


def other_form(path: str) -> str:
    """What is there in place of a path that is not, and composes its letters in another way: macOS
    writes an accent as a character of its own (NFD)."""
    forms = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    found = next((other for other in forms if os.path.exists(other)), None)
    return f" ({found!a} is, in another Unicode form than {path!a})" if found else ""


def choose_transforms(data: LongTailed, config: Config) -> None:
    """Sets the transforms and their size, by the size of the images unless flags name them."""
    in_memory = isinstance(data.train.images, Tensor)
    size = data.train.images.shape[-1] if in_memory else config.image_size
    other = config.augment not in ("auto", "small") or config.image_size not in (0, size)
    if in_memory and other:
        raise TrainError(
            f"--augment, --image-size: got {config.augment}, {config.image_size}, wanted small, "
            f"{size}: {config.dataset} is in memory as it is"
        )
    size = size or typical_size(data.train.images)
    data.augment = config.augment
    if config.augment == "auto":
        data.augment = "small" if in_memory or size <= SMALL else "imagenet"
    data.image_size = size
    if data.augment != "small" and not config.image_size:
        data.image_size = 224 if config.dataset in PUBLISHED else min(224, max(32, size // 32 * 32))


def read_small_images(data: LongTailed, config: Config, quiet: bool) -> None:
    """Replaces the files of every split by their images in memory."""
    for name, split in list(data.splits()):
        setattr(data, name, into_memory(split, data.image_size, f"{name} images", quiet))
