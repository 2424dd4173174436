"""The root-finder behind sigma: the rate t = 1 / (2 sigma^2) at which the mean of exp(-t D) is a wanted density.

The density rho(t) is a mean of decaying exponentials, so it falls strictly and all its derivatives come from the same
pass over the pairs: with m_k = mean(e^{-tD} (tD)^k),

    rho(t (1 + s)) = sum_k (-s)^k / k! m_k.

One pass therefore tells rho in a neighbourhood of t and not only its slope. A subsample of the pairs gives the first
estimate, one exact pass there gives the series, its root is the answer. For s > 0 the partial sums of the series
enclose the value, so the last term kept bounds the error; where that bound is not below the tolerance, another
pass at the new rate follows. A bracket guards every step.

Everything here is elementwise over sets (and rows, for a bandwidth per row): the loop runs until all have converged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign.distances import varying_like
from jaxalign.pairs import Pairs, Reduction, Tile, kernel_terms, over_rows, reduce_pairs, stacked_over_all

# Sums of A (tD)^k up to this k in one pass; the last one bounds the error of the series.
_ORDER = 6
# Largest |s| for which the series is used: beyond it a Newton step in log t does as well.
_SERIES_RADIUS = 0.5
# Largest step in log t without a bracket. Features are about 1, so a root is few such steps away.
_LONGEST_STEP = 4.0
MAX_PASSES = 64
# A set larger than this many rows gets its first estimate from about this many rows and columns.
SUBSAMPLE = 512
_SUBSAMPLE_RTOL = 1e-3
# Steps of the search on the subsample: few, where a pass over all pairs is as quick.
_STEPS = {"stored": 2, "rows of tiles": 4, "tiles": 8}
# Square distances of 1e-30 and less count as 0 in float32 (a ratio of 1e15 between the largest and the smallest
# distance). exp(-z) is 0, or as good as, beyond these, while z^_ORDER must not overflow.
LARGEST_RATE = {"float32": 1e30, "float64": 1e75}
_LARGEST_EXPONENT = {"float32": 100.0, "float64": 700.0}


class Root(NamedTuple):
    """A rate for each set, shape (...), or row, (..., n)."""

    rate: Array
    density: Array  # at this rate
    slope: Array  # mean of A t D there, in units of the density
    converged: Array  # bool
    infeasible: Array  # bool: at the largest rate the density is still above the wanted one
    passes: Array  # int, scalar


def find_rate(
    at: Callable[[Any], Pairs],
    values: Any,
    density: Array,
    *,
    by_row: bool,
    rtol: float,
    improve: Callable[[Array, Array, Any], tuple[Any, Array]] | None = None,
) -> tuple[Root, Any]:
    """The rate at which the weighted mean of exp(-rate * D) over the pairs, or over each row's, equals `density`.

    Args:
        at: values -> n x m pairs with their weights; D about 1.
        values: what the pairs are made of.
        density: the wanted mean, shape (...) or (..., 1).
        by_row: one rate a row.
        rtol: relative error allowed in the density.
        improve: (finished, rate, values) -> values, better, a scalar bool: where the search has finished and the values
            are too coarse for the rate that it found, other values, on which all sets are searched again.

    Returns:
        The root, with the passes over the last values, and these.
    """
    pairs = at(values)
    total = pairs.total(by_row=by_row)
    idle = ~(total > 0)  # masked rows: nothing to find, and no 0 / 0 for checkify to trip over
    total = jnp.where(idle, 1, total)
    norm = total * density
    search = begin(first_guess(pairs, density, total, idle, by_row), idle)

    def going(search: Search, begun: Array) -> Array:  # on any device, so that all of them go on until all are done
        return pairs.any(~search.done) & (search.passes - begun < MAX_PASSES)

    def step(carry: tuple[Search, Any, Array, Array]) -> tuple[Search, Any, Array, Array]:
        search, values, begun, _ = carry
        search = advance(search, sums_over(series_moments, at(values), search.rate, by_row) / norm[None], rtol)
        if improve is not None:
            values, better = improve(~going(search, begun), search.rate, values)
            begun, search = jnp.where(better, search.passes, begun), again(search, better, idle)
        return search, values, begun, going(search, begun)

    begun = jnp.zeros((), jnp.int32)
    begun = begun if improve is None else varying_like(search.rate, begun)
    start = search, values, begun, going(search, begun)
    search, values, begun, _ = lax.while_loop(lambda carry: carry[3], step, start)
    root = finish(search)
    return root._replace(density=root.density * density, passes=root.passes - begun), values


def first_guess(pairs: Pairs, density: Array, total: Array, idle: Array, by_row: bool) -> Array:
    """A rate to start from: that of the distances' first two moments or, for many rows, of a subsample of the pairs."""
    # The few pairs of the subsample hold too many diagonal ones: leave those out, of the wanted density as well.
    off_density = density
    if pairs.itself and not pairs.skip_self:
        own = pairs.own(by_row=by_row)
        off_density = (density * total - own) / jnp.where(total > own, total - own, 1)
    rows, columns = pairs.shape
    many = max(columns, 0 if by_row else rows) >= 2 * SUBSAMPLE
    steps = _STEPS["stored" if pairs.distances is not None else "rows of tiles" if by_row else "tiles"]
    return guess_from(pairs.subset(SUBSAMPLE, all_rows=by_row), off_density, idle, by_row, steps=steps if many else 0)


