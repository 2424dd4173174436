"""A self-contained HTML report of a comparison grid, which needs no network and no other files."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

TITLES = {
    "models": "Map of the models",
    "layers": "Layer by layer",
    "colors": "Colors of the best match, before and after alignment",
}


def page(data: Mapping[str, Any], figures: Mapping[str, bytes], names: Sequence[str] = ()) -> str:
    """The report of a grid as HTML.

    Args:
        data: the JSON of `jaxalign grid`.
        figures: {name: PNG}.
        names: files of the report, which the page lists.
    """
    words, models = data["words"], [model["name"] for model in data["models"]]
    listed = f"{', '.join(models[:-1])} and {models[-1]}" if len(set(models)) > 1 else models[0]
    count = f"{data['samples']} samples. "
    parts = {
        "TITLE": html.escape(f"{data['label'][0].upper()}{data['label'][1:]} of {listed}"),
        "SUMMARY": _paragraphs(count + words["measure"], words["similarity"]),
        "METHODS": _paragraphs(words["null"], words["intervals"]),
        "NOTES": "".join(f"<p>Note: {html.escape(note)}.</p>" for note in data["provenance"]["notes"]),
        "FIGURES": "".join(_figure(name, content, words["map"]) for name, content in figures.items()),
        "FILES": _files(names),
        "PROVENANCE": _provenance(data),
    }
    return filled("page.html", data, parts)


def filled(template: str, data: Any, parts: Mapping[str, str]) -> str:
    """A template of this package, with data for its script and parts that are HTML already."""
    # "</" or "<!--" would end the script element. Escaped, they are the same JSON.
    payload = json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")
    inserted = {**parts, "DATA": payload}
    # In one pass, because inserted text may contain such markers.
    text = (files("jaxalign.report") / template).read_text(encoding="utf-8")
    return re.sub("@@([A-Z]+)@@", lambda marker: inserted[marker[1]], text)


def _files(names: Sequence[str]) -> str:
    """Names of files, each with its formats."""
    formats: dict[str, list[str]] = {}
    for stem, _, suffix in (name.rpartition(".") for name in names):
        formats.setdefault(stem, []).append(f".{suffix}")
    return "; ".join(f"<code>{html.escape(stem)}</code> ({', '.join(kinds)})" for stem, kinds in formats.items())


def _paragraphs(*texts: str) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts if text)


def _figure(name: str, content: bytes, map_words: str) -> str:
    title, source = html.escape(TITLES[name]), base64.b64encode(content).decode()
    caption = _paragraphs(map_words) if name == "models" else ""
    pixels = int.from_bytes(content[16:20])  # the width of the image: on a phone, wide figures scroll
    style = f"width:min(100%,{0.75 * pixels:.0f}px);min-width:{0.5 * pixels:.0f}px"
    image = f'<img alt="{title}" style="{style}" src="data:image/png;base64,{source}">'
    return f'<h2>{title}</h2>{caption}<div class="wide">{image}</div>'


def _provenance(data: Mapping[str, Any]) -> str:
    """Tables of options, versions, bandwidths and files."""
    job = data["provenance"]
    names = data["rows"] if data["itself"] else [*data["rows"], *data["columns"]]
    bandwidths = zip(names, data["sigma"], data["density reached"], strict=True)
    run = {
        "command": f"jaxalign {job['command']}", "Python": job["python"], **job["versions"],
        "devices": ", ".join(job["devices"]),
    }  # fmt: skip
    return (
        _table(("run", ""), run.items())
        + _table(("option of the measure", ""), data["options"].items())
        + _table(("option of the command", ""), job["options"].items())
        + _table(("representation", "sigma", "mean affinity at sigma"), bandwidths)
        + _table(("file", "SHA-256"), job["sha256"].items())
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(tag: str, cells: Sequence[Any]) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(_cell(cell))}</{tag}>' for cell in cells)}</tr>"

    return f'<div class="wide"><table>{line("th", header)}{"".join(line("td", row) for row in rows)}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "none"
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
