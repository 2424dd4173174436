"""Representational similarity analysis: how well the dissimilarities of one representation predict another's.

The representational dissimilarity matrix (RDM) holds a dissimilarity for every pair of samples; RSA (Kriegeskorte et
al. 2008) compares two RDMs over the pairs i < j. Pearson, cosine and the whitened comparisons (Diedrichsen et al. 2021)
are inner products, which need no n x n matrix. Spearman and Kendall sort, so they store all pairs.
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
    cached,
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
    """The representational dissimilarity matrix (RDM) of features.

    Args:
        x: features, shape (..., n, d).
        metric: "sqeuclidean" D_ij = ||x_i - x_j||^2 (not divided by d); "euclidean" its root; "correlation" 1 - r of
            the two rows, from 0 to 2; "cosine" 1 - cos; "rbf" 1 - A of the RBF kernel, or a `jaxalign.kernels.RBF`,
            which also holds sigma or its target density.
        mask: shape (..., n), True marks valid samples; rows and columns of other samples are 0.

    Returns:
        Shape (..., n, n), symmetric, with a diagonal of exactly 0. Differentiable; the derivative of "euclidean" is set
        to 0 at distance 0.

    Raises:
        TypeError, ValueError: see `hsic`; for "correlation" and "cosine", a row that has no direction.

    Examples:
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
    """Representational similarity: the correlation of two representations' dissimilarities over all pairs i < j.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        metric: the dissimilarity, see `rdm`.
        comparison: "pearson"; "spearman" (with average ranks); "kendall" (tau-b); "cosine" (means are not subtracted);
            "whitened_cosine" and "whitened_pearson", which weight by the inverse covariance that dissimilarities have
            if the features are noise (Diedrichsen et al. 2021; identity noise covariance). The whitened cosine of
            squared Euclidean RDMs is biased linear CKA.
        mask: see `hsic`.
        missing: see `hsic`.
        plan: how pairs are visited, see `jaxalign.Plan`. "spearman" and "kendall" store all pairs on one device.

    Returns:
        Shape (...), from -1 to 1; 0 if all dissimilarities of a representation are equal. Differentiable, but the
        derivatives of "spearman" and "kendall", which depend on order alone, are 0.

    Raises:
        TypeError, ValueError: see `hsic`; for "correlation" and "cosine", a row that has no direction.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (50, 8))
        >>> round(float(jaxalign.measures.rsa(x, 3 * x[:, ::-1] + 1, comparison="spearman")), 4)
        1.0
    """
    kernel = metric_kernel(metric)
    measure = rsa_measure(metric_function(metric, kernel), comparison)
    return evaluate(measure, x, y, kernel, mask=mask, missing=missing, plan=plan)


@cached
def rsa_measure(function: PairFunction, comparison: Any) -> PairMeasure | SummaryMeasure:
    """The measure behind `rsa`."""
    _checks.choice("comparison", comparison, (*_COMPARISONS, "spearman", "kendall"))
    if comparison in _COMPARISONS:
        return PairMeasure("rsa", function, _COMPARISONS[comparison], InnerProducts.ratio, 3)
    combine = {"spearman": _spearman, "kendall": _kendall}[comparison]
    # Every dissimilarity orders pairs as squared distances do, at any sigma. Ranking those avoids ties of far pairs,
    # whose dissimilarities all round to 1.
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
    """The pair function of a metric; `kernel` is that of `metric_kernel`."""
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
            # 1 - cos is half the squared distance of rows of unit norm.
            values = values / 2 if function.normalization is not None else values
        values = jnp.where(features.finite, values, jnp.nan)
        if mask is not None:
            values = jnp.where(mask[:, None] & mask[None], values, 0)
        return values, prepared.status

    return batched(dissimilarities, x.ndim - 2)(x, mask, sigmas, density)


# --- rank correlations -----------------------------------------------------------------------------------------------


def _ordered(x: Array, context: Context, function: PairFunction) -> tuple[Array, None]:
    """Integers that order the pairs i < j by squared distance, (n (n - 1) / 2,); the largest marks masked pairs."""
    mask = context.mask
    features = lax.stop_gradient(unit_features(x, mask, function.normalization))
    first, second = np.triu_indices(x.shape[0], 1)
    # Many unresolved distances mean tight clusters, whose mutual distances are then nearly equal: only the exact order
    # is reliable, as it is for the ties of integer features.
    close = jnp.sum(are_unresolved(features, fast_distances(features))) > x.shape[0]

    def exact_order(_: Array, features: CenteredFeatures) -> Array:
        return dense_ranks(*(part[first, second] for part in exact_distances(features)))

    pairs = resolved_distances(features)[first, second]
    keys = when_any(close | has_ties(features), exact_order, ordered_integers(pairs), features)
    counts = jnp.ones(pairs.shape, bool) if mask is None else mask[first] & mask[second]
    largest = jnp.max(jnp.where(counts, pairs, -jnp.inf))
    smallest = jnp.min(jnp.where(counts, pairs, jnp.inf))
    equidistant = largest - smallest <= 16 * float(jnp.finfo(x.dtype).eps) * largest  # up to rounding
    return jnp.where(counts, jnp.where(equidistant, 0, keys), jnp.iinfo(keys.dtype).max), None