def guess_from(sample: Pairs, off_density: Array, idle: Array, by_row: bool, *, steps: int = _STEPS["tiles"]) -> Array:
    """A rate to start from, after so many steps on a subsample of the pairs; 0 where the sample is all of them."""
    count, first, second = sums_over(_plain_moments, sample, None, by_row)
    count = jnp.where(count > 0, count, 1)
    start = _usable(_gamma_rate(first / count, second / count, off_density))
    if steps == 0:
        return start
    norm = count * off_density

    def step(_: Any, search: Search) -> Search:
        return advance(search, sums_over(series_moments, sample, search.rate, by_row) / norm[None], _SUBSAMPLE_RTOL)

    # Some steps, and not until it converged: a GPU's host would have to look after each.
    guess = lax.fori_loop(0, steps, step, begin(start, idle))
    return _usable(jnp.where(guess.done & ~guess.converged, 1, guess.rate))


def _gamma_rate(mean: Array, mean_square: Array, density: Array) -> Array:
    """The rate if distances followed a gamma law with these moments, as those of normal features nearly do.

    Its mean of exp(-t D) is (1 + b t)^(-mean / b), b = variance / mean. As b goes to 0 the rate goes to
    -log(density) / mean, which is never too large (Jensen); far from a gamma law not much more than that is trusted.
    """
    mean = jnp.where(mean > 0, mean, 1)  # 0 where nothing counts, or all coincides
    scale = jnp.maximum((mean_square - mean * mean) / mean, jnp.finfo(mean.dtype).eps * mean)
    least = -jnp.log(density) / mean
    return jnp.minimum(jnp.expm1(jnp.minimum(least * scale, 20.0)) / scale, 2 * least)


def _usable(rate: Array) -> Array:
    low, high = _range(rate)
    return jnp.clip(jnp.where(jnp.isfinite(rate) & (rate > 0), rate, 1), low, high)


def _range(rate: Array) -> tuple[float, float]:
    """The smallest and the largest rate. Features are about 1: distances beyond these are 0, or out of range."""
    high = LARGEST_RATE[rate.dtype.name]
    return 1 / high, high


def sums_over(
    terms: Callable[[Tile], tuple[Array, ...]],
    pairs: Pairs,
    rate: Array | None,
    by_row: bool,
    *,
    in_blocks: bool = True,
) -> Array:
    """Sums of k terms, (k, ...) or by row (k, ..., n); `in_blocks` as for `reduce_pairs`."""
    rates = (None if rate is None else rate[..., None] if by_row else rate[..., None, None],)
    if not by_row:
        sums = reduce_pairs(Reduction(terms, stacked_over_all), pairs, rates=rates, in_blocks=in_blocks)[0]
    else:  # every row has its own rate, so a term changes when its pair is turned round
        reduction = Reduction(terms, over_rows, symmetric=False)
        sums = jnp.concatenate(reduce_pairs(reduction, pairs, rates=rates, rates_of="rows", in_blocks=in_blocks)[1], -1)
    return jnp.moveaxis(sums, -1, 0)


def series_moments(tile: Tile) -> tuple[Array, ...]:
    (d2,), (rate,) = tile.distances, tile.rates
    assert rate is not None
    z = jnp.minimum(rate * d2, _LARGEST_EXPONENT[d2.dtype.name])
    terms = [kernel_terms(tile)]
    for _ in range(_ORDER):
        terms.append(terms[-1] * z)
    return tuple(terms)


def _plain_moments(tile: Tile) -> tuple[Array, ...]:
    (d2,) = tile.distances
    one = tile.weigh(jnp.ones_like(d2))
    return one, one * d2, one * d2 * d2


def _at_least_tiny(a: Array) -> Array:
    return jnp.maximum(a, jnp.finfo(a.dtype).tiny)


class Search(NamedTuple):
    """Where the search for a rate stands: each of shape (...), or (..., n) by row."""

    rate: Array
    low: Array  # rates at which the density is above and below the wanted one
    high: Array
    density: Array  # in units of the wanted one
    slope: Array  # mean of A t D, likewise; of what has converged
    done: Array
    converged: Array
    passes: Array  # scalar


