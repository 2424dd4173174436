"""Figures of the report of a grid. Needs matplotlib, in the extra [viz]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np

from jaxalign import io, plots
from jaxalign._draw import heat_map, pyplot
from jaxalign.grid import ComparisonGrid
from jaxalign.inference import PermutationTest
from jaxalign.report import commands
from jaxalign.report.coloring import checkerboard_landmarks, joint_colors, separate_colors
from jaxalign.report.models import Model, matrix
from jaxalign.report.statistics import Intervals

_DPI = 130
_COLOR_LANDMARKS = 1024


def files_of(name: str, figure: Any) -> dict[str, bytes]:
    """A figure as PDF, the same for the same numbers, and as PNG."""
    content = BytesIO()
    with pyplot().rc_context({"pdf.fonttype": 42}):  # text that can be edited, as publishers require
        figure.savefig(content, format="pdf", bbox_inches="tight", metadata={"CreationDate": None})
    return {f"{name}.pdf": content.getvalue(), f"{name}.png": commands.png_of(figure, _DPI)}


def shortened(name: str, most: int = 40) -> str:
    """A printable name of limited length."""
    plain = io.printable(name)
    return plain if len(plain) <= most else plain[: most // 2 - 1] + "\N{HORIZONTAL ELLIPSIS}" + plain[-most // 2 :]


def figures(
    models: Sequence[Model], compared: ComparisonGrid, test: PermutationTest | None, data: Mapping[str, Any],
    intervals: Intervals | None, file_names: Sequence[str],
) -> dict[str, bytes]:  # fmt: skip
    """The figures of all models, and of each pair of them, {file: content}."""
    many = len(models) > 2
    contents = files_of("grid", _draw_grid(compared, test, models))
    if many:
        contents |= files_of("models", _draw_models(models, compared, data, intervals))
        for pair in data["pairs"]:
            i, j = pair["models"]
            part = _part(compared, test, models[i], models[j])
            contents |= files_of(f"grid_{file_names[i]}_{file_names[j]}", _draw_grid(*part, (models[i], models[j])))
    if max(len(model.layers) for model in models) > 1:
        contents |= files_of("layers", _draw_best(models, data) if many else _draw_layers(models, compared))
    return contents


def _part(
    compared: ComparisonGrid, test: PermutationTest | None, a: Model, b: Model
) -> tuple[ComparisonGrid, PermutationTest | None]:
    """The cells of a pair of models."""
    names: dict[str, Any] = {"rows": a.layers, "columns": b.layers}
    part = replace(compared, values=np.asarray(compared.values)[a.places, b.places], itself=False, **names)
    if test is not None:
        test = replace(test, corrected=test.corrected[a.places, b.places], **names)
    return part, test


def _draw_grid(compared: ComparisonGrid, test: PermutationTest | None, models: Sequence[Model]) -> Any:
    """A heat map with the models on its axes, or lines between more than two."""
    ax = plots.grid(_printable(compared), test=_printable(test))
    if len(models) < 3:
        ax.set(ylabel=shortened(models[0].name), xlabel=shortened(models[-1].name))
        return ax.figure
    for model in models[1:]:
        ax.axhline(model.start - 0.5, color="white", lw=1.5)
        ax.axvline(model.start - 0.5, color="white", lw=1.5)
    return ax.figure


def _draw_layers(models: Sequence[Model], compared: ComparisonGrid) -> Any:
    """The values along the layers of the first model, a line for each layer of the other."""
    ax = plots.layers(_printable(compared))
    ax.set_xlabel(f"layer of {shortened(models[0].name)}")
    ax.get_legend().set_title(shortened(models[-1].name), {"size": 7})
    return ax.figure


def _draw_best(models: Sequence[Model], data: Mapping[str, Any]) -> Any:
    """The best match of each layer in every other model, an axes for each model with several layers."""
    several = [k for k, model in enumerate(models) if len(model.layers) > 1]
    width = min(len(several), 3)
    height = -(-len(several) // width)
    longest = max(len(shortened(layer, 24)) for k in several for layer in models[k].layers)
    size = (4.6 * width, (2.6 + 0.08 * longest) * height)
    figure, axes = pyplot().subplots(height, width, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for ax in axes.flat[len(several) :]:
        ax.set_axis_off()
    for ax, k in zip(axes.flat, several, strict=False):
        lines: dict[str, np.ndarray] = {}
        places = {layer: i for i, layer in enumerate(models[k].layers)}
        for match in data["best matches"]:
            if match["model"] == k:
                name = shortened(models[match["other"]].name)
                line = lines.setdefault(name, np.full(len(places), np.nan))
                line[places[match["layer"]]] = match["value"]
        plots.layers(lines, names=[shortened(layer, 24) for layer in places], ax=ax)
        ax.set_title(shortened(models[k].name), fontsize=10)
        ax.set(xlabel="", ylabel=f"best {data['label']}" if ax.get_subplotspec().is_first_col() else "")
        ax.get_legend().set_title("best match in", {"size": 7})
    return figure


def _draw_models(
    models: Sequence[Model], compared: ComparisonGrid, data: Mapping[str, Any], intervals: Intervals | None
) -> Any:
    """The similarities of models as a matrix, and as a map with the spread of its resamples."""
    names = [shortened(model.name, 24) for model in models]
    values = np.array(data["similarities"], np.float64)
    draws = None
    if intervals is not None:
        resamples = np.stack([np.asarray(interval.resampled) for interval in intervals.found], 1)
        pairs = [[dict(p, similarity=v) for p, v in zip(data["pairs"], draw, strict=True)] for draw in resamples]
        draws = np.stack([distances(matrix(pair, len(models), data["best"]), compared.direction) for pair in pairs])
    has_map = np.isfinite(values).all()
    figure, axes = pyplot().subplots(
        1, 1 + has_map, figsize=(1.4 + 0.75 * len(models) + 4.8 * has_map, 4.4), layout="constrained", squeeze=False
    )
    heat_map(
        values, names, names, f"mean of best {data['label']}",
        brighter_is_more=compared.direction == "similarity", ax=axes[0, 0],
    )  # fmt: skip
    if has_map:
        plots.models(distances(values, compared.direction), names=names, resampled=draws, ax=axes[0, 1])
    return figure


def distances(similarities: np.ndarray, direction: str) -> np.ndarray:
    """Distances of models: the arc cosine of similarities, a metric for CKA (Williams et al. 2021)."""
    return np.arccos(np.clip(similarities, -1, 1)) if direction == "similarity" else similarities


def _printable(named: Any) -> Any:
    """The same with printable, short names."""
    if named is None:
        return None
    names = {"rows": tuple(map(shortened, named.rows)), "columns": tuple(map(shortened, named.columns))}
    return replace(named, **names)


def colors_of_best(
    models: Sequence[Model], data: Mapping[str, Any], images: commands.Images, seed: int
) -> dict[str, bytes]:
    """The colors of the most similar layers, before and after alignment."""
    sign = 1 if data["direction"] == "similarity" else -1
    if not data["best matches"]:
        return {}
    best = max(data["best matches"], key=lambda match: sign * match["value"])
    sides = [models[best["model"]], models[best["other"]]]
    pair = [model.inputs.arrays[best[key]] for model, key in zip(sides, ("layer", "match"), strict=True)]
    number, features = len(images.shown), {}
    names = [shortened(model.name) for model in sides]
    for name, stored in zip(names if names[0] != names[1] else "AB", pair, strict=True):
        rows = stored.values[:number].reshape(-1, stored.values.shape[-1])
        features[f"{name}\n{io.printable(stored.name)}"] = commands.as_floats(stored.name, stored, rows)
    grid = pair[0].grid or (1, 1)
    landmarks = checkerboard_landmarks(number, grid, _COLOR_LANDMARKS, seed)
    colors = {"before": separate_colors(features), "after": joint_colors(features, landmarks)}
    groups = {
        when: {name: values.reshape(number, *grid, 3) for name, values in by_name.items()}
        for when, by_name in colors.items()
    }
    return files_of("colors", plots.color_panels(groups, images.shown))