def _spearman(x: Array, y: Array, mask: Array | None) -> Array:
    del mask
    return spearman(x, y)


def _kendall(x: Array, y: Array, mask: Array | None) -> Array:
    del mask
    return kendall(x, y)


def spearman(x: Array, y: Array) -> Array:
    """Spearman correlation of two arrays of `ordered_integers`, (N,), with average ranks; 0 if all values tie."""
    counts = _is_ranked(x) & _is_ranked(y)
    count = jnp.sum(counts, dtype=jnp.int32)
    number = jnp.maximum(count, 1).astype(_float_of(x))

    def centered(keys: Array) -> Array:
        """Centered average ranks, scaled to [-1, 1] so that sums stay accurate. Masked pairs rank last."""
        return jnp.where(counts, (_average_ranks(keys, count)).astype(number.dtype) / number, 0)

    a, b = centered(x), centered(y)
    return bounded(correlation(jnp.sum(a * b), jnp.sum(a * a), jnp.sum(b * b)), -1, 1)


def _average_ranks(keys: Array, count: Array) -> Array:
    """Twice the centered rank of each key, an integer; ties get their average rank."""
    ordered, index = jnp.sort(keys), jnp.arange(keys.size, dtype=jnp.int32)
    new = _starts(ordered)
    first = lax.cummax(jnp.where(new, index, 0))
    last = lax.cummin(jnp.where(jnp.roll(new, -1), index, keys.size - 1), reverse=True)
    return (first - (count - 1 - last))[jnp.searchsorted(ordered, keys)]


def ordered_integers(a: Array) -> Array:
    """Integers with the order and the ties of `a`: XLA sorts integers six times as fast on CPUs."""
    bits = lax.bitcast_convert_type(jnp.where(a == 0, 0, a), f"int{8 * a.dtype.itemsize}")  # -0 has the bits of 0
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def dense_ranks(high: Array, low: Array) -> Array:
    """Integers with the order and the ties of high + low, (..., N)."""
    keys = (ordered_integers(high), ordered_integers(low))
    place = jnp.broadcast_to(jnp.arange(high.shape[-1], dtype=jnp.int32), high.shape)
    *ordered, place = lax.sort((*keys, place), num_keys=2)
    new = jnp.stack([key != jnp.roll(key, 1, -1) for key in ordered]).any(0)
    ranks = jnp.cumsum(new, -1, dtype=keys[0].dtype)
    return lax.sort((place, ranks), num_keys=1)[1]


def _is_ranked(keys: Array) -> Array:
    """Which pairs count: the largest integer marks pairs that do not."""
    return keys != jnp.iinfo(keys.dtype).max


def _float_of(keys: Array) -> Any:
    return jnp.float32 if keys.dtype.itemsize == 4 else jnp.float64


def _starts(a: Array) -> Array:
    """Where a value differs from the previous one."""
    return jnp.concatenate((jnp.ones(1, bool), a[1:] != a[:-1]))


def kendall(x: Array, y: Array) -> Array:
    """Kendall's tau-b (1945) of two arrays of `ordered_integers`, (N,), in O(N log^2 N); 0 if all values tie.

    After sorting by x, and by y where x ties, the discordant pairs are the inversions of y (Knight 1966). They are
    counted bit by bit in the ranks of y: among ranks that agree in all higher bits, each 1 before a 0 is an inversion.
    """
    n, dtype = x.shape[0], _float_of(x)
    count = jnp.sum(_is_ranked(x) & _is_ranked(y), dtype=jnp.int32)
    index = jnp.arange(n, dtype=jnp.int32)
    counts = index < count  # in sorted order masked pairs come last
    number = jnp.maximum(count, 1).astype(dtype)

    def share(a: Array) -> Array:
        """The sum of `a` as a share of all pairs. Dividing each term, at most n, before the sum keeps it accurate."""
        return 2 * jnp.sum(jnp.where(counts, a, 0).astype(dtype) / number) / jnp.maximum(number - 1, 1)

    def ties(new: Array) -> Array:
        """The number of equal values before each value."""
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
        group, digit = rank >> (bit + 1), (rank >> bit) & 1
        new = _starts(group)
        ones = jnp.cumsum(digit, dtype=jnp.int32) - digit
        ones_before = ones - lax.cummax(jnp.where(new, ones, 0))  # in the same group
        inverted = share(jnp.where(digit == 0, ones_before, 0))
        # A stable sort by one more bit: after all smaller ranks, and after earlier entries with the same digit.
        equal_before = jnp.where(digit == 1, ones_before, ties(new) - ones_before)
        place = jnp.searchsorted(rank_sorted, (rank >> bit) << bit).astype(jnp.int32) + equal_before
        rank = jnp.zeros_like(rank).at[place].set(rank, unique_indices=True)
        return rank, inversions + inverted

    _, discordant = lax.fori_loop(0, bits, level, (rank, jnp.zeros((), dtype)))
    tied_x, tied_y, tied = share(ties(new_x)), share(ties(new_y)), share(ties(new_both))
    concordant_less_discordant = 1 - tied_x - tied_y + tied - 2 * discordant
    return bounded(correlation(concordant_less_discordant, 1 - tied_x, 1 - tied_y), -1, 1)
