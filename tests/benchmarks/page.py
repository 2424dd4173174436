"""Writes docs/pages/performance.md: the text of docs/benchmarks/performance.md, with tables of what was measured.

python -m tests.benchmarks.page       from docs/benchmarks/*.json, which python -m tests.benchmarks --json writes and,
                                      of compiled programs, python -m tests.benchmarks.compiled --json
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "pages" / "performance.md"
COMPILED_COLUMNS = (
    *("program", "for", "compile s", "temporaries MB", "in / out MB", "GB", "GFlop", "launches", "host reads"),
    "collectives",
)
NO_BREAK = "\N{NO-BREAK SPACE}"
ONLY_CUDA = ("launches", "host reads")


def row(result: dict[str, Any]) -> str:
    """One row of a table."""
    unit = f" {result['unit']}" if result["unit"] else ""
    spread = "" if result["low"] == result["high"] else f"{result['low']:.3g} .. {result['high']:.3g}"
    target = "" if result["target"] is None else f"{result['bound']} {result['target']:g}{unit}"
    verdict = {None: "", True: "met", False: "**missed**"}[result["met"]]
    times = "" if result["times_floor"] is None else f"{result['times_floor']:.3g}"
    numbers = (cell.replace(" ", NO_BREAK) for cell in (f"{result['value']:.3g}{unit}", spread, target))
    cells = (result["case"], *numbers, verdict, result["detail"], times)
    return "| " + " | ".join(cells) + " |"


def table(section: dict[str, Any]) -> str:
    """Where and when, the table, and remarks."""
    facts, rates = section["surroundings"], section["rates"]
    here = f"{facts['processor']}, {facts['cores']} cores" if facts["device"] == "cpu" else facts["device"]
    unnamed = ("date", "processor", "cores", "device", "jaxlib")
    versions = ", ".join(f"{name} {v}" for name, v in facts.items() if name not in unnamed and v != "not installed")
    lines = [
        f"{facts['date']}, {here}: {rates['flops'] / 1e9:.0f} GFlop/s in products, {rates['exps'] / 1e9:.2g} G "
        f"exponentials/s, {rates['bytes'] / 1e9:.3g} GB/s; {versions}.",
        "",
        "| case | result | quartiles | target | met | details | times the floor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row(result) for result in section["results"]),
    ]
    if section["remarks"]:
        lines += ["", *(f"- {remark}" for remark in section["remarks"])]
    return "\n".join(lines)


def compiled_cells(one: dict[str, Any]) -> tuple[str, ...]:
    """One row of a table of compiled programs; in parentheses the same computation in plain JAX."""
    plain = one["plain"]

    def beside(name: str, scale: float, digits: str = ".3g") -> str:
        if one[name] is None:
            return "-"
        value = f"{one[name] / scale:{digits}}"
        return f"{value} ({plain[name] / scale:{digits}})" if name in plain else value

    plain_s = "" if one["plain_compile_s"] is None else f" ({one['plain_compile_s']:.2g})"
    kinds = (f"{n:.0f} {kind}, {one['sent'][kind] / 1e6:.3g} MB" for kind, n in sorted(one["collectives"].items()))
    return (
        one["program"],
        one["target"],
        f"{one['compile_s']:.2g}{plain_s}",
        beside("temporaries", 1e6),
        f"{one['arguments'] / 1e6:.3g} / {one['results'] / 1e6:.3g}",
        beside("bytes", 1e9),
        beside("flops", 1e9),
        beside("launches", 1, ".0f"),
        beside("reads", 1, ".0f"),
        "; ".join(kinds) or "-",
    )


def compiled_table(written: dict[str, Any]) -> str:
    """When and with what, the table of compiled programs, and what was assumed of their loops."""
    facts = written["surroundings"]
    shown = [k for k, name in enumerate(COMPILED_COLUMNS) if written["kind"] == "cuda" or name not in ONLY_CUDA]
    rows = [COMPILED_COLUMNS, ("---",) * len(COMPILED_COLUMNS), *map(compiled_cells, written["compiled"])]
    trips = sorted({loop for one in written["compiled"] for loop in one["loops"]})
    failures = [f"{one['program']}, {one['target']}: {why}" for one in written["compiled"] for why in one["failures"]]
    return "\n".join(
        [
            f"{facts['date']}; {', '.join(f'{name} {value}' for name, value in facts.items() if name != 'date')}.",
            "",
            *("| " + " | ".join(row[k] for k in shown) + " |" for row in rows),
            "",
            f"- Trips assumed of loops that end by a condition: {', '.join(f'`{t}`' for t in trips)}.",
            *(f"- **{failure}**" for failure in failures),
        ]
    )


def page() -> str:
    """The page; a section that was not measured is an error."""
    files = [json.loads(file.read_text()) for file in sorted((DOCS / "benchmarks").glob("*.json"))]
    measured = [written["sections"] for written in files if "sections" in written]
    compiled = {f"compiled_{written['kind']}": written for written in files if "compiled" in written}

    def tables(name: re.Match[str]) -> str:
        if name[1] in compiled:
            return compiled_table(compiled[name[1]])
        found = [table(sections[name[1]]) for sections in measured if name[1] in sections]
        if not found:
            raise SystemExit(f"docs/benchmarks has no section {name[1]}: python -m tests.benchmarks --only {name[1]}")
        return "\n\n".join(found)

    text = (DOCS / "benchmarks" / "performance.md").read_text()
    return re.sub(r"\{\{ (\w+) \}\}", tables, text.split("-->\n\n", 1)[1])


if __name__ == "__main__":
    PAGE.write_text(page())
