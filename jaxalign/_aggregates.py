"""One number from the cells of a grid of layers."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

Aggregate = Literal["max", "mean", "mean_of_best", "symmetric_best"]
AGGREGATES: tuple[Aggregate, ...] = ("max", "mean", "mean_of_best", "symmetric_best")


def aggregated(values: ArrayLike, aggregate: Aggregate, *, larger_is_better: bool = True) -> Array:
    """One number from the cells (..., rows, columns) of a grid, without those that are nan."""
    sign = 1 if larger_is_better else -1
    similarities = sign * jnp.asarray(values)
    if aggregate == "mean":
        return sign * jnp.nanmean(similarities, (-2, -1))
    if aggregate == "max":
        return sign * jnp.nanmax(similarities, (-2, -1))
    of_rows = jnp.nanmean(jnp.nanmax(similarities, -1), -1)
    if aggregate == "mean_of_best":
        return sign * of_rows
    return sign * (of_rows + jnp.nanmean(jnp.nanmax(similarities, -2), -1)) / 2
