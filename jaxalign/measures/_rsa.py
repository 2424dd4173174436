"""Representational similarity analysis: how well the dissimilarities of one set predict those of the other.

The representational dissimilarity matrix (RDM) of a set holds a dissimilarity for every pair of samples; RSA
(Kriegeskorte et al. 2008) compares two of them over the pairs i < j. Pearson, cosine and the whitened comparisons
(Diedrichsen et al. 2021) are inner products, so they need no n x n. Ranks do: spearman and kendall store the pairs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxalign import _checks
from jaxalign._directions import unit_features
from jaxalign._linalg import bounded
from jaxalign._memory import check_stored
from jaxalign._problem import check_problem, check_rtol, explain_failure
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.core.devices import batched
from jaxalign.core.features import CenteredFeatures, fast_distances, when_any
from jaxalign.core.resolved import are_unresolved, exact_distances, has_ties, resolved_distances
from jaxalign.kernels import RBF, kernel_of
from jaxalign.measures._centering import CENTERINGS
from jaxalign.measures._evaluate import (
    MASK_ADVICE,
    Context,
    Missing,
    PairMeasure,
    SummaryMeasure,
    check_function,
    check_representations,
    evaluate,
)
from jaxalign.measures._pair_sums import InnerProducts, PairFunction, correlation, prepare_representations
from jaxalign.plan import STORED, Plan

Dissimilarity = Literal["sqeuclidean", "euclidean", "correlation", "cosine", "rbf"] | RBF
Comparison = Literal["pearson", "spearman", "kendall", "cosine", "whitened_cosine", "whitened_pearson"]

_FUNCTIONS: dict[str, dict[str, Any]] = {
    "sqeuclidean": {"form": "squared"},
    "euclidean": {"form": "root"},
    "correlation": {"form": "squared", "normalization": "correlation"},
    "cosine": {"form": "squared", "normalization": "cosine"},
}
# The centering behind each comparison that is an inner product.
_COMPARISONS = {
    "pearson": CENTERINGS["pearson"],
    "cosine": CENTERINGS["none"],
    "whitened_cosine": CENTERINGS["biased"],
    "whitened_pearson": CENTERINGS["whitened_pearson"],
}


def rdm(
    x: Numbers[Data, "*batch n d"],
    metric: Dissimilarity = "sqeuclidean",
    *,
    mask: Mask[Data, "*#batch n"] | None = None,
) -> Float[Array, "*batch n n"]:
    """The representational dissimilarity matrix of a set, stored.

    Args:
        x: features, shape (..., n, d).
        metric: "sqeuclidean" D_ij = ||x_i - x_j||^2 (not divided by d); "euclidean" its root; "correlation" 1 - r of
            the two rows, from 0 to 2; "cosine" 1 - cos; "rbf" 1 - A of the RBF kernel, or a `jaxalign.kernels.RBF`,
            which also holds sigma or its target density.
        mask: shape (..., n), True = a real sample; the others have rows and columns of 0.

    Returns:
        Shape (..., n, n), symmetric, its diagonal exactly 0. Differentiable; the derivative of "euclidean" at distance
        0 is taken as 0.

    Raises:
        TypeError, ValueError: see `hsic`; a row without a direction for "correlation" and "cosine".

    Example:
        >>> import jax.numpy as jnp, jaxalign
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> jaxalign.measures.rdm(x, "cosine").round(5)
        Array([[0., 1., 2.],
               [1., 0., 1.],
               [2., 1., 0.]], dtype=float32)
    """
    kernel = metric_kernel(metric)
    function = metric_function(metric, kernel)
    center = function.normalization is None
    (x,), mask = check_representations((("x", x),), mask, "raise", 2, "rdm", MASK_ADVICE, center=center)
    problem = check_problem(x, None, mask, None, function.diagonal)
    sigmas, target = check_function(("x",), (x,), mask, kernel, function, STORED)
    check_stored("the dissimilarities", x, None)
    matrix, status = _rdm(x, mask, sigmas, target, function, check_rtol(None, x.dtype))
    explain_failure(status, problem)
    return matrix


def rsa(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    metric: Dissimilarity = "sqeuclidean",
    *,
    comparison: Comparison = "pearson",
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
    plan: Plan | None = None,
) -> Float[Array, "*batch"]:
    """Representational similarity: a correlation between the dissimilarities of two sets over all pairs i < j.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        metric: the dissimilarity, see `rdm`.
        comparison: "pearson"; "spearman", of average ranks; "kendall", tau-b; "cosine", without taking the means away;
            "whitened_cosine" and "whitened_pearson": the latter two weighted by the inverse covariance that
            dissimilarities have when the features are noise (Diedrichsen et al. 2021; identity noise covariance). The
            whitened cosine of squared Euclidean RDMs is biased linear CKA.
        mask: see `hsic`.
        missing: see `hsic`.
        plan: how pairs are visited, see `jaxalign.Plan`. "spearman" and "kendall" store all pairs on one device.

    Returns:
        Shape (...), from -1 to 1. 0 where all dissimilarities of a set are equal. Differentiable but for spearman and
        kendall, which depend on order alone: their derivatives are 0.

    Raises:
        TypeError, ValueError: see `hsic`; a row without a direction for "correlation" and "cosine".

    Example:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (50, 8))
        >>> round(float(jaxalign.measures.rsa(x, 3 * x[:, ::-1] + 1, comparison="spearman")), 4)
        1.0
    """
    kernel = metric_kernel(metric)
    measure = rsa_measure(metric_function(metric, kernel), comparison)
    return evaluate(measure, x, y, kernel, mask=mask, missing=missing, plan=plan)


@_checks.cached
def rsa_measure(function: PairFunction, comparison: Any) -> PairMeasure | SummaryMeasure:
    """The measure behind `rsa`."""
    _checks.choice("comparison", comparison, (*_COMPARISONS, "spearman", "kendall"))
    if comparison in _COMPARISONS:
        return PairMeasure("rsa", function, _COMPARISONS[comparison], InnerProducts.ratio, 3)
    combine = {"spearman": _spearman, "kendall": _kendall}[comparison]
    # All dissimilarities of the same rows are in the order of their squared distances, at any sigma; far pairs would
    # tie at 1 by rounding.
    function = replace(function, solves=False)
    return SummaryMeasure("rsa", partial(_ordered, function=function), combine, 3, function, stores_pairs=True)


def metric_kernel(metric: Any) -> RBF | None:
    """The kernel behind a metric, if there is one."""
    if isinstance(metric, RBF) or (isinstance(metric, str) and metric == "rbf"):
        kernel = kernel_of(metric, "metric")
        assert isinstance(kernel, RBF)
        return kernel
    _checks.choice("metric", metric, (*_FUNCTIONS, "rbf"))
    return None


def metric_function(metric: Any, kernel: RBF | None) -> PairFunction:
    """What a metric gives a pair of samples; `kernel` from `metric_kernel`."""
    if kernel is None:
        return PairFunction(**_FUNCTIONS[metric])
    return PairFunction("one_minus_rbf", solves=kernel.solves, diagonal=kernel.diagonal)


@partial(jax.jit, static_argnames=("function", "rtol"))
def _rdm(
    x: Array, mask: Array | None, sigmas: Array | None, density: Array | None, function: PairFunction, rtol: float
) -> tuple[Array, Array]:
    """f_ij of all pairs, stored, and the status of sigma."""

    def dissimilarities(
        x: Array, mask: Array | None, sigmas: Array | None, density: Array | None
    ) -> tuple[Array, Array]:
        (prepared,) = prepare_representations((x,), mask, sigmas, density, function, rtol, STORED, resolved=True)
        features = prepared.features
        values = function.values(prepared.distances, prepared.gamma, features.scale)
        if function.form in ("squared", "root"):
            values = values * features.scale if function.form == "root" else values * features.scale * features.scale
            # Of rows of unit length 1 - cos is half the squared distance.
            values = values / 2 if function.normalization is not None else values
        values = jnp.where(features.finite, values, jnp.nan)
        if mask is not None:
            values = jnp.where(mask[:, None] & mask[None], values, 0)
        return values, prepared.status

    return batched(dissimilarities, x.ndim - 2)(x, mask, sigmas, density)


# --- comparisons of order --------------------------------------------------------------------------------------------


def _ordered(x: Array, context: Context, function: PairFunction) -> tuple[Array, None]:
    """Integers in the order of the squared distances of all pairs i < j, (n (n - 1) / 2,); see `_ranked`."""
    mask = context.mask
    features = lax.stop_gradient(unit_features(x, mask, function.normalization))
    first, second = np.triu_indices(x.shape[0], 1)
    # Many distances that need resolving are those within tight clusters; those between clusters are then nearly equal,
    # and those of whole numbers quite.
    close = jnp.sum(are_unresolved(features, fast_distances(features))) > x.shape[0]

    def exact_order(_: Array, features: CenteredFeatures) -> Array:
        return dense_ranks(*(part[first, second] for part in exact_distances(features)))

    pairs = resolved_distances(features)[first, second]
    keys = when_any(close | has_ties(features), exact_order, ordered_integers(pairs), features)
    counts = jnp.ones(pairs.shape, bool) if mask is None else mask[first] & mask[second]
    largest = jnp.max(jnp.where(counts, pairs, -jnp.inf))
    smallest = jnp.min(jnp.where(counts, pairs, jnp.inf))
    equidistant = largest - smallest <= 16 * float(jnp.finfo(x.dtype).eps) * largest  # what differs is rounding
    return jnp.where(counts, jnp.where(equidistant, 0, keys), jnp.iinfo(keys.dtype).max), None


def _spearman(x: Array, y: Array, mask: Array | None) -> Array:
    del mask
    return spearman(x, y)


def _kendall(x: Array, y: Array, mask: Array | None) -> Array:
    del mask
    return kendall(x, y)


def spearman(x: Array, y: Array) -> Array:
    """Pearson correlation of the average ranks of two orders (N,), as `ordered_integers` gives them; 0 if all tie."""
    real = _ranked(x) & _ranked(y)
    count = jnp.sum(real, dtype=jnp.int32)
    number = jnp.maximum(count, 1).astype(_float_of(x))

    def centred(keys: Array) -> Array:
        """Average ranks less their mean, twice, from -1 to 1 so that sums keep digits. What is left out ranks last."""
        return jnp.where(real, (_average_ranks(keys, count)).astype(number.dtype) / number, 0)

    a, b = centred(x), centred(y)
    return bounded(correlation(jnp.sum(a * b), jnp.sum(a * a), jnp.sum(b * b)), -1, 1)


def _average_ranks(keys: Array, count: Array) -> Array:
    """Twice the rank of each key less the mean of all; equal ones share the mean of their ranks. Whole numbers."""
    ordered, index = jnp.sort(keys), jnp.arange(keys.size, dtype=jnp.int32)
    new = _starts(ordered)
    first = lax.cummax(jnp.where(new, index, 0))
    last = lax.cummin(jnp.where(jnp.roll(new, -1), index, keys.size - 1), reverse=True)
    return (first - (count - 1 - last))[jnp.searchsorted(ordered, keys)]


def ordered_integers(a: Array) -> Array:
    """Integers in the order of the numbers, and as equal: on a CPU XLA sorts them six times as fast."""
    bits = lax.bitcast_convert_type(jnp.where(a == 0, 0, a), f"int{8 * a.dtype.itemsize}")  # of -0 as of 0
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def dense_ranks(high: Array, low: Array) -> Array:
    """Integers in the order of high + low, (..., N), and as equal."""
    keys = (ordered_integers(high), ordered_integers(low))
    place = jnp.broadcast_to(jnp.arange(high.shape[-1], dtype=jnp.int32), high.shape)
    *ordered, place = lax.sort((*keys, place), num_keys=2)
    new = jnp.stack([key != jnp.roll(key, 1, -1) for key in ordered]).any(0)
    ranks = jnp.cumsum(new, -1, dtype=keys[0].dtype)
    return lax.sort((place, ranks), num_keys=1)[1]


def _ranked(keys: Array) -> Array:
    """Which pairs count: the largest integer stands for those that do not."""
    return keys != jnp.iinfo(keys.dtype).max


def _float_of(keys: Array) -> Any:
    return jnp.float32 if keys.dtype.itemsize == 4 else jnp.float64


def _starts(a: Array) -> Array:
    """Where a value differs from the one before it."""
    return jnp.concatenate((jnp.ones(1, bool), a[1:] != a[:-1]))


def kendall(x: Array, y: Array) -> Array:
    """Kendall's tau-b (1945) of two orders (N,), as `ordered_integers` gives them, in N log^2 N; 0 if all tie.

    After sorting by x, and by y where x ties, the discordant pairs are the inversions of y (Knight 1966). They are
    counted bit by bit of the ranks of y: among those that agree in all higher bits, each 1 before a 0 is one.
    """
    real = _ranked(x) & _ranked(y)
    n, dtype = x.shape[0], _float_of(x)
    count = jnp.sum(real, dtype=jnp.int32)
    index = jnp.arange(n, dtype=jnp.int32)
    counts = index < count  # in sorted order, what does not count comes last
    number = jnp.maximum(count, 1).astype(dtype)

    def share(a: Array) -> Array:
        """Of the pairs of two values, twice: counts of at most n each, divided before they are summed up."""
        return 2 * jnp.sum(jnp.where(counts, a, 0).astype(dtype) / number) / jnp.maximum(number - 1, 1)

    def ties(new: Array) -> Array:
        """Of each value, how many before it are equal."""
        return index - lax.cummax(jnp.where(new, index, 0))

    x_sorted, y_by_x = lax.sort((x, y), num_keys=2)
    y_sorted = jnp.sort(y)
    new_x, new_y = _starts(x_sorted), _starts(y_sorted)
    new_both = new_x | _starts(y_by_x)
    rank = jnp.searchsorted(y_sorted, y_by_x).astype(jnp.int32)
    rank_sorted = index - ties(new_y)
    bits = max(1, math.ceil(math.log2(n)))

    def level(k: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rank, inversions = carry
        bit = jnp.asarray(bits - 1 - k, jnp.int32)  # without jit, k is an int
        group, one = rank >> (bit + 1), (rank >> bit) & 1
        new = _starts(group)
        ones = jnp.cumsum(one, dtype=jnp.int32) - one
        here = ones - lax.cummax(jnp.where(new, ones, 0))  # ones before it in its group
        found = share(jnp.where(one == 0, here, 0))
        # In the order of one bit more: behind all of smaller ranks, and those of its own that came before.
        alike = jnp.where(one == 1, here, ties(new) - here)
        place = jnp.searchsorted(rank_sorted, (rank >> bit) << bit).astype(jnp.int32) + alike
        rank = jnp.zeros_like(rank).at[place].set(rank, unique_indices=True)
        return rank, inversions + found

    _, discordant = lax.fori_loop(0, bits, level, (rank, jnp.zeros((), dtype)))
    tied_x, tied_y, tied = share(ties(new_x)), share(ties(new_y)), share(ties(new_both))
    concordant_less_discordant = 1 - tied_x - tied_y + tied - 2 * discordant
    return bounded(correlation(concordant_less_discordant, 1 - tied_x, 1 - tied_y), -1, 1)
