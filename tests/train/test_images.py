"""Reading image files of all modes that Pillow knows, and of several frames."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.train.image_files import load, noise, write_lists
from train import images
from train.config import TrainError
from train.images import read_image, whole

COLOUR = (200, 60, 30)


def written(path, image, **options):
    image.save(path, **options)
    with Image.open(path) as again:  # the file must hold the mode that the test is about
        assert again.mode == image.mode
    return str(path)


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif"])
def test_sixteen_bit_grey_keeps_its_levels(tmp_path, name):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    red = read_image(written(tmp_path / name, Image.fromarray(ramp)), 16)[:, :, 0]
    assert np.array_equal(red, ramp >> 8) and len(np.unique(red)) > 250


def test_sixteen_bit_pgm_keeps_its_levels(tmp_path):
    ramp = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    (tmp_path / "ramp.pgm").write_bytes(b"P5 16 16 4095\n" + ramp.astype(">u2").tobytes())
    red = read_image(str(tmp_path / "ramp.pgm"), 16)[:, :, 0].astype(int)
    assert abs(red - ramp / 4095 * 255).max() <= 1


def cielab():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    return ImageCms.applyTransform(Image.new("RGB", (8, 8), COLOUR), transform)


@pytest.mark.parametrize(
    "name, image, wanted",
    [
        ("1.png", Image.new("1", (8, 8), 1), (255,) * 3),
        ("l.png", Image.new("L", (8, 8), 9), (9,) * 3),
        ("la.png", Image.new("LA", (8, 8), (9, 255)), (9,) * 3),
        ("rgba.png", Image.new("RGBA", (8, 8), (*COLOUR, 255)), COLOUR),
        ("clear.png", Image.new("RGBA", (8, 8), (0, 0, 0, 0)), (255,) * 3),
        ("half.png", Image.new("RGBA", (8, 8), (0, 0, 0, 128)), (127,) * 3),
        ("cmyk.tif", Image.new("RGB", (8, 8), COLOUR).convert("CMYK"), COLOUR),
        ("cmyk.jpg", Image.new("RGB", (8, 8), COLOUR).convert("CMYK"), COLOUR),
        ("ycbcr.tif", Image.new("RGB", (8, 8), COLOUR).convert("YCbCr"), COLOUR),
        ("lab.tif", cielab(), COLOUR),
        ("p.gif", Image.new("RGB", (8, 8), COLOUR).quantize(), COLOUR),
    ],
)
def test_modes(tmp_path, name, image, wanted):
    pixels = read_image(written(tmp_path / name, image), 8)
    assert pixels.shape == (8, 8, 3) and abs(pixels.astype(int) - wanted).max() <= 2


def test_transparent_palette_colours_are_white(tmp_path):
    image = Image.new("P", (8, 8), 5)
    image.putpalette([0, 0, 0] * 256)
    image.putpixel((0, 0), 7)
    pixels = read_image(written(tmp_path / "p.png", image, transparency=5), 8)
    assert (pixels[0, 0] == 0).all() and (pixels[1:] == 255).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_of_unknown_range_are_refused_by_name(tmp_path, mode):
    path = written(tmp_path / "x.tif", Image.new(mode, (8, 8), 300))
    assert f"its mode {mode} has 32 bits" in read_image(path, 8)
    write_lists(tmp_path, train=[0, 1], test=[0])
    (tmp_path / "x.tif").rename(tmp_path / "train/1.png")
    with pytest.raises(TrainError, match=rf"train/1\.png \(its mode {mode} has 32 bits"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp"])
def test_animated_images_give_their_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (40, 90, 140)]
    options = {"lossless": True} if name == "x.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert (read_image(str(tmp_path / name), 8) == 40).all()


def test_orientation_is_not_applied(tmp_path):
    image, exif = Image.new("RGB", (8, 8)), Image.Exif()
    image.paste(COLOUR, (0, 0, 8, 4))
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "x.png", exif=exif)
    pixels = read_image(str(tmp_path / "x.png"), 8)
    assert (pixels[:4] == COLOUR).all() and (pixels[4:] == 0).all()


def test_a_large_jpeg_is_decoded_near_the_wanted_size(tmp_path, monkeypatch):
    noise(tmp_path / "0.png", 0, (60, 50))
    with Image.open(tmp_path / "0.png") as small:
        image = small.resize((1600, 1200), Image.Resampling.BICUBIC)
    image.save(tmp_path / "x.jpg", quality=95)
    sizes, to_rgb = [], images.to_rgb
    monkeypatch.setattr(images, "to_rgb", lambda image: sizes.append(image.size) or to_rgb(image))
    for box, decoded in (((0, 0, 1600, 1200), (400, 300)), ((500, 300, 800, 700), (1600, 1200))):
        pixels = read_image(str(tmp_path / "x.jpg"), 224, lambda *_, box=box: box)
        assert sizes.pop() == decoded
        wanted = image.crop(box).resize((224, 224), Image.Resampling.BILINEAR)
        error = abs(pixels.astype(int) - np.asarray(wanted))[2:-2, 2:-2]
        assert error.mean() < 3
    assert whole(5, 4) == (0, 0, 5, 4)


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13), b"GIF89a" + b"\0" * 9],
)
def test_damaged_files_give_a_message(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    assert read_image(str(tmp_path / "x.png"), 8).startswith(f"{tmp_path}/x.png (")
