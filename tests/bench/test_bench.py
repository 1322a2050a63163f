"""The benchmark: its figures are what they are called, and it catches what it is to catch."""

import json
from types import SimpleNamespace

import pytest
import torch
from rich.progress import Progress
from torch.profiler import ProfilerActivity, profile

import bench.__main__
import tvmf_ext
from bench import compare, end_to_end, kernels, measure, scaling, show, variants
from tvmf_ext import reference

SHAPE = (24, 300, 40)
machine = measure.machine


@pytest.fixture(autouse=True)
def small_and_quick(threads, monkeypatch):
    """One thread; no torch.compile, a minute for what CI's run of the quick suite shows."""
    threads(1)
    speed = {"flops_per_s": 1e11, "bytes_per_s": 1e10}
    monkeypatch.setattr(measure, "machine", lambda *_: speed)
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function)


def test_quick_suite_measures_all_variants(tmp_path, monkeypatch, capsys):
    suite = bench.__main__.SUITES["quick"]
    shrunk = [{**case, "shape": list(SHAPE)} for case in suite["cases"][1:]]
    monkeypatch.setitem(suite, "cases", shrunk)
    path, picture = tmp_path / "quick.json", tmp_path / "quick.png"
    names = ("--seconds", "1e-9", "--threads", "1", "--json", str(path), "--plot", str(picture))
    bench.__main__.main([*names])
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
            forward, backward, full = (result[key]["median"] for key in show.PASSES.values())
            assert 0 < max(forward, backward) <= full <= 3 * (forward + backward)
            assert result["runs"] == 5
            assert result["of_floor"] == pytest.approx(case["floor_ms"] / full)
            assert result["tflops"] == pytest.approx(6 * 24 * 300 * 40 / full / 1e9)
            assert result["extra_bytes"] >= 0 and result["launches"] > 0
            low, high = result["over_eager"]["quartiles"]
            assert low <= result["over_eager"]["median"] <= high
            assert name == "products" or 0 < result["error"] < 1e-4
        assert case["results"]["eager"]["over_eager"]["median"] == 1
        fused, eager = (case["results"][name] for name in ("fused", "eager"))
        assert fused["launches"] < eager["launches"]
    assert picture.stat().st_size > 10_000


def test_figures_of_known_times(monkeypatch):
    """Times that are given, not taken: fused 1 + 2 ms, eager 2 + 10, products 0.5 + 1."""
    taken = {"fused": (1e-3, 2e-3), "eager": (2e-3, 10e-3), "products": (5e-4, 1e-3)}
    names = {}
    make = variants.make

    def named(name, *args):
        variant = make(name, *args)
        names[id(variant)] = name
        return variant

    monkeypatch.setattr(variants, "make", named)
    monkeypatch.setattr(measure, "timed", lambda clock, v, *_: list(taken[names[id(v)]]))
    monkeypatch.setattr(measure, "extra_memory", lambda *_: 5_000_000)
    monkeypatch.setattr(measure, "launches", lambda *_: 7)
    found = {}
    for which in show.PASSES:
        case = {"shape": (100, 1000, 50), "kappa": 16.0}
        found[which] = measure.measure(case, [*taken], 1e-9, which, "cpu", torch.float32)
    # 100 x 1000 x 50 x 6 operations at 1e11 a second; a weight of 200 kB at 1e10, twice.
    floors = {"fwd": 0.1, "bwd": 0.2, "full": 0.3}
    fused = {which: case["results"]["fused"] for which, case in found.items()}
    for which, floor in floors.items():
        assert found[which]["floor_ms"] == pytest.approx(floor)
    assert [fused[w]["of_floor"] for w in floors] == pytest.approx([0.1, 0.1, 0.1])
    assert [fused[w]["tflops"] for w in floors] == pytest.approx([0.01] * 3)
    results = {which: case["results"] for which, case in found.items()}
    over = {w: r["eager"]["over_fused"]["median"] for w, r in results.items()}
    assert over == pytest.approx({"fwd": 2, "bwd": 5, "full": 4})
    assert results["full"]["fused"]["over_eager"]["median"] == pytest.approx(0.25)
    assert results["full"]["products"]["over_fused"]["median"] == pytest.approx(0.5)
    rows = [line.split() for line in show.case_text(found["full"]).splitlines()]
    (row,) = [row for row in rows if row[:1] == ["fused"]]
    assert " ".join(row).startswith("fused 1 ± 0 2 ± 0 3 ± 0 4.00x 0.01 10% 5 MB 7 ")
    row = show.overview([found["full"]], "github").splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["(100, 1000, 50)", "3 ms", "10%", "5 MB / 5 MB", "4.00x", "0.50x"]


