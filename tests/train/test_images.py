"""Reading image files of all modes."""

import numpy as np
from PIL import Image

from tests.train.image_files import load, write_lists
from train.images import read_image


def test_sixteen_bit_grey_keeps_its_levels(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None]
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    red = np.asarray(read_image(str(tmp_path / "ramp.png")))[0, :, 0]
    assert red.tolist() == (ramp[0] >> 8).tolist() and len(set(red)) > 250


def test_grey_and_transparent_images_become_rgb(tmp_path):
    write_lists(tmp_path, train=[0, 0, 0], test=[0])
    for i, (mode, colour) in enumerate((("L", 9), ("RGBA", (9, 9, 9, 0)), ("P", 9))):
        image = Image.new(mode, (8, 8), colour)
        if mode == "P":
            image.putpalette([v for v in range(256) for _ in "rgb"])
        image.save(tmp_path / f"train/{i}.png")
    assert (load(tmp_path).train.images == 9).all()
