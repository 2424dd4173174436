"""Figures of affinities, colors, matches, comparisons and bandwidths, legible at the width of a paper's column.

Every function draws into the axes (or figure) passed to it, or into new ones, and returns them. Color-blind readers can
distinguish the colors. Needs matplotlib (the extra [viz]), which is imported when a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from jaxalign import _draw, _features
from jaxalign._typing import AnyArray, Data, Numbers
from jaxalign.bandwidth import Diagonal, mean_density, solve_sigma
from jaxalign.grid import ComparisonGrid
from jaxalign.inference import PermutationTest
from jaxalign.losses import MonitorCurve
from jaxalign.measures import rdm
from jaxalign.scaling import ScalingCurve


def affinity(
    a: Numbers[Data, "n m"], *, groups: Int[AnyArray, " n"] | Sequence[Any] | None = None, ax: Any = None
) -> Any:
    """Draw an affinity matrix. Colors scale with the square root, as most entries are small.

    Args:
        a: entries from 0 to 1, shape (n, m).
        groups: shape (n,), group of each sample: rows and columns are sorted by group and labeled. Only for a square
            affinity.
        ax: axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: groups of another length, or for an affinity that is not square.

    Examples:
        >>> import jax, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> x = jax.random.normal(jax.random.key(0), (60, 8))
        >>> ax = jaxalign.plots.affinity(jaxalign.rbf_affinity(x), groups=jax.numpy.arange(60) % 3)
        >>> ax.get_title()
        'mean affinity 0.050'
    """
    from matplotlib.colors import PowerNorm

    values = np.asarray(a)
    if values.ndim != 2:
        raise ValueError(f"a must have shape (n, m); got {values.shape}.")
    ax = _draw.axes(ax, (4.2, 3.6))
    if groups is not None:
        labels = np.asarray(groups)
        if values.shape != (len(labels), len(labels)):
            raise ValueError(
                f"groups has {len(labels)} entries, but the affinity has shape {values.shape}: both need n samples."
            )
        order = np.argsort(labels, kind="stable")
        values = values[np.ix_(order, order)]
        names, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
        for ticks in (ax.set_xticks, ax.set_yticks):
            ticks(first + (counts - 1) / 2, [str(name) for name in names])
        ax.tick_params(length=0)
        for edge in first[1:] - 0.5:
            ax.axhline(edge, color="white", lw=0.4)
            ax.axvline(edge, color="white", lw=0.4)
    image = ax.imshow(values, norm=PowerNorm(0.5, 0, 1), cmap="viridis", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="affinity (square-root scale)")
    ax.set_title(f"mean affinity {values.mean():.3f}", fontsize=10)
    return ax


def color_panels(
    groups: Mapping[str, Mapping[str, Numbers[Data, "pictures h w 3"]]],
    pictures: AnyArray | None = None,
    *,
    scores: Mapping[str, str] | None = None,
    smooth: bool = False,
    figure: Any = None,
) -> Any:
    """Draw colors of patches as small images: one row per network, one block of columns per group.

    Args:
        groups: {"before": {network: colors}, "after": {...}}, with colors from 0 to 1, shape (pictures, h, w, 3), see
            `jaxalign.rgb`; the same networks in every group.
        pictures: the images to draw above the colors, shape (pictures, H, W, 3).
        scores: a line of text below the name of each group.
        smooth: whether colors are interpolated between patches.
        figure: figure to draw into.

    Returns:
        The figure.

    Raises:
        ValueError: no groups; groups with different networks; colors of another shape; another number of pictures.

    Examples:
        >>> import numpy as np, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> colors = {"vit": np.random.default_rng(0).random((2, 16, 16, 3))}
        >>> len(jaxalign.plots.color_panels({"before": colors, "after": colors}).axes)
        4
    """
    from matplotlib.textpath import TextPath

    if not groups:
        raise ValueError("groups is empty: pass at least one group of networks.")
    networks = list(next(iter(groups.values())))
    arrays = {group: {name: np.asarray(a) for name, a in members.items()} for group, members in groups.items()}
    counts = {colors.shape[0] for members in arrays.values() for colors in members.values() if colors.ndim == 4}
    for group, members in arrays.items():
        if list(members) != networks:
            raise ValueError(
                f"all groups must have the same networks; the networks of {group!r} are {list(members)}, those of the "
                f"first group {networks}."
            )
        for name, colors in members.items():
            if colors.ndim != 4 or colors.shape[-1] != 3:
                raise ValueError(
                    f"colors of {name!r} in {group!r} must have shape (pictures, h, w, 3); got {colors.shape}."
                )
    images = None if pictures is None else np.asarray(pictures)
    if len(counts) != 1 or (images is not None and len(images) not in counts):
        raise ValueError(
            f"colors and pictures must be of the same number of pictures; colors are of {sorted(counts)}"
            + ("." if images is None else f", pictures are {len(images)}.")
        )
    (count,) = counts
    lines = len(networks) + (images is not None)
    labels = {name: name if "\n" in name else name.replace(" ", "\n", 1) for name in networks}
    parts = (part for label in labels.values() for part in label.split("\n"))
    beside = 0.25 + max(TextPath((0, 0), part or "-", size=8).get_extents().width for part in parts) / 72  # inches
    above = 0.42 if scores else 0.3 if any(groups) else 0.05
    if figure is None:
        figure = _draw.pyplot().figure(figsize=(1.15 * count * len(groups) + beside + 0.05, 1.15 * lines + above))
    # Without a layout engine, which is slow for many axes and leaves gaps within blocks.
    width, height = figure.get_size_inches()
    left, top, gap = beside / width, 1 - above / height, 0.12 / width
    step = ((1 - left - 0.05 / width) - gap * (len(groups) - 1)) / (count * len(groups)), (top - 0.03 / height) / lines
    for g, (group, members) in enumerate(arrays.items()):
        start = left + g * (count * step[0] + gap)
        title = group + (f"\n{scores[group]}" if scores and group in scores else "")
        figure.text(start + count * step[0] / 2, 1 - 0.06 / height, title, ha="center", va="top", fontsize=9)
        stacked = [*([("", images)] if images is not None else []), *members.items()]
        for line, (name, panels) in enumerate(stacked):
            for k, panel in enumerate(panels):
                box = (start + k * step[0], top - (line + 1) * step[1], step[0] * 0.97, step[1] * 0.97)
                ax = figure.add_axes(box)
                between = "bicubic" if smooth else "nearest"
                ax.imshow(np.clip(panel, 0, 1) if name else panel, interpolation=between if name else "antialiased")
                ax.set_axis_off()
            if g == 0 and name:
                y = top - (line + 0.5) * step[1]
                figure.text(
                    left - 0.08 / width,
                    y,
                    labels[name],
                    ha="right",
                    va="center",
                    fontsize=8,
                )
    return figure


def matches(
    left: AnyArray,
    right: AnyArray,
    positions: Numbers[Data, "q 2"] | Int[AnyArray, "q 2"],
    index: Int[AnyArray, " q"],
    grid: tuple[int, int],
    *,
    shown: int = 28,
    near: float = 2.0,
    axes: Any = None,
) -> Any:
    """Draw lines from patches in one network to their matches in another, colored by their error.

    Args:
        left: the image of the query patches, shape (H, W, 3).
        right: the image of the matched patches, shape (H, W, 3).
        positions: (row, column) of each patch in the grid, the same in both images, shape (q, 2).
        index: index of the match of each patch, as `Correspondence.index`, shape (q,).
        grid: (rows, columns) of the whole image.
        shown: the number of lines, spread evenly.
        near: the largest error, in patches, that counts as near.
        axes: two axes to draw into.

    Returns:
        The two axes.

    Raises:
        ValueError: positions and index of different lengths.

    Examples:
        >>> import numpy as np, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> image = np.zeros((64, 64, 3)); positions = np.argwhere(np.ones((4, 4)))
        >>> left, right = jaxalign.plots.matches(image, image, positions, np.arange(16), (4, 4))
    """
    from matplotlib.patches import ConnectionPatch

    places, target = np.asarray(positions), np.asarray(index)
    if places.shape != (len(target), 2):
        raise ValueError(f"positions must have shape (q, 2) for q = {len(target)} matches; got {places.shape}.")
    if axes is None:
        axes = _draw.pyplot().subplots(1, 2, figsize=(7, 3.4), gridspec_kw={"wspace": 0.2})[1]
    assert axes is not None
    for ax, image in zip(axes, (left, right), strict=True):
        ax.imshow(np.asarray(image))
        ax.set_axis_off()
    sizes = [np.asarray(image.shape[:2]) / grid for image in (left, right)]
    for query in np.unique(np.linspace(0, len(target) - 1, min(shown, len(target))).round().astype(int)):
        error = np.abs(places[target[query]] - places[query]).max()
        color = _draw.BLUE if error == 0 else _draw.ORANGE if error <= near else _draw.VERMILION
        start, end = ((places[k] + 0.5) * size for k, size in zip((query, target[query]), sizes, strict=True))
        ends = (start[1], start[0]), (end[1], end[0])
        line = ConnectionPatch(*ends, "data", "data", axesA=axes[0], axesB=axes[1], color=color, lw=1.4, alpha=0.9)
        line.set_in_layout(False)
        axes[0].figure.add_artist(line)
        for ax, (y, x) in zip(axes, (start, end), strict=True):
            ax.plot(x, y, "o", color=color, ms=5, mec="white", mew=0.7)
    return axes


def match_legend(figure: Any, *, near: float = 2.0) -> None:
    """Draw the legend of `matches` below a figure.

    Args:
        figure: the figure.
        near: the largest error, in patches, that counts as near, as passed to `matches`.

    Returns:
        None.

    Raises:
        No errors.

    Examples:
        >>> import jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> import matplotlib.pyplot as plt
        >>> jaxalign.plots.match_legend(plt.figure())
    """
    from matplotlib.lines import Line2D

    off = f"within {near:g} patch{'' if near == 1 else 'es'}"
    meaning = {_draw.BLUE: "correct match", _draw.ORANGE: off, _draw.VERMILION: "farther off"}
    handles = [Line2D([], [], color=color, lw=2, label=label) for color, label in meaning.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


def grid(compared: ComparisonGrid, *, test: PermutationTest | None = None, level: float = 0.05, ax: Any = None) -> Any:
    """Draw a comparison grid as a heat map with values; more similar is brighter, also for distances.

    Args:
        compared: a grid from `compare_grid`.
        test: a `permutation_test` of the same representations: values that are not significant are in parentheses; if
            there are too many cells for values, those have a dot.
        level: family-wise error rate: values with `test.corrected` above it are not significant.
        ax: axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: a test of other representations.

    Examples:
        >>> import jax, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 60, 8))
        >>> ax = jaxalign.plots.grid(jaxalign.compare_grid({"a": x, "b": x + y}, {"c": x, "d": y}))
        >>> [text.get_text() for text in ax.get_xticklabels()]
        ['c', 'd']
    """
    significant = None
    if test is not None:
        if (test.rows, test.columns) != (compared.rows, compared.columns):
            raise ValueError(
                f"the test is of {test.rows} with {test.columns}, but the grid is of {compared.rows} with "
                f"{compared.columns}."
            )
        significant = np.asarray(test.corrected) <= level
    values = np.asarray(compared.values)
    mark = "in parentheses" if values.size <= _draw.MAX_WRITTEN else "dots"
    note = "" if test is None else f"\n({mark}: p > {level:g})"
    return _draw.heat_map(
        values,
        compared.rows,
        compared.columns,
        f"{compared.measure} ({compared.direction}){note}",
        brighter_is_more=compared.direction == "similarity",
        significant=significant,
        ax=ax,
    )


def layers(
    curves: ComparisonGrid | Mapping[str, Numbers[Data, " l"]],
    *,
    names: Sequence[str] | None = None,
    intervals: Mapping[str, tuple[AnyArray, AnyArray]] | None = None,
    label: str | None = None,
    ax: Any = None,
) -> Any:
    """Draw values along the layers of a network, one line per comparison.

    Args:
        curves: {name: values}, shape (layers,); or a `ComparisonGrid`, whose rows are layers and columns are lines.
        names: names of the layers, below the axis. Default: those of the grid, or their numbers.
        intervals: {name: (low, high)}, each of shape (layers,), drawn as bands.
        label: label of the vertical axis. Default: the measure.
        ax: axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: lines of different lengths; another number of names.

    Examples:
        >>> import numpy as np, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> ax = jaxalign.plots.layers({"dino": np.linspace(0, 1, 12), "chance": np.zeros(12)}, label="CKA")
        >>> ax.get_ylabel()
        'CKA'
    """
    if isinstance(curves, ComparisonGrid):
        names = curves.rows if names is None else names
        label = f"{curves.measure} ({curves.direction})" if label is None else label
        curves = dict(zip(curves.columns, np.asarray(curves.values).T, strict=True))
    lines = {name: np.asarray(values) for name, values in curves.items()}
    lengths = {values.shape for values in lines.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise ValueError(f"every line must have one value per layer; got shapes {sorted(lengths)}.")
    count = next(iter(lengths))[0]
    labels = [str(k + 1) for k in range(count)] if names is None else list(map(_draw.text, names))
    if len(labels) != count:
        raise ValueError(f"names must have one name per layer; got {len(labels)} names for {count} layers.")
    many = len(lines) > len(_draw.CYCLE)
    columns = 1 + (len(lines) - 1) // 16 if many else 1 + len(lines) // 9
    beside = columns * (0.5 + 0.06 * max(map(len, map(_draw.text, lines)))) if many else 0.0  # inches, of the legend
    width = 4.6 if names is None else max(4.6, 0.2 * count)
    ax = _draw.axes(ax, (0.6 + width + beside, 2.8 + (0 if names is None else 0.075 * max(map(len, labels)))))
    plt = _draw.pyplot()
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(lines))) if many else _draw.CYCLE
    for color, marker, (name, values) in zip(colors, "osD^vP" * len(lines), lines.items(), strict=False):
        ax.plot(
            range(len(values)),
            values,
            color=color,
            marker="" if many else marker,
            ms=4,
            lw=1.6,
            label=_draw.text(name),
        )
        if intervals and name in intervals:
            ax.fill_between(range(len(values)), *map(np.asarray, intervals[name]), color=color, alpha=0.2, lw=0)
    ax.set_xticks(range(count), labels, rotation=0 if names is None else 90)
    ax.set_ylabel(label or "")
    ax.set_xlabel("layer" if names is None else "")
    ax.legend(frameon=False, fontsize=7, ncols=columns, loc="best" if not many else "center left",
              bbox_to_anchor=None if not many else (1.0, 0.5))  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def scaling(curves: ScalingCurve | Mapping[str, ScalingCurve], *, label: str | None = None, ax: Any = None) -> Any:
    """Draw a measure against the number of samples, with the intervals of its mean as bands.

    Args:
        curves: a `ScalingCurve`, or {name: curve}, one line each.
        label: label of the vertical axis. Default: the measure, if all curves have the same.
        ax: axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: no curves.

    Examples:
        >>> import jax, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> x, noise = jax.random.normal(jax.random.key(0), (2, 256, 8))
        >>> curve = jaxalign.scaling_curve(x, x + noise, kernel="linear", key=jax.random.key(1))
        >>> jaxalign.plots.scaling(curve).get_xlabel()
        'samples'
    """
    if not isinstance(curves, (ScalingCurve, Mapping)):
        raise TypeError(f"curves must be a ScalingCurve or a mapping of names to these; got {type(curves).__name__}.")
    named = {"": curves} if isinstance(curves, ScalingCurve) else dict(curves)
    if not named:
        raise ValueError("curves is empty: pass at least one result of scaling_curve.")
    measures = {f"{curve.measure} ({curve.direction})" for curve in named.values()}
    ax = _draw.axes(ax, (5.2, 3.2))
    for color, (name, curve) in zip(_draw.CYCLE * len(named), named.items(), strict=False):
        ax.plot(curve.sizes, curve.value, "o-", color=color, ms=4, lw=1.6, label=_draw.text(name))
        ax.fill_between(curve.sizes, curve.low, curve.high, color=color, alpha=0.2, lw=0)
    ax.set_xscale("log")
    ax.set_xlabel("samples")
    ax.set_ylabel(label if label is not None else measures.pop() if len(measures) == 1 else "")
    if len(named) > 1 or "" not in named:
        ax.legend(frameon=False, fontsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def monitor(curve: MonitorCurve, *, ax: Any = None) -> Any:
    """Draw CKA and the overlap of neighbors during training, with their standard errors as bands.

    Args:
        curve: the result of `jaxalign.losses.Monitor.curve`.
        ax: axes to draw into.

    Returns:
        The axes.

    Examples:
        >>> import jax, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> monitor = jaxalign.losses.monitor()
        >>> for step in range(20):
        ...     x, noise = jax.random.normal(jax.random.key(step), (2, 32, 8))
        ...     monitor = monitor.update(step, x, x + noise)
        >>> jaxalign.plots.monitor(monitor.curve(window=5)).get_xlabel()
        'step'
    """
    if not isinstance(curve, MonitorCurve):
        raise TypeError(f"curve must be the result of Monitor.curve(); got {type(curve).__name__}.")
    ax = _draw.axes(ax, (5.2, 3.2))
    lines = (("debiased CKA", curve.cka, curve.cka_error), ("overlap of neighbors", curve.overlap, curve.overlap_error))
    for color, (name, value, error) in zip(_draw.CYCLE, lines, strict=False):
        ax.plot(curve.step, value, "o-", color=color, ms=3, lw=1.6, label=name)
        ax.fill_between(curve.step, value - error, value + error, color=color, alpha=0.2, lw=0)
    ax.plot(curve.step, curve.chance, "--", color=_draw.CYCLE[1], lw=1, label="overlap of unrelated networks")
    ax.set_xlabel("step")
    ax.set_ylabel("similarity")
    ax.legend(frameon=False, fontsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def density(
    x: Numbers[Data, "n d"],
    *,
    density: ArrayLike = 0.05,
    diagonal: Diagonal = "include",
    points: int = 41,
    decades: float = 1.5,
    ax: Any = None,
) -> Any:
    """Draw the density of an affinity as a function of sigma, and the solution of `solve_sigma`.

    Args:
        x: features, shape (n, d).
        density: see `solve_sigma`.
        diagonal: see `solve_sigma`.
        points: the number of points of the curve.
        decades: the range of the curve on either side of the solution, in powers of ten.
        ax: axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: see `solve_sigma`.

    Examples:
        >>> import jax, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> ax = jaxalign.plots.density(jax.random.normal(jax.random.key(0), (60, 8)))
        >>> ax.get_xscale()
        'log'
    """
    solution = solve_sigma(x, density=density, diagonal=diagonal)
    sigma = float(solution.sigma)
    sigmas = sigma * np.logspace(-decades, decades, points)
    values = [float(mean_density(x, sigma=jnp.asarray(s, solution.sigma.dtype), diagonal=diagonal)) for s in sigmas]
    ax = _draw.axes(ax, (4.6, 3.2))
    ax.semilogx(sigmas, values, color=_draw.BLUE, lw=1.8)
    target = float(np.asarray(density))
    ax.axhline(target, color="0.5", lw=0.8, ls=":")
    ax.axvline(sigma, color="0.5", lw=0.8, ls=":")
    ax.plot(sigma, target, "o", color=_draw.VERMILION, ms=7, label=f"sigma = {sigma:.4g} at density {target:g}")
    if diagonal == "include":
        ax.axhline(1 / len(np.asarray(x)), color=_draw.ORANGE, lw=0.8, label="diagonal alone (1/n)")
    ax.set(xlabel="sigma (units of the features)", ylabel="density (mean affinity)", ylim=(-0.02, 1.02))
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def dissimilarities(
    x: Numbers[Data, "n d1"], y: Numbers[Data, "n d2"], *, names: tuple[str, str] = ("x", "y"), ax: Any = None
) -> Any:
    """Draw the dissimilarities of all pairs of samples in two networks, whose correlation RSA computes.

    Args:
        x: features, shape (n, d1).
        y: features of the same samples, shape (n, d2).
        names: names of the networks, for the axes.
        ax: axes to draw into.

    Returns:
        The axes. The title holds the Pearson correlation.

    Raises:
        ValueError: different numbers of samples.

    Examples:
        >>> import jax, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 40, 8))
        >>> ax = jaxalign.plots.dissimilarities(x, x + y)
    """
    a, b = np.asarray(rdm(x)), np.asarray(rdm(y))
    if a.shape != b.shape:
        raise ValueError(f"x and y must hold the same samples, row by row: {a.shape[0]} and {b.shape[0]} rows.")
    upper = np.triu_indices(len(a), 1)
    a, b = a[upper], b[upper]
    ax = _draw.axes(ax, (3.8, 3.6))
    if len(a) > 3000:
        bins = ax.hexbin(a, b, gridsize=60, bins="log", cmap="viridis", mincnt=1, linewidths=0)
        ax.figure.colorbar(bins, ax=ax, label="pairs per bin")
    else:
        ax.plot(a, b, ".", color=_draw.BLUE, ms=3, alpha=0.5)
    ax.set(xlabel=f"dissimilarity in {names[0]}", ylabel=f"dissimilarity in {names[1]}")
    ax.set_title(f"Pearson r = {np.corrcoef(a, b)[0, 1]:.3f}, {len(a)} pairs", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def models(
    compared: ComparisonGrid | Numbers[Data, "m m"],
    names: Sequence[str] | None = None,
    *,
    groups: Sequence[str] | None = None,
    resampled: Numbers[Data, "b m m"] | None = None,
    ax: Any = None,
) -> Any:
    """Draw models, or layers, as points in a plane by classical multidimensional scaling (Torgerson 1952).

    Args:
        compared: a grid of a model with itself, or distances, shape (m, m). The distance of a similarity is its arc
            cosine, which is a metric for CKA (Williams et al. 2021).
        names: names of the points. Default: those of the grid.
        groups: shape (m,), group of each point: points of a group have one color and are joined by a line in order. A
            name that starts with its group is drawn without it.
        resampled: distances in resamples of the samples, shape (b, m, m). Their maps are moved and turned onto the map
            (Procrustes), and each point gets an ellipse that holds about 95% of them, if they are normal.
        ax: axes to draw into.

    Returns:
        The axes. The title holds the share of the squared distances that the plane shows.

    Raises:
        ValueError: distances that are not square, or a grid of two different models.

    Examples:
        >>> import jax, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> x = jax.random.normal(jax.random.key(0), (4, 60, 8))
        >>> compared = jaxalign.compare_grid({name: x[0] + x[k] for k, name in enumerate("abcd")})
        >>> ax = jaxalign.plots.models(compared)
    """
    if isinstance(compared, ComparisonGrid):
        if not compared.itself:
            raise ValueError("models() needs all models in one grid: compare_grid({**ours, **theirs}).")
        values = np.asarray(compared.values, np.float64)
        distances = np.arccos(np.clip(values, -1, 1)) if compared.direction == "similarity" else values
        names = compared.rows if names is None else names
    else:
        distances = np.asarray(compared, np.float64)
    m = len(distances)
    if distances.shape != (m, m):
        raise ValueError(f"distances must be square; got shape {distances.shape}.")
    if m < 2:
        raise ValueError(f"models() needs at least two models; got {m}.")
    for argument, entries in (("names", names), ("groups", groups)):
        if entries is not None and len(entries) != m:
            raise ValueError(f"{argument} must have one entry per model; got {len(entries)} for {m} models.")
    _features.finite_rows("compared", distances.astype(np.float32), way_out="Leave such models out.")
    places, share = _scaled(distances)
    ax = _draw.axes(ax, (4.6, 4.2))
    if resampled is not None:
        draws = np.asarray(resampled, np.float64)
        if draws.ndim != 3 or draws.shape[1:] != (m, m):
            raise ValueError(f"resampled must have shape (b, {m}, {m}), as there are {m} models; got {draws.shape}.")
        _draw_ellipses(ax, np.stack([_turned(_scaled(draw)[0], places) for draw in draws]))
    members = ["" for _ in range(m)] if groups is None else list(map(str, groups))
    for color, group in zip(_draw.CYCLE * m, dict.fromkeys(members), strict=False):
        rows = np.array([member == group for member in members])
        if groups is not None:
            ax.plot(*places[rows].T, "-", color=color, lw=0.8, alpha=0.5)
        size = 7 if resampled is None else 3  # points do not cover ellipses
        ax.plot(*places[rows].T, "o", color=color, ms=size, mec="white", mew=size / 7, label=_draw.text(group))
    names = list(map(str, range(m))) if names is None else names
    for place, below, name, group in zip(places, _crowded(places), names, members, strict=True):
        left = place[0] > np.median(places[:, 0])  # names are outside of their points, and below one another
        offset = (-6 if left else 6, -3 - 8 * below)
        ax.annotate(
            _draw.text(name.removeprefix(f"{group} ")),
            place,
            xytext=offset,
            textcoords="offset points",
            fontsize=7,
            ha="right" if left else "left",
        )
    if groups is not None:
        ax.legend(frameon=False, fontsize=8)
    ax.set_aspect("equal", "datalim")
    ax.margins(0.3)
    ax.set_title(f"classical MDS: {share:.0%} of squared distances", fontsize=10)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def _scaled(distances: np.ndarray) -> tuple[np.ndarray, float]:
    """Places in a plane (m, 2), and the share of the squared distances that they show."""
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    centering = np.eye(len(distances)) - 1 / len(distances)
    values, vectors = np.linalg.eigh(-centering @ distances**2 @ centering / 2)
    places = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0))
    return places, np.maximum(values[::-1][:2], 0).sum() / max(np.abs(values).sum(), 1e-30)


def _turned(places: np.ndarray, onto: np.ndarray) -> np.ndarray:
    """Centered places after the rotation or reflection that moves them closest to others."""
    left, _, right = np.linalg.svd(places.T @ onto)
    return places @ left @ right


def _draw_ellipses(ax: Any, draws: np.ndarray) -> None:
    """Ellipses that hold 95% of normal draws (b, m, 2)."""
    from matplotlib.patches import Ellipse

    for draw in np.swapaxes(draws, 0, 1):
        spread, axes = np.linalg.eigh(np.cov(draw.T))
        width, height = 2 * np.sqrt(5.991 * np.maximum(spread, 0))  # the 95% quantile of chi squared of two
        angle = np.degrees(np.arctan2(axes[1, 0], axes[0, 0]))
        ax.add_patch(Ellipse(draw.mean(0), width, height, angle=angle, color=_draw.SKY, alpha=0.35, lw=0))


def _crowded(places: np.ndarray) -> np.ndarray:
    """The number of lines that each name moves down to avoid names of nearby, higher points."""
    near = np.ptp(places, 0).max() * 0.045
    steps = np.zeros(len(places), int)
    order = np.argsort(-places[:, 1])
    for k, point in enumerate(order):
        above = [steps[higher] for higher in order[:k] if np.linalg.norm(places[higher] - places[point]) < near]
        steps[point] = max(above, default=-1) + 1
    return steps


def segments(
    labels: Int[AnyArray, "h w"],
    picture: AnyArray | None = None,
    *,
    keep: AnyArray | None = None,
    ax: Any = None,
) -> Any:
    """Draw segments, for example of `kway`, over an image.

    Args:
        labels: shape (h, w); negative labels are not drawn.
        picture: the image, shape (H, W, 3).
        keep: shape (h, w); only patches where it is true or nonzero are drawn.
        ax: axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: labels that are not a map; keep of another shape.

    Examples:
        >>> import numpy as np, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> ax = jaxalign.plots.segments(np.arange(16).reshape(4, 4) // 4)
    """
    numbers = np.asarray(labels)
    if numbers.ndim != 2:
        raise ValueError(f"labels must have shape (h, w); got {numbers.shape}.")
    kept = np.ones(numbers.shape, bool) if keep is None else np.asarray(keep).astype(bool)
    if kept.shape != numbers.shape:
        raise ValueError(f"keep has shape {kept.shape}, but labels have shape {numbers.shape}: they must be equal.")
    drawn = np.ma.masked_where((numbers < 0) | ~kept, numbers)
    ax = _draw.axes(ax, (3.2, 3.2))
    extent = None
    if picture is not None:
        image = np.asarray(picture)
        ax.imshow(image)
        extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    count = int(numbers.max()) + 1
    colors = _draw.segment_colors(count)
    ax.imshow(drawn, cmap=colors, vmin=0, vmax=colors.N - 1, alpha=1 if picture is None else 0.55,
              extent=extent, interpolation="nearest")  # fmt: skip
    ax.set_axis_off()
    return ax
