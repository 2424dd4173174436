"""Nearest-neighbor measures: whether the same samples are close in both representations.

A reduction over pairs keeps the k smallest distances of every row, so no n x n matrix is stored. Among neighbors at
equal distances the sample with the smaller index comes first.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxalign import _checks
from jaxalign._directions import unit_features
from jaxalign._linalg import bounded, matmul
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.core.devices import ROWS_SECOND_LAST, on_mesh
from jaxalign.core.features import CenteredFeatures
from jaxalign.core.reduce import reduce_pairs
from jaxalign.core.resolved import has_ties
from jaxalign.core.tiles import Pairs, Reduction, Tile, inverse_rms_distance
from jaxalign.measures._evaluate import (
    MASK_ADVICE,
    Context,
    Missing,
    SummaryMeasure,
    cached,
    check_directions,
    check_representations,
    evaluate,
)
from jaxalign.measures._pair_sums import PairFunction, correlation
from jaxalign.plan import Plan, check_plan, resolve_plan

Metric = Literal["euclidean", "cosine", "correlation"]

NO_SAMPLE = np.iinfo(np.int32).max
# Distances down to this factor below the root mean square are accurate to 1e-4, which is enough to order them.
_RESOLVED_BELOW_RMS = 60.0
# Entries of gathered neighbors (k d per row) that are processed at a time.
_MAX_GATHERED = 2**22


def nearest_neighbors(
    x: Numbers[Data, "*batch n d"],
    k: int = 10,
    metric: Metric = "cosine",
    *,
    mask: Mask[Data, "*#batch n"] | None = None,
    plan: Plan | None = None,
) -> Int[Array, "*batch n k"]:
    """Indices of the k nearest neighbors of each sample, nearest first; a sample is not its own neighbor.

    Args:
        x: features, shape (..., n, d).
        k: the number of neighbors, 1 <= k < n.
        metric: "euclidean", "cosine" (1 - cos) or "correlation" (1 - r).
        mask: shape (..., n), True marks valid samples. Other samples are not neighbors of any, and theirs are -1.
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        Indices of samples, int32, shape (..., n, k).

    Raises:
        TypeError, ValueError: see `hsic`; k >= n; for "cosine" and "correlation", a row that has no
            direction.

    Examples:
        >>> import jax.numpy as jnp, jaxalign
        >>> x = jnp.array([[0.0], [1.0], [3.0]])
        >>> jaxalign.measures.nearest_neighbors(x, 1, "euclidean")[:, 0]
        Array([1, 0, 1], dtype=int32)
    """
    function = _function(metric)
    k = _check_k(k)
    (x,), mask = check_representations(
        (("x", x),),
        mask,
        "raise",
        k + 1,
        f"k = {k} neighbors",
        MASK_ADVICE,
        center=function.normalization is None,
    )
    check_directions("x", x, function.normalization, mask)
    indices = _neighbors_jit(x, mask, k, function, resolve_plan(check_plan(plan, local_rows=False), x, None))
    return jnp.where(indices == NO_SAMPLE, -1, indices)


def mutual_knn(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    k: int = 10,
    *,
    metric: Metric = "cosine",
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
    plan: Plan | None = None,
) -> Float[Array, "*batch"]:
    """The mean share of the k nearest neighbors that both representations have in common (Huh et al. 2024, eq. 11).

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        k: the number of neighbors, 1 <= k < n.
        metric: "euclidean", "cosine" (as published) or "correlation".
        mask: see `hsic`.
        missing: see `hsic`.
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        Shape (...), from 0 to 1; k / (n - 1) on average for independent representations. Derivatives are 0.

    Raises:
        TypeError, ValueError: see `nearest_neighbors`.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> float(jaxalign.measures.mutual_knn(x, 2 * x, 5))
        1.0
    """
    measure = mutual_knn_measure(k, metric)
    return evaluate(measure, x, y, mask=mask, missing=missing, plan=check_plan(plan, local_rows=False))


def jaccard(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    k: int = 10,
    *,
    metric: Metric = "cosine",
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
    plan: Plan | None = None,
) -> Float[Array, "*batch"]:
    """The mean Jaccard index of the k nearest neighbors in both representations: the intersection over the union.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        k: the number of neighbors, 1 <= k < n.
        metric: "euclidean", "cosine" or "correlation".
        mask: see `hsic`.
        missing: see `hsic`.
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        Shape (...), from 0 to 1. Derivatives are 0.

    Raises:
        TypeError, ValueError: see `nearest_neighbors`.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> float(jaxalign.measures.jaccard(x, 2 * x, 5))
        1.0
    """
    measure = jaccard_measure(k, metric)
    return evaluate(measure, x, y, mask=mask, missing=missing, plan=check_plan(plan, local_rows=False))


def cknna(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    k: int = 10,
    *,
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
    plan: Plan | None = None,
) -> Float[Array, "*batch"]:
    """Centered kernel nearest-neighbor alignment: CKA of cosines over pairs that are neighbors in both representations.

    The value is Align(K, L) / sqrt(Align(K, K) Align(L, L)) with

        Align(K, L) = sum_ij a_ij (K_ij - mean_l K_il) (L_ij - mean_l L_il),

    a_ij = 1 if j is among the k nearest neighbors of i in both representations, else 0 (Huh et al. 2024, appendix A).

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        k: the number of neighbors, 1 <= k < n; n - 1 compares all pairs.
        mask: see `hsic`.
        missing: see `hsic`.
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        Shape (...), at most 1. Differentiable for fixed neighbors.

    Raises:
        TypeError, ValueError: see `nearest_neighbors`.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> round(float(jaxalign.measures.cknna(x, 2 * x, 5)), 4)
        1.0
    """
    return evaluate(cknna_measure(k), x, y, mask=mask, missing=missing, plan=check_plan(plan, local_rows=False))


# --- specifications --------------------------------------------------------------------------------------------------


@cached
def mutual_knn_measure(k: Any, metric: Any) -> SummaryMeasure:
    """The measure behind `mutual_knn`."""
    k = _check_k(k)
    function = _function(metric)
    combine = partial(_overlap, shared_of=lambda shared: shared / k)
    return SummaryMeasure(
        "mutual_knn", partial(_lists, k=k, function=function), combine, k + 1, function, f"mutual_knn with k = {k}",
        num_neighbors=k,
    )  # fmt: skip


@cached
def jaccard_measure(k: Any, metric: Any) -> SummaryMeasure:
    """The measure behind `jaccard`."""
    k = _check_k(k)
    function = _function(metric)
    combine = partial(_overlap, shared_of=lambda shared: shared / (2 * k - shared))
    return SummaryMeasure(
        "jaccard", partial(_lists, k=k, function=function), combine, k + 1, function, f"jaccard with k = {k}",
        num_neighbors=k,
    )  # fmt: skip


@cached
def cknna_measure(k: Any) -> SummaryMeasure:
    """The measure behind `cknna`."""
    k = _check_k(k)
    function = _function("cosine")
    return SummaryMeasure(
        "cknna",
        partial(_local_kernel, k=k, function=function),
        _local_alignment,
        k + 1,
        function,
        f"cknna with k = {k}",
    )


def _check_k(k: Any) -> int:
    return _checks.whole("k", k, of=" of neighbors")


def _function(metric: Any) -> PairFunction:
    _checks.choice("metric", metric, ("euclidean", "cosine", "correlation"))
    return PairFunction("root", None if metric == "euclidean" else metric)


def _lists(x: Array, context: Context, k: int, function: PairFunction) -> tuple[Array, None]:
    return neighbors(x, context.mask, k, function, context.plan), None


def neighbors(x: Array, mask: Array | None, k: int, function: PairFunction, plan: Plan) -> Array:
    """Indices of the k nearest neighbors, (..., n, k); NO_SAMPLE where there is none."""

    def local(x: Array, _y: None, mask: Array | None, _mask_y: None) -> Array:
        features = unit_features(x, mask, function.normalization, plan.axis_name)
        gamma = resolution(features, plan.axis_name)
        pairs = Pairs((features,), None, True, plan.tile_rows, plan.axis_name, differentiable=False, euclidean=True)
        return reduce_pairs(keep_nearest(k), pairs, gammas=(gamma,))[1].sample

    return on_mesh(local, plan, (lax.stop_gradient(x), None, mask, None), result_rows=ROWS_SECOND_LAST)


_neighbors_jit = jax.jit(neighbors, static_argnames=("k", "function", "plan"))


def resolution(features: CenteredFeatures, axis_name: str | None = None) -> Array:
    """A gamma for which distances are accurate enough to order them: inf if ties are likely."""
    gamma = _RESOLVED_BELOW_RMS * inverse_rms_distance(features, axis_name)
    return jnp.where(has_ties(features, axis_name), jnp.inf, gamma)


def keep_nearest(k: int) -> Reduction:
    """The reduction whose row results are the k nearest samples, `Near`."""
    return Reduction(_candidates, partial(_nearest, k=k), combine=nearer, init=_no_neighbors)


class Near(NamedTuple):
    """The nearest samples of each row."""

    distance: Array  # (..., r, k), smallest first
    sample: Array


def _candidates(tile: Tile) -> Array:
    (distance,) = tile.distances
    return jnp.where(tile.apply_weights(jnp.ones_like(distance)) > 0, distance, jnp.inf)


def _nearest(distances: Array, tile: Tile, k: int) -> tuple[tuple[()], Near]:
    count = min(k, distances.shape[1])
    negative, place = lax.top_k(-distances, count)  # of equal distances the first
    sample = jnp.where(jnp.isfinite(negative), tile.column.sample[place], NO_SAMPLE)
    padding = [(0, 0), (0, k - count)]
    distance = jnp.pad(-negative, padding, constant_values=jnp.inf)
    return (), Near(distance, jnp.pad(sample, padding, constant_values=NO_SAMPLE))


def _no_neighbors(like: Near) -> Near:
    if not isinstance(like, Near):  # results that are not requested
        return like
    return Near(jnp.full_like(like.distance, jnp.inf), jnp.full_like(like.sample, NO_SAMPLE))


def nearer(a: Near, b: Near) -> Near:
    """The nearest of both; of equally near ones the first."""
    if not isinstance(a, Near):
        return a
    both = (jnp.concatenate(part, -1) for part in zip(a, b, strict=True))
    distance, sample = lax.sort(tuple(both), num_keys=2)
    k = a.sample.shape[-1]
    return Near(distance[..., :k], sample[..., :k])


def _mean_over_samples(values: Array, mask: Array | None) -> Array:
    if mask is None:
        return jnp.mean(values, -1)
    weight = mask.astype(values.dtype)
    return jnp.sum(values * weight, -1) / jnp.maximum(jnp.sum(weight, -1), 1)


def _overlap(x: Array, y: Array, mask: Array | None, shared_of: Any) -> Array:
    same = (x[..., :, None] == y[..., None, :]) & (x != NO_SAMPLE)[..., :, None]
    shared = jnp.sum(same, (-2, -1)).astype(jnp.result_type(float))
    return _mean_over_samples(shared_of(shared), mask)


class _Local(NamedTuple):
    """The kernel at the neighbors of each row."""

    sample: Array  # (..., n, k)
    kernel: Array  # (..., n, k): K_ij - mean_l K_il, up to a factor


def _local_kernel(x: Array, context: Context, k: int, function: PairFunction) -> tuple[_Local, None]:
    samples = neighbors(x, context.mask, k, function, context.plan)
    mask = context.mask
    weights = jnp.ones(x.shape[0], x.dtype) if mask is None else mask.astype(x.dtype)
    weights = weights[:, None] / jnp.maximum(jnp.sum(weights), 1)
    # With unit rows u and w = u - mean u, u_i.(u_j - mean u) = w_i.w_j - (|w_j|^2 - mean |w|^2) / 2, which stays
    # accurate if all directions are nearly equal.
    rows = unit_features(x, mask, "cosine").x
    rows = rows - jnp.sum(rows * weights, 0, keepdims=True)
    squares = jnp.sum(rows * rows, 1)
    squares = (squares - jnp.sum(squares * weights[:, 0])) / 2

    def at_neighbors(row: Array, nearest: Array) -> Array:
        neighbor_rows, half_squares = (jnp.take(a, nearest, 0, mode="clip") for a in (rows, squares))
        return jnp.where(nearest == NO_SAMPLE, 0, matmul(neighbor_rows, row) - half_squares)

    batch_size = max(1, _MAX_GATHERED // (k * rows.shape[1]))
    kernel = lax.map(lambda pair: jax.checkpoint(at_neighbors)(*pair), (rows, samples), batch_size=batch_size)
    return _Local(samples, kernel), None


def _local_alignment(x: _Local, y: _Local, mask: Array | None) -> Array:
    del mask  # masked rows have no neighbors, so their terms are 0
    same = x.sample[..., :, None] == y.sample[..., None, :]
    both = jnp.where(same, x.kernel[..., :, None] * y.kernel[..., None, :], 0)
    self_x, self_y = (jnp.sum(a.kernel**2, (-2, -1)) for a in (x, y))
    return bounded(correlation(jnp.sum(both, (-3, -2, -1)), self_x, self_y), -1, 1)
