"""Data sets of image files in folders, one folder for each class."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torchvision import datasets

from train.config import Config, TrainError
from train.splits import LongTailed, Paths, Split, members_of_classes

HELD_OUT = 0.2  # share of each class's images that is tested if there is no folder of test images
EXTENSIONS = (*datasets.folder.IMG_EXTENSIONS, ".avif", ".gif", ".jfif")


def visible(folder: str, root: str) -> list[tuple[os.DirEntry, str]]:
    """The entries of a folder by their names, with their real paths. Hidden ones are no data, nor
    are links back into the tree under `root`, which reach the same files a second time."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
        back = entry.is_symlink() and os.path.commonpath([path, root]) in (path, root)
        if not entry.name.startswith(".") and not back:
            found.append((entry, path))
    return found


def files_under(folder: str, root: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Names and real paths of the files at any depth under a folder; `seen` has its folders."""
    for entry, path in visible(folder, root):
        if not entry.is_dir():
            # A broken link is a missing image; pipes and the like are no files.
            if entry.is_file() or not os.path.exists(path):
                yield entry.name, path
        elif path not in seen:
            seen.add(path)
            yield from files_under(path, root, seen)


def subfolders(root: Path) -> list[str]:
    """The classes in a folder: the names of its visible folders, sorted."""
    real = os.path.realpath(root)
    return [entry.name for entry, _ in visible(real, real) if entry.is_dir()]


def read_folder(root: Path, classes: dict[str, int], others: dict[str, str]) -> Split:
    """Images of ROOT/CLASS/**; the files that their names do not make images go to `others`."""
    real, names, labels = os.path.realpath(root), [], []
    for folder, label in classes.items():
        below, found = os.path.realpath(os.path.join(real, folder)), {}  # each real path once
        for name, path in files_under(below, real, set()) if os.path.isdir(below) else ():
            is_image = name.lower().endswith(EXTENSIONS)
            (found if is_image else others)[path] = os.path.relpath(path, real)
        names += found.values()
        labels += [label] * len(found)
    return Split(Paths.of(real, names), torch.tensor(labels, dtype=torch.int64))


def hold_out(split: Split, num_classes: int) -> tuple[Split, Split]:
    """Training images, and a fifth of each class as test images: the same ones for every seed."""
    held_out, draw = torch.zeros(len(split), dtype=torch.bool), torch.Generator().manual_seed(0)
    for members in members_of_classes(split.labels, num_classes):
        test = round(HELD_OUT * len(members)) or int(len(members) > 1)
        held_out[members[torch.randperm(len(members), generator=draw)[:test]]] = True
    return split.take(torch.where(~held_out)[0]), split.take(torch.where(held_out)[0])


def evaluation_folders(data: Path, root: Path, classes: dict[str, int]) -> dict[str, Path]:
    """The folders for validation and test beside the training images in `root`; a folder of
    validation images that stands alone is the test set."""

    def first(*names):  # ImageNet's own val and test have no folders of classes and do not count
        found = (data / name for name in names)
        return next((path for path in found if path.is_dir() and subfolders(path)), None)

    val, test = first("val_dir", "val"), first("test")
    if not val and not test:
        raise TrainError(
            f"--data: got {data} with train alone, wanted test or val beside it, with folders of "
            "classes"
        )
    found = {"val": val, "test": test} if val and test else {"test": test or val}
    for folder in found.values():
        if unknown := set(subfolders(folder)) - set(classes):
            raise TrainError(
                f"{folder}: got the class {min(unknown)}, which is not in {root}; "
                f"wanted some of its {len(classes)}"
            )
    return found


def load_folder(config: Config) -> LongTailed:
    """DATA/train/CLASS/*, with test, val or val_dir beside train; or DATA/CLASS/*, of which a
    fifth of each class is held out for the test."""
    if not config.data.is_dir():
        raise TrainError(f"--data: got {config.data}, wanted a directory of folders, one a class")
    root = config.data / "train"
    root, others = root if root.is_dir() else config.data, {}
    try:
        classes = {name: label for label, name in enumerate(subfolders(root))}
        train = read_folder(root, classes, others)
        if not len(train):
            raise TrainError(f"--data: got {root}, wanted folders with images in it, one a class")
        if root is config.data:
            train, test = hold_out(train, len(classes))
            splits = {"test": test}
        else:
            splits = evaluation_folders(config.data, root, classes)
            splits = {n: read_folder(path, classes, others) for n, path in splits.items()}
    except OSError as error:
        raise TrainError(
            f"--data: got {error.filename} ({error.strerror}), wanted a directory to read"
        ) from None
    data = LongTailed(train, splits["test"], splits.get("val"), len(classes))
    if others:
        data.notes.append(
            f"{len(others)} files are no images by their names and left out, such as {min(others)}"
        )
    return data