def test_floors_take_the_larger_of_operations_and_bytes():
    speed = {"flops_per_s": 1e9, "bytes_per_s": 1e9}
    assert measure.floors((1, 10, 100), speed) == pytest.approx([4e-6, 8e-6, 8e-6])
    assert measure.floors((100, 10, 100), speed) == pytest.approx([2e-4, 4e-4, 6e-4])


def test_a_timed_call_runs_both_passes():
    calls = []

    class Variant:
        def forward(self, *tensors):
            calls.append("forward")

        def backward(self, *_):
            calls.append("backward")

    clock = measure.Clock("cpu")
    assert len(measure.timed(clock, Variant(), (None,) * 4, True)) == 2
    assert len(measure.timed(clock, Variant(), (None,) * 4, False)) == 1
    assert calls == ["forward", "backward", "forward"]


def test_variants_and_copies_take_turns():
    class Clock:
        def mark(self):
            return 0

        def seconds(self, marks):
            return [1.0, 1.0]

    seen = []

    class Variant:
        def __init__(self, name):
            self.name = name

        def forward(self, *tensors):
            seen.append((self.name, tensors[0]))

        def backward(self, *_):
            pass

    running = {name: Variant(name) for name in "ab"}
    copies = {name: [(i, None, None, None) for i in range(4)] for name in "ab"}
    measure.take_turns(Clock(), running, copies, True, 1e-9, lambda completed: None)
    assert seen[:4] == [("a", 0), ("b", 1), ("b", 2), ("a", 3)] and len(seen) == 10


@pytest.mark.parametrize("place", range(4))
def test_each_result_is_held_against_float64(place):
    tensors = measure.problem(*SHAPE, "cpu", torch.float32)
    wanted = measure.exact(tensors, 16.0)
    got = [t.float().clone() for t in wanted]
    assert measure.error(got, wanted) < 1e-6
    got[place] *= 1.01
    assert measure.error(got, wanted) > 1e-4


def test_a_tail_that_is_left_out_is_an_error():
    wanted = torch.ones(1000, 8)
    wanted[64:] *= 1e-6
    got = wanted.clone()
    got[-5:] = 0
    assert measure.error([got], [wanted]) > 0.1
    assert measure.error([torch.zeros(3)], [torch.zeros(3)]) == 0
    assert measure.error([torch.ones(2) * float("nan")], [torch.ones(2)]) != 0


def test_a_single_class_is_measured():
    case = {"shape": (3, 1, 2), "kappa": 16.0}
    found = measure.measure(case, ["fused", "eager"], 1e-9, "full", "cpu", torch.float32)
    assert all(result["error"] < 1e-6 for result in found["results"].values())


def test_one_pass_and_chosen_variants(tmp_path):
    path = tmp_path / "forward.json"
    chosen = ["--variants", "fused", "products", "--pass", "fwd", "--dtype", "bfloat16"]
    bench.__main__.main([
        "--shape", *map(str, SHAPE), "--seconds", "1e-9", "--json", str(path), *chosen
    ])  # fmt: skip
    (case,) = json.loads(path.read_text())["cases"]
    assert list(case["results"]) == ["fused", "products"] and case["dtype"] == "bfloat16"
    for result in case["results"].values():
        assert "forward_ms" in result and "backward_ms" not in result and "full_ms" not in result


@pytest.mark.parametrize("kappa", [0.0, 16.0])
def test_exact_is_float64_eager_whatever_the_block(kappa):
    tensors = measure.problem(*SHAPE, "cpu", torch.float32)
    leaves = [t.detach().double().requires_grad_() for t in (tensors[0], tensors[1], tensors[3])]
    loss = reference.tvmf_cross_entropy(*leaves[:2], tensors[2], kappa=kappa, scale=leaves[2])
    wanted = (loss, *torch.autograd.grad(loss, leaves))
    for classes in (7, 1 << 14):
        assert measure.error(measure.exact(tensors, kappa, classes), wanted) < 1e-7


