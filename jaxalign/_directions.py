"""Unit rows, whose squared distances are 2 (1 - cosine) or 2 (1 - correlation)."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._linalg import power_of_two, scaled, unit
from jaxalign.core.devices import over_devices
from jaxalign.core.features import CenteredFeatures, center_features, valid_rows

Rows = Literal["cosine", "correlation"]


def unit_rows(x: Array, mask: Array | None, rows: Rows | None) -> Array:
    """Rows divided by their norms, after subtracting their means for "correlation"; nan for rows of norm 0."""
    if rows is None:
        return x
    units = unit(less_row_mean(scaled(x, -1)[0]) if rows == "correlation" else x, fill=jnp.nan)
    return valid_rows(units, mask)


def unit_features(x: Array, mask: Array | None, rows: Rows | None, axis_name: str | None = None) -> CenteredFeatures:
    """Centered `unit_rows`, accurate even if all rows have nearly the same direction, as with a large offset.

    The rounding of x_i / |x_i| can then exceed the differences between directions. With the mean row m and
    z_i = x_i - m,

        x_i / |x_i| - m / |m|  =  z_i / |x_i| - (m / |m|) (2 m.z_i + |z_i|^2) / (|x_i| (|m| + |x_i|)),

    which loses no digits; the constant m / |m| changes no distance.
    """
    if rows is None:
        return center_features(x, None, mask, None, axis_name)
    x = valid_rows(x, mask)
    x = x * power_of_two(over_devices(lax.pmax, jnp.max(jnp.abs(lax.stop_gradient(x))), axis_name))[1]
    mean = center_features(x, None, mask, None, axis_name).center
    z = x - mean
    directions = unit_rows(x, None, rows)  # of the uncentered rows: for short rows, z has no accurate digits
    if rows == "correlation":
        mean, z = less_row_mean(mean), less_row_mean(z)  # separately, or the rounding of the mean would affect z
        x = mean + z
    size = jnp.sqrt(jnp.sum(mean * mean, -1, keepdims=True))
    mean_direction = mean / jnp.where(size > 0, size, 1)
    square = jnp.sum(x * x, -1, keepdims=True)
    near = square > size * size / 4  # otherwise the row is short, and the mean dominates the rounding of z
    length = jnp.sqrt(jnp.where(near, square, 1))
    along = jnp.sum(z * (2 * mean + z), -1, keepdims=True) / (length * (size + length))
    directions = jnp.where(near, z / length - mean_direction * along, directions - mean_direction)
    features = center_features(directions, None, mask, None, axis_name)
    # Rows that are positive multiples of each other have the same direction; remaining differences are rounding.
    spread = jnp.where(near, jnp.abs(z) / length, 1)
    spread = over_devices(lax.pmax, lax.stop_gradient(jnp.max(valid_rows(spread, mask))), axis_name)
    one_direction = features.scale <= 16 * float(jnp.finfo(x.dtype).eps) * spread
    return features._replace(raw_x=jnp.where(one_direction, features.center, features.raw_x))


def less_row_mean(x: Array) -> Array:
    """Subtract the mean of each row, twice, because the first mean is rounded."""
    x = x - jnp.mean(x, -1, keepdims=True)
    return x - jnp.mean(x, -1, keepdims=True)
