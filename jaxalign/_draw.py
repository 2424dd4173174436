"""The parts of pictures that several of them share. Needs matplotlib, the extra [viz], imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, VERMILION, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
# Cells up to this number have their values written in.
_WRITTEN = 400


def pyplot() -> Any:
    """matplotlib.pyplot."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError('pictures need matplotlib: python -m pip install "jaxalign[viz]".') from None
    return plt


def text(name: Any) -> str:
    """A name as it is: a dollar would begin mathematics, and a legend leaves out what begins with a line."""
    plain = str(name).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def axes(ax: Any, size: tuple[float, float]) -> Any:
    """The axes given, or new ones of a size in inches."""
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
    """Values as colours, with their numbers while there is room; the first row on top, as in a table.

    Cells that are not significant, where that is known, have their numbers in brackets and a dot instead of a number
    where there is no room.
    """
    # Inches: cells wide enough for their numbers, and room for the longest names.
    rows, columns = list(map(text, rows)), list(map(text, columns))
    cell = max(0.42, 2.0 / max(values.shape))
    beside, below = (0.085 * max(map(len, names)) for names in (rows, columns))
    size = (len(columns) * cell + beside + 1.6, max(len(rows) * cell, 1.8) + below + 0.8)
    ax = axes(ax, size)
    picture = ax.imshow(values, cmap="viridis" if brighter_is_more else "viridis_r")
    ax.set_xticks(range(len(columns)), columns, rotation=90)
    ax.set_yticks(range(len(rows)), rows)
    ax.figure.colorbar(picture, ax=ax).set_label(label)
    if np.isnan(values).all():
        return ax
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        chance = significant is not None and not significant[i, j]
        told = f"{value:.2f}" if values.size <= _WRITTEN else "\N{MIDDLE DOT}" if chance else ""
        if told:
            bright = (value > middle) == brighter_is_more
            told = f"({told})" if chance and values.size <= _WRITTEN else told
            ax.text(j, i, told, ha="center", va="center", size=7, color="black" if bright else "white")
    return ax
