"""--shard-classes: the numbers of one process that holds all classes, with any number of them."""

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from torch import nn

from tests.train.runs import (
    FLAGS,
    FORK,
    NOW,
    Killed,
    configure,
    equal,
    feat,
    finish,
    in_memory,
    in_step,
    kill,
    launch,
    left,
    load_state,
    ranks_environment,
    records,
    train_both,
)
from train import checkpoint, distributed, fit, stages
from train.config import TrainError
from train.model import head_of_state
from train.session import Session
from tvmf_ext import TvMFLoss

# 4 classes, of which 3 processes have 2, 2 and none. A batch of 20 leaves 8 of 28 images.
SIZES, TESTED, VAL = (13, 8, 4, 3), (5, 3, 2, 1), (2, 2, 2, 1)
JOBS = {
    "prior, class means": {"prior": 1.0, "stage2_start": "means"},
    "stage 1's head, uncached": {
        "views": 0,
        "kappa": 0.0,
        "stage2_start": "stage1",
        "stage2_prior": 1.0,
        "sampling": "sqrt",
    },
    "bfloat16": {"precision": "bf16", "head": "cosine"},
}
KILLED = {"in stage 1": 3, "in stage 2": 6}  # in which step of the optimizer; an epoch has 2


def small_net(*_):
    """A net without batch norm, whose result does not depend on the number of processes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
    net.num_features = 16
    return net


@pytest.fixture(autouse=True)
def net_of_this_process(monkeypatch):
    monkeypatch.setattr(stages, "make_net", small_net)


@pytest.fixture(autouse=True)
def no_group_is_left():
    yield
    distributed.finish()


def job(out, name="prior, class means", **changes):
    config = configure(out, **{"batch_size": 20, "lr": 0.3} | JOBS[name] | changes)
    return config, in_memory(SIZES, TESTED, VAL)


def joined(environment, act, *args):
    """Calls act(rank, world, *args) as one of the processes of a group."""
    os.environ.update(environment, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    stages.make_net, fit.CHEAP = small_net, 0
    rank, world, _ = distributed.start("cpu")
    act(rank, world, *args)
    distributed.finish()


def together(world, act, *args):
    processes = [
        FORK.Process(target=joined, args=(environment, act, *args))
        for environment in ranks_environment(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        finish(process)


def every_job(rank, world, out):
    """Trains each job to its end, and the first one again until it is killed."""
    for name in JOBS:
        results = stages.train(Session(*job(out / name, name, shard_classes=True), rank, world))
        (out / name / f"{rank}.json").write_text(json.dumps(results))
    for name, step in KILLED.items():
        patch = pytest.MonkeyPatch()
        kill(patch, torch.optim.SGD, "step", step)
        with pytest.raises(Killed):
            stages.train(Session(*job(out / name, shard_classes=True), rank, world))
        patch.undo()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes left of every job."""
    out = tmp_path_factory.mktemp("two")
    together(2, every_job, out)
    return out


