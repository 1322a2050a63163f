"""Makes a long-tailed set of icons: the same concept as several icon fonts draw it.

    python examples/icons.py data/icons
    python -m train --dataset list --data data/icons --epochs 60 --stage2-epochs 20

The fonts are those of the Python package QtAwesome, which pip fetches; each has a free licence.
A class is a name, such as `bell`, that Material Design Icons and another font have in common. All
icons of Material Design Icons are test images, those of the other fonts are training images.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PACKAGE = "qtawesome==1.4.2"
TEST = "materialdesignicons6"
TRAIN = ("fontawesome6-solid", "fontawesome6-regular", "phosphor", "remixicon", "codicon")
TRAIN += ("elusiveicons",)
# A concept's styles, which are images of one class.
STYLES = re.compile(r"-(fill|line|outline|light|thin|bold|variant)$")
SIDE, MARGIN = 32, 2  # pixels


def download(folder: str) -> Path:
    """The package's wheel, which pip fetches as it is configured."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE]
    subprocess.run(command, check=True)
    return next(Path(folder).glob("*.whl"))


def read_fonts(wheel: Path) -> dict[str, tuple[bytes, dict[str, str]]]:
    """The font file and the character of each icon, under the names of TEST and TRAIN."""
    fonts = {}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for key in (TEST, *TRAIN):
            ours = [name for name in names if name.startswith(f"qtawesome/fonts/{key}-")]
            font = archive.read(next(name for name in ours if name.endswith(".ttf")))
            characters = json.loads(archive.read(next(n for n in ours if n.endswith(".json"))))
            fonts[key] = font, {name: chr(int(c, 16)) for name, c in characters.items()}
    return fonts


def draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """The icon in black on white, as large as the image allows; None where it is empty."""
    left, top, right, bottom = font.getbbox(character)
    longest = max(right - left, bottom - top)
    if min(right - left, bottom - top) < 1:
        return None
    sheet = Image.new("L", (longest, longest), 255)
    corner = ((longest - left - right) / 2, (longest - top - bottom) / 2)
    ImageDraw.Draw(sheet).text(corner, character, fill=0, font=font)
    image = Image.new("L", (SIDE, SIDE), 255)
    inner = SIDE - 2 * MARGIN
    image.paste(sheet.resize((inner, inner), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory for the images and their lists")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {PACKAGE} that is already here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fonts = read_fonts(options.wheel or download(folder))
    found = {key: defaultdict(list) for key in fonts}
    for key, (_, characters) in fonts.items():
        for name in characters:
            found[key][STYLES.sub("", name)].append(name)
    known = set().union(*(found[key] for key in TRAIN))
    classes = sorted(known & set(found[TEST]))
    lists = {"train": [], "test": []}
    for key, (file, characters) in fonts.items():
        font = ImageFont.truetype(BytesIO(file), 160)
        (options.out / key).mkdir(parents=True, exist_ok=True)
        for label, concept in enumerate(classes):
            for name in found[key][concept]:
                if image := draw(font, characters[name]):
                    image.save(options.out / key / f"{name}.png")
                    split = "test" if key == TEST else "train"
                    lists[split].append(f"{key}/{name}.png {label}")
    for split, lines in lists.items():
        (options.out / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (options.out / "classes.txt").write_text("\n".join(classes) + "\n")
    print(
        f"{options.out}: {len(classes)} classes, "
        + ", ".join(f"{len(lines)} images in {split}.txt" for split, lines in lists.items())
    )


if __name__ == "__main__":
    main()
