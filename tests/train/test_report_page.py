"""The report's page in Chromium: what it draws, and what happens on clicks, on hover and on a
phone."""

import html
import json
import re

import pytest
from PIL import Image

from tests.train.report_runs import write_run, write_runs
from train.config import TrainError
from train.report import browser
from train.report.cli import main

needs_chromium = pytest.mark.skipif(
    browser.find() is None,
    reason=f"none of {', '.join(browser.NAMES)} is on PATH (Debian: apt install chromium)",
)
SMALL = 390  # pixels: the width of a phone


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    main([*map(str, write_runs(root)), "--out", str(root / "report")])
    return root / "report/index.html"


def probe(page, script, size=(1400, 1000), query="?picture"):
    """What a JavaScript function of the body `script` returns, once all of the page is drawn."""
    code = f"""<script>
      (async () => {{
        const drawn = () => document.querySelectorAll(".chart").length ===
          document.querySelectorAll(".chart.js-plotly-plot .main-svg").length / 3;
        while (!drawn()) await new Promise((done) => setTimeout(done, 50));
        const found = await (async () => {{ {script} }})();
        const node = document.createElement("pre");
        node.id = "probe";
        node.textContent = JSON.stringify(found);
        document.body.append(node);
      }})().catch((error) => document.body.insertAdjacentText("beforeend", "PROBE " + error));
    </script>"""
    copy = page.with_name("probe.html")
    copy.write_text(page.read_text("utf-8").replace("</html>", code + "</html>"), "utf-8")
    text = browser.dump(copy, query, *size)
    found = re.search(r'<pre id="probe">(.*?)</pre>', text, re.DOTALL)
    assert found, text[-400:]
    return json.loads(html.unescape(found[1]))


@needs_chromium
def test_page_is_drawn_without_network(page):
    found = probe(
        page,
        """
        const texts = (query) => [...document.querySelectorAll(query)].map((n) => n.textContent);
        return {
          charts: document.querySelectorAll(".chart").length,
          empty: [...document.querySelectorAll(".chart")].filter((n) =>
            !n.querySelector(".trace, .point, .boxlayer path, .scatterlayer path")).length,
          x: texts(".xtitle"),
          y: texts(".ytitle"),
          fetched: performance.getEntriesByType("resource").map((entry) => entry.name)
            .filter((name) => !name.startsWith("data:")),
          broken: [...document.images].filter((image) => !image.naturalWidth).length,
          images: document.images.length,
          epochs: texts("#chart0 .xtick").filter((text) => text), // those within the axis
          single: Math.max(...[...document.querySelectorAll("#chart2 .points path")] // no stars
            .map((n) => n.getBoundingClientRect().width)),
        };
        """,
    )
    assert found["charts"] == 33 and found["empty"] == 0
    assert found["fetched"] == [] and (found["images"], found["broken"]) == (8, 0)
    assert {"error@1 (%)", "loss (nats)", "scale", "accuracy (%)"} <= set(found["y"])
    assert {"epoch", "training images of the class", "confidence (%)"} <= set(found["x"])
    assert found["epochs"] == ["1", "2"] and found["single"] >= 6


