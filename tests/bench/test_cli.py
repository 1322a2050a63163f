"""`python -m bench`: it measures the suite it is asked for, and refuses what makes no sense."""

import importlib
import importlib.util
import json
import sys

import pytest

import bench
import tvmf_ext
from bench import cli, variants
from bench.show.tables import PASSES

SHAPE = (24, 300, 40)


def test_quick_suite_measures_all_variants(tmp_path, monkeypatch, capsys):
    suite = cli.SUITES["quick"]
    shrunk = [{**case, "shape": list(SHAPE)} for case in suite["cases"][1:]]
    monkeypatch.setitem(suite, "cases", shrunk)
    path, picture = tmp_path / "quick.json", tmp_path / "quick.png"
    cli.main(["--seconds", "1e-9", "--threads", "1", "--json", str(path), "--plot", str(picture)])
    report, text = json.loads(path.read_text()), capsys.readouterr().out
    for key in ("device", "cpu", "isa", "threads", "torch", "tvmf_ext", "commit", "date"):
        assert report[key]
    tvmf, cosine = report["cases"]
    assert not set(variants.PEERS) & set(tvmf["results"])
    assert set(variants.PEERS) < set(cosine["results"])
    for case in report["cases"]:
        for name, result in case["results"].items():
            if "refused" in result:
                assert name not in ("fused", "eager", "compile", "linear_ce", "products")
                assert result["refused"] and f"{name} refused: {result['refused']}" in text
                continue
            # The clock ticks a millisecond for each pass.
            medians = [result[key]["median"] for key in PASSES.values()]
            assert medians == pytest.approx([1, 1, 2])
            assert result["runs"] == 5
            assert result["of_floor"] == pytest.approx(case["floor_ms"] / 2)
            assert result["tflops"] == pytest.approx(6 * 24 * 300 * 40 / 2e9)
            assert result["extra_bytes"] >= 0 and result["launches"] > 0
            assert result["over_eager"]["quartiles"] == pytest.approx([1, 1])
            assert name == "products" or 0 < result["error"] < 1e-4
        fused, eager = (case["results"][name] for name in ("fused", "eager"))
        assert fused["launches"] < eager["launches"]
    assert picture.stat().st_size > 10_000


def test_one_pass_and_chosen_variants(tmp_path):
    path = tmp_path / "forward.json"
    shape = ["--shape", *map(str, SHAPE), "--seconds", "1e-9", "--json", str(path)]
    chosen = ["--variants", "fused", "products", "--pass", "fwd", "--dtype", "bfloat16"]
    cli.main([*shape, *chosen])
    (case,) = json.loads(path.read_text())["cases"]
    assert list(case["results"]) == ["fused", "products"] and case["dtype"] == "bfloat16"
    for result in case["results"].values():
        assert "forward_ms" in result and "backward_ms" not in result and "full_ms" not in result


def test_a_wrong_fused_head_is_a_failure(monkeypatch):
    def wrong(x, w, y, kappa, scale):
        return 1.001 * variants.eager(x, w, y, scale, kappa)

    monkeypatch.setattr(tvmf_ext, "tvmf_cross_entropy", wrong)
    with pytest.raises(SystemExit, match="fused head is wrong"):
        cli.main(["--shape", *map(str, SHAPE), "--seconds", "1e-9"])


@pytest.mark.parametrize(
    "args",
    [
        ["--shape", "0", "1", "1"],
        ["--kappa", "0"],
        ["--shape", "1", "1", "1", "--kappa", "-0.5"],
        ["--seconds", "0"],
        ["--threads", "0"],
        ["--document"],
        ["--suite", "gpu-more", "--load", "/no/such.json", "--document"],
        ["--suite", "cpu", "--document", "--pass", "fwd"],
        ["--suite", "cpu", "--document", "--seconds", "1"],
        ["--shape", "1", "1", "1", "--kappa", "inf"],
        ["--shape", "1", "1", "1", "--variants", "linear_ce"],
        ["--json", "/proc/no/such.json"],
        ["--plot", "out.txt"],
        ["--load", "/no/such.json"],
    ],
    ids=" ".join,
)
def test_arguments_that_make_no_sense_are_refused(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2 and "want" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # a refusal leaves nothing behind


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"matplotlib: pip install matplotlib"):
        cli.main(["--plot", str(tmp_path / "a.png")])
    assert not list(tmp_path.iterdir())
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else found(name)
    )
    with pytest.raises(SystemExit, match=r"rich: pip install -e '\.\[train\]'"):
        importlib.reload(bench)
