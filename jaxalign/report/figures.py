"""The demo's figures. Needs matplotlib, in the extra [viz]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxalign import plots
from jaxalign._draw import BLUE as RIGHT
from jaxalign._draw import ORANGE as NEAR
from jaxalign._draw import VERMILION as WRONG
from jaxalign.files.storage import replace_file
from jaxalign.report.baselines import compiled_affinity, compiled_correspondence, variance_sigma
from jaxalign.report.demo import (
    AUTO_SCALED,
    CSLS,
    DECORRELATED,
    PATCH_NETWORKS,
    SEARCH,
    VARIANCE,
    DigitReport,
    MatchReport,
    PatchReport,
    same_width,
)

_DPI = 150
_NONE = "0.5"  # the frame of a query, and of a query without a match


def correspondences(report: PatchReport, k: int, a: str, b: str, number: int = 28) -> Figure:
    """Held-out patches of one network and their matches in another, before and after alignment, on the k-th image."""
    rows, image = report.rows[k], report.data.pictures[k]
    positions = report.data.positions[report.data.picture_index == k][rows.queries]
    figure = Figure(figsize=(10.4, 9.6), layout="constrained")
    methods = {"Before (variance-scaled RBF)": VARIANCE, "After (decorrelated auto-scaled RBF)": DECORRELATED}
    upper, lower = figure.add_gridspec(2, 1)
    parts = [figure.add_subfigure(upper), figure.add_subfigure(lower)]
    for (title, method), part in zip(methods.items(), parts, strict=True):
        axes = part.subplots(1, 2, gridspec_kw={"wspace": 0.25})
        score = compiled_correspondence(rows.by_method[method][a], rows.by_method[method][b])
        plots.matches(image, image, positions, score.index, report.data.grid, shown=number, axes=axes)
        for ax, name in zip(axes, (a, b), strict=True):
            ax.set_title(name, fontsize=11)
        part.suptitle(
            f"{title}: {float(score.top1):.0%} of {len(rows.queries)} held-out patches matched correctly",
            fontsize=13,
            fontweight="bold",
        )
    plots.match_legend(figure)
    return figure


def matched_digits(report: DigitReport, a: str, b: str, number: int = 10) -> Figure:
    """Held-out digits in one network, and their match in another network by each method."""
    rows, data = report.rows, report.data
    labels = data.labels[rows.queries]
    methods = {VARIANCE: (VARIANCE, None), AUTO_SCALED: (AUTO_SCALED, None), CSLS: (DECORRELATED, 10)}
    lines = []
    for name, (method, csls) in methods.items():
        score = compiled_correspondence(rows.by_method[method][a], rows.by_method[method][b], csls)
        label = f"{name.removesuffix(' (as published)')}\ntop-1 {float(score.top1):.2f}"
        lines.append(_Line(label, np.asarray(score.index)))
    shown = _cycle_classes(labels)[:number]
    figure = _draw_matches(data.images[rows.queries], labels, shown, f"query:\n{a}", lines)
    figure.suptitle(f"Best match in {b}, of {len(labels)} held-out digits", fontsize=13)
    return figure


def matched_networks(report: MatchReport, number: int = 12) -> Figure:
    """Digits that are not landmarks in one network, and their match in all others, from the fewest landmarks."""
    data, known = report.data, min(report.matchings)
    matching = report.matchings[known][SEARCH]
    scores = matching.scores(report.places)
    (a, *others), places = matching.names, dict(zip(matching.names, report.places.T, strict=True))
    lines = []
    for b in others:
        candidate = matching.candidate[a, b][places[a]]
        index = np.where(candidate >= 0, np.argsort(places[b])[candidate], -1)
        label = "\n".join([*b.split(" ", 1), f"top-1 {scores[a, b].top1:.3f}"])
        lines.append(_Line(label, index, matching.confidence[a, b][places[a]]))
    queries = np.flatnonzero(~np.isin(places[a], matching.landmarks[a, others[0]][:, 0]))
    shown = queries[_cycle_classes(data.labels[queries])][:number]
    figure = _draw_matches(data.images, data.labels, shown, f"query:\n{a}", lines)
    figure.suptitle(
        f"Best match of {len(queries)} shuffled digits and its confidence, from {known} known digits", fontsize=13
    )
    return figure


@dataclass(frozen=True)
class _Line:
    """The match of every digit, -1 where there is none, with its confidence."""

    label: str
    index: np.ndarray
    confidence: np.ndarray | None = None


def _cycle_classes(labels: np.ndarray) -> np.ndarray:
    """Indices that cycle through the classes, so that every digit is shown."""
    order = np.argsort(np.concatenate([np.arange(np.sum(labels == k)) for k in range(10)]), kind="stable")
    return np.argsort(labels, kind="stable")[order]


def _draw_matches(
    images: np.ndarray, labels: np.ndarray, shown: np.ndarray, query: str, lines: Sequence[_Line]
) -> Figure:
    """A row of queries, and a row of their matches for each line, in frames that tell whether they are right."""
    width, margin = 0.78 * len(shown) + 2.05, 1.95
    # Fixed margins, because layout engines are slow with this many axes.
    grid = {"left": margin / width, "right": 0.995, "top": 0.91, "bottom": 0.1, "wspace": 0.08, "hspace": 0.08}
    figure = Figure(figsize=(width, 4.7))
    axes = figure.subplots(len(lines) + 1, len(shown), gridspec_kw=grid)
    for row, text in zip(axes, [query, *(line.label for line in lines)], strict=True):
        row[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
    for column, i in zip(axes.T, shown, strict=True):
        _draw_digit(column[0], images[i], _NONE)
        for ax, line in zip(column[1:], lines, strict=True):
            j = line.index[i]
            color = _NONE if j < 0 else RIGHT if j == i else NEAR if labels[j] == labels[i] else WRONG
            _draw_digit(ax, images[j] if j >= 0 else np.zeros_like(images[i]), color)
            if line.confidence is not None:
                ax.set_xlabel(f"{line.confidence[i]:.2f}", fontsize=8, labelpad=3)
    handles = [
        Line2D([], [], color=color, lw=3, label=text)
        for color, text in ((RIGHT, "correct match"), (NEAR, "other sample, same class"), (WRONG, "other class"))
    ]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False)
    return figure


def _draw_digit(ax: Axes, image: np.ndarray, color: str) -> None:
    ax.imshow(image, cmap="gray_r", vmin=0, vmax=16)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color=color, linewidth=3)


def affinities(report: DigitReport, a: str, b: str) -> Figure:
    """Affinity matrices of two networks on the same digits, sorted by class: variance-scaled and auto-scaled."""
    labels = report.data.labels
    chosen = np.concatenate([np.flatnonzero(labels == k)[:30] for k in range(10)])
    figure = Figure(figsize=(9.2, 8.6), layout="constrained")
    axes = figure.subplots(2, 2)
    mappable = None
    features = same_width({name: report.data.features[name][chosen] for name in (a, b)})
    for column, (name, x) in enumerate(features.items()):
        variance = compiled_affinity(x, sigma=variance_sigma(x))
        for line, (title, affinity) in enumerate(((VARIANCE, variance), ("auto-scaled RBF", compiled_affinity(x)))):
            ax = axes[line, column]
            mappable = ax.imshow(
                np.asarray(affinity), norm=PowerNorm(0.5, 0, 1), cmap="viridis", interpolation="nearest"
            )
            ax.set_title(f"{name}\n{title}, mean {float(affinity.mean()):.3f}", fontsize=11)
            ax.set_xticks(np.arange(10) * 30 + 15, [str(k) for k in range(10)])
            ax.set_yticks(np.arange(10) * 30 + 15, [str(k) for k in range(10)])
            ax.tick_params(length=0)
    assert mappable is not None
    figure.colorbar(mappable, ax=axes, shrink=0.6, label="affinity (square-root scale)")
    figure.suptitle("Affinities of 300 digits, sorted by class", fontsize=13)
    return figure


def save_all(digits: DigitReport, patches: PatchReport, matches: MatchReport, out: Path) -> list[Path]:
    """Draw the demo's figures into a folder and return their paths."""
    first, second = list(digits.data.features)[:2]
    vit, cnn = PATCH_NETWORKS[:2]
    figures = {
        f"correspondences_{name}.png": correspondences(patches, k, vit, cnn)
        for k, name in enumerate(patches.data.picture_names)
    }
    figures["matched_digits.png"] = matched_digits(digits, first, second)
    figures["matched_networks.png"] = matched_networks(matches)
    figures["affinities.png"] = affinities(digits, first, second)
    paths = []
    for name, figure in figures.items():
        content = BytesIO()
        figure.savefig(content, dpi=_DPI, format="png")
        replace_file(out / name, content.getvalue())
        paths.append(out / name)
    return paths
