"""`--document` writes between markers, and the documents have what it writes."""

import json

import pytest

from bench import cli, end_to_end, kernel_times, scaling
from bench.measure.case import GRAPH_MOST
from bench.show import documents
from bench.suite import GPU_SHAPES, SUITES

H200 = {
    "suite": "gpu",
    "device": "NVIDIA H200",
    "driver": "580.1",
    "cpu": "p",
    "isa": "avx2",
    "threads": 8,
    "torch": "2.11.0",
    "date": "2026-11-26",
    "commit": "c",
}


@pytest.fixture
def document(tmp_path, monkeypatch):
    """Makes docs/measurements.md of another folder with these places, and returns its path."""

    def make(*names):
        monkeypatch.setattr(documents, "ROOT", tmp_path)
        path = tmp_path / documents.MEASUREMENTS
        path.parent.mkdir(exist_ok=True)
        places = [f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in names]
        path.write_text("a\n" + "".join(places) + "z\n")
        return path

    return make


def between(text, name):
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def test_a_document_is_rewritten_between_its_markers(document, tmp_path, monkeypatch):
    path = document("bench cpu")
    suite = SUITES["cpu"]
    monkeypatch.setitem(suite, "seconds", 1e-9)
    shapes = [(16, 200, 24), (1, 8, 8), (8, 90, 24)]
    cases = [{"shape": shape, "kappa": 16.0} for shape in shapes]
    cases[-1]["sweep"] = True
    cases.append({"shape": shapes[0], "kappa": 0.0})
    cases.append({"shape": (20, 210, 24), "kappa": 16.0, "dtype": "bfloat16"})
    monkeypatch.setitem(suite, "cases", cases)
    cli.main(["--suite", "cpu", "--document"])
    text = path.read_text()
    assert text.startswith("a\n<!-- bench cpu -->\n") and text.endswith("<!-- /bench cpu -->\nz\n")
    assert "old" not in text and "| (16, 200, 24) " in text and "At (1, 8, 8), on one" in text
    assert "2 ms" in text  # two ticks of the clock
    float32, bfloat16 = text.split("With features in bfloat16:")
    assert "| (20, 210, 24) " in bfloat16 and "(20, 210, 24)" not in float32
    assert (tmp_path / "docs/bench-cpu.png").exists()
    results = tmp_path / "bench/results/cpu.json"
    assert json.loads(results.read_text())["cases"][0]["results"]["fused"]["full_ms"]
    # The same again from the file, without a measurement.
    document("bench cpu")
    cli.main(["--suite", "cpu", "--load", str(results), "--document"])
    assert path.read_text() == text


def gpu_case(shape, kappa=16.0, refused=(), **more):
    """A case as a GPU's file has it. The fused head takes 1 ms; eager, compile, products and peers
    take 4, 2, 0.9 and 3 ms. In a CUDA graph the fused head takes 0.1 ms, and eager 0.3 ms."""

    def figures(value):
        quartiles = [0.9 * value, 1.1 * value]
        return {"median": value, "quartiles": quartiles, "medians": [value, value]}

    times = {"fused": 1.0, "eager": 4.0, "compile": 2.0, "products": 0.9}
    times |= dict.fromkeys(("linear_ce", "cce", "liger"), 3.0) if kappa == 0 else {}
    results = {
        name: {
            "error": 1e-3,
            "extra_bytes": 30_000_000 * time,
            "launches": 9,
            "runs": 50,
            "tflops": 100.0,
            "of_floor": 0.5 / time,
            "over_fused": figures(time),
            "over_eager": figures(time / 4),
            "forward_ms": figures(0.3 * time),
            "backward_ms": figures(0.7 * time),
            "full_ms": figures(time),
        }
        for name, time in times.items()
        if name not in more.get("leave_out", ())
    }
    for name in refused:
        results[name] = {"refused": "RuntimeError: no such shape"}
    if shape[0] * shape[1] <= GRAPH_MOST:
        for name, time in (("fused", 0.1), ("eager", 0.3)):
            results[name]["graph_ms"] = figures(time)
    return {
        "shape": list(shape),
        "kappa": kappa,
        "dtype": "bfloat16",
        "pass": "full",
        "device": "cuda",
        "threads": 8,
        "copies": 3,
        "preempted_per_s": 0.0,
        "floor_ms": 0.5,
        "machine": {"flops_per_s": 788e12, "bytes_per_s": 4.3e12},
        "results": results,
        **more,
    }


