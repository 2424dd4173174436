"""Statistics of comparisons: permutation tests, bootstrap intervals, paired differences and noise ceilings.

A pairwise measure is the normalized inner product of the centered pair matrices F, G of two representations, which are
stored (n x n). Permuting the samples of one representation permutes the rows and columns of its matrix; resampling
weights its pairs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array

from jaxalign import _arrays, _checks
from jaxalign._linalg import matmul
from jaxalign._memory import check_room
from jaxalign._positions import Positions, check_positions
from jaxalign._problem import check_rtol
from jaxalign._repr import short_repr, shown
from jaxalign.io import named_sets
from jaxalign.kernels import with_bandwidth
from jaxalign.measures._centering import CENTERINGS, Centering
from jaxalign.measures._evaluate import (
    Missing,
    PairMeasure,
    SummaryMeasure,
    check_function,
    check_representations,
    compare_summaries,
    depends_on_differences,
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
from jaxalign.measures._registry import specified
from jaxalign.plan import STORED

# Resamples of fewer samples are mostly copies of each other.
_MIN_RESAMPLED = 10
# Gathered entries, of all permutations, that are multiplied at a time.
_GATHERED = 2**24


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "p_value", "corrected", "null", "null_mean", "null_std", "score", "calibrated"),
    meta_fields=("measure", "direction", "rows", "columns"),
)
@dataclass(frozen=True, repr=False)
class PermutationTest:
    """The result of `permutation_test`; arrays of shape () or, for named representations, (rows, columns).

    Attributes:
        value: the value of the measure.
        p_value: (b + 1) / (m + 1), where b of m permutations have a value at least as extreme.
        corrected: the p-value adjusted for the number of comparisons in a grid, by the largest score of each
            permutation (Westfall & Young 1993): the probability, under the null, that any comparison is as extreme.
        null: values of the permutations, shape (m,) or (m, rows, columns).
        null_mean: mean of `null`.
        null_std: standard deviation of `null`.
        score: (value - null_mean) / null_std, with the sign such that larger means more similar.
        calibrated: value rescaled so that the mean of the null is 0 and the value of equal representations is 1; nan
            for measures without such a value.
        measure: the name of the measure.
        direction: "similarity" or "distance".
        rows: names of the representations in x; empty for a single pair.
        columns: names of the representations in y; empty for a single pair.
    """

    value: Array
    p_value: Array
    corrected: Array
    null: Array
    null_mean: Array
    null_std: Array
    score: Array
    calibrated: Array
    measure: str
    direction: Literal["similarity", "distance"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def __repr__(self) -> str:
        return short_repr(self, omit=("null_mean", "null_std"))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "low", "high", "resampled"),
    meta_fields=("level", "method"),
)
@dataclass(frozen=True, repr=False)
class Interval:
    """A value and its bootstrap interval.

    Attributes:
        value: the value for all samples.
        low: lower end of the interval.
        high: upper end of the interval.
        resampled: values of the resamples, shape (resamples,).
        level: nominal coverage, the share of such intervals that contain the value of the population.
        method: "bca" or "percentile".
    """

    value: Array
    low: Array
    high: Array
    resampled: Array
    level: float
    method: str

    def __repr__(self) -> str:
        return short_repr(self)


@partial(jax.tree_util.register_dataclass, data_fields=("lower", "upper", "each"), meta_fields=())
@dataclass(frozen=True, repr=False)
class NoiseCeiling:
    """Bounds on the value of the best possible model, given how much subjects differ; made by `noise_ceiling`.

    Attributes:
        lower: mean value of each subject compared with the mean of the other subjects.
        upper: mean value of each subject compared with the mean of all subjects.
        each: shape (subjects,), each subject compared with the mean of the other subjects.
    """

    lower: Array
    upper: Array
    each: Array

    def __repr__(self) -> str:
        return short_repr(self)


def permutation_test(
    x: Any,
    y: Any,
    measure: str = "cka",
    *,
    key: Array,
    permutations: int = 1000,
    positions: Positions | None = None,
    mask: Any = None,
    missing: Missing = "raise",
    **options: Any,
) -> PermutationTest:
    """Test whether two representations are more similar than chance, by permuting the samples of one.

    For pairwise measures, one matrix product computes a table of k permutations of x by k permutations of y, both with
    the identity, k^2 > m: thousands of permutations cost little more than a few dozen. The null is m random entries of
    the table, without the observed one. Any two entries belong to independent, uniform permutations, so the Monte Carlo
    error is that of m independent permutations. Under the null the observed value is as likely as any other entry, so
    the p-value is exact. Other measures are recomputed for each of m permutations. Bandwidths do not depend on the
    order of samples.

    Args:
        x: features, shape (n, d1), or a mapping of names to features.
        y: features of the same samples, shape (n, d2), or a mapping.
        measure: a name in `jaxalign.measures.REGISTRY`.
        key: a `jax.random.key` for the permutations.
        permutations: m, the number of permutations.
        positions: see `jaxalign.compare`. Positions of one image are dependent, so p-values with "samples" are too
            small: prefer "channels" or "mean".
        mask: shape (n,), True marks valid samples; other samples are left out.
        missing: see `jaxalign.compare`.
        options: options of the measure.

    Returns:
        A `PermutationTest`. p-values are one-sided, small if the representations are more similar than chance.

    Raises:
        TypeError, ValueError: see `jaxalign.compare_grid`; fewer than 1 permutation.

    Examples:
        >>> import jax, jaxalign
        >>> x, noise = jax.random.normal(jax.random.key(0), (2, 50, 8))
        >>> test = jaxalign.permutation_test(x, x + noise, key=jax.random.key(1), permutations=999)
        >>> round(float(test.p_value), 4)
        0.001
    """
    entry, filled, specification = specified(measure, options)
    _checks.random_key(key)
    permutations = _checks.whole("permutations", permutations)
    rows, columns = _name("x", x), _name("y", y)
    arrays, split = [*rows.values(), *columns.values()], len(rows)
    names = [f"x[{n!r}]" if n else "x" for n in rows] + [f"y[{n!r}]" if n else "y" for n in columns]
    sets = _valid_samples(names, arrays, positions, mask, missing, specification)
    direction, best = entry.direction_with(filled), entry.best_with(filled)
    if _is_product(specification):
        assert isinstance(specification, PairMeasure)
        matrices, units = pair_matrices(sets, filled, specification, names)
        side = math.isqrt(permutations) + 1  # side^2 > permutations
        table_key, choice_key = jax.random.split(key)
        table = _permuted_products(matrices[:split], matrices[split:], table_key, side)
        value, null = _observed_and_null(table, matrices, units, choice_key, specification, split, permutations)
    else:
        value, null = _recomputed(sets, split, names, specification, filled, key, permutations)
    single = "" in rows and "" in columns
    statistics = _statistics(value, null, _finite_pairs(sets, split), direction == "similarity", best)
    if single:
        statistics = {name: a[..., 0, 0] for name, a in statistics.items()}
    return PermutationTest(
        **statistics,
        measure=entry.name,
        direction=direction,
        rows=() if single else tuple(rows),
        columns=() if single else tuple(columns),
    )


def bootstrap(
    x: Any,
    y: Any,
    measure: str = "cka",
    *,
    key: Array,
    resamples: int = 1000,
    level: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    positions: Positions | None = None,
    mask: Any = None,
    missing: Missing = "raise",
    **options: Any,
) -> Interval:
    """A confidence interval of a measure, from resampling the samples with replacement.

    Two copies of one sample in a resample are not a pair: their distance of 0 is no evidence, and would raise the
    similarity. So pairs (for debiased estimators also triples and quadruples) of different samples are weighted by the
    number of times each was drawn. That is possible for cka, hsic and distance_correlation (debiased), and for rsa
    (pearson, cosine). Bandwidths are those of all samples. For unrelated representations debiased estimates vary much
    less than their resamples, so the interval is wider than necessary: use `permutation_test` to test for any
    similarity.

    Args:
        x: features, shape (n, d1).
        y: features of the same samples, shape (n, d2).
        measure: a name in `jaxalign.measures.REGISTRY`.
        key: a `jax.random.key` for the resamples.
        resamples: the number of resamples.
        level: nominal coverage of the interval, 0 < level < 1.
        method: "bca", bias-corrected and accelerated (Efron 1987), or "percentile".
        positions: see `permutation_test`.
        mask: see `permutation_test`.
        missing: see `jaxalign.compare`.
        options: options of the measure.

    Returns:
        An `Interval`.

    Raises:
        TypeError, ValueError: see `jaxalign.compare`; a measure or estimator that duplicates would bias; fewer than 10
            samples.

    Examples:
        >>> import jax, jaxalign
        >>> x, noise = jax.random.normal(jax.random.key(0), (2, 100, 8))
        >>> interval = jaxalign.bootstrap(x, x + noise, kernel="linear", key=jax.random.key(1))
        >>> bool(interval.low < interval.value < interval.high)
        True
    """
    resampled, value, left_out = _resampled(
        (x, y), measure, key, resamples, level, method, positions, mask, missing, options
    )
    return _interval(resampled, value, left_out, level, method)


def paired_difference(
    first: tuple[Any, Any],
    second: tuple[Any, Any],
    measure: str = "cka",
    *,
    key: Array,
    resamples: int = 1000,
    level: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    positions: Positions | None = None,
    mask: Any = None,
    missing: Missing = "raise",
    **options: Any,
) -> Interval:
    """A confidence interval of the difference of two values of a measure, first - second, on the same samples.

    Both values are computed on the same resamples, so shared variation cancels.

    Args:
        first: a pair (x, y) of features, each of shape (n, d).
        second: another pair of features of the same samples; one of them may be in both pairs.
        measure: see `bootstrap`.
        key: see `bootstrap`.
        resamples: see `bootstrap`.
        level: see `bootstrap`.
        method: see `bootstrap`.
        positions: see `permutation_test`.
        mask: see `permutation_test`.
        missing: see `jaxalign.compare`.
        options: options of the measure.

    Returns:
        An `Interval` of the difference. If it does not contain 0, the values differ at that level.

    Raises:
        TypeError, ValueError: see `bootstrap`.

    Examples:
        >>> import jax, jaxalign
        >>> x, a, b = jax.random.normal(jax.random.key(0), (3, 200, 8))
        >>> interval = jaxalign.paired_difference((x, x + 0.3 * a), (x, x + b), kernel="linear", key=jax.random.key(1))
        >>> bool(interval.low > 0)
        True
    """
    for name, pair in (("first", first), ("second", second)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{name} must be a pair (x, y) of features; got {type(pair).__name__}.")
    sets = (*first, *second)
    resampled, value, left_out = _resampled(
        sets, measure, key, resamples, level, method, positions, mask, missing, options
    )
    return _interval(resampled, value, left_out, level, method)


def noise_ceiling(
    subjects: Sequence[Any],
    measure: str = "rsa",
    *,
    positions: Positions | None = None,
    mask: Any = None,
    missing: Missing = "raise",
    **options: Any,
) -> NoiseCeiling:
    """The best value that a model could reach, given how much subjects (or seeds) differ (Nili et al. 2014).

    Each subject's centered pair matrix is scaled to unit norm. Their mean is the matrix most similar to all of them.

    Args:
        subjects: the features of at least two subjects, shape (n, d), of the same samples.
        measure: a pairwise measure: cka, rsa (not spearman and kendall), distance_correlation.
        positions: see `permutation_test`.
        mask: see `permutation_test`.
        missing: see `jaxalign.compare`.
        options: options of the measure.

    Returns:
        A `NoiseCeiling`, the lower and upper bound of the ceiling.

    Raises:
        TypeError, ValueError: fewer than two subjects; a measure that is not an inner product; see `jaxalign.compare`.

    Examples:
        >>> import jax, jaxalign
        >>> x, *noise = jax.random.normal(jax.random.key(0), (5, 60, 8))
        >>> ceiling = jaxalign.noise_ceiling([x + 0.5 * n for n in noise])
        >>> bool(0.5 < ceiling.lower < ceiling.upper < 1)
        True
    """
    entry, filled, specification = specified(measure, options)
    if isinstance(subjects, Mapping):
        raise TypeError("subjects must be a list of feature arrays, without names; got a mapping: pass its values().")
    if len(subjects) < 2:
        raise ValueError(f"subjects must be the features of at least two subjects; got {len(subjects)}.")
    if not _is_product(specification) or entry.name == "hsic" or entry.direction_with(filled) == "distance":
        raise ValueError(
            f"measure {entry.name!r} with these options is not a normalized inner product of pair matrices: use "
            "cka, rsa with pearson, cosine or a whitened comparison, or distance_correlation."
        )
    assert isinstance(specification, PairMeasure)
    names = [f"subjects[{k}]" for k in range(len(subjects))]
    sets = _valid_samples(names, list(subjects), positions, mask, missing, specification)
    matrices, _ = pair_matrices(sets, filled, specification, names)
    gram = jnp.einsum("aij,bij->ab", matrices, matrices, precision=lax.Precision.HIGHEST)
    sizes = jnp.sqrt(jnp.diagonal(gram))
    if _arrays.is_concrete(sizes):  # under a trace the result is nan, 0 / 0
        constant = np.flatnonzero(_arrays.on_host(sizes) == 0)
        if constant.size:
            raise ValueError(f"{names[constant[0]]} does not vary: leave it out.")
    cosines = gram / sizes[:, None] / sizes[None, :]
    total = jnp.sum(cosines)
    row = jnp.sum(cosines, 1)
    upper = row / jnp.sqrt(total)
    norms = total - 2 * row + 1  # squared norm of the sum of the other matrices
    each = (row - 1) / jnp.sqrt(jnp.maximum(norms, float(jnp.finfo(norms.dtype).tiny)))
    finish = _root_of_squares(specification)
    return NoiseCeiling(jnp.mean(finish(each)), jnp.mean(finish(upper)), finish(each))


# --- checks of arguments --------------------------------------------------------------------------------------------


def _name(argument: str, features: Any) -> dict[str, Any]:
    named = isinstance(features, (Mapping, str, os.PathLike))
    return named_sets(argument, features) if named else {"": features}


def _valid_samples(
    names: list[str],
    arrays: list[Any],
    positions: Positions | None,
    mask: Any,
    missing: Missing,
    measure: PairMeasure | SummaryMeasure,
) -> tuple[Array, ...]:
    """Checked features (n, d), without masked and omitted samples."""
    for name, value in zip(names, arrays, strict=True):
        if isinstance(value, Mapping):
            raise TypeError(
                f"{name} must be one array (n, d); got a mapping. Only permutation_test accepts named features."
            )
    rows = check_positions(dict(zip(names, arrays, strict=True)), positions)
    center = depends_on_differences(measure)
    sets, mask = check_representations(
        list(rows.items()), mask, missing, measure.min_samples, measure.label, center=center
    )
    if mask is None:
        return sets
    kept = np.flatnonzero(_arrays.on_host(mask))
    return tuple(features[kept] for features in sets)


@partial(jax.jit, static_argnames="split")
def _finite_pairs(sets: tuple[Array, ...], split: int) -> Array:
    """Whether both representations of a pair are finite, (L, M)."""
    finite = jnp.stack([jnp.isfinite(x).all() for x in sets])
    return finite[:split, None] & finite[None, split:]


def _is_product(measure: PairMeasure | SummaryMeasure) -> bool:
    return isinstance(measure, PairMeasure) and measure.centering is not None


# --- pair matrices --------------------------------------------------------------------------------------------------


def pair_matrices(
    sets: tuple[Array, ...], options: dict[str, Any], measure: PairMeasure, names: Sequence[str]
) -> tuple[Array, Array]:
    """Centered pair matrices (representations, n, n) and their units: the measure is their inner product."""
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


def _values(table: Array, self_products: Array, units: Array, measure: PairMeasure, split: int, n: int) -> Array:
    """Values (m, L, M) from inner products (m, L, M) and self products (L + M,)."""
    shape, number = table.shape[:-2], self_products.shape[0]
    units = jnp.broadcast_to(units, (*shape, number))
    self_products = jnp.broadcast_to(self_products, (*shape, number))
    by_side, units_by_side = ((a[..., :split], a[..., split:]) for a in (self_products, units))
    inner = InnerProducts.of(table, by_side, units_by_side, jnp.full(shape, n, table.dtype))
    return measure.finish(inner)


@partial(jax.jit, static_argnames=("measure", "split", "permutations"))
def _observed_and_null(
    table: Array, matrices: Array, units: Array, key: Array, measure: PairMeasure, split: int, permutations: int
) -> tuple[Array, Array]:
    """The observed value (L, M) and the null (permutations, L, M), from inner products (side^2, L, M).

    Rows and columns of the table are exchangeable, so a random choice of entries is, but not a fixed one.
    """
    entries = 1 + jax.random.permutation(key, table.shape[0] - 1)[:permutations]
    chosen = jnp.concatenate((table[:1], jnp.take(table, entries, 0)))
    values = _values(chosen, _norms(matrices), units, measure, split, matrices.shape[-1])
    return values[0], values[1:]


# --- permutations -----------------------------------------------------------------------------------------------------


def _permutations(key: Array, number: int, n: int) -> Array:
    """The identity and number - 1 random permutations, (number, n)."""
    identity = jnp.arange(n, dtype=jnp.int32)
    shuffled = jax.vmap(lambda k: jax.random.permutation(k, identity))(jax.random.split(key, max(number - 1, 1)))
    return jnp.concatenate((identity[None], shuffled))[:number]


@partial(jax.jit, static_argnames="side")
def _permuted_products(x: Array, y: Array, key: Array, side: int) -> Array:
    """<F of x permuted by s_l, G of y permuted by p_k> for all l, k < side, (side^2, L, M); the first is observed.

    Each entry belongs to the permutation p_k s_l^-1 of y relative to x. Rows are summed in pieces of about _GATHERED
    gathered entries.
    """
    n = x.shape[-1]
    first, second = jax.random.split(key)
    permutations_x, permutations_y = _permutations(first, side, n), _permutations(second, side, n)
    sets = x.shape[0] + y.shape[0]
    rows = max(1, min(n, _GATHERED // (side * sets * n)))
    pieces = -(-n // rows)

    def gather(matrices: Array, permuted: Array, index: Array, valid: Array) -> Array:
        """(L side, rows n): pieces of rows of every permuted matrix."""
        row = jnp.take(permuted, index, 1, mode="clip")  # (side, rows)
        place = row[:, :, None] * n + permuted[:, None, :]
        flat = matrices.reshape(matrices.shape[0], n * n)
        entries = jnp.take(flat, place, 1, mode="clip") * valid.reshape(1, 1, rows, 1)
        return entries.reshape(matrices.shape[0] * side, -1)

    def add(total: Array, piece: Array) -> tuple[Array, None]:
        index = piece * rows + jnp.arange(rows, dtype=jnp.int32)
        valid = (index < n).astype(x.dtype)
        a, b = gather(x, permutations_x, index, valid), gather(y, permutations_y, index, jnp.ones_like(valid))
        return total + matmul(a, b.T), None

    start = jnp.zeros((x.shape[0] * side, y.shape[0] * side), x.dtype)
    total, _ = lax.scan(add, start, jnp.arange(pieces, dtype=jnp.int32))
    table = total.reshape(x.shape[0], side, y.shape[0], side)
    return jnp.transpose(table, (1, 3, 0, 2)).reshape(side * side, x.shape[0], y.shape[0])


def _recomputed(
    sets: tuple[Array, ...],
    split: int,
    names: Sequence[str],
    measure: PairMeasure | SummaryMeasure,
    options: dict[str, Any],
    key: Array,
    number: int,
) -> tuple[Array, Array]:
    """The observed value (L, M) and the null (m, L, M), with the measure recomputed for each permutation."""
    order = _permutations(key, number + 1, sets[0].shape[0])
    if isinstance(measure, PairMeasure):  # affinity_distance
        plain = replace(measure, centering=CENTERINGS["none"])
        values = _recomputed_differences(pair_matrices(sets, options, plain, names)[0], order, split, measure)
    else:
        sigma, target = check_function(names, sets, None, with_bandwidth(options), measure.function, STORED)
        for k in range(len(sets)):
            summary = _summarize(sets[k], None if sigma is None else sigma[k], target, measure)
            explain_status(names[k], summary.status)
        values = _recomputed_summaries(sets, sigma, target, order, split, measure)
    return values[0], values[1:]


@partial(jax.jit, static_argnames=("split", "measure"))
def _recomputed_summaries(
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
def _recomputed_differences(matrices: Array, order: Array, split: int, measure: PairMeasure) -> Array:
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


@partial(jax.jit, static_argnames=("larger", "best"))
def _statistics(value: Array, null: Array, usable: Array, larger: bool, best: float) -> dict[str, Array]:
    """The fields of `PermutationTest` but the names; nan where a pair is not `usable`."""
    value, null = (jnp.where(usable, a, jnp.nan) for a in (value, null))
    m = null.shape[0]
    sign = 1 if larger else -1
    value = value[None]
    unusable = jnp.isnan(value)
    mean, std = jnp.mean(null, 0, keepdims=True), jnp.std(null, 0, keepdims=True)
    positive = jnp.where(std > 0, std, 1)
    score = jnp.where(std > 0, sign * (value - mean) / positive, 0)
    # The largest scores of a grid use the spread of observed and permuted values together. If the observed value did
    # not count in the spread, its score could exceed that of any permuted value.
    every = jnp.concatenate((value, null))
    spread = jnp.std(every, 0, keepdims=True)
    wide = jnp.where(spread > 0, spread, 1)
    scores = jnp.where(spread > 0, sign * (every - jnp.mean(every, 0, keepdims=True)) / wide, 0)
    scores = jnp.where(unusable, -jnp.inf, scores)
    # Permutations with the observed value up to rounding count as at least as extreme.
    close = (
        100 * float(jnp.finfo(null.dtype).eps) * jnp.maximum(jnp.abs(value), jnp.max(jnp.abs(null), 0, keepdims=True))
    )
    beyond = jnp.sum(sign * (null - value) >= -close, 0, dtype=null.dtype)
    largest = jnp.max(scores[1:], (-2, -1), keepdims=True)
    any_beyond = jnp.sum(largest >= scores[:1] - close / wide, 0, dtype=null.dtype)
    beyond, any_beyond = (jnp.where(unusable[0], jnp.nan, count) for count in (beyond, any_beyond))
    reach = best - mean
    has_scale = (reach != 0) & math.isfinite(best)
    calibrated = jnp.where(has_scale, (value - mean) / jnp.where(has_scale, reach, 1), jnp.nan)
    return {
        "value": value[0],
        "p_value": (beyond + 1) / (m + 1),
        "corrected": (any_beyond + 1) / (m + 1),
        "null": null,
        "null_mean": mean[0],
        "null_std": std[0],
        "score": jnp.where(unusable, jnp.nan, score)[0],
        "calibrated": calibrated[0],
    }


# --- resampling -------------------------------------------------------------------------------------------------------


def _resampled(
    sets: tuple[Any, ...],
    measure: str,
    key: Array,
    resamples: Any,
    level: Any,
    method: Any,
    positions: Positions | None,
    mask: Any,
    missing: Missing,
    options: dict[str, Any],
) -> tuple[Array, Array, Array]:
    """Values of the resamples (b,), of all samples (), and without each sample (n,), of a pair or a difference."""
    entry, filled, specification = specified(measure, options)
    _checks.random_key(key)
    resamples = _checks.whole("resamples", resamples, 2)
    _checks.choice("method", method, ("bca", "percentile"))
    if not isinstance(level, (float, np.floating)) or not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1; got {shown(level)}.")
    names = ["x", "y"] if len(sets) == 2 else ["first[0]", "first[1]", "second[0]", "second[1]"]
    ready = _valid_samples(names, list(sets), positions, mask, missing, specification)
    n = ready[0].shape[0]
    if n < _MIN_RESAMPLED:
        raise ValueError(
            f"the bootstrap needs at least {_MIN_RESAMPLED} samples; got {n}. Resamples of fewer samples are mostly "
            "copies of each other."
        )
    drawn = jax.random.randint(key, (resamples, n), 0, n)
    counts = jax.vmap(lambda row: jnp.bincount(row, length=n))(drawn)
    dtype = ready[0].dtype
    weights = jnp.concatenate((jnp.ones((1, n), dtype), 1 - jnp.eye(n, dtype=dtype), counts.astype(dtype)))
    centering = specification.centering if isinstance(specification, PairMeasure) else None
    if isinstance(specification, PairMeasure) and centering is not None and centering.has_bootstrap:
        matrices, units = pair_matrices(ready, filled, specification, names)
        parts = [
            jnp.where(
                jnp.isfinite(ready[k]).all() & jnp.isfinite(ready[k + 1]).all(),
                _weighted_values(*matrices[k : k + 2], units[k : k + 2], weights, specification),
                jnp.nan,
            )
            for k in range(0, len(ready), 2)
        ]
    else:
        raise ValueError(
            f"measure {entry.name!r} with these options has no bootstrap: copies of a sample would count as evidence, "
            'or cause overfitting. Use cka, hsic or distance_correlation with estimator="debiased", or rsa with '
            'comparison="pearson" or "cosine"; or use permutation_test.'
        )
    values = parts[0] if len(parts) == 1 else parts[0] - parts[1]
    return values[n + 1 :], values[0], values[1 : n + 1]


@partial(jax.jit, static_argnames="measure")
def _weighted_values(f: Array, g: Array, units: Array, weights: Array, measure: PairMeasure) -> Array:
    """The measure with samples weighted by w, (b, n): sums are over different samples only."""
    assert measure.centering is not None
    bootstrap = partial(measure.centering.bootstrap, weights=weights)
    cross, self_f, self_g = bootstrap(f, g), bootstrap(f, f), bootstrap(g, g)
    self_products = (self_f[:, None], self_g[:, None])
    units_fg = (jnp.full_like(self_products[0], units[0]), jnp.full_like(self_products[1], units[1]))
    # `finish` of hsic divides by n (n - 3), which is a factor of the weighted product.
    inner = InnerProducts.of(
        cross[:, None, None], self_products, units_fg, jnp.full(cross.shape, f.shape[0], cross.dtype)
    )
    return measure.finish(inner)[:, 0, 0]


def _interval(resampled: Array, value: Array, left_out: Array, level: float, method: Any) -> Interval:
    ends = jnp.asarray([(1 - level) / 2, (1 + level) / 2], resampled.dtype)
    if method == "bca":
        b = resampled.shape[0]
        below = jnp.mean((resampled < value).astype(value.dtype) + 0.5 * (resampled == value).astype(value.dtype))
        bias = ndtri(jnp.clip(below, 0.5 / b, 1 - 0.5 / b))
        influence = jnp.mean(left_out) - left_out
        spread = jnp.sum(influence**2)
        acceleration = jnp.where(spread > 0, jnp.sum(influence**3) / (6 * jnp.where(spread > 0, spread, 1) ** 1.5), 0)
        z = bias + ndtri(ends)
        ends = ndtr(bias + z / (1 - acceleration * z))
    low, high = jnp.quantile(resampled, ends)
    return Interval(value, low, high, resampled, float(level), str(method))


def _root_of_squares(measure: PairMeasure) -> Any:
    """The function from a normalized inner product to the value: the root for distance correlation."""

    def finish(ratio: Array) -> Array:
        one = jnp.ones((*ratio.shape, 1), ratio.dtype)
        inner = InnerProducts.of(ratio[..., None, None], (one, one), (one, one), one[..., 0])
        return measure.finish(inner)[..., 0, 0]

    return finish
