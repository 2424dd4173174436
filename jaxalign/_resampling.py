"""Resampling with replacement: of samples, or of whole groups of dependent samples.

A measure is a ratio of inner products of centered pair matrices F, G. In a resample that holds group g w_g times, a
pair of samples of different groups g, h counts w_g w_h times, a pair within group g w_g times (once for each copy).
Pairs of two copies of one group do not count: in the population no two groups are copies, so they are no evidence, and
would raise the similarity. The centering is that of all samples. To first order in 1 / groups that changes nothing, as
the derivative of <F, G> by the means that are subtracted is 0 at the means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
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


class Resampled(NamedTuple):
    """A statistic with each row of weights, (b,): of all samples, without each group in turn, and of the resamples.

    Attributes:
        values: the statistic.
        linear: the same, linearized in the inner products at those of all samples.
    """

    values: Array
    linear: Array

    @classmethod
    def of(cls, statistic: Callable[[Array], Array], products: Array) -> Resampled:
        """The statistic of inner products (b, ...)."""
        at = jnp.broadcast_to(products[:1], products.shape)
        value, change = jax.jvp(statistic, (at,), (products - at,))
        return cls(statistic(products), value + change)

    def then(self, aggregate: Callable[[Array], Array]) -> Resampled:
        """A function of the statistic."""
        at = jnp.broadcast_to(self.values[:1], self.values.shape)
        value, change = jax.jvp(aggregate, (at,), (self.linear - at,))
        return Resampled(aggregate(self.values), value + change)

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.values - other.values, self.linear - other.linear)


@partial(jax.jit, static_argnames="measure")
def resampled_values(
    f: Array, g: Array, units: Array, groups: Array | None, weights: Array, measure: PairMeasure
) -> Resampled:
    """A measure of all pairs in every resample, (b, L, M), from centered matrices (L, n, n), (M, n, n) and units."""
    rows, columns = len(f), len(g)

    def value(products: Array) -> Array:
        cross, self_f, self_g = jnp.split(products, (rows * columns, rows * columns + rows), 1)
        units_fg = jnp.broadcast_to(units[:rows], self_f.shape), jnp.broadcast_to(units[rows:], self_g.shape)
        num_samples = jnp.full(len(products), f.shape[-1], products.dtype)
        inner = InnerProducts.of(cross.reshape(-1, rows, columns), (self_f, self_g), units_fg, num_samples)
        return measure.finish(inner)

    def product(pair: tuple[Array, Array]) -> Array:
        return resampled_products(*pair, groups, weights)

    cross = lax.map(lambda a: lax.map(lambda b: product((a, b)), g), f)
    products = (cross.reshape(rows * columns, -1), lax.map(product, (f, f)), lax.map(product, (g, g)))
    return Resampled.of(value, jnp.concatenate(products).T)


def without_noise_of_pairs(found: Resampled, weights: Array) -> Array:
    """Values of the resamples, (resamples,), that vary as values of new samples do.

    In a resample the statistic differs by a part that is linear in the weights, the influences of groups, and by one
    that is quadratic, of pairs of groups. An influence is a mean over pairs and contains their noise: that makes the
    variance of the linear part too large by twice the variance of the quadratic part (Efron & Stein 1981). After double
    centering it may be most of it: resamples of unrelated representations vary three times as much as new samples. So
    the linear part is shrunk.
    """
    number = weights.shape[1]
    (value, left_out, resampled), counts = _split(found.linear, number), weights[number + 1 :]
    influence = (jnp.mean(left_out) - left_out) * ((number - 2) / number)
    linear = jnp.sum((counts - 1) * influence[None], 1)
    variance, noise = jnp.var(linear), 2 * jnp.var(resampled - value - linear)
    share = jnp.where(variance > noise, 1 - noise / jnp.where(variance > noise, variance, 1), 0)
    values = _split(found.values, number)[2]
    # Within their range: where the statistic is far from linear, as a root near 0, the part that is linear exceeds it.
    return jnp.clip(values - (1 - jnp.sqrt(share)) * linear, jnp.min(values), jnp.max(values))


def interval_ends(found: Resampled, resampled: Array, level: float, method: str) -> tuple[Array, Array]:
    """The ends of an interval: quantiles of the resamples, for "bca" corrected for bias and skewness (Efron 1987).

    The quantiles are those of Student's t, times sqrt(n / (n - 1)), as resamples of n groups vary less than samples do
    (Hesterberg 2015). Its degrees of freedom are those of the variance of n influences with their kurtosis k,
    2 (n - 1) / (k - 1): n - 1 for normal ones.
    """
    number = len(found.values) - 1 - len(resampled)
    value, left_out, _ = _split(found.values, number)
    influence = jnp.mean(left_out) - left_out
    variance = jnp.mean(influence**2)
    spread = jnp.where(variance > 0, jnp.sqrt(variance), 1)
    skewness, kurtosis = (jnp.mean((influence / spread) ** k) for k in (3, 4))
    ratio = jnp.minimum(jnp.var(resampled) / (number * spread**2), 1)
    freedom = (number - 1) * jnp.clip(2 * ratio**2 / jnp.maximum(kurtosis - 1, 1), 3 / (number - 1), 1)
    reach = math.sqrt(number / (number - 1)) * _quantile_of_t(freedom, level)
    normal = jnp.stack((-reach, reach))
    ends = ndtr(normal)
    if method == "bca":
        b = resampled.shape[0]
        below = jnp.mean((resampled < value).astype(value.dtype) + 0.5 * (resampled == value).astype(value.dtype))
        bias = ndtri(jnp.clip(below, 0.5 / b, 1 - 0.5 / b))
        z = bias + normal
        # Beyond its pole the correction would change sign: there the end is that of all resamples.
        ends = ndtr(bias + z / jnp.maximum(1 - skewness / (6 * math.sqrt(number)) * z, 1e-3))
    low, high = jnp.quantile(resampled, ends)
    return low, high


def _split(values: Array, number: int) -> tuple[Array, Array, Array]:
    """The value, those without each of a number of groups, and those of the resamples."""
    return values[0], values[1 : number + 1], values[number + 1 :]


def _quantile_of_t(freedom: Array, level: float) -> Array:
    """The (1 + level) / 2 quantile of Student's t with at least 3 degrees of freedom, within 1% (A&S 26.7.5)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    series = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return jnp.asarray(z, freedom.dtype) + sum(term / freedom ** (k + 1) for k, term in enumerate(series))
