"""The training of a stage: which epoch is the result, the scale, divergence, no waits."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.runs import (
    NOW,
    configure,
    equal,
    feat,
    in_memory,
    left,
    load_state,
    mlp,
    records,
    train_both,
)
from train import checkpoint, command, fit, stages
from train.augment import channel_statistics
from train.config import TrainError
from train.fit import Fit
from train.model import Classifier, head_of_state
from train.report import analysis
from train.session import Session


@pytest.fixture
def unlearning(monkeypatch, small_net):
    """Data for runs whose loss falls for three epochs and then rises. The labels of the test set
    are wrong, so that a late epoch is the best one on it."""
    monkeypatch.setattr(fit, "cosine_lr", lambda lr, epoch, _: lr if epoch < 3 else -lr)
    data = in_memory((24, 24, 24, 24), (9, 9, 9, 9), (9, 9, 9, 9))
    data.test.labels = (data.test.labels + 1) % 4
    return data


@pytest.mark.parametrize(
    "select, val, told, shown",
    [
        ("auto", True, "val", "val"),
        ("val", True, "val", "val"),
        ("auto", False, "last epoch", "test"),
        ("last", True, "last epoch", "val"),
        ("test", True, "test", "test"),
        ("test", False, "test", "test"),
    ],
)
def test_selection(monkeypatch, unlearning, tmp_path, capsys, select, val, told, shown):
    data, states = unlearning, {}
    data.val = data.val if val else None
    save = checkpoint.save

    def keep(out, state):
        if not state["step"]:
            states[state["stage"], state["epoch"]] = copy.deepcopy(state)
        save(out, state)

    monkeypatch.setattr(checkpoint, "save", keep)
    config = configure(tmp_path, epochs=6, stage2_epochs=3, head="softmax", select=select)
    session = Session(config, data)
    results = stages.train(session)
    errors = [record[shown]["error1"] for (s, _), record in records(tmp_path).items() if s == 1]
    best = 1 + errors.index(min(errors)) if told in ("val", "test") else 6
    assert errors[2] != errors[5]
    assert {"val": best <= 3, "test": best > 3}.get(told, True)
    assert not any(("test" if shown == "val" else "val") in r for r in records(tmp_path).values())

    for stage, last in ((1, best), (2, results["stage2"]["epoch"])):
        report, model = results[f"stage{stage}"], load_state(tmp_path / f"stage{stage}.pt")
        assert (report["selected_on"], report["epoch"], model["epoch"]) == (told, last, last)
        assert equal(model["fc_state_dict"], dict(states[stage, last]["head"]))
        assert equal(model["feat_state_dict"], dict(states[stage, last]["net"]))
    net = mlp().eval()
    net.load_state_dict(feat(tmp_path / "stage1.pt"))
    mean, std = channel_statistics(data.train.images)
    with torch.no_grad():
        features = net((data.test.images / 255 - mean) / std)
    head = head_of_state(load_state(tmp_path / "stage1.pt")["fc_state_dict"])
    wrong = head.logits(features).argmax(1) != data.test.labels
    assert results["stage1"]["error1"] == pytest.approx(100 * wrong.double().mean().item())
    command.print_table(session, results)
    assert capsys.readouterr().out.count(told) >= 2  # in the row of each stage


def test_selection_on_val_needs_val(unlearning, tmp_path):
    unlearning.val = None
    with pytest.raises(TrainError, match="--select: got val"):
        train_both(configure(tmp_path, select="val"), unlearning)


def finite(state):
    tensors = [*state["net"].values(), *state["head"].values()]
    tensors += [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
    return all(t.isfinite().all() for t in tensors)


def test_divergence(small_net, tmp_path):
    data = in_memory()
    with pytest.raises(TrainError, match=r"--lr: got 1e\+20.* loss became (nan|inf) in epoch 1"):
        train_both(configure(tmp_path / "a", lr=1e20, head="softmax"), data)
    assert not (tmp_path / "a/checkpoint.pt").exists()
    with pytest.raises(TrainError, match=r"--stage2-lr: got 1e\+20.* loss became"):
        train_both(configure(tmp_path / "b", stage2_lr=1e20), data)


@pytest.mark.parametrize("minutes", [15.0, NOW])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("number", [6, 8, 11])  # within epoch 2, in its last step, in stage 2
def test_nan(monkeypatch, undisturbed, small_net, tmp_path, minutes, poison, number):
    """A NaN in the loss of one step, or in its gradient alone, which shows one step later."""
    data, _, wanted = undisturbed
    config = configure(tmp_path, checkpoint_minutes=minutes)
    forward, calls = Classifier.forward, itertools.count(1)

    def poisoned(*args):
        loss, counts = forward(*args)
        if next(calls) == number:
            if poison == "gradient":
                loss.register_hook(lambda gradient: gradient * math.nan)
            else:
                loss = loss * math.nan
        return loss, counts

    with monkeypatch.context() as patch, pytest.raises(TrainError, match="became nan in epoch"):
        patch.setattr(Classifier, "forward", poisoned)
        train_both(config, data)
    assert not (tmp_path / "result.json").exists()
    saved = load_state(tmp_path / "checkpoint.pt")
    assert finite(saved)
    train_both(dataclasses.replace(config, resume=True), data)
    assert equal(left(tmp_path)[:3], wanted[:3])


def test_scale_has_a_start_and_a_rate_of_its_own(small_net, tmp_path):
    data, scales = in_memory((60, 30, 8, 4)), {}
    for name, settings in {
        "reference": {},
        "fast": {"scale_lr": 10.0},
        "slow": {"scale_lr": 0.1},
        "fixed": {"scale_lr": 0.0, "scale_start": 20.0, "weight_decay": 0.0},
    }.items():
        config = configure(tmp_path / name, kappa=4.0, **settings)
        train_both(config, data)
        scales[name] = [record["scale"] for record in records(config.out).values()]
    assert scales["fixed"] == pytest.approx([20.0] * 4)
    assert scales["slow"][1] < scales["reference"][1] < scales["fast"][1]
    assert 1 + math.log(2) < scales["slow"][0] < scales["reference"][0]
    # A step of the scale's parameter is longer by the factor scale_lr.
    rise = {n: math.log(math.expm1(scales[n][0] - 1)) for n in ("slow", "reference")}
    assert rise["reference"] / rise["slow"] == pytest.approx(10, rel=0.3)


class Waits(TorchDispatchMode):
    """Counts calls that would wait for a GPU if the tensor were there."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        conversions = ("__bool__", "__float__", "__int__", "__index__", "__contains__")
        for name in ("item", "tolist", "numpy", "cpu", "nonzero", *conversions):
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def call(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waiting = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}
        self.count += function.overloadpacket.__name__ in waiting
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("views", [0, 1])
@pytest.mark.parametrize(
    "settings", [{}, {"head": "softmax"}, {"precision": "bf16", "bn": "frozen"}]
)
def test_no_wait_per_step(monkeypatch, small_net, tmp_path, views, settings):
    """Both stages, trained on images in memory, wait no more often in three times as many steps (as
    long as these are fewer than LOOK). They do wait more often in more epochs, which shows that
    waits are counted."""
    run = Fit.run

    def waits(steps, epochs):
        data = in_memory((8 * steps - 4, 2, 1, 1))
        config = configure(tmp_path, epochs=epochs, views=views, **settings)
        with monkeypatch.context() as patch:
            counter = Waits(patch)

            def counted(fit):  # features for stage 2 are written to disk before this
                before = counter.count
                with counter:
                    result = run(fit)
                total.append(counter.count - before)
                return result

            total = []
            patch.setattr(Fit, "run", counted)
            patch.setattr(analysis, "write", lambda *_: None)  # at the end, and by the data's size
            train_both(config, data)
        return sum(total)

    assert waits(4, 2) == waits(12, 2) < waits(4, 4)
