"""`python -m bench.compare` tells a slower version from noise, and says what was lost."""

import json

import pytest

from bench import compare
from bench.measure.clock import summary


def report_of(fused, products, quartile=0.01, memory=1e6, **more):
    """A report of one case with the given median times."""

    def figures(value):
        ends = [value * (1 - quartile), value * (1 + quartile)]
        return {"median": value, "quartiles": ends, "medians": ends}

    case = {
        "shape": [1, 2, 3],
        "kappa": 16.0,
        "dtype": "float32",
        "pass": "full",
        "threads": 2,
        "device": "cpu",
        "results": {
            "fused": {"full_ms": figures(fused), "extra_bytes": memory, **more},
            "products": {"full_ms": figures(products), "over_fused": figures(products / fused)},
        },
    }
    about = {"commit": "c", "date": "d", "device": "cpu", "cpu": "p", "torch": "t"}
    return {"suite": "cpu", **about, "cases": [case]}


@pytest.mark.parametrize(
    ("b", "status", "said"),
    [
        (report_of(24.0, 20.0), 0, "same"),  # the machine is half as fast
        (report_of(15.0, 10.0), 1, "SLOWER"),
        (report_of(9.0, 10.0), 0, "faster"),
        (report_of(13.0, 10.0, quartile=0.2), 0, "same"),  # within the noise
        (report_of(13.0, 10.0), 0, "same"),  # less than --least
        (report_of(12.0, 10.0, memory=9e6), 1, "LARGER"),
    ],
)
def test_compare_tells_regressions_from_noise(b, status, said, tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, report in zip(paths, (report_of(12.0, 10.0), b), strict=True):
        path.write_text(json.dumps(report))
    with pytest.raises(SystemExit) as end:
        compare.main([*map(str, paths)])
    assert end.value.code == status
    assert said in capsys.readouterr().out


def test_compare_takes_a_drift_for_noise():
    assert compare.limits(summary([1.0] * 8 + [1.5] * 8)) == (1.0, 1.25, 1.5)


def test_compare_says_what_was_lost(tmp_path, capsys):
    a, b = report_of(12.0, 10.0), report_of(12.0, 10.0)
    b["cases"][0]["results"]["fused"] = {"error": 1.0, "wrong": True}
    for name, report in (("a", a), ("b", b)):
        (tmp_path / name).write_text(json.dumps(report))
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert end.value.code == 1 and "LOST: wrong" in capsys.readouterr().out
    (tmp_path / "b").write_text(json.dumps({**b, "cases": []}))
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert end.value.code == 1 and "LOST: not in B" in capsys.readouterr().out
    for bad in ("nothing there", "{}"):
        (tmp_path / "b").write_text(bad)
        with pytest.raises(SystemExit) as end:
            compare.main([str(tmp_path / "a"), str(tmp_path / "b")])
        assert end.value.code == 2 and "wanted a file of python -m bench" in capsys.readouterr().err
