"""Pictures of affinities, colours, matches, comparisons and bandwidths, readable at the size of a paper's column.

Every function draws into the axes (or the figure) that it is given, or into new ones, and returns them. Colours are
told apart by colour-blind readers too. Needs matplotlib, the extra [viz], imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from jaxalign import _checks, _draw
from jaxalign._typing import AnyArray, Data, Numbers
from jaxalign.bandwidth import Diagonal, mean_density, solve_sigma
from jaxalign.grid import ComparisonGrid
from jaxalign.inference import PermutationTest
from jaxalign.measures import rdm


def affinity(
    a: Numbers[Data, "n m"], *, groups: Int[AnyArray, " n"] | Sequence[Any] | None = None, ax: Any = None
) -> Any:
    """An affinity matrix, its colours by the square root, as most entries are small.

    Args:
        a: entries from 0 to 1, shape (n, m).
        groups: shape (n,): rows and columns are sorted by it, and the groups named. Only for a square affinity.
        ax: axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: groups of another length, or of an affinity that is not square.

    Example:
        >>> import jax, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> x = jax.random.normal(jax.random.key(0), (60, 8))
        >>> ax = jaxalign.plots.affinity(jaxalign.rbf_affinity(x), groups=jax.numpy.arange(60) % 3)
        >>> ax.get_title()
        'mean 0.050'
    """
    from matplotlib.colors import PowerNorm

    values = np.asarray(a)
    if values.ndim != 2:
        raise ValueError(f"a must have shape (n, m); got {values.shape}.")
    ax = _draw.axes(ax, (4.2, 3.6))
    if groups is not None:
        of = np.asarray(groups)
        if values.shape != (len(of), len(of)):
            raise ValueError(f"groups has {len(of)} entries, the affinity has shape {values.shape}.")
        order = np.argsort(of, kind="stable")
        values = values[np.ix_(order, order)]
        names, first, counts = np.unique(of[order], return_index=True, return_counts=True)
        for ticks in (ax.set_xticks, ax.set_yticks):
            ticks(first + (counts - 1) / 2, [str(name) for name in names])
        ax.tick_params(length=0)
        for edge in first[1:] - 0.5:
            ax.axhline(edge, color="white", lw=0.4)
            ax.axvline(edge, color="white", lw=0.4)
    picture = ax.imshow(values, norm=PowerNorm(0.5, 0, 1), cmap="viridis", interpolation="nearest")
    ax.figure.colorbar(picture, ax=ax, label="affinity")
    ax.set_title(f"mean {values.mean():.3f}", fontsize=10)
    return ax


def color_panels(
    groups: Mapping[str, Mapping[str, Numbers[Data, "pictures h w 3"]]],
    pictures: AnyArray | None = None,
    *,
    scores: Mapping[str, str] | None = None,
    figure: Any = None,
) -> Any:
    """Colours of patches as small images: a line for each network, a block of columns for each group.

    Args:
        groups: {"before": {network: colours}, "after": {...}}, colours (pictures, h, w, 3) from 0 to 1, see
            `jaxalign.rgb`; the same networks in every group.
        pictures: the images themselves, (pictures, H, W, 3), drawn above.
        scores: a line of text for each group, below its name.
        figure: figure to draw into.

    Returns:
        The figure.

    Raises:
        ValueError: no group; groups of different networks; colours of another shape; another number of pictures.

    Example:
        >>> import numpy as np, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> colours = {"vit": np.random.default_rng(0).random((2, 16, 16, 3))}
        >>> len(jaxalign.plots.color_panels({"before": colours, "after": colours}).axes)
        4
    """
    if not groups:
        raise ValueError("groups is empty.")
    networks = list(next(iter(groups.values())))
    shown = {group: {name: np.asarray(one) for name, one in found.items()} for group, found in groups.items()}
    number = {one.shape[0] for found in shown.values() for one in found.values() if one.ndim == 4}
    for group, found in shown.items():
        if list(found) != networks:
            raise ValueError(f"the networks of {group!r} are {list(found)}, those of the first group {networks}.")
        for name, one in found.items():
            if one.ndim != 4 or one.shape[-1] != 3:
                raise ValueError(
                    f"colours of {name!r} in {group!r} must have shape (pictures, h, w, 3); got {one.shape}."
                )
    images = None if pictures is None else np.asarray(pictures)
    if len(number) != 1 or (images is not None and len(images) not in number):
        raise ValueError(
            f"colours are of {sorted(number)} pictures" + ("" if images is None else f", pictures are {len(images)}.")
        )
    (count,) = number
    lines = len(networks) + (images is not None)
    labels = {name: name if "\n" in name else name.replace(" ", "\n", 1) for name in networks}
    beside = 0.15 + max(0.085 * len(part) for label in labels.values() for part in label.split("\n"))  # inches
    if figure is None:
        figure = _draw.pyplot().figure(figsize=(1.15 * count * len(groups) + beside + 0.05, 1.15 * lines + 0.5))
    # Placed by hand: a layout engine is slow with so many axes, and would leave gaps between patches of one block.
    width, height = figure.get_size_inches()
    left, top, gap = beside / width, 1 - (0.5 if scores else 0.3) / height, 0.12 / width
    step = ((1 - left - 0.05 / width) - gap * (len(groups) - 1)) / (count * len(groups)), (top - 0.03 / height) / lines
    for g, (group, found) in enumerate(shown.items()):
        start = left + g * (count * step[0] + gap)
        title = group + (f"\n{scores[group]}" if scores and group in scores else "")
        figure.text(start + count * step[0] / 2, 1 - 0.06 / height, title, ha="center", va="top", fontsize=9)
        stacked = [*([("", images)] if images is not None else []), *found.items()]
        for line, (name, ones) in enumerate(stacked):
            for k, one in enumerate(ones):
                box = (start + k * step[0], top - (line + 1) * step[1], step[0] * 0.97, step[1] * 0.97)
                ax = figure.add_axes(box)
                ax.imshow(one, interpolation="nearest" if name else "antialiased")
                ax.set_axis_off()
            if g == 0 and name:
                y = top - (line + 0.5) * step[1]
                figure.text(
                    left - 0.08 / width,
                    y,
                    name if "\n" in name else name.replace(" ", "\n", 1),
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
    """Lines from patches in one network to those that they match in another, coloured by whether they are right.

    Args:
        left: the picture of the patches looked up, (H, W, 3).
        right: the picture of those they are found in.
        positions: (row, column) of patch q in the grid, the same in both, shape (q, 2).
        index: which of the q each matches, as `Correspondence.index`.
        grid: (rows, columns) of the whole picture.
        shown: how many lines, spread evenly.
        near: up to so many patches off counts as near.
        axes: two axes to draw into.

    Returns:
        The two axes.

    Raises:
        ValueError: positions and index of different length.

    Example:
        >>> import numpy as np, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> picture = np.zeros((64, 64, 3)); where = np.argwhere(np.ones((4, 4)))
        >>> left, right = jaxalign.plots.matches(picture, picture, where, np.arange(16), (4, 4))
    """
    from matplotlib.patches import ConnectionPatch

    where, found = np.asarray(positions), np.asarray(index)
    if where.shape != (len(found), 2):
        raise ValueError(f"positions must have shape (q, 2) for q = {len(found)} matches; got {where.shape}.")
    if axes is None:
        axes = _draw.pyplot().subplots(1, 2, figsize=(7, 3.4), gridspec_kw={"wspace": 0.2})[1]
    assert axes is not None
    for ax, picture in zip(axes, (left, right), strict=True):
        ax.imshow(np.asarray(picture))
        ax.set_axis_off()
    sizes = [np.asarray(picture.shape[:2]) / grid for picture in (left, right)]
    for query in np.unique(np.linspace(0, len(found) - 1, min(shown, len(found))).round().astype(int)):
        off = np.abs(where[found[query]] - where[query]).max()
        colour = _draw.BLUE if off == 0 else _draw.ORANGE if off <= near else _draw.VERMILION
        start, end = ((where[k] + 0.5) * size for k, size in zip((query, found[query]), sizes, strict=True))
        ends = (start[1], start[0]), (end[1], end[0])
        line = ConnectionPatch(*ends, "data", "data", axesA=axes[0], axesB=axes[1], color=colour, lw=1.4, alpha=0.9)
        line.set_in_layout(False)
        axes[0].figure.add_artist(line)
        for ax, (y, x) in zip(axes, (start, end), strict=True):
            ax.plot(x, y, "o", color=colour, ms=5, mec="white", mew=0.7)
    return axes


def match_legend(figure: Any, *, near: float = 2.0) -> None:
    """What the colours of `matches` mean, below a figure.

    Args:
        figure: the figure.
        near: up to so many patches off counts as near, as it was given to `matches`.

    Returns:
        Nothing.

    Raises:
        Nothing.

    Example:
        >>> import jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> import matplotlib.pyplot as plt
        >>> jaxalign.plots.match_legend(plt.figure())
    """
    from matplotlib.lines import Line2D

    off = f"at most {'two' if near == 2 else f'{near:g}'} patch{'' if near == 1 else 'es'} off"
    meaning = {_draw.BLUE: "the same patch", _draw.ORANGE: off, _draw.VERMILION: "elsewhere"}
    handles = [Line2D([], [], color=colour, lw=2, label=label) for colour, label in meaning.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


def grid(compared: ComparisonGrid, *, test: PermutationTest | None = None, level: float = 0.05, ax: Any = None) -> Any:
    """A comparison grid as a heat map with its values, the first row on top; more alike is brighter, for distances too.

    Args:
        compared: from `compare_grid`.
        test: of the same sets, from `permutation_test`: values that are not beyond chance stand in brackets.
        level: the family's error: `test.corrected` above it is not beyond chance.
        ax: axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: a test of other sets.

    Example:
        >>> import jax, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 60, 8))
        >>> ax = jaxalign.plots.grid(jaxalign.compare_grid({"a": x, "b": x + y}, {"c": x, "d": y}))
        >>> [text.get_text() for text in ax.get_xticklabels()]
        ['c', 'd']
    """
    significant = None
    if test is not None:
        if (test.rows, test.columns) != (compared.rows, compared.columns):
            raise ValueError(f"the test is of {test.rows} with {test.columns}, the grid of others.")
        significant = np.asarray(test.corrected) <= level
    note = "" if test is None else f"\n(in brackets: p > {level:g})"
    return _draw.heat_map(
        np.asarray(compared.values),
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
    """Values along the layers of a network: one line for each thing that the layers are compared with.

    Args:
        curves: {name: (layers,)}, or a `ComparisonGrid`: its rows are the layers and each of its columns is a line.
        names: of the layers, below the axis. Default: those of the grid, or their numbers.
        intervals: {name: (low, high)}, each (layers,), as bands.
        label: of the vertical axis. Default: the measure.
        ax: axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: lines of different length.

    Example:
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
        raise ValueError(f"every line must have one value a layer; got shapes {sorted(lengths)}.")
    count = next(iter(lengths))[0]
    told = [str(k + 1) for k in range(count)] if names is None else list(map(_draw.text, names))
    if len(told) != count:
        raise ValueError(f"names are {len(told)}, the layers {count}.")
    many = len(lines) > len(_draw.CYCLE)
    columns = 1 + (len(lines) - 1) // 16 if many else 1 + len(lines) // 9
    beside = columns * (0.5 + 0.06 * max(map(len, map(_draw.text, lines)))) if many else 0.0  # inches, of the legend
    width = 4.6 if names is None else max(4.6, 0.2 * count)
    ax = _draw.axes(ax, (0.6 + width + beside, 2.8 + (0 if names is None else 0.075 * max(map(len, told)))))
    plt = _draw.pyplot()
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(lines))) if many else _draw.CYCLE
    for colour, marker, (name, values) in zip(colours, "osD^vP" * len(lines), lines.items(), strict=False):
        ax.plot(
            range(len(values)),
            values,
            color=colour,
            marker="" if many else marker,
            ms=4,
            lw=1.6,
            label=_draw.text(name),
        )
        if intervals and name in intervals:
            ax.fill_between(range(len(values)), *map(np.asarray, intervals[name]), color=colour, alpha=0.2, lw=0)
    ax.set_xticks(range(count), told, rotation=0 if names is None else 90)
    ax.set_ylabel(label or "")
    ax.set_xlabel("layer" if names is None else "")
    ax.legend(frameon=False, fontsize=7, ncols=columns, loc="best" if not many else "center left",
              bbox_to_anchor=None if not many else (1.0, 0.5))  # fmt: skip
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
    """How the density of an affinity depends on sigma, and the sigma that was solved for.

    Args:
        x: features, shape (n, d).
        density: see `solve_sigma`.
        diagonal: see `solve_sigma`.
        points: of the curve.
        decades: how far it goes to either side of the solution, in powers of ten.
        ax: axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: see `solve_sigma`.

    Example:
        >>> import jax, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> ax = jaxalign.plots.density(jax.random.normal(jax.random.key(0), (60, 8)))
        >>> ax.get_xscale()
        'log'
    """
    solution = solve_sigma(x, density=density, diagonal=diagonal)
    found = float(solution.sigma)
    sigmas = found * np.logspace(-decades, decades, points)
    values = [float(mean_density(x, sigma=jnp.asarray(s, solution.sigma.dtype), diagonal=diagonal)) for s in sigmas]
    ax = _draw.axes(ax, (4.6, 3.2))
    ax.semilogx(sigmas, values, color=_draw.BLUE, lw=1.8)
    target = float(np.asarray(density))
    ax.axhline(target, color="0.5", lw=0.8, ls=":")
    ax.axvline(found, color="0.5", lw=0.8, ls=":")
    ax.plot(found, target, "o", color=_draw.VERMILION, ms=7, label=f"sigma = {found:.4g} at density {target:g}")
    if diagonal == "include":
        ax.axhline(1 / len(np.asarray(x)), color=_draw.ORANGE, lw=0.8, label="the diagonal alone")
    ax.set(xlabel="sigma, in units of the features", ylabel="mean affinity", ylim=(-0.02, 1.02))
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def dissimilarities(
    x: Numbers[Data, "n d1"], y: Numbers[Data, "n d2"], *, names: tuple[str, str] = ("x", "y"), ax: Any = None
) -> Any:
    """Dissimilarities of all pairs of samples in one network against those in another, which RSA correlates.

    Args:
        x: features, shape (n, d1).
        y: features of the same samples, shape (n, d2).
        names: of the two, for the axes.
        ax: axes to draw into.

    Returns:
        The axes. Its title tells the Pearson correlation.

    Raises:
        ValueError: different numbers of samples.

    Example:
        >>> import jax, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 40, 8))
        >>> ax = jaxalign.plots.dissimilarities(x, x + y)
    """
    a, b = np.asarray(rdm(x)), np.asarray(rdm(y))
    if a.shape != b.shape:
        raise ValueError(f"x and y must be of the same samples; they are {a.shape[0]} and {b.shape[0]}.")
    upper = np.triu_indices(len(a), 1)
    a, b = a[upper], b[upper]
    ax = _draw.axes(ax, (3.8, 3.6))
    if len(a) > 3000:
        ax.hexbin(a, b, gridsize=60, bins="log", cmap="viridis", mincnt=1, linewidths=0)
    else:
        ax.plot(a, b, ".", color=_draw.BLUE, ms=3, alpha=0.5)
    ax.set(xlabel=f"dissimilarity in {names[0]}", ylabel=f"dissimilarity in {names[1]}")
    ax.set_title(f"Pearson {np.corrcoef(a, b)[0, 1]:.3f} over {len(a)} pairs", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def models(
    compared: ComparisonGrid | Numbers[Data, "m m"],
    names: Sequence[str] | None = None,
    *,
    groups: Sequence[str] | None = None,
    ax: Any = None,
) -> Any:
    """Models, or layers, as points whose distances are about those between them: classical scaling (Torgerson 1952).

    Args:
        compared: a grid of a model with itself, or distances, shape (m, m). Of a similarity the distance is its
            arc cosine, which is a metric for CKA (Williams et al. 2021).
        names: of the points; default: those of the grid.
        groups: shape (m,): points of one group have one colour, and a line joins them in order.
        ax: axes to draw into.

    Returns:
        The axes. Its title tells the share of the squared distances that the plane shows.

    Raises:
        ValueError: distances that are not square, or a grid of two different models.

    Example:
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
        raise ValueError("models() needs at least two models.")
    for what, given in (("names", names), ("groups", groups)):
        if given is not None and len(given) != m:
            raise ValueError(f"{what} are {len(given)}, the models {m}.")
    _checks.finite_rows("compared", distances.astype(np.float32), way_out="Leave such models out.")
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    centring = np.eye(m) - 1 / m
    values, vectors = np.linalg.eigh(-centring @ distances**2 @ centring / 2)
    places = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0))
    share = np.maximum(values[::-1][:2], 0).sum() / max(np.abs(values).sum(), 1e-30)
    ax = _draw.axes(ax, (4.6, 4.2))
    of = ["" for _ in range(m)] if groups is None else list(map(str, groups))
    for colour, group in zip(_draw.CYCLE * m, dict.fromkeys(of), strict=False):
        here = np.array([one == group for one in of])
        ax.plot(*places[here].T, "-" if groups is not None else "", color=colour, lw=0.8, alpha=0.5)
        ax.plot(*places[here].T, "o", color=colour, ms=7, mec="white", label=_draw.text(group))
    for place, below, name in zip(places, _crowded(places), names if names is not None else range(m), strict=True):
        left = place[0] > np.median(places[:, 0])  # names go outwards from the middle, and below one another
        at = (-6 if left else 6, -3 - 8 * below)
        ax.annotate(
            _draw.text(name), place, xytext=at, textcoords="offset points", fontsize=7, ha="right" if left else "left"
        )
    if groups is not None:
        ax.legend(frameon=False, fontsize=8)
    ax.set_aspect("equal", "datalim")
    ax.margins(0.3)
    ax.set_title(f"{share:.0%} of the squared distances", fontsize=10)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def _crowded(places: np.ndarray) -> np.ndarray:
    """How many places a name has to step down for others that are near and higher."""
    near = np.ptp(places, 0).max() * 0.045
    steps = np.zeros(len(places), int)
    order = np.argsort(-places[:, 1])
    for k, this in enumerate(order):
        above = [steps[other] for other in order[:k] if np.linalg.norm(places[other] - places[this]) < near]
        steps[this] = max(above, default=-1) + 1
    return steps


def segments(
    labels: Int[AnyArray, "h w"],
    picture: AnyArray | None = None,
    *,
    keep: AnyArray | None = None,
    ax: Any = None,
) -> Any:
    """Segments of a picture, as `kway` finds them, over the picture.

    Args:
        labels: shape (h, w); negative: none.
        picture: the image, (H, W, 3).
        keep: shape (h, w), true or nonzero: only these are drawn.
        ax: axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: labels that are not a map.

    Example:
        >>> import numpy as np, jaxalign, pytest; _ = pytest.importorskip("matplotlib").use("agg")
        >>> ax = jaxalign.plots.segments(np.arange(16).reshape(4, 4) // 4)
    """
    of = np.asarray(labels)
    if of.ndim != 2:
        raise ValueError(f"labels must have shape (h, w); got {of.shape}.")
    kept = np.ones(of.shape, bool) if keep is None else np.asarray(keep).astype(bool)
    if kept.shape != of.shape:
        raise ValueError(f"keep has shape {kept.shape}, labels {of.shape}.")
    drawn = np.ma.masked_where((of < 0) | ~kept, of)
    ax = _draw.axes(ax, (3.2, 3.2))
    extent = None
    if picture is not None:
        image = np.asarray(picture)
        ax.imshow(image)
        extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    number = int(of.max()) + 1
    cmap, last = ("tab10", 9) if number <= 10 else ("tab20", 19) if number <= 20 else ("gist_ncar", number - 1)
    ax.imshow(drawn, cmap=cmap, vmin=0, vmax=last, alpha=1 if picture is None else 0.55,
              extent=extent, interpolation="nearest")  # fmt: skip
    ax.set_axis_off()
    return ax
