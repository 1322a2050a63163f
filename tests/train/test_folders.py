"""Data sets of folders, one for each class."""

import os

import numpy as np
import pytest
import torch

from tests.train.image_files import load, numbers, png
from train.config import TrainError, parse_config
from train.data import load_data
from train.lists import PUBLISHED


def write_tree(root, **splits):
    """Writes ROOT/SPLIT/CLASS/N.png for splits of {class: how many}; the images are numbered."""
    number = 0
    for split, classes in splits.items():
        for name, size in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(size):
                png(root / split / name / f"{i:03}.png", number)
                number += 1
    return root


@pytest.mark.parametrize(
    "test, val",
    [("test", None), ("val", None), ("val_dir", None), ("test", "val"), ("test", "val_dir")],
)
def test_folders_of_splits(tmp_path, test, val):
    splits = {"train": {"bee": 2, "ant": 3}, test: {"bee": 1}} | ({val: {"ant": 2}} if val else {})
    write_tree(tmp_path, **splits)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    png(tmp_path / "train/ant/more/x.png", 99)
    (tmp_path / "train/ant/more/x.png").rename(tmp_path / "train/ant/more/X.PNG")
    (tmp_path / "train/.cache").mkdir()
    data = load(tmp_path, "folder")
    # ant is class 0, although it was written last.
    labels = dict(zip(numbers(data.train), data.train.labels.tolist(), strict=True))
    assert labels == {0: 1, 1: 1, 2: 0, 3: 0, 4: 0, 99: 0} and len(data.train) == 6
    assert (data.num_classes, data.counts.tolist()) == (2, [4, 2])
    assert (numbers(data.test), data.test.labels.tolist()) == ([5], [1])
    assert (data.val is None) if val is None else (numbers(data.val) == [6, 7])


def test_imagenet_is_folders_of_the_published_size(tmp_path, monkeypatch):
    write_tree(tmp_path, train={"n01": 2, "n02": 1}, val_dir={"n01": 1, "n02": 1})
    png(tmp_path / "test/flat.png", 0)  # ImageNet's own test images have no classes
    recipe = parse_config(["--dataset", "imagenet", "--data", str(tmp_path)])
    with pytest.raises(TrainError, match=r"got 3 .*1,281,167"):
        load_data(recipe)
    monkeypatch.setitem(PUBLISHED, "imagenet", (2, 3, "ImageNet_"))
    data = load_data(recipe)
    assert (len(data.train), len(data.test), data.val) == (3, 2, None)
    assert (data.augment, data.image_size) == ("imagenet", 224)


def test_a_fifth_of_plain_folders_is_held_out(tmp_path):
    sizes = {"a": 20, "b": 10, "c": 3, "d": 2, "e": 1}
    write_tree(tmp_path, **{".": sizes})
    data, other = load(tmp_path, "folder"), load(tmp_path, "folder", seed=1)
    assert torch.bincount(data.test.labels, minlength=5).tolist() == [4, 2, 1, 1, 0]
    assert data.counts.tolist() == [16, 8, 2, 1, 1] and data.val is None
    assert sorted(numbers(data.train) + numbers(data.test)) == list(range(36))
    assert numbers(other.test) == numbers(data.test)  # every seed has the same test images
    assert numbers(data.test)[:4] != [0, 1, 2, 3]  # they are drawn, not the first ones
    ends = np.cumsum([0, *sizes.values()])
    for split in (data.train, data.test):
        wanted = np.searchsorted(ends, numbers(split), "right") - 1
        assert split.labels.tolist() == wanted.tolist()


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(TrainError, match=r"--data: got .*none, wanted a directory of folders"):
        load(tmp_path / "none", "folder")
    with pytest.raises(TrainError, match="wanted folders with images"):
        load(tmp_path, "folder")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").write_text("no image")
    with pytest.raises(TrainError, match="wanted folders with images"):
        load(tmp_path, "folder")
    write_tree(tmp_path, train={"a": 2, "b": 1})
    with pytest.raises(TrainError, match="train alone, wanted test or val"):
        load(tmp_path, "folder")
    write_tree(tmp_path, test={"a": 1, "c": 1})
    with pytest.raises(TrainError, match=r"test: got the class c, which is not in .*train; wanted"):
        load(tmp_path, "folder")
    write_tree(tmp_path / "new", train={"a": 2}, test={"a": 0})
    with pytest.raises(TrainError, match="got no image in test"):
        load(tmp_path / "new", "folder")


def test_what_is_hidden_is_no_data(tmp_path):
    write_tree(tmp_path, train={"a": 2, "b": 1}, test={"a": 1})
    for name in (".a/0.png", "a/.thumbs/0.png", "a/._0.png", "a/deep/.x/0.png"):
        png(tmp_path / "train" / name, 99)
    data = load(tmp_path, "folder")
    assert numbers(data.train) == [0, 1, 2] and data.num_classes == 2 and data.notes == []


def test_links_are_followed_once(tmp_path):
    write_tree(tmp_path / "data", train={"a": 2, "b": 1}, test={"a": 1})
    png(tmp_path / "pool/c/x.png", 70)
    train = tmp_path / "data/train"
    png(tmp_path / "pool/own.png", 50)
    for link, target in (
        ("c", tmp_path / "pool/c"),  # a class of its own
        ("a/out", tmp_path / "pool/own.png"),  # no image by its name
        ("a/out.png", tmp_path / "pool/own.png"),
        ("a/twice.png", tmp_path / "pool/own.png"),
        ("a/loop", train),
        ("b/up", tmp_path / "data"),
        ("a/b", train / "b"),
        ("b/again.png", train / "b/000.png"),
        ("latest", train / "a"),
    ):
        (train / link).symlink_to(target)
    data = load(tmp_path / "data", "folder")
    labels = dict(zip(numbers(data.train), data.train.labels.tolist(), strict=True))
    assert labels == {0: 0, 1: 0, 50: 0, 2: 1, 70: 2} and len(data.train) == 5
    assert data.num_classes == 3 and len(data.test) == 1 and len(data.notes) == 1
    (train / "b/out.png").symlink_to(tmp_path / "pool/own.png")
    with pytest.raises(
        TrainError, match=r"own\.png for train, class 1, .*names for train, class 0"
    ):
        load(tmp_path / "data", "folder")


def test_files_that_are_no_images_by_their_names_are_counted(tmp_path):
    write_tree(tmp_path, train={"a": 6}, test={"a": 1})
    folder = tmp_path / "train/a"
    for old, new in ((0, "0.gif"), (1, "1.avif"), (2, "2.jfif"), (3, "3"), (4, "4.xyz")):
        (folder / f"00{old}.png").rename(folder / new)
    data = load(tmp_path, "folder")
    assert sorted(numbers(data.train)) == [0, 1, 2, 5]  # a name decides on what is read, not how
    assert data.notes == [
        f"2 files are no images by their names and left out, such as {folder / '3'}"
    ]


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    write_tree(tmp_path, train={"a": 1}, test={"a": 1})
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("train/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(TrainError, match=r"--data: got .*train/a \(Permission denied\), wanted"):
        load(tmp_path, "folder")
