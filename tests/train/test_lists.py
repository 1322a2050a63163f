"""Data sets of list files."""

import os
import re
import time
import tracemalloc

import pytest
import torch

from tests.train.image_files import append, load, names, numbers, png, write_lists
from train.config import TrainError
from train.lists import PUBLISHED, read_list


def test_list_lines(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("/a/x.png 10\nb b/y 1.png 0\n\n \t\n  a/z.png  2 \n//c.png 3", encoding="utf-8")
    split = read_list(path, tmp_path / "images")
    root = tmp_path / "images"
    assert names(split, root) == ["a/x.png", "b b/y 1.png", "a/z.png", "c.png"]
    assert split.labels.tolist() == [10, 0, 2, 3] and split.labels.dtype == torch.int64
    assert [split.where(i) for i in range(4)] == [f"{path}:{n}" for n in (1, 2, 5, 6)]


def test_list_with_a_byte_order_mark(tmp_path):
    (tmp_path / "list.txt").write_text("a.png 0\n", encoding="utf-8-sig")
    assert names(read_list(tmp_path / "list.txt", tmp_path), tmp_path) == ["a.png"]


def test_list_of_a_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        png(tmp_path / name, 5)
    except OSError:
        pytest.skip("this file system allows no such name")
    write_lists(tmp_path, train=[], test=[0])
    (tmp_path / "train.txt").write_bytes(b"caf\xe9.png 0\n")
    assert numbers(load(tmp_path).train) == [5]


@pytest.mark.parametrize(
    "lines, wanted",
    [
        (["a b.png\t3", "c.png \t 4"], [("a b.png", 3), ("c.png", 4)]),
        (["a b.png,3", "c,d.png,4"], [("a b.png", 3), ("c,d.png", 4)]),
        (["a.png, 3", "c.png , 4"], [("a.png", 3), ("c.png", 4)]),
        (["a,.png 3", "c, 4"], [("a,.png", 3), ("c", 4)]),
        (["a,1 3", "b 1,4"], [("a,1", 3), ("b 1", 4)]),
        (["a\x0cb.png 3", "c\u2028d\x85.png 4"], [("a\x0cb.png", 3), ("c\u2028d\x85.png", 4)]),
        (["a.png 3\r", "c.png 007 \r"], [("a.png", 3), ("c.png", 7)]),
        (["./a//x.png 3", "b/../c.png 4"], [("a/x.png", 3), ("c.png", 4)]),
    ],
)
def test_separators_and_odd_characters(tmp_path, lines, wanted):
    (tmp_path / "list.txt").write_bytes("\n".join(lines).encode())
    split = read_list(tmp_path / "list.txt", tmp_path)
    assert list(zip(names(split, tmp_path), split.labels.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named(tmp_path, encoding):
    (tmp_path / "list.txt").write_text("a.png 0\n", encoding=encoding)
    with pytest.raises(TrainError, match=r"list\.txt: got UTF-16 .*wanted a list in UTF-8"):
        read_list(tmp_path / "list.txt", tmp_path)


@pytest.mark.parametrize("part", ["file", "folder"])
def test_a_name_in_another_form_is_explained(tmp_path, part):
    there, listed = "caf\u0065\u0301", "caf\u00e9"
    there, listed = (f"{n}/0.png" if part == "folder" else f"a/{n}.png" for n in (there, listed))
    write_lists(tmp_path, train=[0], test=[0])
    png(tmp_path / there)
    append(tmp_path / "train.txt", f"{listed} 0")
    there, listed = (re.escape(ascii(name)[1:-1]) for name in (there, listed))
    wanted = rf"train\.txt:2: got .*\('.*{there}' is, .*than '.*{listed}'\)"
    with pytest.raises(TrainError, match=wanted):
        load(tmp_path)


def test_a_long_list_is_read_fast_and_kept_small(tmp_path):
    lines, size = (
        [f"train/n{i % 1000:08}/n{i:012}.JPEG {i % 1000}\n" for i in range(200_000)],
        200_000,
    )
    (tmp_path / "list.txt").write_text("".join(lines))
    began = time.process_time()
    read_list(tmp_path / "list.txt", tmp_path)
    assert time.process_time() - began < 1  # 0.25 on one core
    tracemalloc.start()
    split = read_list(tmp_path / "list.txt", tmp_path)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert names(split, tmp_path)[size - 1] == lines[-1].split()[0] and len(split) == size
    # A million of them: 66 MB, and 90 MB for a moment, of which the file has 42 MB.
    assert kept < 70 * size and most < 100 * size


@pytest.mark.parametrize(
    "line", ["a.png", "a.png x", "a.png -1", " 3", "/ 3", "a.png 1.5", "a0", "a " + "9" * 20]
)
def test_bad_list_line_is_named(tmp_path, line):
    path = tmp_path / "list.txt"
    path.write_text(f"good.png 0\n\n{line}\n")
    wanted = f"{re.escape(str(path))}:3: got {re.escape(repr(line))}, wanted"
    with pytest.raises(TrainError, match=wanted):
        read_list(path, tmp_path)


def test_lists_may_lie_elsewhere_and_val_may_be_the_test(tmp_path):
    write_lists(tmp_path, train=[0, 1], val=[1])
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).rename(lists / name)
    data = load(tmp_path, lists=lists)
    assert data.val is None and numbers(data.test) == [2] and numbers(data.train) == [0, 1]


@pytest.mark.parametrize(
    "prefix, dataset",
    [
        ("ImageNet_LT_", "list"),
        ("Places_LT_", "places-lt"),
        ("iNaturalist18_", "inat2018"),
        ("ImageNet_", "imagenet"),
        ("ImageNet_", "list"),
    ],
)
def test_official_names_of_lists(tmp_path, monkeypatch, prefix, dataset):
    if dataset in PUBLISHED:
        monkeypatch.setitem(PUBLISHED, dataset, (2, 2, PUBLISHED[dataset][2]))
    write_lists(tmp_path, train=[0, 1], val=[1], test=[0])
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").rename(tmp_path / f"{prefix}{split}.txt")
    data = load(tmp_path, dataset)
    assert [numbers(split) for _, split in data.splits()] == [[0, 1], [2], [3]]


def test_a_sets_own_list_comes_before_those_of_others(tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "imagenetlt", (1, 1, "ImageNet_LT_"))
    write_lists(tmp_path, train=[0], test=[0])
    (tmp_path / "train.txt").rename(tmp_path / "ImageNet_LT_train.txt")
    (tmp_path / "ImageNet_train.txt").write_text("none.png 0\n")
    assert numbers(load(tmp_path, "imagenetlt").train) == [0]


@pytest.mark.parametrize("missing", ["train", "test"])
def test_missing_list_is_named(tmp_path, missing):
    write_lists(tmp_path, train=[0], test=[0])
    (tmp_path / f"{missing}.txt").unlink()
    with pytest.raises(TrainError, match=f"--data: got .* {missing} images, wanted {missing}.txt"):
        load(tmp_path)


def test_empty_list_is_named(tmp_path):
    write_lists(tmp_path, train=[0], test=[])
    with pytest.raises(TrainError, match=r"test\.txt: got an empty list, wanted"):
        load(tmp_path)


def test_label_that_is_no_class_is_named_with_its_line(tmp_path):
    write_lists(tmp_path, train=[0, 19], test=[0])
    assert load(tmp_path).num_classes == 20  # gaps are allowed
    append(tmp_path / "train.txt", "train/0.png 1000000000000")
    with pytest.raises(TrainError, match=r"train\.txt:3: got class 1000000000000 .*3 classes"):
        load(tmp_path)


def test_published_counts():
    # ILSVRC 2012; OLTR (Liu et al., 2019), table 1; the competitions of iNaturalist.
    for name, published in {
        "imagenet": (1000, 1_281_167),
        "imagenetlt": (1000, 115_846),
        "places-lt": (365, 62_500),
        "inat2018": (8142, 437_513),
        "inat2019": (1010, 265_213),
    }.items():
        assert PUBLISHED[name][:2] == published
