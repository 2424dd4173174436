"""Resampling with replacement: of samples, or of whole groups of dependent samples.

A measure is a ratio of inner products of centered pair matrices F, G. In a resample that holds group g w_g times, a
pair of samples of different groups g, h counts w_g w_h times, a pair within group g w_g times (once for each copy).
Pairs of two copies of one group do not count: in the population no two groups are copies, so they are no evidence, and
would raise the similarity. The centering is that of all samples. To first order in 1 / groups that changes nothing, as
the derivative of <F, G> by the means that are subtracted is 0 at the means.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array

from jaxalign._linalg import matmul
from jaxalign.measures._evaluate import PairMeasure
from jaxalign.measures._pair_sums import InnerProducts


def draw_weights(key: Array, resamples: int, number: int, dtype: Any) -> Array:
    """How often each of `number` groups counts, (1 + number + resamples, number).

    Of all groups; of all but one, for every group in turn; and of the resamples.
    """
    drawn = jax.random.randint(key, (resamples, number), 0, number)
    counts = jax.vmap(lambda row: jnp.bincount(row, length=number))(drawn).astype(dtype)
    return jnp.concatenate((jnp.ones((1, number), dtype), 1 - jnp.eye(number, dtype=dtype), counts))


@jax.jit
def resampled_products(f: Array, g: Array, groups: Array | None, weights: Array) -> Array:
    """The inner product of centered matrices (n, n) in every resample, (b,), in sums over as many pairs as all have."""
    if groups is None:  # every sample is a group: the diagonals are 0
        return _over_pairs(f * g, weights) / _share_of_pairs(jnp.ones_like(f[0]), weights)
    number = weights.shape[1]
    sums = jax.ops.segment_sum(jax.ops.segment_sum(f * g, groups, number).T, groups, number)
    sizes = jax.ops.segment_sum(jnp.ones_like(f[0]), groups, number)
    return _over_pairs(sums, weights) / _share_of_pairs(sizes, weights)


def _over_pairs(sums: Array, weights: Array) -> Array:
    """Sums over the pairs of a resample, (b,), from sums over the pairs of two groups, (groups, groups)."""
    within = jnp.diagonal(sums)[None]
    return jnp.sum(weights * (matmul(weights, sums) + (1 - weights) * within), 1)


def _share_of_pairs(sizes: Array, weights: Array) -> Array:
    """The number of pairs of different samples in each resample, divided by that of all samples."""

    def pairs(weights: Array) -> Array:
        counted = weights * sizes[None]
        return jnp.sum(counted, 1) ** 2 + jnp.sum(counted * ((1 - weights) * sizes[None] - 1), 1)

    return pairs(weights) / pairs(jnp.ones_like(weights[:1]))


@partial(jax.jit, static_argnames="measure")
def resampled_values(
    f: Array, g: Array, units: Array, groups: Array | None, weights: Array, measure: PairMeasure
) -> Array:
    """A measure of every resample, (b,), from the centered matrices of two representations and their units."""
    cross, self_f, self_g = (resampled_products(a, b, groups, weights) for a, b in ((f, g), (f, f), (g, g)))
    self_products = (self_f[:, None], self_g[:, None])
    units_fg = (jnp.full_like(self_products[0], units[0]), jnp.full_like(self_products[1], units[1]))
    num_samples = jnp.full(cross.shape, f.shape[0], cross.dtype)
    return measure.finish(InnerProducts.of(cross[:, None, None], self_products, units_fg, num_samples))[:, 0, 0]


def interval_ends(value: Array, left_out: Array, resampled: Array, level: float, method: str) -> tuple[Array, Array]:
    """The ends of an interval: quantiles of the resamples, for "bca" corrected for bias and skewness (Efron 1987).

    `left_out` are the values without each of the n groups. The quantiles are those of Student's t with n - 1 degrees of
    freedom, times sqrt(n / (n - 1)), as resamples of n groups vary less than samples do (Hesterberg 2015).
    """
    from scipy.special import stdtrit  # comes with jax, but importing it takes time

    n = left_out.shape[0]
    reach = math.sqrt(n / (n - 1)) * float(stdtrit(n - 1, (1 + level) / 2))
    normal = jnp.asarray([-reach, reach], resampled.dtype)
    ends = ndtr(normal)
    if method == "bca":
        b = resampled.shape[0]
        below = jnp.mean((resampled < value).astype(value.dtype) + 0.5 * (resampled == value).astype(value.dtype))
        bias = ndtri(jnp.clip(below, 0.5 / b, 1 - 0.5 / b))
        influence = jnp.mean(left_out) - left_out
        spread = jnp.sum(influence**2)
        acceleration = jnp.where(spread > 0, jnp.sum(influence**3) / (6 * jnp.where(spread > 0, spread, 1) ** 1.5), 0)
        z = bias + normal
        ends = ndtr(bias + z / (1 - acceleration * z))
    low, high = jnp.quantile(resampled, ends)
    return low, high
