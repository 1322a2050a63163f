"""Data sets whose files have a fixed format: the digits beside this file, MNIST and CIFAR.

Their training images are thinned out to a long-tailed profile of class sizes (--imbalance).
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets

from train.config import Config, TrainError
from train.splits import LongTailed, Split, exponential_profile, first_of_each_class

DIGITS = Path(__file__).with_name("digits.png")  # digits.txt names its source and licence
DIGITS_TRAIN, DIGITS_TEST = 400, 100  # images of each digit, before the profile thins them out

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


def load_digits(config: Config) -> LongTailed:
    """The last 100 images of each digit are the test set; training images come from the rest.

    The split depends on no seed, so that every run is tested on the same images.
    """
    every = read_digits()
    sizes = exponential_profile(DIGITS_TRAIN, config.imbalance, 10)
    members = [torch.where(every.labels == c)[0][DIGITS_TRAIN:][:DIGITS_TEST] for c in range(10)]
    test = every.take(torch.cat(members))
    return LongTailed(every.take(first_of_each_class(every.labels, sizes)), test, None, 10)


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
    train, test = splits
    counts = torch.bincount(train.labels)
    sizes = exponential_profile(int(counts.min()), config.imbalance, len(counts))
    return LongTailed(train.take(first_of_each_class(train.labels, sizes)), test, None, len(counts))


BUILTIN = {"digits": load_digits} | dict.fromkeys(TORCHVISION, load_torchvision)
