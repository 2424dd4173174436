"""Losses that are means over the pairs of each sample, by the pair reduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._linalg import root
from jaxalign.core.tiles import Reduction, Tile, log_kernel, over_all, over_rows
from jaxalign.measures._pair_sums import PairFunction, Representation, squared_differences, visit_pairs

# Used as log 0: its exp is 0, and differences of two of them are finite.
LOG_ZERO = -1e30


def affinity_rows(prepared: list[Representation], function: PairFunction) -> Array:
    """mean_j (A_ij - B_ij)^2, (n,)."""
    count = prepared[0].pairs.total(per_row=True) + 1  # the pair of a sample with itself, whose difference is 0, counts
    return squared_differences(prepared, function)[:, 0] / count


def gram_rows(prepared: list[Representation], function: PairFunction) -> Array:
    """mean_j (cos(x_i, x_j) - cos(y_i, y_j))^2 over j != i, (n,)."""
    # |a - b|^2 = 2 - 2 cos for unit vectors.
    units = tuple(-0.5 * function.unit(part.features.scale) for part in prepared)
    return _mean_differences(prepared, units, jnp.square)


def distance_rows(prepared: list[Representation], function: PairFunction) -> Array:
    """The mean Huber loss of differences of distances, each divided by the mean distance, over j != i, (n,)."""
    pairs = prepared[0].pairs.total(per_row=False)

    def terms(tile: Tile) -> tuple[Array, ...]:
        return tuple(tile.apply_weights(a) for a in tile.distances)

    totals = visit_pairs(Reduction(terms, over_all), prepared)[0]
    return _mean_differences(prepared, tuple(pairs / jnp.where(a > 0, a, jnp.inf) for a in totals), _huber)


def angle_rows(prepared: list[Representation], function: PairFunction) -> Array:
    """The mean Huber loss of differences of cos(angle at sample i between j and k), over other j != k, (n,).

    Cosines follow from squared distances: cos = (D_ij + D_ik - D_jk) / (2 sqrt(D_ij D_ik)).
    """
    squared = tuple(part.distances for part in prepared)
    lengths = tuple(root(a) for a in squared)
    weights = prepared[0].pairs.weights()[0]
    n = len(weights)

    @jax.checkpoint
    def at(i: Array) -> Array:
        others = jnp.where(jnp.arange(n) == i, 0, weights)

        def cosines(squared: Array, lengths: Array) -> Array:
            sides = lengths[i][:, None] * lengths[i][None]
            difference = squared[i][:, None] + squared[i][None] - squared
            return jnp.where(sides > 0, difference / (2 * jnp.where(sides > 0, sides, 1)), 0)

        x, y = map(cosines, squared, lengths)
        both = jnp.where(jnp.eye(n, dtype=bool), 0, others[:, None] * others[None])
        return jnp.sum(both * _huber(x - y)) / jnp.maximum(jnp.sum(both), 1)

    return lax.map(at, jnp.arange(n))


def _mean_differences(
    prepared: list[Representation], units: tuple[Array, ...], penalty: Callable[[Array], Array]
) -> Array:
    """mean_j penalty(f_ij - g_ij) over j != i, (n,), of the distances of tiles times their units."""

    def terms(tile: Tile) -> Array:
        f, g = (distances * unit for distances, unit in zip(tile.distances, units, strict=True))
        return tile.apply_weights(penalty(f - g))

    rows = visit_pairs(Reduction(terms, over_rows), prepared)[1]
    return rows / jnp.maximum(prepared[0].pairs.total(per_row=True), 1)


def _huber(difference: Array) -> Array:
    """d^2 / 2, or |d| - 1/2 beyond 1."""
    size = jnp.minimum(jnp.abs(difference), 1)
    return size * (jnp.abs(difference) - size / 2)


class _LogSums(NamedTuple):
    """Sums of each row, (r,), with l the log affinities of the target and k those of x."""

    top: Array  # largest l
    total: Array  # sum exp(l - top)
    differences: Array  # sum exp(l - top) (l - k)
    other_top: Array  # largest k
    other_total: Array  # sum exp(k - other_top)


def divergence_rows(prepared: list[Representation], function: PairFunction) -> Array:
    """sum_j P_ij log(P_ij / Q_ij), (n,), from sums of exponentials relative to the largest, which cannot underflow."""
    del function  # the logarithm of the RBF kernel
    keep = Reduction(_logarithms, _log_sums, combine=_log_sums_of_both, init=_no_log_sums)
    sums = visit_pairs(keep, prepared)[1]
    has_pairs = (sums.total > 0) & (sums.other_total > 0)
    total, other = (jnp.where(has_pairs, a, 1) for a in (sums.total, sums.other_total))
    log_ratio = jnp.log(other) - jnp.log(total) + jnp.where(has_pairs, sums.other_top - sums.top, 0)
    return jnp.where(has_pairs, sums.differences / total + log_ratio, 0)


def _logarithms(tile: Tile) -> tuple[Array, Array]:
    """Log affinities of x and y; -inf for pairs that do not count."""
    counts = tile.apply_weights(jnp.ones_like(tile.distances[0])) > 0

    def log(k: int) -> Array:
        gamma = tile.gammas[k]
        assert gamma is not None
        return jnp.where(counts, log_kernel(tile.distances[k], gamma), -jnp.inf)

    return log(0), log(1)


def _log_sums(terms: tuple[Array, Array], tile: Tile) -> tuple[tuple[()], _LogSums]:
    del tile
    counts = jnp.isfinite(terms[0])
    student, target = (jnp.where(counts, logs, 0) for logs in terms)

    def relative(logs: Array) -> tuple[Array, Array]:
        top = lax.stop_gradient(jnp.max(jnp.where(counts, logs, LOG_ZERO), 1))
        return top, jnp.where(counts, jnp.exp(logs - top[:, None]), 0)

    (top, p), (other_top, q) = relative(target), relative(student)
    total, differences, other = (jnp.sum(a, 1) for a in (p, p * (target - student), q))
    return (), _LogSums(top, total, differences, other_top, other)


def _log_sums_of_both(a: Any, b: Any) -> Any:
    if not isinstance(a, _LogSums):  # results that are not requested
        return a
    top, other_top = jnp.maximum(a.top, b.top), jnp.maximum(a.other_top, b.other_top)
    of_a, of_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    other = a.other_total * jnp.exp(a.other_top - other_top) + b.other_total * jnp.exp(b.other_top - other_top)
    total, differences = a.total * of_a + b.total * of_b, a.differences * of_a + b.differences * of_b
    return _LogSums(top, total, differences, other_top, other)


def _no_log_sums(like: Any) -> Any:
    if not isinstance(like, _LogSums):
        return like
    zero, lowest = jnp.zeros_like(like.total), jnp.full_like(like.top, LOG_ZERO)
    return _LogSums(lowest, zero, zero, lowest, zero)