def begin(start: Array, idle: Array) -> Search:
    """A search that starts at a rate, except where there is nothing to find."""
    lowest, highest = _range(start)
    no = start != start  # False wherever start is a number, and of its shape and sharding
    return Search(
        rate=start,
        low=jnp.full_like(start, 0.5 * lowest),
        high=jnp.full_like(start, 2 * highest),
        density=start,
        slope=start,
        done=no | idle,
        converged=no,
        passes=jnp.zeros((), jnp.int32),
    )


def again(search: Search, better: Array, idle: Array) -> Search:
    """A search that begins once more, if `better`: where it ended at a root, else in the middle of the range."""
    lowest, highest = _range(search.rate)
    return search._replace(
        rate=jnp.where(better & ~search.converged, 1, search.rate),
        low=jnp.where(better, 0.5 * lowest, search.low),
        high=jnp.where(better, 2 * highest, search.high),
        done=jnp.where(better, idle, search.done),
        converged=search.converged & ~better,
    )


def advance(search: Search, m: Array, rtol: float) -> Search:
    """One step, from the moments m (_ORDER + 1, ...) at the search's rate, in units of the wanted density."""
    lowest, highest = _range(search.rate)
    rate = search.rate
    excess = jnp.log(_at_least_tiny(m[0]))
    low = jnp.where(excess > 0, jnp.maximum(search.low, rate), search.low)
    high = jnp.where(excess < 0, jnp.minimum(search.high, rate), search.high)

    def inside(candidate: Array) -> Array:
        return (candidate > low) & (candidate < high)

    s, value, slope, bound = _series_root(m)
    # The truncated series may have no root near: then its Newton steps end anywhere, and following them may creep.
    closer = jnp.abs(value - 1) < 0.5 * jnp.abs(m[0] - 1)
    in_series = (jnp.abs(s) < _SERIES_RADIUS) & closer & inside(rate * (1 + s))
    converged = (jnp.abs(s) < _SERIES_RADIUS) & (bound < rtol) & (jnp.abs(value - 1) < rtol)
    newton = jnp.clip(excess * m[0] / _at_least_tiny(m[1]), -_LONGEST_STEP, _LONGEST_STEP)
    newton = jnp.clip(rate * jnp.exp(newton), lowest, highest)
    new = jnp.where(inside(newton), newton, jnp.sqrt(low) * jnp.sqrt(high))
    new = jnp.where(in_series | converged, rate * (1 + s), new)
    # Nothing more to learn: not a number, or at an end of the range.
    stuck = jnp.isnan(excess) | ((rate >= highest) & (excess > 0)) | ((rate <= lowest) & (excess < 0))
    return Search(
        rate=jnp.where(search.done, rate, jnp.where(stuck & ~converged, rate, new)),
        low=low,
        high=high,
        density=jnp.where(search.done, search.density, jnp.where(converged, value, m[0])),
        slope=jnp.where(search.done, search.slope, slope),
        done=search.done | converged | stuck,
        converged=jnp.where(search.done, search.converged, converged),
        passes=search.passes + 1,
    )


def finish(search: Search) -> Root:
    """The root that was found, its density in units of the wanted one."""
    highest = _range(search.rate)[1]
    infeasible = ~search.converged & (search.rate >= highest) & (search.density > 1)
    return Root(search.rate, search.density, search.slope, search.converged, infeasible, search.passes)


def _series_root(m: Array) -> tuple[Array, Array, Array, Array]:
    """Solve sum_k (-s)^k / k! m_k = 1.

    Returns s, the value of the sum there, that of the mean of A t D at the rate t (1 + s), and a bound on the error of
    the first.
    """
    coefficients = [m[k] * (-1) ** k / math.factorial(k) for k in range(_ORDER + 1)]

    def evaluate(s: Array) -> tuple[Array, Array]:
        value, slope = coefficients[-1], jnp.zeros_like(s)
        for coefficient in coefficients[-2::-1]:
            value, slope = value * s + coefficient, slope * s + value
        return value, slope

    s = jnp.expm1(jnp.clip(jnp.log(_at_least_tiny(m[0])) * m[0] / _at_least_tiny(m[1]), -0.6, 0.6))

    def newton(_: Any, s: Array) -> Array:
        value, slope = evaluate(s)
        return jnp.clip(s - (value - 1) / jnp.where(slope == 0, 1, slope), -0.9, 0.9)

    s = lax.fori_loop(0, 4, newton, s, unroll=True)  # a GPU runs the copies as one kernel, steps of a loop as eight
    value, slope = evaluate(s)
    # s > 0: the terms alternate and enclose the sum. s < 0: they add up, the rest grows like that of a gamma law.
    last = jnp.abs(coefficients[-1]) * jnp.abs(s) ** _ORDER
    bound = jnp.where(s >= 0, last, last * (1 - jnp.abs(s)) ** -(_ORDER + 1))
    return s, value, -(1 + s) * slope, bound
