"""The benchmark of the training loop runs, and its two loops do the same training."""

import json

import pytest

import bench.train


def test_quick_benchmark(tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(bench.train, "DEVICE", "cpu")
    monkeypatch.setattr(bench.train, "CLASSES", (10, 300))
    made_up = bench.train.made_up
    monkeypatch.setattr(
        bench.train, "load_data", lambda recipe: made_up(200, 10)
    )  # small, so that it takes little time
    path = tmp_path / "figures.json"
    bench.train.main(["--quick", "--workers", "0", "--json", str(path)])
    report = json.loads(path.read_text())
    for key in ("device", "cpu", "isa", "threads", "torch", "tvmf_ext", "commit", "date"):
        assert report[key]
    *stage1, each, last = report["cases"]
    for case in report["cases"]:
        for name, result in case["results"].items():
            assert len(result["runs_s"]) == 1 and result["median_s"] > 0
            ratio = result["median_s"] / case["results"]["ours"]["median_s"]
            assert case["ratios"][name] == pytest.approx(ratio)
    for case in stage1:
        first, results = case["first_loss"], case["results"]
        assert first["ours"] == pytest.approx(first["reference"], rel=1e-5)
        (ours,), (same,) = results["ours"]["loss"], results["same data"]["loss"]
        assert ours == pytest.approx(same, rel=1e-5)  # mean over an epoch of equal steps
    for name in ("ours", "reference"):
        assert stage1[0]["results"][name]["loss"][0] < stage1[0]["first_loss"][name]
    assert each["results"]["ours"]["error1"] == last["results"]["ours"]["error1"]
    assert set(report["input"]["ms_per_image"]) == {"ours", "torchvision", "ours, device"}
    assert all(ms > 0 for ms in report["input"]["ms_per_image"].values())
