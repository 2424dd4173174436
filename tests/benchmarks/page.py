"""Writes docs/pages/performance.md: the text of docs/benchmarks/performance.md, with tables of what was measured.

python -m tests.benchmarks.page       from docs/benchmarks/*.json, which python -m tests.benchmarks --json writes
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "pages" / "performance.md"


def row(result: dict[str, Any]) -> str:
    """One row of a table."""
    unit = f" {result['unit']}" if result["unit"] else ""
    spread = "" if result["low"] == result["high"] else f"{result['low']:.3g} .. {result['high']:.3g}"
    target = "" if result["target"] is None else f"{result['bound']} {result['target']:g}{unit}"
    verdict = {None: "", True: "met", False: "**missed**"}[result["met"]]
    times = "" if result["times_floor"] is None else f"{result['times_floor']:.3g}"
    cells = (result["case"], f"{result['value']:.3g}{unit}", spread, target, verdict, result["detail"], times)
    return "| " + " | ".join(cells) + " |"


def table(section: dict[str, Any]) -> str:
    """Where and when, the table, and remarks."""
    facts, rates = section["surroundings"], section["rates"]
    here = f"{facts['processor']}, {facts['cores']} cores" if facts["device"] == "cpu" else facts["device"]
    unnamed = ("date", "processor", "cores", "device", "jaxlib")
    versions = ", ".join(f"{name} {v}" for name, v in facts.items() if name not in unnamed and v != "not installed")
    lines = [
        f"{facts['date']}, {here}: {rates['flops'] / 1e9:.0f} GFlop/s in products, {rates['exps'] / 1e9:.2g} G "
        f"exponentials/s, {rates['bytes'] / 1e9:.2g} GB/s; {versions}.",
        "",
        "| case | result | quartiles | target | | | times the floor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row(result) for result in section["results"]),
    ]
    if section["remarks"]:
        lines += ["", *(f"- {remark}" for remark in section["remarks"])]
    return "\n".join(lines)


def page() -> str:
    """The page; a section that was not measured is an error."""
    measured = [json.loads(file.read_text())["sections"] for file in sorted((DOCS / "benchmarks").glob("*.json"))]

    def tables(name: re.Match[str]) -> str:
        found = [table(sections[name[1]]) for sections in measured if name[1] in sections]
        if not found:
            raise SystemExit(f"docs/benchmarks has no section {name[1]}: python -m tests.benchmarks --only {name[1]}")
        return "\n\n".join(found)

    text = (DOCS / "benchmarks" / "performance.md").read_text()
    return re.sub(r"\{\{ (\w+) \}\}", tables, text.split("-->\n\n", 1)[1])


if __name__ == "__main__":
    PAGE.write_text(page())
