"""The page: one HTML file that holds its figures, pictures, style and the plotting library."""

import base64
import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from train.report import figures, table
from train.report.runs import STAGES, Group, settings, typed
from train.report.traces import color_of

HERE = Path(__file__).parent
MANY = 2  # A list of more elements is in the page once for all traces that have it.


@dataclass
class Section:
    """A part of the page: its name in the list of sections, a heading, a sentence or two, panels,
    and HTML that follows them."""

    link: str
    title: str
    note: str
    panels: list[tuple[str, go.Figure]]
    html: str = ""

    @property
    def id(self) -> str:
        return self.link.lower().replace(" ", "-")


def both(draw: Callable[[int], go.Figure | None], text: str = "") -> list[tuple[str, go.Figure]]:
    """A panel for each stage that has something to show."""
    found = [(n, fig) for n in STAGES if (fig := draw(n)) is not None]
    return [(f"{text}stage {n}", fig) for n, fig in found]


def single(text: str, fig: go.Figure | None) -> list[tuple[str, go.Figure]]:
    return [] if fig is None else [(text, fig)]


def make_sections(groups: list[Group]) -> list[Section]:
    """The sections in the order of the page; those without anything to show are left out."""
    # The figures' texts are HTML, too.
    shown = [replace(group, label=escape(group.label)) for group in groups]

    def each(draw, *more):
        return lambda stage: draw(shown, stage, *more)

    def curves(key, title, text):
        return both(each(figures.curve, key, title), f"{text}, ")

    norm = "norm of the class weight", "mean norm of features"
    sections = [
        Section(
            "Training",
            "Training",
            "Training (dashed) and evaluation (solid) after each epoch, ★ where the result was "
            "taken. Lines are means over seeds, bands one sample standard deviation. Training "
            "figures are means over the epoch, with its augmentation and its sampling.",
            curves("error1", "error@1 (%)", "error")
            + curves("loss", "loss (nats)", "loss")
            + curves("scale", "scale", "scale of the head")
            + curves("lr", "learning rate", "learning rate"),
        ),
        Section(
            "Errors",
            "Errors by class size",
            "A point is a class, and its name appears on hover. Lines join the means of classes "
            "of similar size, whiskers are one standard deviation over seeds.",
            both(each(figures.size_bars)) + both(each(figures.each_class), "each class, "),
        ),
        Section(
            "Stage 2",
            "What stage 2 changes",
            "Error after stage 2 minus error after stage 1, so that below zero is better.",
            single("by size of the class", figures.stage_change_bars(shown))
            + single("each class", figures.stage_change(shown)),
        ),
        Section(
            "Prior",
            "What a prior adjustment would change",
            "The logarithm of each class's frequency is subtracted from its logit (Menon et al., "
            "ICLR 2021, τ = 1), at no cost and from the same model. Below zero is better. A model "
            "whose training was balanced over classes has no use for it.",
            both(each(figures.prior_change_bars))
            + both(each(figures.prior_change), "each class, "),
        ),
        Section(
            "Calibration",
            "Calibration",
            "A model on the dotted line is as often right as it is sure. Below the line it is too "
            "sure. The area of a point grows with its share of the test images.",
            both(each(figures.calibration)),
        ),
        Section(
            "Angles",
            "Angles and norms",
            "Angles in degrees between features of training images, without augmentation, and the "
            "weight of their own class. Boxes reach from the first to the third quartile with the "
            "median between, whiskers from 5 to 95 % of the images. A compact class has small "
            "angles; classes of few images tend to larger ones.",
            both(each(figures.angle_boxes), "angles of training images, ")
            + both(each(figures.angle_boxes, "test_angles"), "angles of test images, ")
            + both(each(figures.class_angles), "training images of each class, ")
            + both(each(figures.class_values, "weight_norm", norm[0]), "class weights, ")
            + both(each(figures.class_values, "feature_norm", norm[1]), "training images, ")
            + single("the similarity that stage 1 was trained with", figures.similarity(shown)),
        ),
        Section(
            "Cosines",
            "Cosines of test images",
            "Of a feature with the weight of its own class (solid) and with that of the nearest "
            "other class (dotted). Where the two overlap, images are confused.",
            both(each(figures.cosines)),
        ),
        Section(
            "Confusions",
            "Most confused classes",
            "Test images of the left class that the model took for the right one; the surest are "
            "shown, beside a training image of the class that they were taken for.",
            [],
            confusions(groups),
        ),
        Section(
            "Settings",
            "Settings of the runs",
            "Each flag as it was for each group, those that differ first.",
            [],
            all_settings(groups),
        ),
    ]
    for section in sections:
        same_axes(section.panels)
    return [section for section in sections if section.panels or section.html]


def same_axes(panels: list[tuple[str, go.Figure]]) -> None:
    """Gives the same vertical range to panels of one kind and quantity, so that they compare at a
    glance."""
    kinds: dict[tuple[str, str], list[go.Figure]] = {}
    for _, fig in panels:
        kinds.setdefault((fig.layout.yaxis.title.text or "", fig.data[-1].type), []).append(fig)
    for (title, _), figs in kinds.items():
        values = [value for fig in figs for trace in fig.data for value in heights(trace)]
        if len(figs) < 2 or not title or not values:
            continue
        low, high = min(values), max(values)
        zero = not title.startswith(("loss", "scale")) or low < 0
        low = min(low, 0) if zero else low
        room = 0.06 * (high - low or 1)
        for fig in figs:
            fig.update_yaxes(range=[low - room * (low < 0 or not zero), high + room])


