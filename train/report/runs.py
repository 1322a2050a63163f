"""Runs as a report reads them: their records, results and analyses, in groups of equal flags."""

import contextlib
import dataclasses
import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from train.config import NO_RESULT, Config, TrainError

STAGES = (1, 2)


@dataclasses.dataclass
class Group:
    """Runs that differ only in their seed. An unfinished run is a group by itself."""

    label: str
    runs: list[dict[str, Any]]

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0]["config"]

    def results(self, stage: int) -> list[dict[str, Any]]:
        """The stage's figures of each run that has finished it."""
        return [run[f"stage{stage}"] for run in self.runs if f"stage{stage}" in run]

    def analyses(self, stage: int) -> list[dict[str, Any]]:
        """The stage's analysis of each run that has written one."""
        return [run["analysis"][stage] for run in self.runs if stage in run["analysis"]]


def class_errors(run: dict[str, Any], stage: int, adjusted: bool = False) -> list | None:
    """The error of each class in percent, perhaps after the prior adjustment; None where the run
    has none, and an element None for a class without test images."""
    result = run.get(f"stage{stage}", {})
    accuracy = (result.get("adjusted", {}) if adjusted else result).get("class_accuracy")
    return accuracy and [None if a is None else 100 - a for a in accuracy]


def change(after: list | None, before: list | None) -> list | None:
    """after - before, class by class, as far as both are known."""
    if not after or not before:
        return None
    pairs = zip(after, before, strict=True)
    return [None if a is None or b is None else a - b for a, b in pairs]


def read_json(file: Path) -> Any:
    """The content of a JSON file; None where there is none, or only a part of one."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(file.read_text("utf-8"))
    return None


def load_run(path: Path) -> dict[str, Any]:
    """What a run left in its directory.

    Returns {"path", "epochs": the records of metrics.jsonl in order, "analysis": {stage: content
    of its analysis.json}}, and the content of result.json, or {"config": {}} for an unfinished
    run. Raises TrainError if there is neither file, or if result.json holds no result.
    """
    log, file = path / "metrics.jsonl", path / "result.json"
    if not log.is_file() and not file.is_file():
        raise TrainError(f"RUN: got {path}, wanted a directory with metrics.jsonl or result.json")
    records, result = {}, {"config": {}}
    # A killed run may leave half a record, and the resumed run then writes on in the same line.
    for part in re.split(r'\n|(?={"stage")', log.read_text("latin-1") if log.is_file() else ""):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(part)
            records[record["stage"], record["epoch"]] = record  # the last, if it was repeated
    if file.is_file():
        result = read_json(file)
        if not isinstance(result, dict) or not {"config", "dataset"} <= set(result):
            raise TrainError(f"{file}: got no JSON with config and dataset, wanted a run's result")
    analysis = {n: read_json(path / f"stage{n}.analysis.json") for n in STAGES}
    run = {"path": path, "epochs": [records[key] for key in sorted(records)]}
    return run | {"analysis": {n: a for n, a in analysis.items() if a}} | result


def typed(value: Any) -> str:
    """A setting as one types it: 0.1, 20, not 20.0."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def head_of(config: dict[str, Any]) -> str:
    return f"t-vMF κ={typed(config['kappa'])}" if config["head"] == "tvmf" else config["head"]


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What sets an experiment apart: all but where and how it ran, the seed, and a kappa that its
    head does not use. A flag that an older version did not have is as if left out."""
    left_out = {*NO_RESULT, "seed", *(() if config["head"] == "tvmf" else ("kappa",))}
    given = {field.name: field.default for field in dataclasses.fields(Config)} | config
    return {k: v for k, v in given.items() if k not in left_out}


def telling_settings(configs: list[dict[str, Any]]) -> list[str]:
    """The settings, beside the head, by which a label tells these experiments apart. One that
    follows from the data set, as most of a recipe does, tells nothing more."""
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: {typed(config[key]) for config in configs if key in config} for key in keys}
    told = [k for k in keys if len(values[k]) > 1 and k not in ("head", "kappa")]

    def follows(key):
        pairs = {(typed(config.get("dataset")), typed(config.get(key))) for config in configs}
        return key != "dataset" and "dataset" in told and len(pairs) == len(values["dataset"])

    return [k for k in told if not follows(k)]


def order_of(config: dict[str, Any], told: list[str]) -> tuple:
    """A key that sorts groups: softmax, cosine, t-vMF by kappa, then by what the label tells."""
    head = {"softmax": -2.0, "cosine": -1.0}.get(config["head"], config.get("kappa"))
    values = [config.get(key) for key in told]
    numbers = [isinstance(value, (int, float)) for value in values]
    rest = [(0, v, "") if n else (1, 0, str(v)) for v, n in zip(values, numbers, strict=True)]
    return head, rest, json.dumps(config, sort_keys=True)


def group_runs(runs: list[dict[str, Any]]) -> list[Group]:
    """Groups of the runs whose settings are equal, in their order; unfinished runs come last.

    A label says only what differs between the groups, and always if the result was selected on
    the test images. Raises TrainError if a group has a seed twice, which would look like
    agreement between seeds.
    """
    finished = [run for run in runs if run["config"]]
    told = telling_settings([settings(run["config"]) for run in finished])
    several_heads = len({head_of(run["config"]) for run in finished}) > 1
    keyed = [(order_of(settings(run["config"]), told), run) for run in finished]
    keyed.sort(key=lambda pair: (pair[0], pair[1]["config"]["seed"]))
    groups = []
    for _, members in groupby(keyed, key=lambda pair: pair[0]):
        group = Group("", [run for _, run in members])
        config = settings(group.config)
        parts = [head_of(config)] if several_heads or not told else []
        parts += [f"{key}={typed(config[key])}" for key in told if key in config]
        if config.get("select") == "test" and "select" not in told:
            parts.append("select=test")
        group.label = ", ".join(parts)
        seeds = [run["config"]["seed"] for run in group.runs]
        for seed in {seed for seed in seeds if seeds.count(seed) > 1}:
            raise TrainError(f"RUN: got seed {seed} twice for {group.label}, wanted each seed once")
        groups.append(group)
    labels = [group.label for group in groups]
    for group in groups:
        if labels.count(group.label) > 1:  # they differ in a flag that one version does not have
            group.label += f" ({group.runs[0]['path']})"
    left = [Group(f"unfinished: {run['path']}", [run]) for run in runs if not run["config"]]
    return groups + left


def describe(runs: list[dict[str, Any]]) -> str:
    """How many runs there are, on which data, and which of them are unfinished."""
    text = "{config[dataset]}, {config[net]}: {dataset[train]:,} training and {dataset[test]:,} "
    text += "test images of {dataset[classes]:,} classes"
    done = dict.fromkeys(text.format(**run) for run in runs if run["config"])
    left = [f"unfinished: {r['path']} ({len(r['epochs'])} epochs)" for r in runs if not r["config"]]
    return "; ".join([f"{len(runs)} run{'s' * (len(runs) != 1)}", *done, *left]) + "."
