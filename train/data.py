"""The data set of a configuration: loaded by its name, checked, and prepared for the training."""

import os
import unicodedata
from pathlib import Path

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
        out = torch.where((split.labels < 0) | (split.labels >= data.num_classes))[0]
        if len(out):
            where = name if isinstance(split.images, Tensor) else split.where(int(out[0]))
            raise TrainError(
                f"{where}: got class {split.labels[out[0]]}, wanted one of the "
                f"{data.num_classes} classes (0 to {data.num_classes - 1})"
            )
    if not isinstance(data.train.images, Tensor):
        check_files(data, skip=config.bad_images == "skip")
    if config.dataset in PUBLISHED:
        got = (len(data.train.labels.unique()), len(data.train))
        if got != PUBLISHED[config.dataset]:
            classes, images = PUBLISHED[config.dataset]
            raise TrainError(
                f"--data: got {got[1]:,} training images of {got[0]:,} classes, wanted the "
                f"{images:,} of {classes:,} of {config.dataset} as published; for a set of your "
                "own: --dataset list"
            )


def located(split: Split, folders: dict[bytes, int]) -> np.ndarray:
    """For each image of a split the number of its folder in `folders`, and the hash of its name:
    16 bytes an image, where sets of paths take 200. [N] with the fields f0, f1."""
    paths, known = split.images, {}
    root, odd = os.fsencode(paths.root), any(part in paths.text for part in (b"//", b"./"))

    def places():
        for path in paths.names():
            folder, _, name = (os.path.normpath(path) if odd else path).rpartition(b"/")
            if folder not in known:
                where = os.path.normpath(os.path.join(root, folder))
                known[folder] = folders.setdefault(where, len(folders))
            yield known[folder], hash(name)

    return np.fromiter(places(), "i8,i8", len(split))


def check_files(data: LongTailed, skip: bool) -> None:
    """Refuses files that are missing (with `skip`, only where all of a split are), and an image of
    two splits or classes; notes images that a split has twice."""
    folders, splits = {}, list(data.splits())
    places = [located(split, folders) for _, split in splits]
    ends = np.cumsum([len(split) for _, split in splits])
    places, labels = np.concatenate(places), torch.cat([split.labels for _, split in splits])
    number = np.repeat(np.arange(len(splits)), [len(split) for _, split in splits])

    def named(i: int) -> tuple[str, str, str]:
        """The path, the list's line and the split of the i-th of all images."""
        name, split = splits[number[i]]
        i = int(i - ends[number[i]])  # counted from the split's end
        return split.images[i], split.where(i), name

    there = np.empty(len(places), bool)
    groups = np.split(places["f0"].argsort(kind="stable"), np.bincount(places["f0"]).cumsum()[:-1])
    for folder, group in zip(folders, groups, strict=True):
        # A folder is listed once, which is faster than to ask for every file.
        content = os.listdir(folder) if os.path.isdir(folder) else ()
        there[group] = np.isin(places["f1"][group], [*map(hash, content)])
    for i in np.flatnonzero(~there):
        if not (skip and there[number == number[i]].any()):
            image, where, _ = named(i)
            raise TrainError(
                f"{where}: got {image}, which is not there{twin(image)}; wanted an image"
            )

    keys = places["f1"] ^ (places["f0"] << 44)
    order = keys.argsort(kind="stable")
    a, b = order[:-1], order[1:]
    a, b = (pair[keys[a] == keys[b]] for pair in (a, b))
    odd = (number[a] != number[b]) | (labels[a] != labels[b]).numpy()
    for i, j in zip(a[odd], b[odd], strict=True):
        (image, where, name), (_, other, other_name) = named(j), named(i)
        raise TrainError(
            f"{where}: got {image} for {name}, class {labels[j]}, which {other} names for "
            f"{other_name}, class {labels[i]}; wanted one split and one class for an image"
        )
    if len(b):
        image, where, _ = named(b.min())
        data.notes.append(f"{len(b)} images are named more than once, such as {image} ({where})")


def twin(path: str) -> str:
    """What is there in place of a path that is not, and differs only in the case of letters or in
    how Unicode composes them: macOS writes an accent as a character of its own (NFD)."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    missing = next(p for p in (*reversed(Path(path).parents), Path(path)) if not p.exists())
    names = os.listdir(missing.parent) if missing.parent.is_dir() else []
    other = next((name for name in names if plain(name) == plain(missing.name)), None)
    if other is None:
        return ""
    return f" ({other!a} is, with other letter case or Unicode form than {missing.name!a})"


def choose_transforms(data: LongTailed, config: Config) -> None:
    """Sets the transforms and their size, by the size of the images unless flags name them."""
    in_memory = isinstance(data.train.images, Tensor)
    size = data.train.images.shape[-1] if in_memory else config.image_size
    if in_memory and (
        config.augment not in ("auto", "small") or config.image_size not in (0, size)
    ):
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
        skip = config.bad_images == "skip"
        read = into_memory(split, data.image_size, skip, f"{name} images", quiet)
        if not len(read):
            raise TrainError(f"--data: got no readable image in {name}, wanted at least one")
        data.bad_images += len(split) - len(read)
        setattr(data, name, read)
