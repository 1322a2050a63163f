"use strict";
const { charts, shared } = JSON.parse(document.getElementById("data").textContent);
const config = {
  responsive: true,
  displaylogo: false,
  displayModeBar: matchMedia("(hover: none)").matches ? false : "hover", // no room on a phone
  modeBarButtonsToRemove: ["lasso2d", "select2d"],
  toImageButtonOptions: { scale: 2 },
};
const off = new Set();

// A chart is drawn when it comes near the screen, so that the page opens at once.
function draw(node) {
  const chart = charts[Number(node.id.slice(5))];
  for (const trace of chart.data) {
    for (const key of ["x", "y", "customdata"])
      trace[key] = shared[trace[key]?.shared] ?? trace[key];
    if (off.has(trace.meta?.group)) trace.visible = false;
  }
  return Plotly.newPlot(node, chart.data, chart.layout, config);
}

function show(group, shown) {
  shown ? off.delete(group) : off.add(group);
  document.querySelector(`.chip[data-group="${group}"]`).ariaPressed = String(shown);
  for (const row of document.querySelectorAll(`tr[data-group="${group}"]`))
    row.classList.toggle("off", !shown);
}

function redraw() {
  for (const node of document.querySelectorAll(".chart.js-plotly-plot"))
    Plotly.restyle(node, { visible: node.data.map((trace) => !off.has(trace.meta?.group)) });
}

const chips = [...document.querySelectorAll(".chip")];
for (const chip of chips) {
  chip.title = "Click to switch these runs on or off, double-click to see them alone";
  const group = Number(chip.dataset.group);
  chip.onclick = () => { show(group, off.has(group)); redraw(); };
  chip.ondblclick = () => { chips.forEach((_, i) => show(i, i === group)); redraw(); };
}
for (const [id, shown] of [["all", true], ["none", false]])
  document.getElementById(id).onclick = () => {
    chips.forEach((_, i) => show(i, shown));
    redraw();
  };

// A click on a heading sorts by it, and a second one turns the order around.
const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
for (const heading of document.querySelectorAll("#results thead th")) {
  heading.onclick = () => {
    const up = heading.ariaSort !== "ascending", column = heading.cellIndex;
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.ariaSort = up ? "ascending" : "descending";
    const body = document.querySelector("#results tbody");
    const compare = (a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (x === "" || y === "") return (x === "") - (y === ""); // a missing figure comes last
      return (up ? 1 : -1) * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    };
    body.append(...[...body.rows].sort(compare));
  };
}

const pairs = document.getElementById("pairs");
if (pairs) {
  pairs.onchange = () => {
    for (const cards of document.querySelectorAll(".cards"))
      cards.classList.toggle("on", cards.dataset.of === pairs.value);
  };
  pairs.onchange();
}


// Draws everything and says where each section is, for the pictures that browser.py takes.
async function drawAll(nodes) {
  const root = document.documentElement, boxes = {};
  root.classList.add("picture");
  for (const panels of document.querySelectorAll(".panels:not(:empty)")) {
    const legend = document.createElement("div"); // each picture has one of its own
    legend.className = "chips";
    legend.append(...chips.map((chip) => chip.cloneNode(true)));
    panels.before(legend);
  }
  await Promise.all(nodes.map(draw));
  for (const node of [root, ...document.querySelectorAll("section")]) {
    const { left, top, right, bottom } = node.getBoundingClientRect();
    boxes[node.id || "page"] = [left, top, right, bottom].map(Math.round);
  }
  root.dataset.boxes = JSON.stringify(boxes);
}

async function start() {
  const text = atob(document.getElementById("library").textContent);
  const packed = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.text = await new Response(stream).text();
  document.head.append(script);
  const nodes = [...document.querySelectorAll(".chart")];
  if (new URLSearchParams(location.search).has("picture")) return drawAll(nodes);
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((entry) => entry.isIntersecting)) {
      near.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "600px" });
  nodes.forEach((node) => near.observe(node));
}
start().catch((error) => {
  const note = document.createElement("p");
  note.textContent = `The figures cannot be drawn (${error}); they need a browser from 2023 on.`;
  document.querySelector("main").prepend(note);
});
