"""Fixtures that the driver's tests share; runs.py and image_files.py have their functions."""

import signal

import pytest
import torch

from tests.train.runs import FOLDER, configure, in_memory, left, mlp, train_both, write_folder
from train import fit, stages


@pytest.fixture(scope="module", autouse=True)
def single_thread(one_thread):
    """One thread for all of the driver's tests, whose nets are small."""


@pytest.fixture(autouse=True)
def quiet_process(monkeypatch):
    """Runs stay on the CPU, where they are bitwise equal; signal handlers are put back."""
    monkeypatch.setattr(fit, "CHEAP", 0)  # save after every epoch, although all are short here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of 286 small training images in list files."""
    return write_folder(tmp_path_factory.mktemp("folder"), train=FOLDER, test=(5,) * len(FOLDER))


@pytest.fixture
def small_net(monkeypatch):
    """A net that is faster than convolutions, whatever --net says."""
    monkeypatch.setattr(stages, "make_net", lambda *_: mlp())


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A run with the net of small_net: its data, results, and the files that it left."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests, which compare bits
    out, data = tmp_path_factory.mktemp("runs") / "undisturbed", in_memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "make_net", lambda *_: mlp())
        results = train_both(configure(out), data)
    torch.set_num_threads(threads)
    return data, results, left(out)
