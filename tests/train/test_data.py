"""The steps for every data set: checks of its files, transforms by size, images in memory."""

import dataclasses
import re

import pytest
import torch

from tests.train.image_files import append, load, names, numbers, png, spoil, write_lists
from train.config import TrainError, parse_config
from train.data import load_data
from train.lists import PUBLISHED


def test_small_listed_images_are_read_into_memory(tmp_path):
    write_lists(tmp_path, train=[0, 2, 2, 1], test=[1, 0], val=[2])
    data = load(tmp_path)
    assert (data.num_classes, data.counts.tolist()) == (3, [1, 1, 2])
    assert (data.augment, data.image_size) == ("small", 8)
    assert data.train.images.shape == (4, 3, 8, 8) and data.train.images.dtype == torch.uint8
    for split, there, labels in (
        (data.train, [0, 1, 2, 3], [0, 2, 2, 1]),
        (data.test, [4, 5], [1, 0]),
        (data.val, [6], [2]),
    ):
        assert numbers(split) == there and split.labels.tolist() == labels
    assert [name for name, _ in data.splits()] == ["train", "val", "test"]


@pytest.mark.parametrize("name", ["train/none.png", "nowhere/0.png"])
def test_missing_file_is_named_with_its_line(tmp_path, name):
    write_lists(tmp_path, train=[0, 1], test=[0])
    append(tmp_path / "train.txt", f"{name} 1")
    with pytest.raises(TrainError, match=rf"train\.txt:3: got .*{name}, which is not there"):
        load(tmp_path)


def test_class_out_of_range_is_named_with_its_line(tmp_path, monkeypatch):
    write_lists(tmp_path, train=[0, 2], test=[1, 3, 2])
    with pytest.raises(TrainError, match=r"test\.txt:2: got class 3, wanted .*\(0 to 2\)"):
        load(tmp_path)
    monkeypatch.setitem(PUBLISHED, "inat2019", (2, 2, "iNaturalist19_"))
    with pytest.raises(TrainError, match=r"train\.txt:2: got class 2, wanted .*\(0 to 1\)"):
        load(tmp_path, "inat2019")


@pytest.mark.parametrize("other", ["test", "val"])
def test_image_in_two_splits_is_named_with_both_lines(tmp_path, other):
    write_lists(tmp_path, train=[0, 1, 1], test=[0], val=[1])
    append(tmp_path / f"{other}.txt", "/train/1.png 1")
    wanted = rf"{other}\.txt:2: got .*train/1\.png for {other}, .*train\.txt:2 names for train"
    with pytest.raises(TrainError, match=wanted):
        load(tmp_path)


@pytest.mark.parametrize("again", ["train/1.png", "train/../train//1.png"])
def test_image_twice_in_one_split_is_told(tmp_path, again):
    write_lists(tmp_path, train=[0, 1], test=[0])
    assert load(tmp_path).notes == []
    append(tmp_path / "train.txt", f"{again} 1")
    data = load(tmp_path)
    assert numbers(data.train) == [0, 1, 1]
    assert re.match(r"1 images .* once, such as .*train/1\.png \(.*train\.txt:3\)", data.notes[0])
    append(tmp_path / "train.txt", f"{again} 0")
    wanted = (
        r"txt:4: got .*1\.png for train, class 0, which .*:[23] names for train, class 1; wanted"
    )
    with pytest.raises(TrainError, match=wanted):
        load(tmp_path)


