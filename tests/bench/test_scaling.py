"""`python -m bench.scaling`: the fit, the plan's prediction, and the prediction for many GPUs."""

import json

import pytest

from bench import scaling


def test_scaling_fits_and_predicts(tmp_path, monkeypatch):
    monkeypatch.setitem(scaling.MIDDLE, "cpu", (16, 256, 32))
    monkeypatch.setitem(scaling.SIZES, "cpu", {"N": [8, 16], "C": [128, 256], "D": [16, 32]})
    path, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    scaling.main(["--quick", "--json", str(path), "--plot", str(picture)])
    series = json.loads(path.read_text())["series"]
    for points in series.values():
        first, second = points
        assert second["predicted_ms"] == pytest.approx(2 * first["predicted_ms"], rel=0.5)
        assert second["predicted_bytes"] >= first["predicted_bytes"]
    squares = [{"size": n, "ms": {"median": 3.0 * n**2}} for n in (1, 2, 4, 8)]
    assert scaling.exponent(squares, "ms") == pytest.approx(2)
    assert picture.stat().st_size > 10_000


def test_many_gpus_on_paper(capsys):
    scaling.main(["--paper"])
    rows = capsys.readouterr().out.strip().splitlines()[2:]
    assert len(rows) == 16
    eight = scaling.spread_over(10**7, 8)  # over NVLink
    assert eight["sent by collectives"] == "1.46 MB" and eight["collectives"] == "3.23 us"
    one = scaling.spread_over(10**8, 1024)
    assert one["collectives"] == "4.1 ms"
    assert one["classes a GPU"] == 97_657 and one["rows"] == 65_536
    # 97,657 rows of 512 float32 three times; 65,536 rows of 2 + 4 bytes a feature, a label, and a
    # score, three statistics and a rank there and back.
    assert one["weight, gradient, momentum"] == "600 MB" and one["sent by collectives"] == "205 MB"


def test_a_sharded_head_in_two_processes(capsys):
    scaling.main(["--processes", "1,2", "--quick", "--seconds", "0.01"])
    one, two = capsys.readouterr().out.strip().splitlines()[2:]
    assert [cell.strip() for cell in one.split("|")[1:3]] == ["1000", "1"]
    cells = [cell.strip() for cell in two.split("|")]
    assert cells[1:3] == ["1000", "2"] and cells[4] == "256 kB"
    with pytest.raises(SystemExit):
        scaling.main(["--processes", "3"])
