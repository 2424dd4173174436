"""The demo's figures. Needs matplotlib, in the extra [viz]."""

from __future__ import annotations

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
    VARIANCE,
    DigitReport,
    PatchReport,
    same_width,
)

_DPI = 150


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
    # Cycle through the classes, so that every digit is shown.
    order = np.argsort(np.concatenate([np.arange(np.sum(labels == k)) for k in range(10)]), kind="stable")
    shown = np.argsort(labels, kind="stable")[order][:number]
    methods = {VARIANCE: (VARIANCE, None), AUTO_SCALED: (AUTO_SCALED, None), CSLS: (DECORRELATED, 10)}
    figure = Figure(figsize=(0.78 * number + 2.05, 4.7))
    # Fixed margins, because layout engines are slow with this many axes.
    grid = {
        "left": 1.95 / (0.78 * number + 2.05),
        "right": 0.995,
        "top": 0.91,
        "bottom": 0.08,
        "wspace": 0.08,
        "hspace": 0.08,
    }
    axes = figure.subplots(len(methods) + 1, number, gridspec_kw=grid)
    images = data.images[rows.queries]

    def draw(ax: Axes, image: np.ndarray, color: str) -> None:
        ax.imshow(image, cmap="gray_r", vmin=0, vmax=16)
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set(color=color, linewidth=3)

    def label(ax: Axes, text: str) -> None:
        ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)

    for k, query in enumerate(shown):
        draw(axes[0, k], images[query], "0.5")
    label(axes[0, 0], f"query:\n{a}")
    for line, (name, (method, csls)) in enumerate(methods.items(), 1):
        score = compiled_correspondence(rows.by_method[method][a], rows.by_method[method][b], csls)
        index = np.asarray(score.index)
        for k, query in enumerate(shown):
            match = index[query]
            color = RIGHT if match == query else NEAR if labels[match] == labels[query] else WRONG
            draw(axes[line, k], images[match], color)
        label(axes[line, 0], f"{name.removesuffix(' (as published)')}\ntop-1 {float(score.top1):.2f}")
    handles = [
        Line2D([], [], color=color, lw=3, label=text)
        for color, text in ((RIGHT, "correct match"), (NEAR, "other sample, same class"), (WRONG, "other class"))
    ]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False)
    figure.suptitle(f"Best match in {b}, of {len(labels)} held-out digits", fontsize=13)
    return figure


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


def save_all(digits: DigitReport, patches: PatchReport, out: Path) -> list[Path]:
    """Draw the demo's figures into a folder and return their paths."""
    first, second = list(digits.data.features)[:2]
    vit, cnn = PATCH_NETWORKS[:2]
    figures = {
        f"correspondences_{name}.png": correspondences(patches, k, vit, cnn)
        for k, name in enumerate(patches.data.picture_names)
    }
    figures["matched_digits.png"] = matched_digits(digits, first, second)
    figures["affinities.png"] = affinities(digits, first, second)
    paths = []
    for name, figure in figures.items():
        content = BytesIO()
        figure.savefig(content, dpi=_DPI, format="png")
        replace_file(out / name, content.getvalue())
        paths.append(out / name)
    return paths
