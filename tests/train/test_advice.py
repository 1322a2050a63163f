"""Warnings about stages that ended badly: each sign alone, and silence on good runs."""

import dataclasses

import pytest

from tests.train.runs import configure, in_memory, train_both
from train import advice
from train.config import Config

CONFIG = Config(scale_start=8.0)


def epochs(*errors, loss=0.5, scale=12.0):
    return [{"loss": loss, "error1": error, "scale": scale, "steps": 10} for error in errors]


def test_too_short_is_told_by_steps_and_training_error():
    assert advice.too_short(CONFIG, epochs(90, 60), 300) == (
        "stage 1 ended with a training error of 60.0 % after 300 steps; try a smaller --batch-size"
    )
    small = dataclasses.replace(CONFIG, batch_size=16)
    assert "try more --epochs" in advice.too_short(small, epochs(90, 60), 300)
    assert advice.too_short(CONFIG, epochs(60, 1), 300) is None
    assert advice.too_short(CONFIG, epochs(90, 60), 30_000) is None  # such as noisy labels


@pytest.mark.parametrize(
    "history, sign",
    [
        (epochs(30), None),
        (epochs(44, 36), None),  # class balance may cost some training error
        (epochs(30, scale=1.2), "its scale fell from 8.00 to 1.20"),
        (epochs(30, loss=2.4), "its loss of 2.40 is above that of guessing, 2.30"),
        (epochs(30, 55), "its training error of 55.0 % is above the 30.0 % of stage 1"),
    ],
)
def test_signs_of_a_spoilt_stage2(history, sign):
    text = advice.stage2_spoilt(CONFIG, 10, history, {"stage1": {"train_error1": 30.0}})
    assert (text is None) == (sign is None)
    if sign:
        assert sign in text and "--stage2-start means" in text


def test_a_stage2_without_stage1_is_judged_by_itself():
    assert advice.stage2_spoilt(CONFIG, 10, epochs(80), {}) is None
    assert "scale fell" in advice.stage2_spoilt(CONFIG, 10, epochs(80, scale=1.1), {})


def test_worse_on_the_selection_set():
    report = {"selection_error1": 31.0, "selected_on": "val"}
    text = advice.worse_than_stage1(report, {"stage1": {"selection_error1": 30.0}})
    assert "worse than stage 1 on val: 31.0 % against 30.0 %" in text
    assert advice.worse_than_stage1(report, {"stage1": {"selection_error1": 31.0}}) is None
    assert advice.worse_than_stage1(report, {}) is None


def test_a_ruined_stage2_is_marked_in_warning_and_result(small_net, tmp_path, capsys):
    data = in_memory((24, 24, 24, 24), (9, 9, 9, 9), (9, 9, 9, 9))
    # A learning rate that moves the head nowhere leaves it as random as it began.
    config = configure(tmp_path, epochs=12, stage2_epochs=1, stage2_lr=1e-9, head="softmax")
    results = train_both(config, data)
    stage1, stage2 = results["stage1"], results["stage2"]
    assert stage1["warning"] is None or "stage 1 ended" in stage1["warning"]
    assert stage2["selection_error1"] > stage1["selection_error1"]
    assert "stage 2 is worse than stage 1 on val" in stage2["warning"]
    assert "stage 2 is worse than stage 1 on val" in " ".join(capsys.readouterr().out.split())
