"""`jaxalign match`: the same samples in several representations, from files and a table of known pairs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign import io
from jaxalign.files.storage import replace_file
from jaxalign.matching import Matching, match
from jaxalign.report import commands
from jaxalign.report.tables import format_table


def match_files(options: dict[str, Any]) -> commands.Result:
    """Match the samples of several representations, from known pairs."""
    inputs = commands.read(options["inputs"], options["positions"])
    models = {name: _model(options["inputs"], stored.path) for name, stored in inputs.arrays.items()}
    landmarks = read_landmarks(options["landmarks"], models)
    with commands.output_folder(options["out"], inputs.hashes, force=options["force"]) as out:
        return _match(inputs, landmarks, out, options)


def _match(inputs: commands.Input, landmarks: Any, out: Path, options: Mapping[str, Any]) -> commands.Result:
    matching = match(
        commands.in_memory(inputs.rows),
        landmarks=landmarks, method=options["method"],
        rounds="auto" if options["rounds"] is None else options["rounds"],
        min_confidence=options["min_confidence"], density=options["density"],
        key=jax.random.key(options["seed"]),
    )  # fmt: skip
    files = [
        _write_table(out / "matches.csv", ("a", "b", "sample", "candidate", "confidence", "mutual"), _rows(matching)),
        _write_table(out / "tracks.csv", matching.names, matching.tracks().tolist()),
    ]
    pairs = {
        f"{a} | {b}": {
            "landmarks": len(matching.landmarks.get((a, b), ())), "matches": len(matching.pairs(a, b)),
            "mean rank of held-out landmarks": matching.landmark_rank[a, b],
        }
        for a, b in combinations(matching.names, 2)
    }  # fmt: skip
    data = {
        "samples": {name: len(rows) for name, rows in inputs.rows.items()}, "rounds": matching.rounds, "pairs": pairs,
        "min_confidence": matching.min_confidence, "tracks": len(matching.tracks()),
        "files": [path.name for path in files], "provenance": commands.provenance(options, inputs),
    }  # fmt: skip
    commands.write_manifest(out / "match.json", data, files)
    rows = [(io.printable(name), *(f"{value:.3g}" for value in facts.values())) for name, facts in pairs.items()]
    table = format_table(("pair", "landmarks", "matches", "rank of held-out landmarks"), rows)
    text = (
        f"matches.csv and tracks.csv in {commands.shown_path(out)}, after {matching.rounds} rounds\n\n{table}\n"
        "Matches include landmarks. The rank of held-out landmarks is 0 at best and 0.5 by chance."
    )
    return commands.Result(data, commands.with_notes(text, inputs.notes))


def _model(paths: Sequence[Path], path: Path) -> str:
    """The name of the input from which a representation was read: its layers share their samples."""
    return next(given.stem if given == path else given.name for given in paths if given in (path, *path.parents))


def read_landmarks(value: str, models: Mapping[str, str]) -> int | np.ndarray:
    """A number of random landmarks, or indices (m, number of representations) from a CSV file.

    A row of the file is one sample: its index in each representation, in each input (whose layers share their
    samples), or one index if it is the same in all. A header, if there is one, names representations or inputs; without
    it columns are in their order.

    Args:
        value: the number, or the path of the file.
        models: the name of the input of each representation, by its name.
    """
    if value.isdecimal():
        return int(value)
    with Path(value).open(newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(map(str.strip, row))]
    header = rows.pop(0) if rows and not all(map(str.isdecimal, rows[0])) else None
    inputs = list(dict.fromkeys(models.values()))
    for number, row in enumerate(rows, 1):
        if (
            len(row) not in {1, len(models), len(inputs)}
            or len(row) != len(rows[0])
            or not all(map(str.isdecimal, row))
        ):
            raise ValueError(
                f"{value}, sample {number} is {','.join(row)!r}: write its index, counted from 0, in each of the "
                f"{len(models)} representations or {len(inputs)} inputs, or one index if it is the same in all."
            )
    table = np.asarray(rows, dtype=np.int64).reshape(len(rows), -1)
    if table.shape[1] == 1:
        return table[:, 0]
    columns = list(models) if table.shape[1] == len(models) else inputs
    header = columns if header is None else header
    if sorted(header) != sorted(columns):
        raise ValueError(f"{value} has the columns {', '.join(header)}; expected {', '.join(columns)}.")
    by_name = dict(zip(header, table.T, strict=True))
    return np.stack([by_name[name] if name in by_name else by_name[model] for name, model in models.items()], 1)


def _rows(matching: Matching) -> Iterable[Sequence[Any]]:
    """A row for each sample of each ordered pair of representations that has a candidate."""
    for (a, b), candidate in matching.candidate.items():
        for i in np.flatnonzero(candidate >= 0):
            confidence, mutual = matching.confidence[a, b][i], matching.mutual[a, b][i]
            yield a, b, int(i), int(candidate[i]), f"{confidence:.4f}", bool(mutual)


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    content = StringIO(newline="")
    writer = csv.writer(content)
    writer.writerow(header)
    writer.writerows(rows)
    replace_file(path, content.getvalue().encode())
    return path
