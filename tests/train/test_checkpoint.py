"""Checkpoints: damaged files, full disks, other configurations, files that run code."""

import dataclasses
import os
import pickle
import re

import numpy as np
import pytest
import torch

from tests.train.runs import NOW, ROOT, configure, equal, killed, left, load_state, train_both
from train import checkpoint
from train.config import TrainError


@pytest.fixture
def interrupted(monkeypatch, small_net, undisturbed, tmp_path):
    """A run killed in stage 1 that has two checkpoints, its data, and what it should leave."""
    data, _, wanted = undisturbed
    config = configure(tmp_path / "run", checkpoint_minutes=NOW)
    assert killed(monkeypatch, config, data, checkpoint, "save", 3)
    return dataclasses.replace(config, resume=True), data, wanted


def flip(content, at, length=1):
    flipped = bytes(byte ^ 0x10 for byte in content[at : at + length])
    return content[:at] + flipped + content[at + length :]


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": lambda content: flip(content, len(content) // 2, 70),  # beyond 64 bytes of padding
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint(interrupted, capsys, damage):
    config, data, wanted = interrupted
    path = config.out / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    train_both(config, data)
    assert "going on from the one before" in " ".join(capsys.readouterr().out.split())
    assert equal(left(config.out), wanted)


def test_any_flipped_bit_is_seen_or_harmless(interrupted):
    config, _, _ = interrupted
    path = config.out / "checkpoint.pt"
    good, content = checkpoint.read(path), path.read_bytes()
    seen, places = 0, np.linspace(0, len(content) - 1, 300).astype(int)
    for place in places:
        path.write_bytes(flip(content, place))
        try:
            assert equal(checkpoint.read(path), good), place
        except AssertionError:
            raise
        except Exception:
            seen += 1
    assert seen > 0.5 * len(places)  # the other bits are padding


def test_both_checkpoints_damaged(interrupted):
    config, data, _ = interrupted
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        path = config.out / name
        path.write_bytes(DAMAGES["flipped"](path.read_bytes()))
    with pytest.raises(TrainError) as error:
        train_both(config, data)
    message = str(error.value)
    assert message.count("unreadable (wrong checksum") == 2
    assert checkpoint.NAME in message and checkpoint.PREVIOUS in message


def test_other_configuration_and_no_checkpoint(interrupted, tmp_path):
    config, data, _ = interrupted
    with pytest.raises(TrainError, match=r"another configuration: kappa: got 4\.0, was 16\.0"):
        train_both(dataclasses.replace(config, kappa=4.0), data)
    with pytest.raises(TrainError, match=r"another configuration: epochs.*seed: got 1, was 0"):
        train_both(dataclasses.replace(config, epochs=3, seed=1), data)
    with pytest.raises(TrainError, match=r"got no checkpoint at .*elsewhere"):
        train_both(dataclasses.replace(config, out=tmp_path / "elsewhere"), data)


@pytest.mark.parametrize("name", ["checkpoint.pt.tmp", "stage1.pt.tmp", "metrics.jsonl"])
def test_full_disk(interrupted, name):
    """Writing to /dev/full fails as on a full disk."""
    config, data, wanted = interrupted
    good = {path: path.read_bytes() for path in config.out.glob("checkpoint*.pt")}
    assert len(good) == 2
    (config.out / name).symlink_to("/dev/full")
    with pytest.raises(TrainError, match=r"--out: got .*No space left on device.*--resume goes on"):
        train_both(config, data)
    if name == "checkpoint.pt.tmp":
        assert {path: path.read_bytes() for path in config.out.glob("checkpoint*.pt")} == good
    (config.out / name).unlink(missing_ok=True)
    train_both(config, data)
    assert equal(left(config.out), wanted)


def test_full_disk_under_features(interrupted):
    config, data, wanted = interrupted
    (config.out / "features").mkdir()
    (config.out / "features/view 1, rank 0").symlink_to("/dev/full")
    with pytest.raises(TrainError, match=r"--views: got No space left .*view 1.*--views 0"):
        train_both(config, data)
    assert load_state(config.out / "checkpoint.pt")["stage"] == 1
    train_both(config, data)  # the run before has removed the link
    assert equal(left(config.out), wanted)


class Executed:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_torch_load_is_only_called_with_weights_only():
    calls = [
        call
        for path in (ROOT / "train").glob("*.py")
        for call in re.findall(r"torch\.load\([^()]*\)|pickle\.|np\.load", path.read_text())
    ]
    assert calls
    assert all("weights_only=True" in call for call in calls), calls


def test_pickles_are_not_executed(interrupted, tmp_path):
    config, data, _ = interrupted
    trap = tmp_path / "executed"
    model = {"feat_state_dict": Executed(trap), "fc_state_dict": {}}
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Executed(trap)))
    for name in ("model.pt", "bare.pt"):
        changed = {"model": tmp_path / name, "resume": False}
        with pytest.raises(TrainError, match=r"--model: got .*unreadable"):
            train_both(dataclasses.replace(config, **changed), data)
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        torch.save(load_state(config.out / name) | {"net": Executed(trap)}, config.out / name)
    with pytest.raises(TrainError, match=r"unreadable .*unreadable "):
        train_both(config, data)
    assert not trap.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert trap.exists()  # so a pickle that is executed does make the file
