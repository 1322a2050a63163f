"""A page in headless Chromium: what it draws, as text and as pictures."""

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path

from PIL import Image

from train.config import TrainError

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
FLAGS += ("--hide-scrollbars", "--virtual-time-budget=20000")  # ms for the page to draw itself
SECONDS = 100


def find() -> str | None:
    """The path of Chromium, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def run(address: str, *flags: str) -> str:
    """Opens a page in a browser that has never run before; returns what the flags make it print."""
    browser = find()
    if browser is None:
        raise TrainError(
            f"--pictures: got no {NAMES[0]} on PATH, wanted Chromium (Debian: apt install chromium)"
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrainError(f"--pictures: got exit code {done.returncode} of {browser} ({last})")
    return done.stdout


def dump(page: Path, query: str = "", width: int = 1400, height: int = 1000) -> str:
    """The page as HTML after its scripts have run."""
    return run(f"{page.resolve().as_uri()}{query}", f"--window-size={width},{height}", "--dump-dom")


def pictures(page: Path, width: int = 1400) -> list[Path]:
    """Writes page.png, and a PNG of each section, beside the page."""
    found = re.search(r'data-boxes="([^"]+)"', dump(page, "?picture", width))
    if found is None:
        raise TrainError(f"--pictures: got {page}, which {find()} cannot draw")
    boxes = json.loads(unescape(found[1]))
    whole = page.with_name("page.png")
    whole.unlink(missing_ok=True)
    size = f"--window-size={width},{boxes['page'][3]}"
    run(f"{page.resolve().as_uri()}?picture", size, f"--screenshot={whole.resolve()}")
    if not whole.exists():
        raise TrainError(f"--pictures: got no {whole} from {find()}, wanted a picture of the page")
    paths = [page.with_name(f"{section}.png") for section in boxes]
    with Image.open(whole) as image:
        for path, box in zip(paths[1:], list(boxes.values())[1:], strict=True):
            image.crop(box).quantize(256).save(path, optimize=True)
    return paths
