"""Tables of a grid as CSV, and as LaTeX for a paper: `tabular` environments that need the package booktabs alone."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import Any

from jaxalign import io

_ESCAPED = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip
_STATISTICS = ("calibrated", "p_value", "corrected")
_LEVEL = 0.05


def tables(data: Mapping[str, Any], file_names: Sequence[str]) -> dict[str, bytes]:
    """All tables of the JSON of a grid, {file: content}; `file_names` are those of the models."""
    contents = {
        "grid.csv": csv_table(*_cells(data)),
        "best_matches.csv": csv_table(*_matches(data)),
        "best_matches.tex": _matches_tex(data),
    }
    if data["pairs"]:
        contents |= {"models.csv": csv_table(*_similarities(data)), "models.tex": _similarities_tex(data)}
    alone: dict[str, Any] = {"models": [0, 0], "rows": [0, None], "columns": [0, None]}
    for pair in data["pairs"] or [alone]:
        a, b = pair["models"]
        suffix = "" if len(data["models"]) < 3 else f"_{file_names[a]}_{file_names[b]}"
        contents[f"grid{suffix}.tex"] = _pair_tex(data, pair)
    return {name: content.encode(errors="backslashreplace") for name, content in contents.items()}


def csv_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV, with all digits; missing values are empty."""
    content = StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return content.getvalue()


def tex_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A tabular of cells that are LaTeX already; the first `texts` columns are text, others numbers."""
    lines = [
        f"% {' '.join(io.printable(caption).split())}", r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{'l' * texts}{'r' * (len(header) - texts)}}}", r"\toprule",
        rf"{' & '.join(header)} \\", r"\midrule", *(rf"{' & '.join(row)} \\" for row in rows), r"\bottomrule",
        r"\end{tabular}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def file_parts(names: Sequence[str]) -> list[str]:
    """Distinct parts of file names that LaTeX can read, from the names of models."""
    parts: list[str] = []
    for k, name in enumerate(names, 1):
        part = re.sub(r"[^A-Za-z0-9_.+-]+", "-", name)[:60].strip("-.") or "model"
        while part.lower() in map(str.lower, parts):
            part = f"{part}-{k}"
        parts.append(part)
    return parts


def escape(name: str) -> str:
    """A name as LaTeX text."""
    return "".join(_ESCAPED.get(character, character) for character in io.printable(name))


def _names(data: Mapping[str, Any]) -> list[str]:
    return [model["name"] for model in data["models"]]


def _cells(data: Mapping[str, Any]) -> tuple[list[str], Iterable[Sequence[Any]]]:
    """Every cell of the grid, a row each."""
    rows, columns = ([(m["name"], layer) for m in side for layer in m["layers"]] for side in _sides(data))
    statistics = data["statistics"] or {}
    tables = [data["values"], *(statistics[name] for name in _STATISTICS if statistics)]
    header = ["row_model", "row_layer", "column_model", "column_layer", data["measure"]]
    cells = (
        (*row, *column, *(table[i][j] for table in tables))
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    )
    return [*header, *(_STATISTICS if statistics else ())], cells


def _sides(data: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """The models of the rows, and those of the columns."""
    models = data["models"]
    return (models[:1], models[1:]) if len(models) == 2 else (models, models)


def _matches(data: Mapping[str, Any]) -> tuple[list[str], Iterable[Sequence[Any]]]:
    names, statistics = _names(data), _STATISTICS if data["statistics"] else ()
    rows = (
        (names[m["model"]], m["layer"], names[m["other"]], m["match"], *(m[key] for key in ("value", *statistics)))
        for m in data["best matches"]
    )
    return ["model", "layer", "other_model", "best_match", data["measure"], *statistics], rows


def _similarities(data: Mapping[str, Any]) -> tuple[list[str], Iterable[Sequence[Any]]]:
    names = _names(data)
    header = ["model", "other_model", data["direction"], "low", "high", "calibrated", "p_value"]
    rows = []
    for pair in data["pairs"]:
        null = pair["aggregates"].get("symmetric_best", {})
        numbers = (pair["similarity"], pair["low"], pair["high"], null.get("calibrated"), null.get("p_value"))
        rows.append((*(names[k] for k in pair["models"]), *numbers))
    return header, rows


def _matches_tex(data: Mapping[str, Any]) -> str:
    names, with_p = _names(data), data["statistics"] is not None
    header = ["Layer", "Best match", escape(data["label"]), *(["Calibrated", "$p$"] if with_p else [])]
    rows = [
        [escape(f"{names[m['model']]}/{m['layer']}"), escape(f"{names[m['other']]}/{m['match']}"), _number(m["value"]),
         *([_number(m["calibrated"]), _p(m["corrected"])] if with_p else [])]
        for m in data["best matches"]
    ]  # fmt: skip
    caption = f"Best matches. {data['words']['measure']}{' p is corrected.' if with_p else ''}"
    return tex_table(caption, header, rows, 2)


def _similarities_tex(data: Mapping[str, Any]) -> str:
    names = list(map(escape, _names(data)))
    cells = [[_number(value) for value in row] for row in data["similarities"]]
    for pair in data["pairs"]:
        if pair["low"] is not None:
            i, j = pair["models"]
            interval = f" [{_number(pair['low'])}, {_number(pair['high'])}]"
            cells[i][j], cells[j][i] = cells[i][j] + interval, cells[j][i] + interval
    rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
    return tex_table(f"{data['words']['similarity']} {data['words']['intervals']}", ["", *names], rows)


def _pair_tex(data: Mapping[str, Any], pair: Mapping[str, Any]) -> str:
    """The values of a pair of models; those that are not significant are in parentheses."""
    a, b = (data["models"][k] for k in pair["models"])
    rows, columns = slice(*pair["rows"]), slice(*pair["columns"])
    cells = [[_number(value) for value in row[columns]] for row in data["values"][rows]]
    caption = f"Rows: {a['name']}, columns: {b['name']}. {data['words']['measure']}"
    if data["statistics"]:
        caption += f" In parentheses: corrected p above {_LEVEL}."
        weak = [[p is None or p > _LEVEL for p in row[columns]] for row in data["statistics"]["corrected"][rows]]
        cells = [[f"({v})" if w else v for v, w in zip(*both, strict=True)] for both in zip(cells, weak, strict=True)]
    body = [[escape(layer), *row] for layer, row in zip(a["layers"], cells, strict=True)]
    return tex_table(caption, ["", *map(escape, b["layers"])], body)


def _number(value: float | None) -> str:
    return "--" if value is None or value != value else f"${value:.3f}$" if value < 0 else f"{value:.3f}"


def _p(value: float | None) -> str:
    return "--" if value is None or value != value else f"{value:.3g}"
