"""The configuration: one flat dataclass, filled from recipes.toml, then the command line."""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")  # the link adds nothing to an error

import tyro
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from pydantic.dataclasses import dataclass

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = tomllib.loads(Path(__file__).with_name("recipes.toml").read_text(encoding="utf-8"))
# A batch of 0 becomes the largest power of two with which stage 1 has this many steps.
ENOUGH_STEPS, SMALLEST_BATCH = 2000, 16
# From fewer images a class than this, a net does not learn which places in an image mean the same.
FEW_IMAGES = 10
# Fields that do not decide a run's result: --resume may change them, and runs that differ in them
# alone are one group in a report.
NO_RESULT = ("out", "resume", "data", "lists", "download")
NO_RESULT += ("device", "workers", "checkpoint_minutes", "shard_classes")

Dataset = Literal[tuple(RECIPES)]
Count = Annotated[int, Field(ge=0, le=10**6)]
NETS = "^(auto|convnet|gridnet|resnet10|resnet50|timm:.+)$"


class TrainError(ValueError):
    """An error that the user can put right; its message says what was got and what was wanted."""


@dataclass(frozen=True, config={"extra": "forbid", "allow_inf_nan": False})
class Config:
    """The flags of the command, with the paper's settings as defaults; train/data.py, model.py and
    fit.py give them their meaning."""

    dataset: Dataset = "digits"
    """Data set, which chooses the recipe of its name. list: DATA/train.txt, test.txt and perhaps
    val.txt, lines of `relative/path label`. folder: DATA/train/CLASS/*, DATA/test, DATA/val."""
    data: Path = Path("data")
    """Directory of the images, or of torchvision's files of MNIST and CIFAR."""
    lists: Path | None = None
    """Directory of the list files, where that is not DATA."""
    download: bool = False
    """Let torchvision download MNIST, Fashion-MNIST or CIFAR to DATA."""
    imbalance: Annotated[float, Field(ge=1)] = 100.0
    """Images of the largest class over those of the smallest, in digits and *-lt."""
    subset: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each class's training images to keep, at least one: small-scale training."""
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of training labels to replace by another class, drawn uniformly: symmetric noise."""
    augment: Literal["auto", "imagenet", "inat", "small"] = "auto"
    """Transforms: ImageNet's, iNaturalist's, or a shift of small images, which are kept in memory;
    auto: by image size."""
    flip: bool = False
    """Mirror small images at random; the other transforms always do so."""
    image_size: NonNegativeInt = 0
    """Side of the images in pixels. 0: small images keep their size, others get at most 224."""
    net: Annotated[str, Field(pattern=NETS)] = "auto"
    """convnet or gridnet (for 28 to 64 pixels), resnet10, resnet50 or timm:NAME; auto: by image
    size."""
    pretrained: bool = False
    """Let timm load the pretrained weights of timm:NAME."""
    model: Path | None = None
    """A stage1.pt of ours, or a model_best.pth.tar of the paper's code: stage 2 begins from it."""
    evaluate: bool = False
    """Only test MODEL, with the head that it holds."""
    head: Literal["softmax", "cosine", "tvmf"] = "tvmf"
    """Head of stage 1."""
    kappa: Annotated[float, Field(gt=-0.5)] = 16.0
    """Concentration of the t-vMF similarity; the other heads have none."""
    prior: NonNegativeFloat = 0.0
    """TAU of logit adjustment in stage 1: the loss adds TAU times the logarithm of the class
    frequencies to the logits. 1 is balanced softmax."""
    scale_start: Annotated[float, Field(gt=1)] = 1 + math.log(2)
    """Scale of the cosine and t-vMF heads at the start; 1 + ln 2 in the paper's code."""
    scale_lr: NonNegativeFloat = 1.0
    """Learning rate of the scale's parameter, as a multiple of the other parameters' rate."""
    epochs: Annotated[int, Field(ge=1, le=10**6)] = 90
    """Epochs of stage 1: backbone and head, every image equally often."""
    stage2_epochs: Count = 30
    """Epochs of stage 2: a new cosine head on the frozen backbone, which balances the classes."""
    sampling: Literal["classes", "sqrt", "images"] = "classes"
    """Stage 2 draws every class equally often, by the square root of its size, or every image
    equally often."""
    stage2_start: Literal["fresh", "means", "stage1"] = "fresh"
    """Weights of stage 2's head at the start: random, the mean training feature of each class, or
    those of stage 1's head."""
    stage2_prior: NonNegativeFloat = 0.0
    """TAU of logit adjustment in stage 2."""
    batch_size: NonNegativeInt = 256
    """Images in a step, over all processes. 0: so few that stage 1 has enough steps."""
    stage2_batch_size: NonNegativeInt = 0
    """The same in stage 2. 0: that of stage 1."""
    lr: PositiveFloat = 0.2
    """Learning rate of the first epoch; it falls to zero as a half cosine."""
    stage2_lr: NonNegativeFloat = 0.0
    """The same in stage 2. 0: that of stage 1."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay of all parameters."""
    bn: Literal["batch", "frozen"] = "batch"
    """Batch norm in stage 2: normalise by the batch and update the running statistics, as the
    paper's code does; or leave them alone."""
    views: NonNegativeInt = 2
    """Epochs of stage 2 whose features are computed once and then used again and again. 0: the
    backbone runs in every epoch."""
    select: Literal["auto", "val", "last", "test"] = "auto"
    """Which epoch's model is the result: the best on val, the last, or, knowingly, the best on
    test; auto is val where there is one, else last."""
    eval_every: NonNegativeInt = 0
    """Epochs between evaluations; the last is always evaluated. 0: so many that evaluation costs at
    most a fifth of the training."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of autocast."""
    shard_classes: bool = False
    """Spread the classes of the head over the processes, each of which then holds the vectors of
    its own classes alone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    workers: Annotated[int, Field(ge=0, le=256)] = 4
    """Processes that read image files, for each training process."""
    checkpoint_minutes: PositiveFloat = 15.0
    """Minutes after which a checkpoint is saved within an epoch, too."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights, of the order of the images and of their augmentation."""
    out: Path = Path("out")
    """Directory of checkpoint.pt, stage1.pt, stage2.pt, metrics.jsonl and result.json."""
    resume: bool = False
    """Go on from the checkpoint in OUT; without it, an earlier run in OUT is replaced."""

    def as_dict(self) -> dict[str, Any]:
        """The fields in types that JSON and a checkpoint can hold."""
        fields = dataclasses.asdict(self).items()
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields}

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result of a run: equal for a run and its continuation."""
        return {k: v for k, v in self.as_dict().items() if k not in NO_RESULT}


def settle(config: Config, images: int, evaluated: int, classes: int, small: bool) -> Config:
    """The configuration with what it leaves to the data set: `images` training images of `classes`
    classes, `evaluated` images after an epoch, all of them `small` or not."""
    chosen: dict[str, Any] = {}
    if config.net == "auto":
        net = "gridnet" if images < FEW_IMAGES * classes else "convnet"
        chosen["net"] = net if small else "resnet10"
    if not config.batch_size:
        most = max(1, images * config.epochs // ENOUGH_STEPS)
        power = 1 << most.bit_length() - 1
        chosen["batch_size"] = min(max(power, SMALLEST_BATCH), Config.batch_size)
    if not config.eval_every:
        # An image costs a third in evaluation of what its forward and backward pass cost.
        chosen["eval_every"] = math.ceil(5 * evaluated / (3 * images))
    return dataclasses.replace(config, **chosen)


def load_recipe(dataset: str) -> Config:
    """The configuration of a data set where no flag says otherwise."""
    return Config(**RECIPES[dataset] | {"dataset": dataset})


def parse_config(args: Sequence[str]) -> Config:
    """The recipe of the data set that `args` name, overridden by the other flags."""
    first = argparse.ArgumentParser(prog="python -m train", add_help=False, allow_abbrev=False)
    first.add_argument("--dataset")
    given, _ = first.parse_known_args(args)
    # tyro refuses an unknown data set below.
    default = load_recipe(given.dataset if given.dataset in RECIPES else Config.dataset)
    about = "Train a classifier on long-tailed data, in two stages."
    config = tyro.cli(Config, prog=first.prog, args=args, default=default, description=about)
    if config.pretrained and not config.net.startswith("timm:"):
        raise TrainError(f"--pretrained: got --net {config.net}, wanted timm:NAME")
    if config.shard_classes and config.head == "softmax" and not config.model:
        raise TrainError("--shard-classes: got --head softmax, wanted --head tvmf or cosine")
    if config.out == Path():
        raise TrainError("--out: got the current folder, wanted one of its own")
    if config.evaluate and not config.model:
        raise TrainError("--evaluate: got no --model, wanted a model file")
    return config
