"""The example that makes a set of icons, from a wheel whose icons are letters of Pillow's font."""

import json
import runpy
import sys
import zipfile

import pytest
from PIL import Image, ImageFont

from tests.train.runs import ROOT

ICONS = {
    "materialdesignicons6": ("bell", "bell-outline", "car", "alone"),
    "fontawesome6-solid": ("bell",),
    "fontawesome6-regular": ("bell",),
    "phosphor": ("bell", "bell-fill", "car", "tree"),
    "remixicon": ("bell-line", "car-fill"),
    "codicon": ("empty",),
    "elusiveicons": ("tree",),
}


@pytest.fixture
def wheel(tmp_path):
    font = ImageFont.load_default(20).path.getvalue()
    path = tmp_path / "icons.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for key, names in ICONS.items():
            letters = {name: f"{ord('A') + i:x}" for i, name in enumerate(names)}
            archive.writestr(f"qtawesome/fonts/{key}-webfont-1.ttf", font)
            archive.writestr(f"qtawesome/fonts/{key}-webfont-charmap-1.json", json.dumps(letters))
    return path


def test_icons(monkeypatch, wheel, tmp_path, capsys):
    out = tmp_path / "icons"
    monkeypatch.setattr(sys, "argv", ["icons.py", str(out), "--wheel", str(wheel)])
    runpy.run_path(str(ROOT / "examples/icons.py"), run_name="__main__")
    assert (out / "classes.txt").read_text().split() == ["bell", "car"]
    train, test = (sorted((out / f"{s}.txt").read_text().splitlines()) for s in ("train", "test"))
    fonts = "materialdesignicons6/bell-outline.png 0", "materialdesignicons6/bell.png 0"
    assert test == [*fonts, "materialdesignicons6/car.png 1"]
    assert train == [
        "fontawesome6-regular/bell.png 0",
        "fontawesome6-solid/bell.png 0",
        "phosphor/bell-fill.png 0",
        "phosphor/bell.png 0",
        "phosphor/car.png 1",
        "remixicon/bell-line.png 0",
        "remixicon/car-fill.png 1",
    ]
    with Image.open(out / "phosphor/bell.png") as image:
        assert image.size == (32, 32)
        left, top, right, bottom = image.point(lambda pixel: 255 - pixel).getbbox()
        assert max(right - left, bottom - top) >= 27  # an A that fills the image but its margin
        assert image.getpixel((0, 0)) == 255 and image.getextrema()[0] < 30
    assert "2 classes, 7 images in train.txt, 3 images in test.txt" in capsys.readouterr().out
