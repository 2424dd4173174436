"""The root-finder behind sigma: the rate t = 1 / (2 sigma^2) at which the mean of exp(-t D) is a wanted density.

The density rho(t) is a mean of decaying exponentials, so it falls strictly and all its derivatives come from the same
pass over the pairs: with m_k = mean(e^{-tD} (tD)^k),

    rho(t (1 + s)) = sum_k (-s)^k / k! m_k.

One pass therefore tells rho in a neighbourhood of t and not only its slope. A subsample of the pairs gives the first
estimate, one exact pass there gives the series, its root is the answer. For s > 0 the partial sums of the series
enclose the value, so the first term left out bounds the error; where that bound is not below the tolerance, another
pass at the new rate follows. A bracket guards every step.

Everything here is elementwise over sets (and rows, for a bandwidth per row): the loop runs until all have converged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign.pairs import Pairs, kernel, reduce_pairs

# Sums of A (tD)^k up to this k in one pass; the last one bounds the error of the series.
_ORDER = 6
# Largest |s| for which the series is used: beyond it a Newton step in log t does as well.
_SERIES_RADIUS = 0.5
# Largest step in log t without a bracket. Features are about 1, so a root is few such steps away.
_LONGEST_STEP = 4.0
_MAX_PASSES = 64
# A set larger than this many rows gets its first estimate from about this many rows and columns.
_SUBSAMPLE = 512
_SUBSAMPLE_RTOL = 1e-3
# Square distances of 1e-30 and less count as 0 in float32 (a ratio of 1e15 between the largest and the smallest
# distance). exp(-z) is 0, or as good as, beyond these, while z^_ORDER must not overflow.
LARGEST_RATE = {"float32": 1e30, "float64": 1e75}
_LARGEST_EXPONENT = {"float32": 100.0, "float64": 700.0}


class Root(NamedTuple):
    """A rate for each set, shape (...), or row, (..., n)."""

    rate: Array
    density: Array  # at this rate
    converged: Array  # bool
    infeasible: Array  # bool: at the largest rate the density is still above the wanted one
    passes: Array  # int, scalar


def no_root(shape: tuple[int, ...], dtype: jnp.dtype) -> Root:
    """A root that was not found yet, to start a loop with."""
    no = jnp.zeros(shape, bool)
    return Root(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), no, no, jnp.zeros((), jnp.int32))


def find_rate(pairs: Pairs, density: Array, *, self_pairs: bool, by_row: bool, rtol: float) -> Root:
    """The rate at which the weighted mean of exp(-rate * D) over the pairs, or over each row's, equals `density`.

    Args:
        pairs: n x m pairs with their weights; D about 1.
        density: the wanted mean, shape (...) or (..., 1).
        self_pairs: the columns are the rows' samples, so row i has a pair of distance 0 with itself.
        by_row: one rate a row.
        rtol: relative error allowed in the density.
    """
    total = pairs.total(by_row=by_row)
    idle = ~(total > 0)  # masked rows: nothing to find, and no 0 / 0 for checkify to trip over
    total = jnp.where(idle, 1, total)
    n, m = pairs.distances.shape[-2:]
    row_step, column_step = (1 if by_row else max(1, n // _SUBSAMPLE)), max(1, m // _SUBSAMPLE)
    # The few pairs of the subsample hold too many diagonal ones: leave those out, of the wanted density as well.
    off_density = density
    if self_pairs and not pairs.skip_self:
        own = pairs.own(by_row=by_row)
        off_density = (density * total - own) / jnp.where(total > own, total - own, 1)
    sample = pairs.every(row_step, column_step, skip_self=self_pairs)
    sample_total = sample.total(by_row=by_row)
    sample_total = jnp.where(sample_total > 0, sample_total, 1)
    first, second = reduce_pairs(lambda d2: (d2, d2 * d2), sample, by_row=by_row)
    start = _usable(_gamma_rate(first / sample_total, second / sample_total, off_density))
    if row_step > 1 or column_step > 1:
        guess = _find(_moments(sample, sample_total * off_density, by_row), start, idle, _SUBSAMPLE_RTOL)
        start = _usable(jnp.where(guess.converged, guess.rate, 1))
    root = _find(_moments(pairs, total * density, by_row), start, idle, rtol)
    return root._replace(density=root.density * density)


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


def _moments(pairs: Pairs, norm: Array, by_row: bool) -> Callable[[Array], Array]:
    def moments(rate: Array) -> Array:
        rate = rate[..., None] if by_row else rate[..., None, None]
        return jnp.stack([total / norm for total in reduce_pairs(_powers, pairs, rate, by_row=by_row)])

    return moments


def _powers(d2: Array, rate: Array) -> tuple[Array, ...]:
    z = jnp.minimum(rate * d2, _LARGEST_EXPONENT[d2.dtype.name])
    terms = [*kernel(d2, rate)]
    for _ in range(_ORDER):
        terms.append(terms[-1] * z)
    return tuple(terms)


def _at_least_tiny(a: Array) -> Array:
    return jnp.maximum(a, jnp.finfo(a.dtype).tiny)


class _State(NamedTuple):
    rate: Array
    low: Array  # rates at which the density is above and below the wanted one
    high: Array
    density: Array
    done: Array
    converged: Array
    passes: Array


def _find(moments: Callable[[Array], Array], start: Array, idle: Array, rtol: float) -> Root:
    """The rate at which moments(rate)[0] = 1, from `start`, except where idle; densities in units of the wanted one."""
    lowest, highest = _range(start)

    def step(state: _State) -> _State:
        rate = state.rate
        m = moments(rate)
        excess = jnp.log(_at_least_tiny(m[0]))
        low = jnp.where(excess > 0, jnp.maximum(state.low, rate), state.low)
        high = jnp.where(excess < 0, jnp.minimum(state.high, rate), state.high)

        def inside(candidate: Array) -> Array:
            return (candidate > low) & (candidate < high)

        s, value, bound = _series_root(m)
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
        done = state.done | converged | stuck
        return _State(
            rate=jnp.where(state.done, rate, jnp.where(stuck & ~converged, rate, new)),
            low=low,
            high=high,
            density=jnp.where(state.done, state.density, jnp.where(converged, value, m[0])),
            done=done,
            converged=jnp.where(state.done, state.converged, converged),
            passes=state.passes + 1,
        )

    no = start != start  # False wherever start is a number, and of its shape and sharding
    state = lax.while_loop(
        lambda state: jnp.any(~state.done) & (state.passes < _MAX_PASSES),
        step,
        _State(
            start,
            jnp.full_like(start, 0.5 * lowest),
            jnp.full_like(start, 2 * highest),
            start,
            no | idle,
            no,
            jnp.zeros((), jnp.int32),
        ),
    )
    infeasible = ~state.converged & (state.rate >= highest) & (state.density > 1)
    return Root(state.rate, state.density, state.converged, infeasible, state.passes)


def _series_root(m: Array) -> tuple[Array, Array, Array]:
    """Solve sum_k (-s)^k / k! m_k = 1; returns s, the value of the sum there, and a bound on its error."""
    coefficients = [m[k] * (-1) ** k / math.factorial(k) for k in range(_ORDER + 1)]

    def evaluate(s: Array) -> tuple[Array, Array]:
        value, slope = coefficients[-1], jnp.zeros_like(s)
        for coefficient in coefficients[-2::-1]:
            value, slope = value * s + coefficient, slope * s + value
        return value, slope

    s = jnp.expm1(jnp.clip(jnp.log(_at_least_tiny(m[0])) * m[0] / _at_least_tiny(m[1]), -0.6, 0.6))

    def newton(_: Array, s: Array) -> Array:
        value, slope = evaluate(s)
        return jnp.clip(s - (value - 1) / jnp.where(slope == 0, 1, slope), -0.9, 0.9)

    s = lax.fori_loop(0, 4, newton, s)  # a loop, as four copies take longer to compile
    value, _ = evaluate(s)
    # s > 0: the terms alternate and enclose the sum. s < 0: they add up, the rest grows like that of a gamma law.
    last = jnp.abs(coefficients[-1]) * jnp.abs(s) ** _ORDER
    bound = jnp.where(s >= 0, last, last * (1 - jnp.abs(s)) ** -(_ORDER + 1))
    return s, value, bound