def heights(trace: Any) -> Iterable[float]:
    """The vertical positions that a trace reaches."""
    if trace.type == "box":
        return [*trace.lowerfence, *trace.upperfence]
    spread = (trace.error_y.array if trace.type == "bar" else None) or [0] * len(trace.y)
    pairs = [(y, s) for y, s in zip(trace.y, spread, strict=True) if y is not None]
    return [y + sign * s for y, s in pairs for sign in (-1, 1)]


def confusions(groups: list[Group]) -> str:
    """Cards of the most confused pairs for the first seed of each group and for each stage, of
    which the page shows one choice at a time."""
    options, parts = "", ""
    for i, group in enumerate(groups):
        for stage in reversed(STAGES):
            for run in group.runs[:1]:
                analysis = run["analysis"].get(stage, {})
                cards = "".join(card(analysis, pair) for pair in analysis.get("pairs", ()))
                seed = f", seed {run['config']['seed']}" if run["config"] else ""
                if cards:
                    value = f'value="{i}-{stage}"'
                    options += f"<option {value}>{escape(group.label)}, stage {stage}{seed}"
                    parts += f'<div class="cards" data-of="{i}-{stage}">{cards}</div>'
    return f'<label>Model <select id="pairs">{options}</select></label>{parts}' if parts else ""


def card(analysis: dict[str, Any], pair: dict[str, Any]) -> str:
    """One confused pair with its images."""
    true, other = (escape(analysis["names"][pair[key]]) for key in ("true", "predicted"))

    def pictures(uris, about):
        return "".join(f'<img alt="{about}" src="{escape(uri)}">' for uri in uris if uri)

    return (
        f"<figure><figcaption><b>{true}</b> taken for <b>{other}</b><br><span>{pair['images']} of "
        f"{pair['of']} images ({100 * pair['images'] / pair['of']:.0f} %)</span></figcaption><div>"
        + pictures(pair["examples"], f"{true}, taken for {other}")
        + '<i aria-hidden="true">→</i>'
        + pictures(pair["predicted_example"], f"a training image of {other}")
        + "</div></figure>"
    )


def all_settings(groups: list[Group]) -> str:
    """A table of flags by group, and the folders of the runs."""
    groups = [group for group in groups if group.config]
    if not groups:
        return ""
    keys = dict.fromkeys(k for g in groups for k in settings(g.config) if k in g.config)

    def values(key):
        return [typed(group.config[key]) if key in group.config else "-" for group in groups]

    keys = sorted(keys, key=lambda key: len(set(values(key))) == 1)
    head = "".join(f'<th scope="col">{escape(group.label)}</th>' for group in groups)
    lines = [("runs", [", ".join(str(run["path"]) for run in group.runs) for group in groups])]
    lines += [(key, values(key)) for key in keys]
    body = ""
    for key, found in lines:
        cells = "".join(f"<td>{escape(value)}</td>" for value in found)
        body += (
            f'<tr{" class=differs" * (len(set(found)) > 1)}><th scope="row">{key}</th>{cells}</tr>'
        )
    return (
        "<details><summary>Show the flags</summary><div class=scroll><table><thead><tr><th></th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def chips(groups: list[Group]) -> str:
    return "".join(
        f'<button class="chip" aria-pressed="true" data-group="{i}" style="--c:{color_of(i)}">'
        f"{escape(group.label)}</button>"
        for i, group in enumerate(groups)
    )


def packed_library() -> str:
    """Plotly's JavaScript, compressed to two fifths, which the page unpacks when it is opened."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def share_lists(charts: list[dict[str, Any]]) -> list[list]:
    """Replaces lists that several traces have, as the names and sizes of thousands of classes, by
    {"shared": their number in the returned list of them}."""
    traces = [trace for chart in charts for trace in chart["data"]]
    known: dict[str, list[tuple[dict, str]]] = {}
    for trace in traces:
        for key in ("x", "y", "customdata"):
            if len(trace.get(key) or ()) > MANY:
                known.setdefault(json.dumps(trace[key]), []).append((trace, key))
    lists = []
    for places in known.values():
        if len(places) > 1:
            lists.append(places[0][0][places[0][1]])
            for trace, key in places:
                trace[key] = {"shared": len(lists) - 1}
    return lists


def make_page(groups: list[Group], about: str, note: str) -> str:
    """The page as HTML."""
    rows = table.make_rows(groups)
    sections = make_sections(groups)
    charts, body, links = [], "", ""
    for section in sections:
        links += f'<a href="#{section.id}">{section.link}</a>'
        body += f'<section id="{section.id}"><h2>{section.title}</h2><p>{section.note}</p>'
        body += '<div class="panels">'
        for heading, fig in section.panels:
            height = f' style="height:{fig.layout.height}px"' if fig.layout.height else ""
            body += f"<figure><figcaption>{heading}</figcaption>"
            body += f'<div class="chart" id="chart{len(charts)}"{height}></div></figure>'
            charts.append(json.loads(fig.to_json()))
        body += f"</div>{section.html}</section>"
    colors = [color_of(i) for i in range(len(groups))]
    result = table.to_html(rows, colors) if rows else "<p>No run has finished yet.</p>"
    content = {"shared": share_lists(charts), "charts": charts}
    # "</" would end the script that holds the data.
    data = json.dumps(content, separators=(",", ":")).replace("</", "<\\/")
    return Template((HERE / "page.html").read_text("utf-8")).substitute(
        style=(HERE / "page.css").read_text("utf-8"),
        script=(HERE / "page.js").read_text("utf-8"),
        about=escape(about),
        note=note,
        links=links,
        chips=chips(groups),
        table=result,
        body=body,
        data=data,
        library=packed_library(),
    )
