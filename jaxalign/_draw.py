"""Drawing shared by several figures. Needs matplotlib (the extra [viz]), which is imported when a figure is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Okabe and Ito's colors, which color-blind readers can distinguish.
BLUE, VERMILION, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
# Up to this number of cells their values are written into them.
MAX_WRITTEN = 400


def pyplot() -> Any:
    """matplotlib.pyplot."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError('figures need matplotlib: python -m pip install "jaxalign[viz]".') from None
    return plt


def text(name: Any) -> str:
    """A name to draw literally: `$` would start mathematics, and legends skip labels that start with `_`."""
    plain = str(name).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def axes(ax: Any, size: tuple[float, float]) -> Any:
    """`ax`, or new axes of a size in inches if it is None."""
    return pyplot().subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    brighter_is_more: bool = True,
    significant: np.ndarray | None = None,
    ax: Any = None,
) -> Any:
    """Draw values as colors, with numbers if there is room; the first row is on top, as in a table.

    If `significant` is known, other numbers are in parentheses; without room for numbers, those cells have a dot.
    """
    # Inches: cells wide enough for their numbers, and room for the longest names.
    rows, columns = list(map(text, rows)), list(map(text, columns))
    cell = max(0.42 if values.size <= MAX_WRITTEN else 0.2, 2.0 / max(values.shape))
    beside, below = (0.085 * max(map(len, names)) for names in (rows, columns))
    size = (len(columns) * cell + beside + 1.6, max(len(rows) * cell, 1.8) + below + 0.8)
    ax = axes(ax, size)
    image = ax.imshow(values, cmap="viridis" if brighter_is_more else "viridis_r")
    ax.set_xticks(range(len(columns)), columns, rotation=90)
    ax.set_yticks(range(len(rows)), rows)
    ax.figure.colorbar(image, ax=ax).set_label(label)
    if np.isnan(values).all():
        return ax
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        chance = significant is not None and not significant[i, j]
        number = f"{value:.2f}" if values.size <= MAX_WRITTEN else "\N{MIDDLE DOT}" if chance else ""
        if number:
            bright = (value > middle) == brighter_is_more
            number = f"({number})" if chance and values.size <= MAX_WRITTEN else number
            ax.text(j, i, number, ha="center", va="center", size=7, color="black" if bright else "white")
    return ax


def segment_colors(number: int) -> Any:
    """A color map for segments: the colors of the first segments do not depend on their number, up to 20."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    if number <= 20:
        pairs = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
        return ListedColormap([*pairs[::2], *pairs[1::2]])
    return colormaps["gist_ncar"].resampled(number)