def close(found, wanted, tolerance):
    """Compares what JSON holds."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted.keys() - {"warning"}:
            close(found[name], wanted[name], tolerance)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            close(*pair, tolerance)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    else:
        assert found == wanted


def close_files(found, wanted, tolerance=2e-5):
    """Compares the models, the analyses and the records that two runs left."""
    for stage in ("stage1", "stage2"):
        heads = [load_state(out / f"{stage}.pt")["fc_state_dict"] for out in (found, wanted)]
        assert list(heads[0]) == list(heads[1])
        plain = TvMFLoss(16, 4, kappa=heads[0].get("kappa", 0.0))
        plain.load_state_dict(heads[0])
        for name, values in heads[1].items():
            # Terms of both signs cancel in the gradient of the scale.
            allowed = tolerance * values.norm() * (10 if values.numel() == 1 else 1)
            assert (heads[0][name] - values).norm() <= allowed, name
        for name, values in feat(wanted / f"{stage}.pt").items():
            difference = feat(found / f"{stage}.pt")[name] - values
            assert difference.norm() <= tolerance * values.norm()
        analyses = [
            json.loads((out / f"{stage}.analysis.json").read_text()) for out in (found, wanted)
        ]
        close(*analyses, 100 * tolerance)
    close(*(list(records(out).values()) for out in (found, wanted)), tolerance)


def results_of_one(out, name="prior, class means"):
    """What one process that holds all classes reports, as JSON has it."""
    return json.loads(json.dumps(train_both(*job(out, name))))


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_agree_with_one_that_holds_all(two, tmp_path, name):
    wanted = results_of_one(tmp_path, name)
    found = [json.loads((two / name / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    tolerance = 2e-5
    if name == "bfloat16":
        tolerance = 2e-2
        for report in (*wanted.values(), *found[0].values()):
            del report["cosine_histogram"]  # an image may change its bin
    close(found[0], wanted, tolerance)
    close_files(two / name, tmp_path, tolerance)


def resume(rank, world, out):
    for name in KILLED:
        stages.train(Session(*job(out / name, shard_classes=True, resume=True), rank, world))


@pytest.mark.parametrize("world", [0, 1, 3])
def test_another_number_of_processes_resumes(two, tmp_path, world):
    """0 is one process without --shard-classes."""
    for name in KILLED:
        shutil.copytree(two / name, tmp_path / name)
        state = load_state(tmp_path / name / "checkpoint.pt")
        assert f"in stage {state['stage']}" == name and state["head"] == {} and state["shards"]
    if world == 3:
        together(3, resume, tmp_path)
    else:
        for name in KILLED:
            train_both(*job(tmp_path / name, shard_classes=world > 0, resume=True))
    results_of_one(tmp_path / "whole")
    for name in KILLED:
        close_files(tmp_path / name, tmp_path / "whole")
        # Shards that no checkpoint names are gone.
        numbers = {int(path.name[11:]) for path in (tmp_path / name).glob("checkpoint.[0-9]*")}
        files = (checkpoint.NAME, checkpoint.PREVIOUS)
        named = {load_state(tmp_path / name / file)["shards"] for file in files}
        assert numbers == named - {0}


def test_a_checkpoint_without_shards_resumes(monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, torch.optim.SGD, "step", 3)
        train_both(*job(tmp_path / "part"))
    train_both(*job(tmp_path / "part", shard_classes=True, resume=True))
    results_of_one(tmp_path / "whole")
    close_files(tmp_path / "part", tmp_path / "whole")


def processes(log, *flags, ways=(None, None)):
    """Two processes of `python -m train --shard-classes FLAGS`."""
    flags = [*FLAGS, "--net", "convnet", "--workers", 0, "--shard-classes", *flags]
    return [
        launch(f"{log}.{env['RANK']}", *flags, before=way, GLOO_SOCKET_IFNAME="lo", **env)
        for env, way in zip(ranks_environment(2), ways, strict=True)
    ]


def die():
    in_step(18, lambda: os.kill(os.getpid(), signal.SIGKILL))


def raise_error():
    def act():
        raise RuntimeError("a broken rank")

    in_step(18, act)


def test_a_rank_that_ends(folder, tmp_path):
    """The other ends with an error, and --resume ends as a run that nothing disturbed."""
    flags = ["--data", folder, "--epochs", 2, "--stage2-epochs", 1, "--views", 1]
    flags += ["--checkpoint-minutes", NOW]
    undisturbed = processes(tmp_path / "w", *flags, "--out", tmp_path / "whole")
    for name, way, code in (("raises", raise_error, 1), ("killed", die, -signal.SIGKILL)):
        out = tmp_path / name
        first, second = processes(tmp_path / "a", *flags, "--out", out, ways=(None, (way,)))
        finish(second, code)
        finish(first, 1)
        assert "Error" in (tmp_path / "a.0").read_text()
        assert not (out / "result.json").exists() and load_state(out / "checkpoint.pt")["step"]
    for each in (*processes(tmp_path / "b", *flags, "--out", out, "--resume"), *undisturbed):
        finish(each)
    assert equal(left(out), left(tmp_path / "whole"))
    results = [json.loads((o / "result.json").read_text()) for o in (out, tmp_path / "whole")]
    assert all(results[0][stage] == results[1][stage] for stage in ("stage1", "stage2"))


def test_test_of_a_model(two, tmp_path):
    config, data = job(tmp_path, model=two / "bfloat16/stage2.pt", evaluate=True)
    plain, spread = (
        stages.test_model(Session(dataclasses.replace(config, shard_classes=s), data))
        for s in (False, True)
    )
    close(json.loads(json.dumps(spread)), json.loads(json.dumps(plain)), 1e-5)


def test_refusals(tmp_path):
    config, data = job(tmp_path, shard_classes=True)
    softmax = {"weight": torch.zeros(4, 16), "bias": torch.zeros(4)}
    with pytest.raises(TrainError, match="--shard-classes: got a softmax head"):
        head_of_state(softmax, Session(config, data).mesh)


def test_shards_that_cannot_be_written(tmp_path):
    config, data = job(tmp_path, shard_classes=True)
    (tmp_path / "checkpoint.1").touch()  # where the directory should be
    with pytest.raises(TrainError, match=r"--out: got .*exists.* on writing .*checkpoint\.1"):
        train_both(config, data)
