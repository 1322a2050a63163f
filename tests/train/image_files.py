"""Image files that the tests of the data sets write and know again."""

import os

import numpy as np
from PIL import Image

from train.config import Config
from train.data import load_data


def png(path, number=0, size=(8, 8)):
    """Writes an image of one colour, by which a test knows it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, 255 - number, 7)).save(path)


def noise(path, seed, size=(48, 40)):
    """Writes an image of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_lists(root, /, size=(8, 8), **splits):
    """Writes ROOT/train.txt and so on with the labels given, and the images, which are numbered
    over all splits."""
    number = 0
    for split, labels in splits.items():
        lines = []
        for label in labels:
            png(root / f"{split}/{number}.png", number, size)
            lines.append(f"{split}/{number}.png {label}\n")
            number += 1
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def numbers(split):
    """The numbers of the images in memory, which `png` wrote."""
    assert (split.images == split.images[:, :, :1, :1]).all()
    assert (split.images[:, 0].int() + split.images[:, 1] == 255).all()
    assert (split.images[:, 2] == 7).all()
    return split.images[:, 0, 0, 0].tolist()


def names(split, root):
    """The paths of a split's images, relative to `root`."""
    return [os.path.relpath(split.images[i], root) for i in range(len(split))]


def load(root, dataset="list", **options):
    return load_data(Config(dataset=dataset, data=root, **options))


def append(path, line):
    """Adds a line to a file."""
    with open(path, "a") as file:
        file.write(line + "\n")


def numbered(size, *shape):
    """Random uint8 images [size, *shape], the first byte of each of which is its number."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, *shape), dtype=np.uint8)
    pixels.reshape(size, -1)[:, 0] = np.arange(size) % 256
    return pixels


def spoil(path, how):
    """Makes an image unreadable."""
    if how == "truncated":
        noise(path, 0)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text("no image")
