"""Distances that are accurate individually, however small beside the others: to be returned, ranked or sorted."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._linalg import exact_sum, upper_half
from jaxalign.core.devices import over_devices
from jaxalign.core.features import (
    CenteredFeatures,
    explicit_distances,
    fast_distances,
    first_valid_row,
    squared_norms,
    sum_over_channels,
    valid_rows,
    when_any,
)

# A distance this many times above the error of the fast formula is resolved.
_RESOLVED = 1e4
# Rows that are resolved together: if one needs it, all of them are computed again.
_ROWS_PER_STEP = 64
# Whole numbers are recognized up to this many times their unit.
_UNITS = 2.0**15


def resolved_distances(features: CenteredFeatures, precision: lax.PrecisionLike = None) -> Array:
    """Squared distances; those that the fast formula does not resolve are explicit. Without a derivative."""
    features = lax.stop_gradient(features)
    fast = fast_distances(features, precision)
    unresolved = are_unresolved(features, fast)
    others = features._replace(raw_y=features.raw_columns, mask_y=features.column_mask)

    def resolve_row(row: Array, fast_row: Array, unresolved_row: Array) -> Array:
        def explicit(fast_row: Array, row: Array) -> Array:
            distances = explicit_distances(others._replace(raw_x=row[None], mask=None))[0]
            return jnp.where(unresolved_row, distances, fast_row)

        return when_any(unresolved_row.any(), explicit, fast_row, row)

    def resolve(fast: Array, rows: Array) -> Array:
        return lax.map(lambda row: resolve_row(*row), (rows, fast, unresolved), batch_size=_ROWS_PER_STEP)

    return when_any(unresolved.any(), resolve, fast, features.raw_x)


def are_unresolved(features: CenteredFeatures, fast: Array) -> Array:
    """Where `fast_distances` may be off by more than 1e-4 of themselves, (n, m)."""
    rows, columns = squared_norms(lax.stop_gradient(features))
    return features.only_valid(fast < float(jnp.finfo(fast.dtype).eps) * _RESOLVED * (rows + columns))


def has_ties(features: CenteredFeatures, axis_name: str | None = None) -> Array:
    """Whether ties are likely: up to an offset, features are multiples of scale / 2^15, as counts and one-hots are: ().

    Rounding in `fast_distances` would put equal distances in some order.
    """
    differences = features.raw_x - first_valid_row(features.raw_x, features.mask)
    units = lax.stop_gradient(valid_rows(differences, features.mask) * features.inverse) * _UNITS
    return over_devices(lax.pmin, (units == jnp.round(units)).all().astype(jnp.int32), axis_name) > 0


def exact_distances(features: CenteredFeatures) -> tuple[Array, Array]:
    """Squared distances to about 1.5 times the digits of the dtype, high + low: for the order of nearly equal ones.

    What addition rounds away is known exactly (Knuth 1969), and so is a square of which each half is squared.
    """

    def add(total: tuple[Array, Array], a: Array, b: Array) -> tuple[Array, Array]:
        (high, low), (difference, lost) = total, exact_sum(a, -b)
        upper = upper_half(difference)
        lower = difference - upper
        high, carried = exact_sum(high, upper * upper)
        return high, low + (carried + (2 * upper * lower + (lower * lower + 2 * difference * lost)))

    return exact_sum(*sum_over_channels(features, add, lambda zeros: (zeros, zeros)))
