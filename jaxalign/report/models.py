"""Models as folders of layers: their names, their places in a grid, their best matches and similarities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import io
from jaxalign._aggregates import aggregated
from jaxalign.files.readers import READERS
from jaxalign.grid import ComparisonGrid
from jaxalign.report.commands import Input, read
from jaxalign.report.statistics import Intervals, Tested


@dataclass(frozen=True, eq=False)
class Model:
    """A model: the layers in a folder or file."""

    name: str
    path: Path
    inputs: Input
    start: int  # the place of its first layer among the rows or columns of the grid

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers."""
        return tuple(self.inputs.rows)

    @property
    def places(self) -> slice:
        """Its layers among the rows or columns of the grid."""
        return slice(self.start, self.start + len(self.layers))


def read_models(paths: Sequence[Path], positions: io.Positions) -> list[Model]:
    """The models in folders or files, or in the subfolders of a single folder."""
    paths = _subfolders(paths[0]) if len(paths) == 1 else list(paths)
    if len(paths) > 2:
        for k, path in enumerate(paths):
            if path.resolve() in {other.resolve() for other in paths[:k]}:
                raise ValueError(f"inputs: {path} is named twice. Name each model once.")
    models: list[Model] = []
    start = 0
    for name, path in zip(_names(paths), paths, strict=True):
        model = Model(name, path, read([path], positions), start)
        models.append(model)
        start += len(model.layers) if len(paths) > 2 else 0  # two models are the rows and the columns
    return models


def _subfolders(folder: Path) -> list[Path]:
    """The subfolders that hold features, or the folder itself if it holds features."""
    if not folder.is_dir() or _holds_features(folder):
        return [folder]
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(filter(_holds_features, inside), key=io.natural) or [folder]


def _holds_features(folder: Path) -> bool:
    return any(
        file.suffix.lower() in READERS and not file.name.startswith(".") and file.is_file() for file in folder.iterdir()
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of models: of their folders or files, with as many folders above as make different paths differ."""
    plain = [path.resolve() if path.is_dir() else path.resolve().with_suffix("") for path in paths]
    for depth in range(1, max(len(path.parts) for path in plain)):
        names = ["/".join(path.parts[-depth:]) for path in plain]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def all_layers(models: Sequence[Model], part: str) -> dict[str, Any]:
    """The `rows` or `arrays` of all models, with the names of model and layer."""
    named = {f"{m.name}/{layer}": a for m in models for layer, a in getattr(m.inputs, part).items()}
    if len(named) < sum(len(m.layers) for m in models):
        raise ValueError("inputs: two layers have the same names of model and layer. Rename a folder.")
    return named


def model_pairs(models: Sequence[Model]) -> Iterator[tuple[Model, Model]]:
    """Every pair of models, once, in order."""
    return combinations(models, 2)


def describe_pairs(
    models: Sequence[Model], compared: ComparisonGrid, tested: Tested | None, intervals: Intervals | None
) -> list[dict[str, Any]]:
    """The similarity of each pair of models: the mean of best matches in both directions, with its statistics."""
    larger_is_better = compared.direction == "similarity"
    pairs = []
    for k, (a, b) in enumerate(model_pairs(models)):
        cells = np.asarray(compared.values)[a.places, b.places]
        value = float(aggregated(cells, "symmetric_best", larger_is_better=larger_is_better))
        pair = {
            "models": [models.index(a), models.index(b)],
            "rows": [a.places.start, a.places.stop], "columns": [b.places.start, b.places.stop],
            "similarity": value, "low": None, "high": None,
            "aggregates": {} if tested is None else tested.aggregates(a.places, b.places),
        }  # fmt: skip
        if intervals is not None:
            pair |= {"low": float(intervals.found[k].low), "high": float(intervals.found[k].high)}
        pairs.append(pair)
    return pairs


def best_matches(
    models: Sequence[Model], compared: ComparisonGrid, statistics: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The best match of every layer in every other model, in the order of layers; or in its own, of a single model."""
    tables = {"value": np.array(compared.values, np.float64)}
    if statistics is not None:
        tables |= {name: np.array(statistics[name], np.float64) for name in ("calibrated", "p_value", "corrected")}
    if compared.itself:
        np.fill_diagonal(tables["value"], np.nan)
    sign = 1 if compared.direction == "similarity" else -1
    matches: list[dict[str, Any]] = []
    for a in models:
        for b in models if len(models) == 1 else (other for other in models if other is not a):
            flip = models.index(a) > models.index(b)  # the values of a pair are those of the earlier model's rows
            first, second = (b, a) if flip else (a, b)
            parts = {name: table[first.places, second.places] for name, table in tables.items()}
            parts = {name: part.T if flip else part for name, part in parts.items()}
            for i, row in enumerate(parts["value"]):
                if not np.isnan(row).all():
                    j = int(np.nanargmax(sign * row))
                    matches.append({
                        "model": models.index(a), "layer": a.layers[i], "other": models.index(b), "match": b.layers[j],
                        **{name: float(part[i, j]) for name, part in parts.items()},
                    })  # fmt: skip
    return matches


def matrix(pairs: Sequence[Mapping[str, Any]], count: int, best: float, key: str = "similarity") -> np.ndarray:
    """A value of all pairs of models as a symmetric matrix, with `best` on the diagonal."""
    values = np.full((count, count), best, np.float64)
    for pair in pairs:
        i, j = pair["models"]
        values[i, j] = values[j, i] = np.nan if pair[key] is None else pair[key]
    return values
