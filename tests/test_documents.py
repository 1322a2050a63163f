"""The documents name files, commands and numbers of the repository: all of them must be there."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from bench import kernel_times, scaling
from bench.show.units import milliseconds, with_unit
from tvmf_ext import plan

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    + list((ROOT / "docs").glob("*.md"))
)
README = (ROOT / "README.md").read_text()
README_LINE = " ".join(README.split())  # its text, wherever its lines break
MEASUREMENTS = (ROOT / "docs" / "measurements.md").read_text()
FOLDERS = ("csrc", "tests", "train", "bench", "docs", "tvmf_ext", r"\.ci")
SHAPES = ((256, 1000, 512), (256, 8142, 2048), (1024, 21841, 768), (1024, 1000000, 512))
# Flags of other programs that docs/training.md explains.
FOREIGN_FLAGS = {"--signal", "--shutdown-timeout"}

of_each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def anchors(text):
    """The anchors that GitHub gives to the headings of a document."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in headings}


def broken_links(path):
    """Relative links of a document to a file or a heading that is not there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def missing_paths(text, root):
    """Files and folders of the repository that a text names and that are not there. Names with
    CLASS are the layout of a user's data."""
    text = re.sub(r"\]\([^)]*\)|https?://\S+", "", text)
    named = re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./+-]*", text)
    paths = {name.rstrip("./") for name in named if "CLASS" not in name}
    return {name for name in paths if not (root / name).exists()}


def commands(text):
    """Module and arguments of each command `python -m` or `torchrun -m` that a text names."""
    text = text.replace("\\\n", " ")
    return re.findall(r"(?:python|torchrun[^`\n]*?) -m ([\w.]+)([^`\n]*)", text)


def sources(package):
    return "\n".join(path.read_text() for path in sorted((ROOT / package).rglob("*.py")))


def has_flag(package, flag):
    """Whether a package's parsers know the flag: argparse has it as a string, tyro as a field."""
    if flag == "--help":
        return True
    name = flag.removeprefix("--")
    field = name.replace("-", "_")
    return re.search(rf'"(--)?{name}"|^    {field}: ', sources(package), re.M) is not None


@of_each_document
def test_links_lead_to_files_and_headings(path):
    assert not broken_links(path)


def test_a_link_to_a_file_that_is_gone_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One title\n[a](other.md) [b](#one-title) [c](#no-title) [d](https://e.f/)")
    assert broken_links(page) == ["other.md", "#no-title"]
    (tmp_path / "other.md").touch()
    assert broken_links(page) == ["#no-title"]


@of_each_document
def test_named_files_are_there(path):
    if path.name != "CHANGELOG.md":  # whose files may be gone
        assert not missing_paths(path.read_text(), ROOT)


def test_a_named_file_that_is_gone_is_noticed(tmp_path):
    text = "see `tests/gone.py`, tests/here.py, train/CLASS/a and [x](docs/link.md)"
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "here.py").touch()
    assert missing_paths(text, tmp_path) == {"tests/gone.py"}


@of_each_document
def test_named_commands_have_their_module_and_flags(path):
    for module, arguments in commands(path.read_text()):
        assert importlib.util.find_spec(module), f"python -m {module}"
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", arguments):
            assert has_flag(module.split(".")[0], flag), f"python -m {module} {flag}"


def test_commands_are_found_however_they_are_written():
    text = "`python -m a.b --c`\ntorchrun --d 8 \\\n  -m e --f g\n`pip install -m h`"
    assert [(m, a.split()) for m, a in commands(text)] == [
        ("a.b", ["--c"]),
        ("e", ["--f", "g"]),
    ]


def test_flags_of_the_driver_are_as_docs_training_has_them():
    text = (ROOT / "docs" / "training.md").read_text().split("## From the paper's code")[0]
    codes = " ".join(re.findall(r"`(--[^`]+)`", text))
    flags = set(re.findall(r"(?<!\S)--[a-z][\w-]*", codes))
    assert len(flags) > 30
    assert {flag for flag in flags - FOREIGN_FLAGS if not has_flag("train", flag)} == set()


def test_readme_fits_three_screens():
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 900


def test_readme_has_the_quick_start_word_for_word():
    for command in (
        "pip install -e '.[train]' && python -m train",
        "pip install -e '.[test]' && pytest",
    ):
        assert f"\n{command}\n" in README


def test_readme_has_one_example_and_ci_runs_it(monkeypatch, tmp_path, capsys):
    """As .ci/run does: the lines between the markers, without fences, from another folder."""
    begin, end = "<!-- example -->", "<!-- /example -->"
    assert README.count(begin) == README.count(end) == 1
    printed = subprocess.check_output([ROOT / ".ci" / "example"], text=True)
    assert '.ci/example >"$work/example.py"' in (ROOT / ".ci" / "run").read_text()
    lines = README.split(begin)[1].split(end)[0].strip().splitlines()
    assert lines[0] == "```python" and lines[-1] == "```"
    code = "\n".join(line for line in lines if "```" not in line)
    assert printed.strip() == code.strip()
    assert "optimizer.step()" in code
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})
    loss = float(re.search(r"loss ([\d.]+)", capsys.readouterr().out)[1])
    assert loss < 2  # before training it is about log(100)


