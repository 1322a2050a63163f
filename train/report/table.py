"""The report's table: a row for each group and stage, means and deviations over seeds."""

import statistics
from dataclasses import dataclass
from html import escape
from typing import Any

from train.metrics import FIGURES, SIZES
from train.report.runs import STAGES, Group

TRAINING = "training error@1"
MORE_IS_BETTER = {"macro_f1"}


@dataclass
class Cell:
    """A figure of each seed's run; `best` if no group has a better mean in this stage."""

    values: list[float]
    best: bool = False

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    def __str__(self) -> str:
        """Mean ± sample standard deviation, as far as there are seeds for them."""
        if not self.values:
            return "-"
        spread = f" ± {statistics.stdev(self.values):.1f}" if len(self.values) > 1 else ""
        return f"{self.mean:.1f}{spread}"


@dataclass
class Row:
    group: int
    label: str
    stage: int
    seeds: int
    cells: dict[str, Cell]
    selected_on: str

    def texts(self) -> list[str]:
        figures = [str(cell) for cell in self.cells.values()]
        return [self.label, str(self.stage), str(self.seeds), *figures, self.selected_on]


def training_error(run: dict[str, Any], stage: int) -> list[float]:
    """The training error of the epoch whose model is the result, as its record has it."""
    chosen = run[f"stage{stage}"].get("epoch")
    found = [r["error1"] for r in run["epochs"] if (r["stage"], r["epoch"]) == (stage, chosen)]
    return found[:1]


def make_rows(groups: list[Group]) -> list[Row]:
    rows = []
    for i, group in enumerate(groups):
        for stage in STAGES:
            results = group.results(stage)
            if not results:
                continue
            cells = {
                name: Cell([float(r[name]) for r in results if r.get(name) is not None])
                for name in FIGURES
            }
            runs = [run for run in group.runs if f"stage{stage}" in run]
            cells[TRAINING] = Cell([e for run in runs for e in training_error(run, stage)])
            selected = results[0]["selected_on"].replace("test", "TEST")
            rows.append(Row(i, group.label, stage, len(results), cells, selected))
    mark_best(rows)
    return rows


def mark_best(rows: list[Row]) -> None:
    """Marks the best mean of each figure in each stage, as far as the shown digits tell."""
    for stage in STAGES:
        for name in FIGURES:
            cells = [r.cells[name] for r in rows if r.stage == stage and r.cells[name].values]
            better = max if name in MORE_IS_BETTER else min
            best = better((round(cell.mean, 1) for cell in cells), default=None)
            for cell in cells:
                cell.best = len(cells) > 1 and round(cell.mean, 1) == best


def headings() -> list[str]:
    return ["head", "stage", "seeds", *FIGURES.values(), TRAINING, "selected on"]


def to_text(rows: list[Row], markdown: bool) -> str:
    """The table for a terminal, or for a document."""
    table = [headings(), *(row.texts() for row in rows)]
    if markdown:
        table.insert(1, ["---"] * len(table[0]))
        cells = ([cell.replace("|", "\\|") for cell in line] for line in table)
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        f"{line[0]:{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in table
    )


def to_html(rows: list[Row], colors: list[str]) -> str:
    """A table whose headings sort it (page.js) by each cell's data-value."""
    titles = {FIGURES[name]: f"classes with {size} images" for name, size in SIZES.items()}
    head = "".join(
        f'<th scope="col" title="{escape(titles.get(name, ""))}"><button>{name}</button></th>'
        for name in headings()
    )
    body = ""
    for row in rows:
        swatch = f'<i class="swatch" style="background:{colors[row.group]}"></i>'
        body += f'<tr data-group="{row.group}"><th scope="row">{swatch}{escape(row.label)}</th>'
        body += f"<td>{row.stage}</td><td>{row.seeds}</td>"
        for cell in row.cells.values():
            mean, spread, deviation = str(cell).partition(" ± ")
            seeds = ", ".join(f"{value:.2f}" for value in cell.values)
            value = "" if cell.mean is None else f"{cell.mean:.6f}"
            body += f'<td data-value="{value}" title="by seed: {seeds}"'
            body += f"{' class=best' * cell.best}>{mean}"
            body += f"<small>{spread}{deviation}</small></td>" if spread else "</td>"
        mark = "<mark>{}</mark>" if row.selected_on == "TEST" else "{}"
        body += f"<td>{mark.format(escape(row.selected_on))}</td></tr>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'
