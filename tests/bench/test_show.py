"""Numbers, tables and files are as they should be read."""

import pytest

from bench.show import results, tables
from bench.show.units import with_spread, with_unit


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0 B"),
        (None, "B", "-"),
        (999, "B", "999 B"),
        (999.7, "B", "1 kB"),
        (1.5e9, "B", "1.5 GB"),
        (0.0121, "s", "12.1 ms"),
        (740e-9, "s", "740 ns"),
        (788e12, "FLOP/s", "788 TFLOP/s"),
        (2.5e15, "FLOP/s", "2.5e+03 TFLOP/s"),
    ],
)
def test_a_value_has_three_digits_and_a_prefix(value, unit, text):
    assert with_unit(value, unit) == text


@pytest.mark.parametrize(
    ("median", "half", "text"),
    [(3.456, 0.12, "3.46 ± 0.1"), (734.2, 70.4, "734 ± 70"), (2441.0, 3.0, "2441 ± 3")],
)
def test_a_spread_is_written_without_exponents(median, half, text):
    figures = {"median": median, "quartiles": [median - half, median + half]}
    assert with_spread(figures) == text


def test_a_table_is_markdown_whose_columns_line_up():
    rows = [{"a": "x", "long title": 1}, {"a": "yyy", "b": "z"}]
    assert tables.table(rows).splitlines() == [
        "| a   | long title | b |",
        "|-----|------------|---|",
        "| x   | 1          |   |",
        "| yyy |            | z |",
    ]


def figures(value):
    return {"median": value, "quartiles": [value, value], "medians": [value, value]}


def known_case():
    """Forward and backward take 1 + 2 ms (fused), 2 + 10 ms (eager) and 0.5 + 1 ms (products); the
    floor is 0.3 ms."""
    times = {"fused": (1.0, 2.0), "eager": (2.0, 10.0), "products": (0.5, 1.0)}
    found = {
        name: {
            "forward_ms": figures(forward),
            "backward_ms": figures(backward),
            "full_ms": figures(forward + backward),
            "over_eager": figures((forward + backward) / 12),
            "over_fused": figures((forward + backward) / 3),
            "of_floor": 0.3 / (forward + backward),
            "tflops": 0.01,
            "extra_bytes": 5_000_000,
            "launches": 7,
            "error": 1e-6,
        }
        for name, (forward, backward) in times.items()
    }
    return {
        "shape": (100, 1000, 50),
        "kappa": 16.0,
        "dtype": "float32",
        "pass": "full",
        "device": "cpu",
        "threads": 1,
        "machine": {"flops_per_s": 1e11, "bytes_per_s": 1e10},
        "preempted_per_s": 0.0,
        "floor_ms": 0.3,
        "results": found,
    }


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_of_known_times():
    case = known_case()
    lines = tables.case_text(case).splitlines()
    assert "floor 300 us" in lines[1] and "100 GFLOP/s" in lines[1] and "10 GB/s" in lines[1]
    (row,) = [cells(line) for line in lines if line.startswith("| fused")]
    passes = ["1 ± 0", "2 ± 0", "3 ± 0"]
    assert row == ["fused", *passes, "4.00x", "0.01", "10%", "5 MB", "7", "1.0e-06"]
    row = cells(tables.overview([case]).splitlines()[2])
    assert row == ["(100, 1000, 50)", "3 ms", "10%", "5 MB / 5 MB", "4.00x", "0.50x"]


def test_other_work_on_the_machine_is_told():
    assert "BUSY" not in tables.case_text(known_case())
    busy = {**known_case(), "preempted_per_s": 1000.0}
    assert "BUSY: other work took a core 1000 times a second" in tables.case_text(busy)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "a.json"
    results.save({"a": 1}, path)
    with pytest.raises(TypeError):
        results.save({"a": object()}, path)
    assert path.read_text() == '{\n "a": 1\n}\n' and [*path.parent.iterdir()] == [path]
