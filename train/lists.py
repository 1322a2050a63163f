"""Data sets of image files that lists name, in lines `relative/path label`."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from train.config import Config, TrainError
from train.splits import LongTailed, Paths, Split

# Classes and training images as published, and how the names of the lists begin: ImageNet and
# iNaturalist by their challenges, the long-tailed sets by Liu et al. (OLTR, CVPR 2019).
PUBLISHED = {
    "imagenet": (1000, 1_281_167, "ImageNet_"),
    "imagenetlt": (1000, 115_846, "ImageNet_LT_"),
    "places-lt": (365, 62_500, "Places_LT_"),
    "inat2018": (8142, 437_513, "iNaturalist18_"),
    "inat2019": (1010, 265_213, "iNaturalist19_"),
}
# A path without the slashes before it, and a label behind the last blanks, tabs and commas; or else
# a line that is not empty. A dot stands for all but a newline.
LINE = re.compile(
    rb"^[ \t\r]*(?![ \t\r])/*(?!/)(.*[^ \t\r,\n])[ \t\r,]+([0-9]{1,18})[ \t\r]*$|^.*[^ \t\r\n].*$",
    re.MULTILINE,
)


def read_list(path: Path, root: Path) -> Split:
    """The images of a list file. It may have a million lines, of which arrays keep places alone."""
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise TrainError(f"--data: got {path} ({error.strerror}), wanted a list to read") from None
    if text[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in text:
        raise TrainError(f"{path}: got UTF-16 or zero bytes, wanted a list in UTF-8")

    def places() -> Iterator[int]:
        for found in LINE.finditer(text):
            if found[2] is None:
                line, got = text.count(b"\n", 0, found.start()) + 1, os.fsdecode(found[0])
                raise TrainError(f"{path}:{line}: got {got!r}, wanted `relative/path label`")
            yield from (*found.span(1), int(found[2]))

    begin, end, labels = np.fromiter(places(), np.int64).reshape(-1, 3).T.copy()
    if not len(labels):
        raise TrainError(f"{path}: got an empty list, wanted lines `relative/path label`")
    return Split(Paths(str(root), text, begin, end), torch.from_numpy(labels), f"{path}:")


def find_lists(config: Config) -> dict[str, Split]:
    """The splits whose lists lie in --lists, or in --data if that is not given."""
    folder = config.lists or config.data
    known = [config.dataset, *PUBLISHED] if config.dataset in PUBLISHED else PUBLISHED
    prefixes = ["", *(PUBLISHED[name][2] for name in known)]
    found = {}
    for split in ("train", "val", "test"):
        names = (folder / f"{prefix}{split}.txt" for prefix in prefixes)
        if path := next((name for name in names if name.is_file()), None):
            found[split] = read_list(path, config.data)
    # Without a list of test images that of val is the test set, as in the paper's code.
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    return found


def load_lists(config: Config) -> LongTailed:
    """A data set of list files."""
    found = find_lists(config)
    for split in ("train", "test"):
        if split not in found:
            raise TrainError(
                f"--data: got {config.lists or config.data} without a list of {split} images, "
                f"wanted {split}.txt there with lines `relative/path label`"
            )
    train = found["train"]
    largest, present = int(train.labels.max()), len(train.labels.unique())
    num_classes = PUBLISHED.get(config.dataset, [largest + 1])[0]
    # A mistyped label could ask for gigabytes of weights. Published sets are checked elsewhere.
    if config.dataset not in PUBLISHED and num_classes > 10 * present:
        raise TrainError(
            f"{train.where(int(train.labels.argmax()))}: got class {largest} in a list of "
            f"{present} classes, wanted labels from 0 on without such gaps"
        )
    return LongTailed(train, found["test"], found.get("val"), num_classes)
