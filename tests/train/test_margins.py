"""The example that gives the driver's stage 1 margins of its own."""

import runpy
import sys

import pytest
import torch

from tests.train.runs import FLAGS, FOLDER, ROOT
from train import stages
from tvmf_ext.margin import ldam


@pytest.mark.parametrize(
    "head, flags, cosine, angular",
    [
        ("cosine", ["--ldam", 0.4], ldam(FOLDER, 0.4), 0.0),
        ("tvmf", ["--cosine-margin", 0.2, "--angular-margin", 0.1], torch.tensor(0.2), 0.1),
    ],
)
def test_margins(monkeypatch, folder, tmp_path, head, flags, cosine, angular):
    heads = {}

    class Recorded(stages.Fit):
        def __init__(self, session, stage, net, head, *rest):
            heads[stage] = head
            super().__init__(session, stage, net, head, *rest)

    monkeypatch.setattr(stages, "Fit", Recorded)
    flags = [*flags, *FLAGS, "--data", folder, "--epochs", 1, "--stage2-epochs", 1]
    flags += ["--head", head, "--scale-start", 3, "--prior", 1, "--workers", 0, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["margins.py", *map(str, flags)])
    before = stages.train_stage1, stages.make_head
    example = runpy.run_path(str(ROOT / "examples/margins.py"))
    monkeypatch.setattr(stages, "train_stage1", stages.train_stage1)  # put back after the test
    example["main"]()
    assert stages.make_head is before[1]
    torch.testing.assert_close(torch.as_tensor(heads[1].cosine_margin), cosine)
    assert heads[1].angular_margin == angular
    assert float(heads[1].kappa) == (16 if head == "tvmf" else 0)
    assert heads[1].prior is not None and heads[1].reduction == "sum"
    assert heads[2].cosine_margin == 0 and float(heads[2].kappa) == 0
