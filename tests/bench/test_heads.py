"""`python -m bench.heads`: which runs it makes, and the differences between runs of one seed."""

import json
import subprocess
from pathlib import Path

import pytest

from bench import heads
from bench.show import documents
from train.config import parse_config

ERRORS = {
    ("cosine", 0): 20.0,
    ("cosine", 1): 30.0,
    ("cosine", 2): 25.0,
    ("better", 0): 18.0,
    ("better", 1): 28.5,
    ("better", 2): 22.5,
    ("noisy", 0): 15.0,
    ("noisy", 1): 33.0,
    ("noisy", 2): 24.0,
}


def figures(error):
    known = {"error1": error, "adjusted_error1": error + 1, "few": None}
    return known | {"train_error1": error / 2, "scale": 9.0, "kappa": 0.0}


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A table of three rows whose runs have the errors above; the commands that were run."""
    rows = {"cosine": "--head cosine", "better": "--kappa 4", "noisy": "--head cosine --ldam 0.2"}
    tables = {"tried": heads.Table("a title", 3, "--dataset digits", rows)}
    monkeypatch.setattr(heads, "TABLES", tables)
    monkeypatch.setattr(heads, "RESULTS", tmp_path / "heads.json")
    monkeypatch.setattr(documents, "picture_path", lambda name: tmp_path / f"{name}.png")
    written = {}
    monkeypatch.setattr(documents, "write_between", lambda *place: written.update([place[1:]]))
    commands = []

    def run(command, **options):
        if "-m" not in command:  # `git describe`, of the machine's description
            return subprocess.CompletedProcess(command, 0, "")
        out = Path(command[-1])
        index, seed = out.name.split("-seed")
        report = {"stage1": figures(ERRORS[list(rows)[int(index)], int(seed)])}
        (out / "result.json").write_text(json.dumps(report))
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(heads.subprocess, "run", run)
    return commands, written, tmp_path


def test_heads_are_compared_seed_by_seed(trained, capsys):
    commands, written, folder = trained
    command = ["tried", "--data", str(folder), "--out", str(folder / "runs"), "--document"]
    heads.main(command)
    assert [c[0] for c in commands] == ["train", "train", "examples.margins"] * 3
    assert commands[4][1:6] == ["--kappa", "4", "--dataset", "digits", "--seed"]
    assert commands[4][6] == "1"
    cosine, better, noisy = capsys.readouterr().out.splitlines()[-3:]
    assert "25.0 ± 5.0" in cosine and "12.5 ± 2.5" in cosine
    # The differences are -2, -1.5 and -2.5: their mean's interval leaves out 0. Those of the other
    # row are -5, 3 and -1.
    assert "| **-2.0 ± 1.2** |" in better
    assert "| -1.0 ± 9.9 " in noisy
    assert "difference" in written["heads tried"] and (folder / "heads.png").exists()
    report = json.loads((folder / "heads.json").read_text())["tried"]
    assert report["rows"]["noisy"][1] == {"stage1": figures(33.0)}
    heads.main(command)  # finished runs are read, not trained again
    assert len(commands) == 9


def test_a_failed_run_is_named(trained, monkeypatch):
    _, _, folder = trained
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(heads.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"--seed 0 .* failed, see .*0-seed0/log\.txt"):
        heads.main(["tried", "--data", str(folder), "--out", str(folder / "runs")])


@pytest.mark.parametrize("name", heads.TABLES)
def test_the_flags_of_all_tables_are_the_drivers(name):
    table = heads.TABLES[name]
    assert heads.BASELINE in table.rows and table.seeds in heads.STUDENT
    for row in table.rows:
        command = heads.command_of(name, row, 3, Path("data"), Path("runs/x/0-seed3"))[2:]
        if command[0] == "examples.margins":
            del command[command.index("--ldam") : command.index("--ldam") + 2]
        config = parse_config(command[1:])
        assert config.seed == 3
