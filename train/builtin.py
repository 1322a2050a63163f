"""Data sets whose files have a fixed format: the digits beside this file, MNIST and CIFAR.

Their training images are thinned out to a long-tailed profile of class sizes (--imbalance).
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets

from train.config import Config, TrainError
from train.splits import LongTailed, Split, exponential_profile, members_of_classes

DIGITS = Path(__file__).with_name("digits.png")  # digits.txt names its source and licence
DIGITS_TRAIN = 400  # images of each digit, before the profile thins them out; 100 more are tested

TORCHVISION = {
    "mnist-lt": datasets.MNIST,
    "fashion-mnist-lt": datasets.FashionMNIST,
    "cifar10-lt": datasets.CIFAR10,
    "cifar100-lt": datasets.CIFAR100,
}


def read_digits() -> Split:
    """5,000 images of MNIST, [5000, 1, 28, 28], 500 of each digit in the order of the digits."""
    with Image.open(DIGITS) as sheet:
        pixels = torch.from_numpy(np.array(sheet))
    rows, columns = (length // 28 for length in pixels.shape)
    images = pixels.view(rows, 28, columns, 28).transpose(1, 2).reshape(-1, 1, 28, 28)
    return Split(images, torch.arange(10).repeat_interleave(len(images) // 10))


def long_tailed(train: Split, test: Split, imbalance: float) -> LongTailed:
    """The data set of the first training images of each class, as many as the profile says."""
    classes = members_of_classes(train.labels)
    sizes = exponential_profile(min(map(len, classes)), imbalance, len(classes))
    kept = [members[:size] for members, size in zip(classes, sizes, strict=True)]
    return LongTailed(train.take(torch.cat(kept)), test, None, len(classes))


def load_digits(config: Config) -> LongTailed:
    """The last 100 images of each digit are the test set; training images come from the rest.

    The split depends on no seed, so that every run is tested on the same images.
    """
    every = read_digits()
    digits = members_of_classes(every.labels)
    train = every.take(torch.cat([members[:DIGITS_TRAIN] for members in digits]))
    test = every.take(torch.cat([members[DIGITS_TRAIN:] for members in digits]))
    return long_tailed(train, test, config.imbalance)


def load_torchvision(config: Config) -> LongTailed:
    """A data set of TORCHVISION: its test images, and its training images thinned out."""
    splits = []
    for train in (True, False):
        try:
            source = TORCHVISION[config.dataset](config.data, train, download=config.download)
        except (RuntimeError, OSError) as error:
            raise TrainError(
                f"--data: got {config.data} ({error}), wanted torchvision's files of "
                f"{config.dataset} there; --download fetches them"
            ) from None
        images = torch.as_tensor(source.data)  # MNIST's [N, H, W], CIFAR's [N, H, W, 3]
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, torch.as_tensor(source.targets)))
    return long_tailed(*splits, config.imbalance)


BUILTIN = {"digits": load_digits} | dict.fromkeys(TORCHVISION, load_torchvision)