def test_published_sets_are_held_to_their_counts(tmp_path, monkeypatch):
    write_lists(tmp_path, train=[0, 1, 1], test=[1])
    with pytest.raises(TrainError, match=r"got 3 .*wanted the 115,846 .*imagenetlt as published"):
        load(tmp_path, "imagenetlt")
    monkeypatch.setitem(PUBLISHED, "imagenetlt", (3, 3, "ImageNet_LT_"))
    with pytest.raises(TrainError, match=r" 2 classes.* 3 .*--dataset list"):
        load(tmp_path, "imagenetlt")
    monkeypatch.setitem(PUBLISHED, "imagenetlt", (2, 3, "ImageNet_LT_"))
    recipe = parse_config(["--dataset", "imagenetlt", "--data", str(tmp_path)])
    data = load_data(recipe)
    # The recipe's transforms hold for images of any size.
    assert (data.augment, data.image_size, data.num_classes) == ("imagenet", 224, 2)
    assert names(data.train, tmp_path) == ["train/0.png", "train/1.png", "train/2.png"]
    assert load_data(dataclasses.replace(recipe, image_size=64)).image_size == 64


def test_subset_and_noise_leave_counts_and_test_alone(tmp_path):
    train, test = [0] * 20 + [1] * 10 + [2] * 3, [0, 1, 2]
    write_lists(tmp_path, train=train, test=test)
    plain, data = load(tmp_path), load(tmp_path, subset=0.5, label_noise=0.4)
    assert data.counts.tolist() == [10, 5, 2]  # counted before the noise
    true = torch.tensor(train)[numbers(data.train)]
    assert (data.train.labels != true).sum() == round(0.4 * 17)
    assert torch.equal(data.test.labels, plain.test.labels)
    assert plain.counts.tolist() == [20, 10, 3] and plain.train.labels.tolist() == train
    again, other = (load(tmp_path, subset=0.5, label_noise=0.4, seed=s) for s in (0, 1))
    assert torch.equal(again.train.labels, data.train.labels)
    assert numbers(again.train) == numbers(data.train) != numbers(other.train)


def test_noise_needs_another_class(tmp_path):
    write_lists(tmp_path, train=[0, 0], test=[0])
    with pytest.raises(TrainError, match="--label-noise: got a single class, wanted two"):
        load(tmp_path, label_noise=0.5)


@pytest.mark.parametrize(
    "sizes, options, augment, wanted",
    [
        ([(28, 28)], {}, "small", 28),
        ([(64, 64)], {}, "small", 64),
        ([(65, 65)], {}, "imagenet", 64),
        ([(100, 130)], {}, "imagenet", 96),
        ([(200, 40)], {}, "small", 40),  # the shorter side
        ([(300, 280)], {}, "imagenet", 224),
        ([(10, 10), (10, 10), (300, 300)], {}, "small", 10),  # the median
        ([(20, 20)], {"augment": "imagenet"}, "imagenet", 32),
        ([(80, 80)], {"augment": "inat"}, "inat", 64),
        ([(28, 28)], {"image_size": 16}, "small", 16),
        ([(300, 300)], {"image_size": 112}, "imagenet", 112),
        ([(100, 100)], {"augment": "small"}, "small", 100),
        ([(100, 100)], {"augment": "small", "image_size": 32}, "small", 32),
    ],
)
def test_image_size_decides(tmp_path, sizes, options, augment, wanted):
    write_lists(tmp_path, train=range(len(sizes)), test=[0])
    for i, size in enumerate(sizes):
        png(tmp_path / f"train/{i}.png", i, size)
    data = load(tmp_path, **options)
    assert (data.augment, data.image_size) == (augment, wanted)
    if augment == "small":
        assert data.train.images.shape == (len(sizes), 3, wanted, wanted)
        assert data.test.images.shape == (1, 3, wanted, wanted)
        assert numbers(data.train) == list(range(len(sizes)))
    else:
        assert names(data.train, tmp_path) == [f"train/{i}.png" for i in range(len(sizes))]


@pytest.mark.parametrize("how", ["truncated", "text", "empty", "folder"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_image_in_memory_is_named(tmp_path, how, split):
    write_lists(tmp_path, train=[0, 1, 2], test=[2, 1, 0], val=[1])
    spoil(tmp_path / split / ("1.png" if split == "train" else "4.png"), how)
    with pytest.raises(TrainError, match=rf"1 of 3 {split} images .*{split}/[14]\.png \("):
        load(tmp_path)