def test_numbers_of_the_readme_are_those_of_bench_results():
    run = json.loads((ROOT / "bench/results/h200-kernels.json").read_text())[-1]
    on_gpu = next(case for case in run["cases"] if case["shape"] == [1024, 1000000, 512])
    fused, eager = (milliseconds(on_gpu[key]["median"]) for key in ("fused_ms", "eager_ms"))
    assert f"(1024, 1000000, 512), bfloat16 features | {fused} | {eager} |" in README
    assert f"takes {fused} on an H200; eager PyTorch takes {eager}." in README_LINE

    cases = json.loads((ROOT / "bench/results/cpu.json").read_text())["cases"]
    on_cpu = next(case for case in cases if case["shape"] == [64, 1000000, 512])
    fused, eager = (
        (milliseconds(result["full_ms"]["median"]), with_unit(result["extra_bytes"], "B"))
        for result in map(on_cpu["results"].get, ("fused", "eager"))
    )
    row = (
        f"(64, 1000000, 512), float32 | {fused[0]}, {fused[1]} extra memory | {', '.join(eager)} |"
    )
    assert row in README


def test_measurements_have_the_runs_of_the_kernels():
    runs = json.loads((ROOT / "bench/results/h200-kernels.json").read_text())
    assert kernel_times.pass_table(runs[-1]) in MEASUREMENTS
    for run in runs:
        assert run["commit"] in MEASUREMENTS
    for key in ("device", "driver", "torch", "date"):
        assert runs[-1][key] in MEASUREMENTS


def predictions():
    """Rows of the table of predictions, two for each shape."""
    for shape in SHAPES:
        found = plan(*shape, dtype=torch.bfloat16, weight_dtype=torch.float32, device="H200")
        for name in ("forward", "backward"):
            cells = (
                ", ".join(map(str, shape)) if name == "forward" else "",
                name,
                getattr(found, f"{name}_launches"),
                with_unit(getattr(found, f"{name}_workspace"), "B"),
                f"{getattr(found, f'{name}_flops'):.2e}".replace("e+0", "e").replace("e+", "e"),
                with_unit(getattr(found, f"{name}_hbm"), "B"),
                with_unit(getattr(found, f"{name}_l2"), "B"),
                with_unit(getattr(found, f"{name}_seconds"), "s"),
                found.limit(name),
            )
            yield "| " + " | ".join(map(str, cells)).lstrip() + " |"


def test_predictions_are_those_of_the_plan():
    missing = [row for row in predictions() if row not in MEASUREMENTS]
    assert not missing, "docs/measurements.md lacks:\n" + "\n".join(missing)


# Predicted seconds of a step on the portable path, before Hopper's took 16-bit weights.
NARROW_BEFORE = {
    (2048, 128256, 4096): 0.10656,
    (2048, 102400, 2048): 0.04013,
    (2048, 32000, 4096): 0.02664,
    (1024, 1000000, 512): 0.04928,
    (256, 8142, 2048): 331.2e-6,
}


def narrow():
    """Rows of the table of weights of the features' dtype."""
    for shape, before in NARROW_BEFORE.items():
        found = plan(*shape, dtype=torch.bfloat16, weight_dtype=torch.bfloat16, device="H200")
        step = found.forward_seconds + found.backward_seconds
        cells = ", ".join(map(str, shape)), with_unit(before, "s"), with_unit(step, "s")
        yield f"| {' | '.join(cells)} | {before / step:.1f} |"


def test_predictions_of_16_bit_weights_are_those_of_the_plan():
    missing = [row for row in narrow() if row not in MEASUREMENTS]
    assert not missing, "docs/measurements.md lacks:\n" + "\n".join(missing)


def expectations():
    """Rows of the table of docs/confirm.md."""
    for shape in (*SHAPES, (16384, 39063, 512)):
        found = plan(*shape, dtype=torch.bfloat16, weight_dtype=torch.float32, device="H200")
        kernels = ", ".join(map(str, found.forward_kernels + found.backward_kernels))
        step = with_unit(found.forward_seconds + found.backward_seconds, "s")
        yield f"| {', '.join(map(str, shape))} | {step} | {kernels} |"


def test_what_a_gpu_should_show_is_what_the_plan_predicts():
    text = (ROOT / "docs" / "confirm.md").read_text()
    missing = [row for row in expectations() if row not in text]
    assert not missing, "docs/confirm.md lacks:\n" + "\n".join(missing)


def test_the_table_of_many_gpus_is_that_of_the_plan():
    text = (ROOT / "docs" / "scaling.md").read_text()
    table = text.split("<!-- paper -->\n")[1].split("\n<!-- /paper -->")[0]
    assert table == scaling.paper(), "python -m bench.scaling --paper --document writes it"