def test_a_wrong_variant_is_shown_and_not_timed(monkeypatch):
    peer = variants.Loss(lambda x, w, y, s: 1.001 * variants.eager(x, w, y, s, 0.0))
    monkeypatch.setitem(variants.PEERS, "linear_ce", lambda: peer)
    case = {"shape": SHAPE, "kappa": 0.0}
    names = ["fused", "eager", "linear_ce"]
    case = measure.measure(case, names, 1e-9, "full", "cpu", torch.float32)
    result = case["results"]["linear_ce"]
    assert result["wrong"] and "full_ms" not in result
    assert "linear_ce is WRONG by 1.0e-03" in show.case_text(case)
    assert "wrong" in show.overview([case])


def test_a_wrong_fused_head_is_a_failure(monkeypatch):
    monkeypatch.setattr(tvmf_ext, "tvmf_cross_entropy", lambda x, w, y, kappa, scale: (
        1.001 * variants.eager(x, w, y, scale, kappa)
    ))  # fmt: skip
    with pytest.raises(SystemExit, match="fused head is wrong"):
        bench.__main__.main(["--shape", *map(str, SHAPE), "--seconds", "1e-9"])


def test_a_refusal_says_why(monkeypatch):
    def bare():
        raise AssertionError

    with pytest.raises(AssertionError) as raised:
        bare()
    assert variants.reason(raised.value) == "AssertionError: raise AssertionError"
    assert variants.reason(ValueError("D is odd\nmore")) == "ValueError: D is odd"
    with pytest.raises(variants.Refused, match="kappa = 0"):
        variants.make("linear_ce", SHAPE, 16.0, "cpu", torch.float32)
    monkeypatch.setitem(variants.MODULES, "cce", "a_module_that_nobody_has")
    with pytest.raises(variants.Refused, match="not installed"):
        variants.make("cce", SHAPE, 0.0, "cpu", torch.float32)


def test_machine_measures_what_it_says():
    class Clock:
        def mark(self):
            return 0

        def seconds(self, marks):
            return [0.5]

    # A product of 1024 x 1024 matrices, a copy of 2^24 float32 read and written, in half a second.
    found = machine("cpu", torch.float32, Clock())
    assert found["flops_per_s"] == pytest.approx(2 * 1024**3 / 0.5)
    assert found["bytes_per_s"] == pytest.approx(2 * 4 * 2**24 / 0.5)


def test_extra_memory_is_a_call_s_peak():
    def call():
        parts = [torch.ones(1 << 22) for _ in range(3)]
        del parts

    held = torch.ones(1 << 23)
    extra = measure.extra_memory("cpu", call, 1 << 24)
    if extra is None:
        pytest.skip("this system does not tell the peak")
    assert abs(extra - 2 * (1 << 24)) < 1 << 21 and held is not None
    assert measure.extra_memory("cpu", lambda: None, 1 << 24) == 0


def report_of(fused, products, quartile=0.01, memory=1e6, **more):
    def figures(value):
        ends = [value * (1 - quartile), value * (1 + quartile)]
        return {"median": value, "quartiles": ends, "medians": ends}

    results = {
        "fused": {"full_ms": figures(fused), "extra_bytes": memory, **more},
        "products": {"full_ms": figures(products), "over_fused": figures(products / fused)},
    }
    case = {"shape": [1, 2, 3], "kappa": 16.0, "dtype": "float32", "pass": "full", "threads": 2,
            "device": "cpu", "results": results}  # fmt: skip
    return {"suite": "cpu", "commit": "c", "date": "d", "device": "cpu", "cpu": "p", "torch": "t",
            "cases": [case]}  # fmt: skip


