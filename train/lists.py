"""Data sets of image files that lists name: lines `relative/path label`, or iNaturalist's JSON."""

import json
import re
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from train.config import Config, TrainError
from train.splits import LongTailed, Paths, Split

# Classes and training images as published: ImageNet and iNaturalist by their challenges, the
# long-tailed sets by Liu et al. (OLTR, CVPR 2019).
PUBLISHED = {
    "imagenet": (1000, 1_281_167),
    "imagenetlt": (1000, 115_846),
    "places-lt": (365, 62_500),
    "inat2018": (8142, 437_513),
    "inat2019": (1010, 265_213),
}
# How the names of the lists begin that OLTR and those after it give out.
OFFICIAL = {
    "imagenet": "ImageNet_",
    "imagenetlt": "ImageNet_LT_",
    "places-lt": "Places_LT_",
    "inat2018": "iNaturalist18_",
    "inat2019": "iNaturalist19_",
}
BLANKS, DIGITS, SLASH = b" \t\r", b"0123456789", b"/"


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainError(f"--data: got {path} ({error.strerror}), wanted a list to read") from None


def moved(codes: np.ndarray, at: np.ndarray, limit: np.ndarray, members: bytes, step: int = -1):
    """Positions moved over the characters `members`, backwards or forwards, up to `limit`."""
    table, at, going = np.isin(np.arange(256), list(members)), at.copy(), np.arange(len(at))
    while len(going := going[at[going] != limit[going]]):
        going = going[table[codes[at[going] + min(step, 0)]]]
        at[going] += step
    return at


def read_list(path: Path, root: Path) -> Split:
    """The images of a list file, which is taken apart by arrays, as it may have a million lines.

    The label follows the last blanks, tabs and commas of a line. Slashes before the path are
    dropped.
    """
    text = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    if text[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in text:
        raise TrainError(f"{path}: got UTF-16 or zero bytes, wanted a list in UTF-8")
    codes = np.frombuffer(text, np.uint8)
    breaks = (found.start() for found in re.finditer(b"\n", text))
    kind = np.int32 if len(text) < 2**31 else np.int64
    stop = np.fromiter(chain(breaks, [len(text)]), kind, text.count(b"\n") + 1)
    start = np.concatenate([stop[:1] * 0, stop[:-1] + 1])
    end = moved(codes, stop, start, BLANKS)
    lines = np.flatnonzero(end > start)
    if not len(lines):
        raise TrainError(f"{path}: got an empty list, wanted lines `relative/path label`")
    start, end = start[lines], end[lines]
    label = moved(codes, end, start, DIGITS)
    name = moved(codes, label, start, BLANKS + b",")
    start = moved(codes, moved(codes, start, name, BLANKS, 1), name, SLASH, 1)
    digits = end - label
    # More digits would overflow int64.
    bad = (digits == 0) | (digits > 18) | (name == label) | (name == start)
    if bad.any():
        line = lines[bad.argmax()]
        got = text.split(b"\n", line + 1)[line].decode(errors="surrogateescape")
        raise TrainError(f"{path}:{line + 1}: got {got!r}, wanted `relative/path label`")
    labels = (int(text[a:b]) for a, b in zip(label, end, strict=True))
    labels = torch.from_numpy(np.fromiter(labels, np.int64, len(lines)))
    return Split(Paths(str(root), text, start, name), labels, f"{path}:", lines + 1)


def read_inat_json(path: Path, root: Path) -> Split:
    """iNaturalist's own annotations: images with a file_name, annotations with a category_id."""
    try:
        content = json.loads(read_bytes(path))
        files = {image["id"]: image["file_name"].lstrip("/") for image in content["images"]}
        names = [files[a["image_id"]] for a in content["annotations"]]
        labels = torch.tensor([int(a["category_id"]) for a in content["annotations"]])
    except TrainError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise TrainError(
            f"{path}: got JSON without {error}, wanted iNaturalist's images and annotations"
        ) from None
    if not names:
        raise TrainError(f"{path}: got no annotation, wanted one for each image")
    numbers = np.arange(len(names))
    return Split(Paths.of(str(root), names), labels, f"{path}, annotation ", numbers)


def find_lists(config: Config) -> dict[str, Split]:
    """The splits whose lists lie in --lists, or in --data if that is not given."""
    folder = config.lists or config.data
    prefixes = dict.fromkeys(["", OFFICIAL.get(config.dataset, ""), *OFFICIAL.values()])
    found = {}
    for split in ("train", "val", "test"):
        names = (folder / f"{prefix}{split}.txt" for prefix in prefixes)
        if path := next((name for name in names if name.is_file()), None):
            found[split] = read_list(path, config.data)
        # iNaturalist's train2018.json and val2018.json; its test2018.json has no labels.
        official = folder / f"{split}{config.dataset.removeprefix('inat')}.json"
        if split not in (*found, "test") and official.is_file():
            found[split] = read_inat_json(official, config.data)
    # Without a list of test images that of val is the test set, as in the paper's code.
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    return found


def load_lists(config: Config) -> LongTailed:
    """A data set of list files or of iNaturalist's JSON."""
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
