"""The configuration: recipes, flags, and which of them decide a run's result."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from train.config import (
    RECIPES,
    Config,
    TrainError,
    load_recipe,
    parse_config,
    settle,
)
from train.data import LOADERS
from train.lists import PUBLISHED

IMAGE_FILES = {  # net and transforms in the paper
    "imagenet": ("resnet50", "imagenet"),
    "imagenetlt": ("resnet10", "imagenet"),
    "places-lt": ("resnet10", "imagenet"),
    "inat2018": ("resnet50", "inat"),
    "inat2019": ("resnet50", "inat"),
}
IN_MEMORY = {"cifar10-lt": True, "cifar100-lt": True, "fashion-mnist-lt": True, "mnist-lt": False}


def test_every_data_set_has_a_recipe_that_loads():
    assert {*LOADERS, *PUBLISHED} < {*RECIPES}
    for name in RECIPES:
        assert parse_config(["--dataset", name]) == load_recipe(name)


@pytest.mark.parametrize("name", [*IMAGE_FILES, *IN_MEMORY, "list", "folder"])
def test_recipes_have_the_numbers_of_the_paper(name):
    config = load_recipe(name)
    assert config.dataset == name
    own = name in ("list", "folder")
    assert (config.lr, config.weight_decay) == (0.2, 1e-4)
    assert (config.epochs, config.stage2_epochs) == (90, 30)
    assert (config.head, config.kappa, config.select) == ("tvmf", 16, "auto")
    assert (config.scale_lr, config.prior) == (1, 0)
    stage2 = (config.bn, config.sampling, config.stage2_start, config.stage2_prior)
    if own:
        assert (config.batch_size, config.scale_start, config.stage2_lr) == (0, 10, 0.05)
        assert stage2 == ("frozen", "images", "stage1", 1)
    else:
        assert (config.batch_size, config.stage2_lr) == (256, 0)
        assert config.scale_start == pytest.approx(1 + math.log(2))
        assert stage2 == ("batch", "classes", "fresh", 0)
    net, augment = IMAGE_FILES.get(name, ("convnet", "small"))
    if own:
        net, augment = "auto", "auto"
    assert (config.net, config.augment) == (net, augment)
    assert config.flip == IN_MEMORY.get(name, False)
    assert (config.subset, config.label_noise, config.imbalance) == (1, 0, 100)


def test_flags_override_the_recipe_which_overrides_the_defaults():
    config = parse_config(["--dataset=fashion-mnist-lt", "--epochs", "9", "--lr=0.5", "--no-flip"])
    mine = {"epochs": 9, "lr": 0.5, "net": "convnet", "augment": "small"}
    assert config == Config(dataset="fashion-mnist-lt", **mine)
    assert parse_config([]) == load_recipe("digits") != Config(dataset="digits")
    assert parse_config(["--lr", "0.5"]) == dataclasses.replace(load_recipe("digits"), lr=0.5)


def test_data_set_chooses_the_recipe():
    assert parse_config(["--dataset=inat2018"]).augment == "inat"
    assert parse_config(["--seed", "1", "--dataset", "cifar10-lt", "--no-flip"]).flip is False


def test_the_papers_heads():
    for kappa in ("-0.3", "4", "16", "64"):
        assert parse_config(["--head", "tvmf", "--kappa", kappa]).kappa == float(kappa)
    for head in ("softmax", "cosine"):
        assert parse_config(["--head", head]).head == head


@pytest.mark.parametrize(
    "flag, value, wanted",
    [
        ("kappa", "-0.5", "greater than -0.5"),
        ("kappa", "nan", "finite"),
        ("batch_size", "-1", "greater than or equal to 0"),
        ("epochs", "0", "greater than or equal to 1"),
        ("epochs", str(10**30), "less than or equal to 1000000"),
        ("workers", "5000", "less than or equal to 256"),
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
    # tyro prints a box, whose lines break between words.
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert flag in message.replace("-", "_") and value in message and wanted in message


@pytest.mark.parametrize(
    "args, message",
    [
        (["--pretrained"], "--pretrained: got --net convnet, wanted timm:NAME"),
        (["--evaluate"], "--evaluate: got no --model, wanted"),
        (["--shard-classes", "--head", "softmax"], "--shard-classes: got --head softmax, wanted"),
        (["--out", ""], "--out: got the current folder, wanted one of its own"),
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


@pytest.mark.parametrize(
    "images, epochs, batch",
    [(6_151, 15, 32), (6_151, 60, 128), (6_151, 90, 256), (50, 1, 16), (437_513, 90, 256)],
)
def test_batch_of_zero_follows_from_the_number_of_images(images, epochs, batch):
    config = settle(Config(batch_size=0, epochs=epochs), images, 100, 3, small=True)
    assert config.batch_size == batch
    given = settle(Config(batch_size=64, epochs=epochs), images, 100, 3, small=True)
    assert given.batch_size == 64


@pytest.mark.parametrize("evaluated, every", [(100, 1), (600, 1), (1000, 2), (6000, 10)])
def test_evaluation_costs_at_most_a_fifth(evaluated, every):
    assert settle(Config(), 1000, evaluated, 3, small=True).eval_every == every
    assert settle(Config(eval_every=7), 1000, evaluated, 3, small=True).eval_every == 7


def test_net_follows_from_the_images():
    assert settle(Config(), 100, 10, 10, small=True).net == "convnet"
    assert settle(Config(), 99, 10, 10, small=True).net == "gridnet"  # fewer than 10 a class
    assert settle(Config(), 99, 10, 10, small=False).net == "resnet10"
    assert settle(Config(net="resnet50"), 10, 10, 10, small=True).net == "resnet50"
