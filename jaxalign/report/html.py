"""A self-contained HTML report of a comparison grid, which needs no network and no other files."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping
from typing import Any

TITLES = {"colors": "Colors of the best match, before and after alignment", "layers": "Layer by layer"}


def page(data: Mapping[str, Any], figures: Mapping[str, bytes], notes: tuple[str, ...] = ()) -> str:
    """The report of a grid as HTML.

    Args:
        data: the JSON of `jaxalign grid`.
        figures: {name: PNG}.
        notes: lines of text.
    """
    # "</" or "<!--" would end the script element. Escaped, they are the same JSON.
    payload = json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")
    shown = "".join(
        f"<h2>{html.escape(TITLES.get(name, name))}</h2>"
        f'<img alt="{html.escape(TITLES.get(name, name))}" src="data:image/png;base64,'
        f'{base64.b64encode(content).decode()}">'
        for name, content in figures.items()
    )
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    names = " and ".join(html.escape(name) for name in dict.fromkeys(data["names"]))
    parts = {
        "TITLE": f"{html.escape(str(data['measure']))} of {names}",
        "NOTES": f"<ul>{items}</ul>" if items else "",
        "FIGURES": shown,
        "DATA": payload,
    }
    # In one pass, because inserted text may contain such markers.
    return re.sub("@@([A-Z]+)@@", lambda marker: parts[marker[1]], _PAGE)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@@TITLE@@</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; } th, td { padding: .2rem .6rem; text-align: left; border-bottom: 1px solid var(--soft); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid; }
.wide { overflow-x: auto; } img { max-width: 100%; background: #fff; border-radius: 4px; }
svg { font: 11px system-ui, sans-serif; } svg text { fill: currentColor; } svg .cell { cursor: crosshair; }
svg .cell:hover, svg .cell.on { stroke: currentColor; stroke-width: 2; }
#tip { position: fixed; pointer-events: none; background: #222; color: #fff; padding: .35rem .6rem; border-radius: 4px; font-size: 13px; max-width: 24rem; white-space: pre-line; overflow-wrap: anywhere; }
#tip[hidden] { display: none; } code { overflow-wrap: anywhere; } label { margin-right: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; border-radius: 4px; font-size: 12px; }
</style></head><body>
<h1>@@TITLE@@</h1>
<p id="summary"></p>@@NOTES@@
<p><label>rows and columns <select id="order"><option value="original">in original order</option><option value="name">by name</option>
<option value="best">by best match</option></select></label>
<label id="significance" hidden><input type="checkbox" id="fade"> fade cells that are not significant</label></p>
<div class="wide" id="map" role="img" aria-label="heat map of all comparisons"></div><div id="tip" hidden></div>
<h2>Best matches</h2><div class="wide"><table id="best"></table></div>
@@FIGURES@@
<h2>Options and provenance</h2><pre id="provenance"></pre>
<script type="application/json" id="data">@@DATA@@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const {rows, columns, values} = data, stats = data.statistics, better = data.direction === "similarity" ? 1 : -1;
const svgNS = "http://www.w3.org/2000/svg";
// viridis, at nine points
const ramp = [[68,1,84],[71,44,122],[59,81,139],[44,113,142],[33,144,141],[39,173,129],[92,200,99],[170,220,50],[253,231,37]];
const all = values.flat().filter(v => v !== null);
const low = Math.min(...all), high = Math.max(...all);
function share(v) { const s = high > low ? (v - low) / (high - low) : 0.5; return better > 0 ? s : 1 - s; }
function color(v) {
  if (v === null) return "#8883";
  const s = share(v) * (ramp.length - 1), k = Math.min(Math.floor(s), ramp.length - 2), t = s - k;
  return "rgb(" + ramp[k].map((a, c) => Math.round(a + t * (ramp[k + 1][c] - a))).join(",") + ")";
}
function best(list) { return list.reduce((m, v, k) => v === null ? m : m < 0 || better * (v - list[m]) > 0 ? k : m, -1); }
function candidates(i) { return data.itself ? values[i].map((v, j) => j === i ? null : v) : values[i]; }
function element(name, attributes, text) {
  const made = document.createElementNS(svgNS, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}
function cut(name) { return name.length > 34 ? name.slice(0, 16) + "…" + name.slice(-17) : name; }
function order(names, score) {
  const how = document.getElementById("order").value, list = names.map((_, k) => k);
  if (how === "name") list.sort((a, b) => names[a].localeCompare(names[b], undefined, {numeric: true}));
  if (how === "best") list.sort((a, b) => better * (score(b) - score(a)));
  return list;
}
function describe(i, j) {
  let text = rows[i] + "\\n" + columns[j] + "\\n" + data.measure + " = " + (values[i][j] === null ? "none" : values[i][j].toPrecision(5));
  if (stats && stats.calibrated[i][j] !== null) text += "\\ncalibrated " + stats.calibrated[i][j].toPrecision(3);
  if (stats) text += "\\np = " + stats.p_value[i][j].toPrecision(3) + ", corrected " + stats.corrected[i][j].toPrecision(3);
  return text;
}
const tip = document.getElementById("tip");
function draw() {
  const size = Math.max(14, Math.min(44, 760 / Math.max(rows.length, columns.length)));
  const left = 10 + 6.4 * Math.max(...rows.map(r => cut(r).length)), below = 10 + 6.4 * Math.max(...columns.map(c => cut(c).length));
  const byRow = order(rows, i => { const k = best(candidates(i)); return k < 0 ? -1e9 : values[i][k]; });
  const byColumn = data.itself ? byRow : order(columns, j => { const list = values.map(r => r[j]), k = best(list); return k < 0 ? -1e9 : list[k]; });
  const width = left + size * columns.length + 10, height = size * rows.length + below;
  const svg = element("svg", {width, height, viewBox: `0 0 ${width} ${height}`});
  const fade = document.getElementById("fade").checked;
  byRow.forEach((i, line) => {
    svg.append(element("text", {x: left - 6, y: (line + 0.5) * size + 4, "text-anchor": "end"}, cut(rows[i])));
    byColumn.forEach((j, place) => {
      const v = values[i][j], weak = stats && stats.corrected[i][j] > 0.05 + 1e-9;
      const cell = element("rect", {class: "cell", x: left + place * size, y: line * size, width: size - 1, height: size - 1,
        fill: color(v), opacity: fade && weak ? 0.15 : 1, tabindex: 0, "aria-label": describe(i, j)});
      const show = (x, y) => { tip.textContent = describe(i, j); tip.hidden = false; const box = tip.getBoundingClientRect();
        tip.style.left = Math.min(x + 14, innerWidth - box.width - 8) + "px"; tip.style.top = Math.min(y + 14, innerHeight - box.height - 8) + "px"; };
      cell.addEventListener("mousemove", e => show(e.clientX, e.clientY));
      cell.addEventListener("focus", () => { const box = cell.getBoundingClientRect(); show(box.right, box.bottom); });
      for (const end of ["mouseleave", "blur"]) cell.addEventListener(end, () => { tip.hidden = true; });
      svg.append(cell);
      if (size >= 30 && v !== null) {
        const dark = share(v) > 0.55, text = element("text", {x: left + (place + 0.5) * size, y: (line + 0.5) * size + 4, "text-anchor": "middle",
          "pointer-events": "none"}, v.toFixed(2));
        text.style.fill = fade && weak ? "currentColor" : dark ? "#000" : "#fff";
        svg.append(text);
      }
    });
  });
  byColumn.forEach((j, place) => {
    const x = left + (place + 0.5) * size + 4, y = size * rows.length + 8;
    svg.append(element("text", {transform: `translate(${x},${y}) rotate(-90)`, "text-anchor": "end"}, cut(columns[j])));
  });
  document.getElementById("map").replaceChildren(svg);
}
function short(k) { return cut(data.names[k].replace(/[\\\\/]+$/, "").split(/[\\\\/]/).pop()); }
let sorted = {key: 2, down: true};
function table() {
  const matches = rows.map((row, i) => { const j = best(candidates(i)); return j < 0 ? null : [row, columns[j], values[i][j], ...(stats ? [stats.calibrated[i][j] ?? NaN, stats.corrected[i][j]] : [])]; }).filter(Boolean);
  matches.sort((a, b) => (typeof a[sorted.key] === "number" ? a[sorted.key] - b[sorted.key] : a[sorted.key].localeCompare(b[sorted.key], undefined, {numeric: true})) * (sorted.down ? -1 : 1));
  const head = document.createElement("tr"), out = document.getElementById("best");
  [...(data.itself ? ["layer", "best match"] : [`layer of ${short(0)}`, `best match in ${short(1)}`]), data.measure, ...(stats ? ["calibrated", "p, corrected"] : [])].forEach((name, key) => {
    const th = document.createElement("th"), button = document.createElement("button");
    button.textContent = name + (sorted.key === key ? (sorted.down ? " ▾" : " ▴") : "");
    button.addEventListener("click", () => { sorted = {key, down: sorted.key === key ? !sorted.down : key > 1}; table(); });
    if (key > 1) th.className = "number"; th.append(button); head.append(th);
  });
  out.replaceChildren(head, ...matches.map(cells => {
    const tr = document.createElement("tr");
    cells.forEach(cell => { const td = document.createElement("td"); if (typeof cell === "number") { td.className = "number"; td.textContent = Number.isNaN(cell) ? "-" : Number(cell.toPrecision(4)); } else td.textContent = cell; tr.append(td); });
    return tr;
  }));
}
document.getElementById("summary").textContent = `${data.samples} samples, ${rows.length} x ${columns.length} layers, ${data.measure} (${data.direction})` +
  (stats ? `; ${stats.words}. The table corrects for ${rows.length * columns.length} comparisons. Calibrated values are 0 up to what 5% of permutations exceed, and 1 for equal representations` : "") +
  (stats ? Object.entries(stats.aggregates).map(([name, a]) => `. ${name[0].toUpperCase() + name.slice(1).replaceAll("_", " ")}: ${a.value.toPrecision(4)}` + (a.calibrated === null ? "" : `, calibrated ${a.calibrated.toPrecision(3)}`) + `, p = ${a.p_value.toPrecision(3)}`).join("") : "") +
  (data.itself ? "" : `. Rows are of ${short(0)}, columns of ${short(1)}`) + (low > high ? "." : `. Brighter cells are more similar (values from ${low.toPrecision(3)} to ${high.toPrecision(3)}); hover or tab for details.`);
document.getElementById("significance").hidden = !stats;
document.getElementById("provenance").textContent = JSON.stringify({options: data.options, sigma: data.sigma, ...data.provenance}, null, 1);
for (const id of ["order", "fade"]) document.getElementById(id).addEventListener("change", draw);
draw(); table();
</script></body></html>
"""  # noqa: E501
