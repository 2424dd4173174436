"""Values of a measure under permutations: from stored pair matrices, or recomputed for each permutation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._memory import check_room
from jaxalign._permutations import Permutations, permuted_products
from jaxalign._problem import check_rtol
from jaxalign.kernels import with_bandwidth
from jaxalign.measures._centering import CENTERINGS, Centering
from jaxalign.measures._evaluate import (
    PairMeasure,
    SummaryMeasure,
    check_function,
    compare_summaries,
    explain_status,
    summarize,
)
from jaxalign.measures._pair_sums import (
    InnerProducts,
    PairFunction,
    collect_properties,
    prepare_representations,
    rounding_level,
)
from jaxalign.plan import STORED

# The number of a pair of samples is an int32.
_MOST_SAMPLES = 46_340


def is_product(measure: PairMeasure | SummaryMeasure) -> bool:
    """Whether a measure is a function of inner products of centered pair matrices."""
    return isinstance(measure, PairMeasure) and measure.centering is not None


def permuted_values(
    sets: tuple[Array, ...],
    split: int,
    names: Sequence[str],
    measure: PairMeasure | SummaryMeasure,
    options: dict[str, Any],
    permutations: Permutations,
    key: Array,
    number: int,
) -> tuple[Array, Array]:
    """The observed value (L, M), and those of `number` permutations, or of all if there are fewer, (m, L, M)."""
    if is_product(measure):
        assert isinstance(measure, PairMeasure)
        matrices, units = pair_matrices(sets, options, measure, names)
        products = permuted_products(matrices[:split], matrices[split:], permutations, key, number)
        values = _values(products, _norms(matrices), units, measure, split, matrices.shape[-1])
    elif isinstance(measure, PairMeasure):  # affinity_distance
        plain = replace(measure, centering=CENTERINGS["none"])
        matrices, _ = pair_matrices(sets, options, plain, names)
        values = _permuted_differences(matrices, permutations.orders(key, number), split, measure)
    else:
        sigma, target = check_function(names, sets, None, with_bandwidth(options), measure.function, STORED)
        for k in range(len(sets)):
            summary = _summarize(sets[k], None if sigma is None else sigma[k], target, measure)
            explain_status(names[k], summary.status)
        values = _permuted_summaries(sets, sigma, target, permutations.orders(key, number), split, measure)
    return values[0], values[1:]


def pair_matrices(
    sets: tuple[Array, ...], options: dict[str, Any], measure: PairMeasure, names: Sequence[str]
) -> tuple[Array, Array]:
    """Centered pair matrices (representations, n, n) and their units: the measure is their inner product."""
    if measure.samples_channels:
        raise ValueError(
            "sampled_channels=True multiplies a value and its null by the same factor: use sampled_channels=False, "
            "whose p-value is the same."
        )
    if sets[0].shape[0] > _MOST_SAMPLES:
        raise ValueError(f"at most {_MOST_SAMPLES} samples can be permuted or resampled; got {sets[0].shape[0]}.")
    sigmas, target = check_function(names, sets, None, with_bandwidth(options), measure.function, STORED)
    pairs = []
    shape = (len(sets), sets[0].shape[0], sets[0].shape[0])
    check_room("the pair matrices", shape, sets[0], "Test fewer samples, drawn at random: x[rows], y[rows].")
    for k, (name, x) in enumerate(zip(names, sets, strict=True)):
        sigma_k = None if sigmas is None else sigmas[..., k : k + 1]
        assert measure.centering is not None
        rtol = check_rtol(None, x.dtype)
        matrix, unit, status = _pair_matrix(x, sigma_k, target, measure.function, measure.centering, rtol)
        explain_status(name, status)
        pairs.append((matrix, unit))
    matrices, units = (jnp.stack(parts) for parts in zip(*pairs, strict=True))
    return matrices, units


@partial(jax.jit, static_argnames=("function", "centering", "rtol"))
def _pair_matrix(
    x: Array, sigmas: Array | None, density: Array | None, function: PairFunction, centering: Centering, rtol: float
) -> tuple[Array, Array, Array]:
    (prepared,) = prepare_representations((x,), None, sigmas, density, function, rtol, STORED)
    scale = prepared.features.scale
    f = function.values(prepared.distances, prepared.gamma, scale)
    # f is in its unit, so that neither squares nor products overflow.
    matrix = centering.matrix(f)
    count, size = jnp.asarray(x.shape[0], x.dtype), jnp.max(jnp.abs(f), -1, keepdims=True)
    constant = _norms(matrix) <= rounding_level(collect_properties([prepared], function), size, function, count)[0]
    return jnp.where(constant, 0, matrix), function.unit(scale), prepared.status


def _norms(matrices: Array) -> Array:
    """<F, F>, (...)."""
    return jnp.sum(jnp.sum(matrices * matrices, -1), -1)


@partial(jax.jit, static_argnames=("measure", "split", "n"))
def _values(table: Array, self_products: Array, units: Array, measure: PairMeasure, split: int, n: int) -> Array:
    """Values (m, L, M) from inner products (m, L, M) and self products (L + M,)."""
    shape, number = table.shape[:-2], self_products.shape[0]
    units = jnp.broadcast_to(units, (*shape, number))
    self_products = jnp.broadcast_to(self_products, (*shape, number))
    by_side, units_by_side = ((a[..., :split], a[..., split:]) for a in (self_products, units))
    inner = InnerProducts.of(table, by_side, units_by_side, jnp.full(shape, n, table.dtype))
    return measure.finish(inner)


@partial(jax.jit, static_argnames=("split", "measure"))
def _permuted_summaries(
    sets: tuple[Array, ...],
    sigma: Array | None,
    density: Array | None,
    order: Array,
    split: int,
    measure: SummaryMeasure,
) -> Array:
    def summary(k: int, x: Array) -> Any:
        return summarize(x, None, None if sigma is None else sigma[k], density, measure, STORED)

    row_summaries = [summary(k, sets[k]) for k in range(split)]

    def value_of(p: Array) -> Array:
        column_summaries = [summary(k, jnp.take(sets[k], p, 0)) for k in range(split, len(sets))]
        return jnp.stack(
            [jnp.stack([compare_summaries(a, b, None, measure) for b in column_summaries]) for a in row_summaries]
        )

    return lax.map(value_of, order)


@partial(jax.jit, static_argnames=("split", "measure"))
def _permuted_differences(matrices: Array, order: Array, split: int, measure: PairMeasure) -> Array:
    return lax.map(lambda p: _differences(matrices, split, p, measure), order)


@partial(jax.jit, static_argnames="measure")
def _summarize(x: Array, sigma: Array | None, density: Array | None, measure: SummaryMeasure) -> Any:
    return summarize(x, None, sigma, density, measure, STORED)


def _differences(matrices: Array, split: int, p: Array, measure: PairMeasure) -> Array:
    n = matrices.shape[-1]
    permuted = [g[p][:, p] for g in matrices[split:]]
    rows = jnp.stack([jnp.stack([jnp.sum((f - g) ** 2, -1) for g in permuted], 0) for f in matrices[:split]], 0)
    zeros = (jnp.zeros(split, rows.dtype), jnp.zeros(len(permuted), rows.dtype))
    inner = InnerProducts.of(jnp.sum(rows, -1), zeros, zeros, jnp.asarray(n, rows.dtype), jnp.sum(jnp.sqrt(rows), -1))
    return measure.finish(inner)
