"""Reading image files, and keeping all images of a split in memory where they are small."""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from rich.progress import track

from train.config import TrainError
from train.splits import Paths, Split

NAMED = 20  # images in one message, of those that cannot be read


class LostImages(TrainError):
    """Images that a step waits for do not come; what was trained before can be saved."""


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, over white where it is transparent. A mode of Pillow whose pixels have no
    known range raises ValueError."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # of 16 bits
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has 32 bits a pixel, of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def whole(width: int, height: int) -> tuple[float, float, float, float]:
    return 0, 0, width, height


def read_image(path: str, size: int, choose: Callable = whole) -> np.ndarray | str:
    """A part of the first frame of an image file, uint8 [size, size, 3], or a message that says why
    the file cannot be read. choose(width, height) returns left, top, right and bottom of the part.

    A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves enough pixels.
    """
    try:
        with Image.open(path) as image:
            full = image.size
            box = choose(*full)
            sides = (box[2] - box[0], box[3] - box[1])
            wanted = [int(f * size / side) + 1 for f, side in zip(full, sides, strict=True)]
            image.draft(image.mode, wanted)
            box = [at * image.size[i % 2] / full[i % 2] for i, at in enumerate(box)]
            rgb = to_rgb(image)
            if (size, size) != rgb.size or (0, 0, size, size) != tuple(box):
                rgb = rgb.resize((size, size), Image.Resampling.BILINEAR, box)
            return np.array(rgb)
    except Exception as error:  # a damaged file fails in many ways, few of them documented
        reason = (str(error) or repr(error)).splitlines()[0]
        return f"{path} ({reason})"


def typical_size(paths: Paths) -> int:
    """Median of the shorter side of about 64 of the images, in pixels."""
    sizes = []
    for i in range(0, len(paths), max(1, len(paths) // 64)):
        with contextlib.suppress(Exception), Image.open(paths[i]) as image:
            sizes.append(min(image.size))
    return int(np.median(sizes)) if sizes else 224


def into_memory(split: Split, size: int, title: str, quiet: bool = True) -> Split:
    """Reads all images, [N, 3, size, size]. Those that cannot be read are refused together."""
    images, lost = torch.empty(len(split), 3, size, size, dtype=torch.uint8), []
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda i: read_image(split.images[i], size), range(len(split)))
        for i, image in enumerate(track(found, title, len(split), disable=quiet)):
            if isinstance(image, str):
                lost.append(image)
            else:
                images[i] = torch.from_numpy(image).permute(2, 0, 1)
    if lost:
        raise TrainError(
            f"--data: got {len(lost):,} of {len(split):,} {title} that cannot be read, wanted "
            f"readable ones in their place: {'; '.join(lost[:NAMED])}"
        )
    return Split(images, split.labels)