@needs_chromium
def test_clicks_and_hover(page):
    found = probe(
        page,
        """
        const shown = () => charts_of().map((node) => [...new Set(node.data
          .filter((t) => t.visible !== false).map((t) => t.meta?.group))].sort());
        const charts_of = () => [...document.querySelectorAll(".chart")];
        const chip = document.querySelectorAll("nav .chip"), out = { before: shown() };
        const off = () => [...document.querySelectorAll("tr.off th")].map((n) => n.textContent);
        chip[1].click();
        await new Promise((done) => setTimeout(done, 300));
        out.clicked = shown();
        out.off = off();
        chip[1].dispatchEvent(new MouseEvent("dblclick"));
        await new Promise((done) => setTimeout(done, 300));
        out.alone = shown();
        document.getElementById("all").click();
        await new Promise((done) => setTimeout(done, 300));
        out.all = shown();

        const errors = () => [...document.querySelectorAll("#results tbody tr")]
          .map((row) => row.cells[0].textContent + row.cells[1].textContent);
        const heading = [...document.querySelectorAll("#results th")]
          .find((n) => n.textContent === "error@1");
        heading.click();
        out.up = errors();
        heading.click();
        out.down = errors();
        out.sorted = heading.ariaSort;

        const points = [...document.querySelectorAll("#errors .chart")].at(-2);
        const number = points.data.findIndex((t) => t.mode === "markers");
        Plotly.Fx.hover(points, [{ curveNumber: number, pointNumber: 1 }]);
        await new Promise((done) => setTimeout(done, 300));
        out.hover = points.querySelector(".hoverlayer").textContent;

        const select = document.getElementById("pairs");
        const cards = () => [...document.querySelectorAll(".cards.on")].map((n) => n.dataset.of);
        out.first = cards();
        select.value = select.options[2].value;
        select.dispatchEvent(new Event("change"));
        out.chosen = [cards(), select.value];
        return out;
        """,
    )
    both = [groups for groups in found["before"] if {0, 1} <= set(groups)]
    assert len(both) == len(found["before"]) - 1  # the similarity has no line of softmax
    for before, clicked, alone in zip(
        found["before"], found["clicked"], found["alone"], strict=True
    ):
        assert clicked == [group for group in before if group != 1]
        assert alone == [group for group in before if group in (1, None)]
    assert found["all"] == found["before"]
    assert found["off"] == 2 * ["t-vMF κ=16"]
    assert found["up"][:2] == ["softmax1", "softmax2"] and found["up"] != found["down"]
    assert found["down"][0].startswith("t-vMF") and found["sorted"] == "descending"
    assert "<dog>" in found["hover"] and "150 training, 10 test images" in found["hover"]
    assert found["first"] == ["0-2"] and found["chosen"] == [["1-2"], "1-2"]


@needs_chromium
def test_phone(page):
    """The page in a frame as wide as a phone, since a window of Chromium is at least 500 wide."""
    text = json.dumps(page.read_text("utf-8")).replace("</", "<\\/")
    frame = page.with_name("frame.html")
    frame.write_text(
        f"""<!doctype html><meta charset="utf-8">
      <iframe style="width:{SMALL}px;height:14000px;border:0"></iframe><script>
      const frame = document.querySelector("iframe");
      frame.srcdoc = {text};
      frame.onload = async () => {{
        const inside = frame.contentDocument, count = (q) => inside.querySelectorAll(q).length;
        while (count(".chart.js-plotly-plot .main-svg") < 3 * count(".chart"))
          await new Promise((done) => setTimeout(done, 50));
        const right = (q) => Math.max(...[...inside.querySelectorAll(q)]
          .map((node) => node.getBoundingClientRect().right));
        const found = {{
          width: inside.documentElement.scrollWidth,
          sections: right("section"),
          charts: right(".chart, .chart .main-svg"),
          narrow: Math.min(...[...inside.querySelectorAll(".chart .main-svg")]
            .map((node) => node.getBoundingClientRect().width)),
        }};
        const node = document.createElement("pre");
        node.id = "probe";
        node.textContent = JSON.stringify(found);
        document.body.append(node);
      }};
      </script>""",
        "utf-8",
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', browser.dump(frame, "", 700, 14000))
    found = json.loads(found[1])
    assert found["width"] == SMALL and found["sections"] <= SMALL and found["charts"] <= SMALL
    assert found["narrow"] > 0.8 * SMALL


@needs_chromium
def test_pictures(tmp_path):
    run = write_run(tmp_path / "run")
    main([str(run), "--out", str(tmp_path / "report"), "--pictures"])
    sections = {"results", "training", "errors", "stage-2", "prior", "calibration", "angles"}
    sections |= {"cosines", "confusions", "settings"}
    found = {path.stem: Image.open(path) for path in (tmp_path / "report").glob("*.png")}
    assert set(found) == sections | {"page"}
    for name in ("errors", "angles"):
        colors = found[name].convert("RGB").getcolors(1 << 20)
        assert (0, 114, 178) in {color for _, color in colors}, name  # the first group's
        assert found[name].width == 1280 and found["page"].width == 1400


def test_pictures_without_chromium(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TrainError, match=r"--pictures: got no chromium on PATH, wanted Chromium"):
        main([str(write_run(tmp_path / "run")), "--out", str(tmp_path / "out"), "--pictures"])
    assert (tmp_path / "out/index.html").exists()
