"""Reading image files, and keeping all images of a split in memory where they are small."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from train.config import TrainError
from train.splits import Split

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def read_image(path: str) -> Image.Image | str:
    """The image in RGB, or a message that says why the file cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip to 8
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except UNREADABLE as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        return f"{path}: got an image that cannot be read ({reason})"


def bad_image(message: str) -> TrainError:
    """The error for a message of `read_image`."""
    return TrainError(f"{message}, wanted a readable one; --bad-images skip leaves such out")


def typical_size(paths: list[str]) -> int:
    """Median of the shorter side of about 64 of the images, in pixels."""
    sizes = []
    for path in paths[:: max(1, len(paths) // 64)]:
        with contextlib.suppress(*UNREADABLE), Image.open(path) as image:
            sizes.append(min(image.size))
    return int(np.median(sizes)) if sizes else 224


def into_memory(split: Split, size: int, skip: bool, title: str, quiet: bool = True) -> Split:
    """Reads all images, [N, 3, size, size]. A file that cannot be read raises TrainError, or is
    left out with `skip`."""

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