@pytest.mark.parametrize(
    ("b", "status", "said"),
    [
        (report_of(24.0, 20.0), 0, "same"),  # the machine is half as fast
        (report_of(15.0, 10.0), 1, "SLOWER"),
        (report_of(9.0, 10.0), 0, "faster"),
        (report_of(13.0, 10.0, quartile=0.2), 0, "same"),  # noise
        (report_of(13.0, 10.0), 0, "same"),  # too little
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
    figures = measure.summary([1.0] * 8 + [1.5] * 8)
    assert figures["medians"] == [1.0, 1.5] and compare.limits(figures) == (1.0, 1.25, 1.5)


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


def test_end_to_end_trains_both_heads_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(end_to_end, "CASES", {"small": ("convnet", 300, 4, 4)})
    calls, function = [], reference.tvmf_cross_entropy
    monkeypatch.setattr(
        reference, "tvmf_cross_entropy", lambda *a, **k: calls.append(1) or function(*a, **k)
    )

    class Clock:  # a step of the fused head takes 2 s and its head 0.5; of eager's 6 and 3
        times = (2.0, 0.5, 6.0, 3.0)
        turn = -1

        def __init__(self, device):
            pass

        def mark(self):
            return 0

        def seconds(self, marks):
            Clock.turn += 1
            return [self.times[Clock.turn % 4]]

    monkeypatch.setattr(end_to_end, "Clock", Clock)
    path = tmp_path / "steps.json"
    end_to_end.main(["--quick", "--json", str(path)])
    (case,) = json.loads(path.read_text())["cases"]
    assert case["shape"] == [2, 300, 128]
    fused, eager = (case["results"][name] for name in end_to_end.HEADS)
    assert fused["loss"] == pytest.approx(eager["loss"], rel=1e-2)  # two steps later
    assert len(calls) == 2 * fused["runs"] + 2 + 3  # steps, heads, first calls; none of fused's
    assert case["eager_over_fused"]["median"] == 3
    assert fused["head_share"]["median"] == 0.25 and eager["head_share"]["median"] == 0.5
    assert fused["images_per_s"]["median"] == 1 and eager["step_ms"]["median"] == 6000
    text = capsys.readouterr().out
    assert "1 ± 0" in text and "3.00x" in text and "25.0%" in text and "50.0%" in text


def test_end_to_end_counts_gradients_as_memory():
    """The gradient of 60,000 x 128 weights is 31 MB."""
    with Progress(disable=True) as progress:
        case = end_to_end.measure("", "convnet", 60_000, 2, 32, 0, "cpu", progress)
    fused, eager = (case["results"][name]["extra_bytes"] for name in end_to_end.HEADS)
    if fused is None:
        pytest.skip("this system does not tell the peak")
    assert 29e6 < fused < eager


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
    assert eight["sent by collectives"] == "1.39 MB" and eight["which take"] == "0.00308 ms"
    one = scaling.spread_over(10**8, 1024)
    assert one["which take"] == "4.05 ms"
    assert one["classes a GPU"] == 97_657 and one["rows"] == 65_536
    # 97,657 rows of 512 float32 three times; 65,536 rows of 2 + 4 bytes a feature and 6 numbers.
    assert one["weight, gradient, momentum"] == "600 MB" and one["sent by collectives"] == "203 MB"


def test_readme_is_rewritten_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(show, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("a\n<!-- bench cpu -->\nold\n<!-- /bench cpu -->\nz\n")
    suite = bench.__main__.SUITES["cpu"]
    monkeypatch.setitem(suite, "seconds", 1e-9)
    shapes = [(16, 200, 24), (1, 8, 8), (8, 90, 24)]
    cases = [{"shape": shape, "kappa": 16.0} for shape in shapes]
    cases[-1]["sweep"] = True
    monkeypatch.setitem(suite, "cases", [*cases, {"shape": shapes[0], "kappa": 0.0}])
    bench.__main__.main(["--suite", "cpu", "--readme"])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("a\n<!-- bench cpu -->\n") and text.endswith("<!-- /bench cpu -->\nz\n")
    assert "old" not in text and "| (16, 200, 24)" in text and "(1, 8, 8), on one thread" in text
    assert (tmp_path / "docs/bench-cpu.png").exists()
    report = json.loads((tmp_path / "bench/results/cpu.json").read_text())
    fused = report["cases"][0]["results"]["fused"]["full_ms"]["median"]
    assert f"{fused:.3g} ms" in text
    # The same again from the file, without a measurement.
    (tmp_path / "README.md").write_text("<!-- bench cpu -->\n<!-- /bench cpu -->")
    bench.__main__.main([
        "--suite", "cpu", "--load", str(tmp_path / "bench/results/cpu.json"), "--readme"
    ])  # fmt: skip
    assert f"{fused:.3g} ms" in (tmp_path / "README.md").read_text()


def gpu_case(shape, kappa=16.0, refused=(), **more):
    """A case as a GPU's file has it: eager, compile, products and peers take 4, 2, 0.9 and 3 times
    the fused head's time, which is 1 ms; in a graph 0.1 ms, and eager's 0.3."""

    def figures(value):
        return {"median": value, "quartiles": [0.9 * value, 1.1 * value],
                "medians": [value, value]}  # fmt: skip

    out = more.get("leave_out", ())
    times = {"fused": 1.0, "eager": 4.0, "compile": 2.0, "products": 0.9}
    times |= dict.fromkeys(("linear_ce", "cce", "liger"), 3.0) if kappa == 0 else {}
    results = {
        name: {"error": 1e-3, "extra_bytes": 30_000_000 * time, "launches": 9, "runs": 50,
               "tflops": 100.0, "of_floor": 0.5 / time, "over_fused": figures(time),
               "over_eager": figures(time / 4), "forward_ms": figures(0.3 * time),
               "backward_ms": figures(0.7 * time), "full_ms": figures(time)}
        for name, time in times.items() if name not in out
    }  # fmt: skip
    for name in refused:
        results[name] = {"refused": "RuntimeError: no such shape"}
    if shape[0] * shape[1] <= measure.GRAPH_MOST:
        for name, time in (("fused", 0.1), ("eager", 0.3)):
            results[name]["graph_ms"] = figures(time)
    return {"shape": list(shape), "kappa": kappa, "dtype": "bfloat16", "pass": "full",
            "device": "cuda", "threads": 8, "copies": 3, "preempted_per_s": 0.0, "floor_ms": 0.5,
            "machine": {"flops_per_s": 788e12, "bytes_per_s": 4.3e12}, "results": results,
            **more}  # fmt: skip


def test_a_gpu_s_figures_fill_the_readme(tmp_path, monkeypatch, capsys):
    """Fabricated figures, of the suite's own cases."""
    suite = bench.__main__.SUITES["gpu"]
    cases = [gpu_case(**case) for case in suite["cases"]]
    cases[4] = gpu_case(**{**suite["cases"][4], "refused": ("cce",)})
    report = {"suite": "gpu", "device": "NVIDIA H200", "driver": "580.1", "cpu": "p", "isa": "avx2",
              "threads": 8, "torch": "2.11.0", "date": "2026-11-26", "commit": "c",
              "cases": cases}  # fmt: skip
    path = tmp_path / "from_the_gpu.json"
    path.write_text(json.dumps(report))
    monkeypatch.setattr(show, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("a\n<!-- bench gpu -->\nold\n<!-- /bench gpu -->\nz\n")
    bench.__main__.main(["--suite", "gpu", "--load", str(path), "--readme"])
    text = (tmp_path / "README.md").read_text()
    tvmf, cosine = text.split("The plain cosine head")
    rows = {row[0]: row for row in ([cell.strip() for cell in line.strip("|").split("|")]
            for line in tvmf.splitlines() if line.startswith("| ("))}  # fmt: skip
    for (N, C, D), graph in zip(bench.__main__.DESIGN, ["0.1 / 0.3"] * 2 + ["- / -"] * 2,
                                strict=True):  # fmt: skip
        row = rows[f"({N}, {C}, {D})"]
        assert row[1:] == ["1 ms", graph, "50%", "30 MB / 120 MB", "4.00x", "2.00x", "0.90x"]
    assert "| geometric mean" in tvmf and "sweep" not in text and "old" not in text
    assert "cut-cross-entropy (RuntimeError: no such shape)" in cosine and "3.00x" in cosine
    assert "compile" not in cosine.split("Refused")[0]
    for words in ("NVIDIA H200, driver 580.1", "bfloat16", "CUDA graph", "docs/bench-gpu.png",
                  "python -m bench --suite gpu --readme"):  # fmt: skip
        assert words in text
    assert (tmp_path / "docs/bench-gpu.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "bench/results/gpu.json").read_text()) == report
    shown = capsys.readouterr().out
    assert "a product here 788 TFLOP/s" in shown and "launches" in shown and "graph ms" in shown


def test_a_gpu_s_suite_cut_short_fills_the_readme_too():
    cases = [gpu_case(**case) for case in bench.__main__.SUITES["gpu"]["cases"][:2]]
    report = {"suite": "gpu", "device": "NVIDIA H200", "driver": "580.1", "cpu": "p", "isa": "avx2",
              "threads": 8, "torch": "2.11.0", "date": "d", "cases": cases}  # fmt: skip
    text = show.markdown(report)
    assert "(256, 8142, 2048)" in text and "kappa = 0" not in text


def test_the_documents_have_a_place_for_every_table():
    text = (show.ROOT / "docs/measurements.md").read_text()
    for name in ("bench cpu", "bench gpu", "end to end cpu", "end to end cuda", "scaling cpu",
                 "scaling cuda"):  # fmt: skip
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1


def test_steps_and_scaling_of_a_gpu_are_shown_from_a_file(tmp_path, monkeypatch, capsys):
    for module in (show, end_to_end, scaling):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    for file, name in (("README.md", "end to end cuda"), ("docs/scaling.md", "scaling cuda")):
        (tmp_path / file).write_text(f"<!-- {name} -->\nold\n<!-- /{name} -->\n")
    figures = {"median": 2.0, "quartiles": [1.9, 2.1], "medians": [2.0, 2.0]}
    head = {"step_ms": figures, "images_per_s": figures, "extra_bytes": 5e9, "runs": 9,
            "head_share": {**figures, "median": 0.25}}  # fmt: skip
    steps = {"device": "NVIDIA H200", "quick": False, "cases": [
        {"name": "net", "shape": [256, 1000, 512], "eager_over_fused": figures,
         "results": {"fused": head, "eager": head}}]}  # fmt: skip
    points = [{"size": n, "ms": {"median": 2.0 * n}, "bytes": 1e6 * n, "predicted_ms": 1.0 * n,
               "predicted_bytes": 1e6 * n} for n in (1, 2, 4, 8)]  # fmt: skip
    grown = {"device": "NVIDIA H200", "quick": False, "middle": [1, 2, 3],
             "series": dict.fromkeys("NCD", points)}  # fmt: skip
    for name, report in (("steps", steps), ("grown", grown)):
        (tmp_path / name).write_text(json.dumps(report))
    end_to_end.main(["--device", "cuda", "--load", str(tmp_path / "steps"), "--readme"])
    scaling.main(["--device", "cuda", "--load", str(tmp_path / "grown"), "--docs"])
    text = (tmp_path / "README.md").read_text()
    assert "2.00x" in text and "25.0%" in text and "5 GB" in text and "old" not in text
    text = (tmp_path / "docs/scaling.md").read_text()
    assert "16 ms" in text and "N^1.00" in text and "(scaling-cuda.png)" in text
    assert (tmp_path / "docs/scaling-cuda.png").exists()
    for name in ("end-to-end-cuda", "scaling-cuda"):
        assert (tmp_path / f"bench/results/{name}.json").exists()
    for module, file in ((end_to_end, "steps"), (scaling, "grown")):
        with pytest.raises(SystemExit):  # on this device they were not measured
            module.main(["--load", str(tmp_path / file)])
    assert "figures of cuda" in capsys.readouterr().err


def kernels_run(**more):
    """A run as a GPU's file has it, of one shape: 2 ms in a graph over a floor of 0.5."""

    def figures(value):
        return {"median": value, "least": 0.9 * value, "most": 1.1 * value}

    case = {"shape": [10, 100, 50], "kappa": 16.0, "graph_ms": figures(2.0), "predicted_ms": 0.75,
            "fused_ms": figures(3.0), "eager_ms": figures(12.0),
            "kernels": {"gradient": {"launches": 79.0, "us": 57.8},
                        "statistics": {"launches": 1.0, "us": 2381.0}}}  # fmt: skip
    return {"device": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "date": "2026-11-26",
            "commit": "c0ffee", "dtype": "bfloat16", "kappa": 16.0,
            "machine": {"flops_per_s": 6e8, "bytes_per_s": 1e12}, "cases": [case],
            **more}  # fmt: skip


def test_kernels_are_shown_from_a_file(tmp_path, capsys):
    refused = kernels_run(note="of a forerunner", commit="decaf")
    del refused["cases"][0]["eager_ms"]
    refused["cases"][0]["eager_refused"] = "OutOfMemoryError: much"
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps([kernels_run(), refused]))
    kernels.main(["--load", str(path)])
    text = capsys.readouterr().out
    first, second = text.split("commit decaf")
    rows = {row[0]: row[1:] for row in (line.split("  ") for line in first.splitlines())
            for row in [[cell.strip() for cell in row if cell.strip()]] if row}  # fmt: skip
    whole = ["2 ms", "750 us", "4.0x", "3 ms", "12 ms", "4.0x"]
    assert rows["(10, 100, 50)"] == whole
    assert rows["gradient"] == ["79 x 57.8 us"] and rows["statistics"] == ["1 x 2.38 ms"]
    assert "NVIDIA H200, driver 580.1" in first and "commit c0ffee" in first
    assert "of a forerunner" in second and "eager refused: OutOfMemoryError: much" in second


def test_kernels_are_told_apart_by_name():
    def event(start, name, microseconds):
        span = SimpleNamespace(start=start, elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, time_range=span)

    names = ["void tvmf::sm90::(anonymous namespace)::gradient<(tvmf::Math)1, float>(Params)",
             "void tvmf::<unnamed>::class_gradient<1>(P<tvmf::T>)",
             "void tvmf::<unnamed>::class_gradient<1>(P<tvmf::T>)", "Memset (Device)"]  # fmt: skip
    events = [event(10 * i, names[i % 4], 1.0 + i % 4) for i in reversed(range(8))]
    assert kernels.by_kernel(events, 2) == {
        "Memset": {"launches": 1, "us": 4}, "class_gradient+weight": {"launches": 1, "us": 3},
        "class_gradient": {"launches": 1, "us": 2}, "gradient": {"launches": 1, "us": 1},
    }  # fmt: skip


def test_a_shape_s_kernels_are_measured(monkeypatch):
    """On the CPU, the device's clock, graph and profiler replaced."""
    clock, problem = measure.Clock, measure.problem
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(measure, "Clock", lambda _: clock("cpu"))
    monkeypatch.setattr(measure, "problem", lambda N, C, D, _, t: problem(N, C, D, "cpu", t))
    monkeypatch.setattr(measure, "captured", lambda *_: graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    plan = tvmf_ext.plan
    cpu = {"activities": [ProfilerActivity.CPU]}
    monkeypatch.setattr(kernels, "profile", lambda **_: profile(**cpu))
    monkeypatch.setattr(kernels, "plan", lambda *a, **k: plan(*a, **{**k, "device": "H200"}))
    monkeypatch.setattr(kernels, "SECONDS", 1e-9)
    case = kernels.case_of(SHAPE)
    assert case["shape"] == list(SHAPE) and case["kernels"] == {}
    for key in ("fused_ms", "eager_ms"):
        assert 0 < case[key]["least"] <= case[key]["median"] <= case[key]["most"]
    assert case["graph_ms"]["least"] >= 0 and 0 < case["predicted_ms"] < 1
    monkeypatch.setattr(variants, "eager", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in kernels.case_of(SHAPE)["eager_refused"]


@pytest.mark.parametrize(
    "args",
    [[], ["--shape", "0", "1", "1"], ["--load", "/no/such.json"], ["--load", __file__]],
    ids=str,
)
def test_kernels_want_a_gpu_or_a_file(args, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        kernels.main(args)
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "got" in said and "want" in said


@pytest.mark.parametrize(
    "args",
    [
        ["--shape", "0", "1", "1"],
        ["--kappa", "0"],
        ["--shape", "1", "1", "1", "--kappa", "-0.5"],
        ["--seconds", "0"],
        ["--threads", "0"],
        ["--readme"],
        ["--suite", "gpu-more", "--load", "/no/such.json", "--readme"],
        ["--suite", "cpu", "--readme", "--pass", "fwd"],
        ["--suite", "cpu", "--readme", "--seconds", "1"],
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
        bench.__main__.main(args)
    assert end.value.code == 2 and "want" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # a refusal leaves nothing behind
