"""Data sets of image files that lists name: lines `relative/path label`, or iNaturalist's JSON."""

import json
import os
from pathlib import Path

import torch

from train.config import Config, TrainError
from train.splits import LongTailed, Split

# Classes and training images as published: ImageNet and iNaturalist by their challenges, the
# long-tailed sets by Liu et al. (OLTR, CVPR 2019).
PUBLISHED = {
    "imagenet": (1000, 1_281_167),
    "imagenetlt": (1000, 115_846),
    "places-lt": (365, 62_500),
    "inat2018": (8142, 437_513),
    "inat2019": (1010, 265_213),
}
LIST_NAMES = {
    "train": ("train.txt", "ImageNet_LT_train.txt", "Places_LT_train.txt"),
    "val": ("val.txt", "ImageNet_LT_val.txt", "Places_LT_val.txt"),
    "test": ("test.txt", "ImageNet_LT_test.txt", "Places_LT_test.txt"),
}


def read_list(path: Path, root: Path) -> Split:
    """The images of a list file. The label follows the last space of a line, and a leading / of
    the path is dropped."""
    images, labels, where = [], [], []
    for number, line in enumerate(path.read_text("utf-8-sig", "surrogateescape").splitlines(), 1):
        if not line.strip():
            continue
        image, _, label = line.strip().rpartition(" ")
        image = image.strip().lstrip("/")
        if not image or not label.isdecimal() or len(label) > 18:  # more digits overflow int64
            raise TrainError(f"{path}:{number}: got {line!r}, wanted `relative/path label`")
        images.append(os.path.normpath(root / image))
        labels.append(int(label))
        where.append(f"{path}:{number}")
    if not images:
        raise TrainError(f"{path}: got an empty list, wanted lines `relative/path label`")
    return Split(images, torch.tensor(labels), where)


def read_inat_json(path: Path, root: Path) -> Split:
    """iNaturalist's own annotations: images with a file_name, annotations with a category_id."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(files[a["image_id"]], int(a["category_id"])) for a in content["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise TrainError(
            f"{path}: got JSON without {error}, wanted iNaturalist's images and annotations"
        ) from None
    if not pairs:
        raise TrainError(f"{path}: got no annotation, wanted one for each image")
    images = [os.path.join(root, file.lstrip("/")) for file, _ in pairs]
    where = [f"{path}, annotation {i}" for i in range(len(pairs))]
    return Split(images, torch.tensor([label for _, label in pairs]), where)


def find_lists(config: Config) -> dict[str, Split]:
    """The splits whose lists lie in --lists, or in --data if that is not given."""
    folder = config.lists or config.data
    found = {}
    for split, names in LIST_NAMES.items():
        for name in names:
            if split not in found and (folder / name).is_file():
                found[split] = read_list(folder / name, config.data)
        # iNaturalist's train2018.json and val2018.json; its test2018.json has no labels.
        official = folder / f"{split}{config.dataset.removeprefix('inat')}.json"
        if split not in (*found, "test") and official.is_file():
            found[split] = read_inat_json(official, config.data)
    # Without a list of test images that of val is the test set, as in the paper's code.
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    for split in ("train", "test"):
        if split not in found:
            raise TrainError(
                f"--data: got {folder} without a list of {split} images, wanted {split}.txt "
                "there with lines `relative/path label`"
            )
    return found


def load_lists(config: Config) -> LongTailed:
    """A data set of list files or of iNaturalist's JSON."""
    found = find_lists(config)
    train = found["train"]
    largest, present = int(train.labels.max()), len(train.labels.unique())
    num_classes = PUBLISHED.get(config.dataset, [largest + 1])[0]
    # A mistyped label could ask for gigabytes of weights. Published sets are checked elsewhere.
    if config.dataset not in PUBLISHED and num_classes > 10 * present:
        raise TrainError(
            f"{train.where[train.labels.argmax()]}: got class {largest} in a list of "
            f"{present} classes, wanted labels from 0 on without such gaps"
        )
    return LongTailed(train, found["test"], found.get("val"), num_classes)
