"""Data sets of image files in folders, one folder for each class."""

from pathlib import Path

import torch
from torchvision import datasets

from train.config import Config, TrainError
from train.splits import LongTailed, Split

HELD_OUT = 0.2  # share of each class's images that is tested if there is no folder of test images


def subfolders(root: Path) -> list[str]:
    """The classes in a folder: the names of its visible folders, sorted."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")


def read_folder(root: Path, classes: dict[str, int]) -> Split:
    """Images of ROOT/CLASS/**."""
    extensions = datasets.folder.IMG_EXTENSIONS
    try:
        found = datasets.folder.make_dataset(str(root), classes, extensions, allow_empty=True)
    except OSError as error:
        raise TrainError(f"--data: got {root} ({error.strerror}), wanted a directory") from None
    images = [image for image, _ in found]
    return Split(images, torch.tensor([label for _, label in found], dtype=torch.int64), images)


def hold_out(split: Split, num_classes: int) -> tuple[Split, Split]:
    """Training images, and a fifth of each class as test images: the same ones for every seed."""
    held_out, draw = torch.zeros(len(split), dtype=torch.bool), torch.Generator().manual_seed(0)
    for members in (torch.where(split.labels == c)[0] for c in range(num_classes)):
        test = round(HELD_OUT * len(members)) or int(len(members) > 1)
        held_out[members[torch.randperm(len(members), generator=draw)[:test]]] = True
    return split.take(torch.where(~held_out)[0]), split.take(torch.where(held_out)[0])


def read_evaluation(data: Path, root: Path, classes: dict[str, int]) -> tuple[Split | None, Split]:
    """The splits for validation and test beside the training images in `root`; a folder of
    validation images that stands alone is the test set."""

    def first(*names):  # ImageNet's own val and test have no folders of classes and do not count
        found = (data / name for name in names)
        return next((path for path in found if path.is_dir() and subfolders(path)), None)

    val, test = first("val_dir", "val"), first("test")
    val, test = (val, test) if test else (None, val)
    if test is None:
        raise TrainError(
            f"--data: got {data} with train alone, wanted test or val beside it, with folders of "
            "classes"
        )
    for folder in filter(None, (val, test)):
        if unknown := set(subfolders(folder)) - set(classes):
            raise TrainError(
                f"{folder}: got the class {min(unknown)}, which is not in {root}; "
                f"wanted some of its {len(classes)}"
            )
    return val and read_folder(val, classes), read_folder(test, classes)


def load_folder(config: Config) -> LongTailed:
    """DATA/train/CLASS/*, with test, val or val_dir beside train; or DATA/CLASS/*, of which a
    fifth of each class is held out for the test."""
    if not config.data.is_dir():
        raise TrainError(f"--data: got {config.data}, wanted a directory of folders, one a class")
    root = config.data / "train"
    root = root if root.is_dir() else config.data
    classes = {name: label for label, name in enumerate(subfolders(root))}
    train = read_folder(root, classes) if classes else ()
    if not len(train):
        raise TrainError(f"--data: got {root}, wanted folders with images in it, one a class")
    if root is config.data:
        train, test = hold_out(train, len(classes))
        return LongTailed(train, test, None, len(classes))
    val, test = read_evaluation(config.data, root, classes)
    return LongTailed(train, test, val, len(classes))