def test_a_gpu_s_figures_fill_the_document(document, tmp_path, capsys):
    """Fabricated figures, of the suite's own cases."""
    suite = SUITES["gpu"]["cases"]
    cases = [gpu_case(**case) for case in suite]
    cases[4] = gpu_case(**{**suite[4], "refused": ("cce",)})
    report = {**H200, "cases": cases}
    file = tmp_path / "from_the_gpu.json"
    file.write_text(json.dumps(report))
    path = document("bench gpu")
    cli.main(["--suite", "gpu", "--load", str(file), "--document"])
    text = path.read_text()
    tvmf, cosine = text.split("At kappa 0")
    lines = [line.strip("|").split("|") for line in tvmf.splitlines() if line.startswith("| (")]
    rows = {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}
    graphs = ["0.1 / 0.3"] * 2 + ["- / -"] * 2
    for (N, C, D), graph in zip(GPU_SHAPES, graphs, strict=True):
        wanted = ["1 ms", graph, "50%", "30 MB / 120 MB", "4.00x", "2.00x", "0.90x"]
        assert rows[f"({N}, {C}, {D})"] == wanted
    assert "| geometric mean" in tvmf and "sweep" not in text and "old" not in text
    line = " ".join(cosine.split())
    assert "cut-cross-entropy (RuntimeError: no such shape)" in line and "3.00x" in cosine
    assert "compile" not in cosine
    whole = " ".join(text.split())
    assert "NVIDIA H200, driver 580.1" in whole and "bfloat16" in whole and "CUDA graph" in whole
    assert "(bench-gpu.png)" in text and "python -m bench --suite gpu --document" in text
    assert (tmp_path / "docs/bench-gpu.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "bench/results/gpu.json").read_text()) == report
    shown = capsys.readouterr().out
    assert "large product 788 TFLOP/s" in shown and "launches" in shown and "graph, ms" in shown


def test_a_gpu_s_suite_cut_short_fills_the_document_too():
    cases = [gpu_case(**case) for case in SUITES["gpu"]["cases"][:2]]
    text = documents.markdown({**H200, "cases": cases})
    assert "(256, 8142, 2048)" in text and "kappa 0" not in text


def test_the_documents_have_a_place_for_every_table():
    suites = {"bench cpu", "bench gpu", "kernel times"}
    others = {"end to end cpu", "end to end cuda", "scaling cpu", "scaling cuda"}
    measurements, scales = (
        (documents.ROOT / name).read_text() for name in (documents.MEASUREMENTS, documents.SCALING)
    )
    for text, name in [(measurements, name) for name in suites | others] + [(scales, "paper")]:
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1


@pytest.mark.parametrize(
    ("name", "file", "markdown"),
    [
        ("bench cpu", "cpu", documents.markdown),
        ("end to end cpu", "end-to-end-cpu", end_to_end.step_table),
        ("scaling cpu", "scaling-cpu", scaling.markdown),
        ("kernel times", "h200-kernels", lambda runs: kernel_times.markdown(runs[-1])),
    ],
)
def test_the_document_has_the_figures_of_bench_results(name, file, markdown):
    text = (documents.ROOT / documents.MEASUREMENTS).read_text()
    report = json.loads((documents.ROOT / f"bench/results/{file}.json").read_text())
    assert between(text, name) == markdown(report), "--load FILE --document writes it"


def test_a_document_without_the_markers_is_refused(document):
    document("another")
    with pytest.raises(SystemExit, match=r"without <!-- bench cpu -->"):
        documents.write_between(documents.MEASUREMENTS, "bench cpu", "text")


def test_steps_and_scaling_of_a_gpu_are_shown_from_a_file(document, tmp_path, capsys):
    path = document("end to end cuda", "scaling cuda", "kernel times")
    figures = {"median": 2.0, "quartiles": [1.9, 2.1], "medians": [2.0, 2.0]}
    head = {
        "step_ms": figures,
        "images_per_s": figures,
        "extra_bytes": 5e9,
        "runs": 9,
        "head_share": {**figures, "median": 0.25},
    }
    case = {"name": "net", "shape": [256, 1000, 512], "eager_over_fused": figures}
    case["results"] = {"fused": head, "eager": head}
    steps = {"device": "NVIDIA H200", "quick": False, "cases": [case]}
    points = [
        {
            "size": n,
            "ms": {"median": 2.0 * n},
            "bytes": 1e6 * n,
            "predicted_ms": 1.0 * n,
            "predicted_bytes": 1e6 * n,
        }
        for n in (1, 2, 4, 8)
    ]
    grown = {"device": "NVIDIA H200", "quick": False, "middle": [1, 2, 3]}
    grown["series"] = dict.fromkeys("NCD", points)
    for name, report in (("steps", steps), ("grown", grown)):
        (tmp_path / name).write_text(json.dumps(report))
    end_to_end.main(["--device", "cuda", "--load", str(tmp_path / "steps"), "--document"])
    scaling.main(["--device", "cuda", "--load", str(tmp_path / "grown"), "--document"])
    text = path.read_text()
    table = between(text, "end to end cuda")
    assert "2.00x" in table and "25.0%" in table and "5 GB" in table and "old" not in table
    table = between(text, "scaling cuda")
    assert "16 ms" in table and "N^1.00" in table and "(scaling-cuda.png)" in table
    assert (tmp_path / "docs/scaling-cuda.png").exists()
    for name in ("end-to-end-cuda", "scaling-cuda"):
        assert (tmp_path / f"bench/results/{name}.json").exists()
    for module, file in ((end_to_end, "steps"), (scaling, "grown")):
        with pytest.raises(SystemExit):  # the figures are a GPU's, the device is the CPU
            module.main(["--load", str(tmp_path / file)])
    assert "figures of cuda" in capsys.readouterr().err


def test_the_paper_s_table_is_written(document, tmp_path):
    document()
    path = tmp_path / documents.SCALING
    path.write_text("<!-- paper -->\nold\n<!-- /paper -->\n")
    scaling.main(["--paper", "--document"])
    assert between(path.read_text(), "paper") == scaling.paper()
