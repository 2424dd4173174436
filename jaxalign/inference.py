"""Statistics of comparisons: permutation tests, calibration, bootstrap intervals, differences and noise ceilings.

Dependent samples, such as the patches of one image, are permuted and resampled as whole groups. Pair matrices are
stored, (n, n).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxalign import _arrays, _checks
from jaxalign._aggregates import AGGREGATES, Aggregate, aggregated
from jaxalign._groups import Groups, check_groups
from jaxalign._null import is_product, pair_matrices, permuted_values
from jaxalign._permutations import GridMoves, GroupExchange, Permutations
from jaxalign._positions import Positions, check_positions
from jaxalign._repr import describe, short_repr
from jaxalign._resampling import (
    Resampled,
    draw_weights,
    interval_ends,
    resampled_products,
    resampled_values,
    without_noise_of_pairs,
)
from jaxalign.io import named_sets
from jaxalign.measures._evaluate import (
    Missing,
    PairMeasure,
    SummaryMeasure,
    check_representations,
    depends_on_differences,
)
from jaxalign.measures._pair_sums import InnerProducts
from jaxalign.measures._registry import specified

Null = Literal["groups", "grid"]

# Resamples of fewer groups are mostly copies of each other.
_MIN_RESAMPLED = 10
# What differs from the best value by less than this is rounding of it.
_ROUNDING_OF_BEST = 1e-5
# The level of the threshold in a `PermutationTest`.
_ALPHA = 0.05


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "value", "p_value", "corrected", "null", "null_mean", "null_std", "score", "threshold", "calibrated",
    ),
    meta_fields=("measure", "direction", "best", "rows", "columns"),
)  # fmt: skip
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
        threshold: the value that 5% of permutations exceed, see `calibrate`; nan if there are fewer than 19.
        calibrated: value rescaled so that `threshold` and all below it is 0 and the value of equal representations is
            1, see `calibrate`; nan without a threshold, and for measures without such a value.
        measure: the name of the measure.
        direction: "similarity" or "distance".
        best: the value of equal representations; infinite if it depends on the features.
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
    threshold: Array
    calibrated: Array
    measure: str
    direction: Literal["similarity", "distance"]
    best: float
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def __repr__(self) -> str:
        return short_repr(self, omit=("null_mean", "null_std", "threshold", "best"))

    @property
    def smallest_p_value(self) -> float:
        """The smallest p-value that this test can give, 1 / (m + 1): with few groups, there are few permutations."""
        return 1 / (self.null.shape[0] + 1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "calibrated", "threshold", "p_value"),
    meta_fields=("alpha", "aggregate"),
)
@dataclass(frozen=True, repr=False)
class Calibration:
    """The result of `calibrate`; arrays of shape () or, for a grid without aggregate, (rows, columns).

    Attributes:
        value: the value of the measure, or the aggregate.
        calibrated: (value - threshold) / (best - threshold), or 0 if that is negative.
        threshold: the 1 - alpha quantile of the null.
        p_value: the p-value of the value.
        alpha: the level.
        aggregate: how the cells of a grid were aggregated, or None.
    """

    value: Array
    calibrated: Array
    threshold: Array
    p_value: Array
    alpha: float
    aggregate: Aggregate | None

    def __repr__(self) -> str:
        return short_repr(self)


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
        resampled: values of the resamples, shape (resamples,), corrected for the noise of pairs.
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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("lower", "upper", "each", "lower_interval", "upper_interval"),
    meta_fields=(),
)
@dataclass(frozen=True, repr=False)
class NoiseCeiling:
    """Bounds on the value of the best possible model, given how much subjects differ; made by `noise_ceiling`.

    Attributes:
        lower: mean value of each subject compared with the mean of the other subjects.
        upper: mean value of each subject compared with the mean of all subjects.
        each: shape (subjects,), each subject compared with the mean of the other subjects.
        lower_interval: bootstrap interval of `lower`, over samples or groups; None without a key.
        upper_interval: that of `upper`.
    """

    lower: Array
    upper: Array
    each: Array
    lower_interval: Interval | None = None
    upper_interval: Interval | None = None

    def __repr__(self) -> str:
        intervals = {"lower_interval": self.lower_interval, "upper_interval": self.upper_interval}
        return short_repr(
            self, **{k: f"{describe(v.low)} to {describe(v.high)}" for k, v in intervals.items() if v is not None}
        )


def permutation_test(
    x: Any,
    y: Any,
    measure: str = "cka",
    *,
    key: Array,
    permutations: int = 1000,
    groups: Any = None,
    null: Null = "groups",
    positions: Positions | None = None,
    mask: Any = None,
    missing: Missing = "raise",
    **options: Any,
) -> PermutationTest:
    """Test whether two representations are more similar than chance, by permuting the samples of one.

    Samples that depend on each other, such as the patches of an image, are exchanged as whole groups: permuting them
    one by one would call unrelated representations similar. For pairwise measures, all shifts of m groups of one size
    are computed together by FFT, so ten thousand permutations of a grid cost about as much as the grid. Other measures
    are recomputed for each permutation. Under the null the observed value is as likely as any other entry, so the
    p-value is exact. Bandwidths do not depend on the order of samples.

    Args:
        x: features, shape (n, d1), or a mapping of names to features.
        y: features of the same samples, shape (n, d2), or a mapping.
        measure: a name in `jaxalign.measures.REGISTRY`.
        key: a `jax.random.key` for the permutations.
        permutations: m, the number of permutations. If there are fewer, all are used, once.
        groups: a label for each sample, (n,): samples of one label are dependent, and stay together. Groups are
            exchanged with groups of equal size, the first sample of one with the first of the other and so on, and if
            samples are left out, only with groups where the same ones are. Others stay in place. With
            positions="samples", (n,) or one label per image or text; None makes these the groups. Otherwise None makes
            all samples independent.
        null: "groups" exchanges groups. "grid", for maps with positions="samples", keeps images in place and flips and,
            if square, rotates the grid of each image: it asks whether representations agree about places within images
            beyond both being smooth, and is exact if maps have no preferred directions.
        positions: see `jaxalign.compare`.
        mask: shape (n,), True marks valid samples; other samples are left out.
        missing: see `jaxalign.compare`.
        options: options of the measure.

    Returns:
        A `PermutationTest`. p-values are one-sided, small if the representations are more similar than chance.

    Raises:
        TypeError, ValueError: see `jaxalign.compare_grid`; fewer than 1 permutation; groups that are not labels, or of
            which most cannot be exchanged; a measure that is the same for all permutations, such as cca with more
            channels than samples; null="grid" without maps of one size, with groups, or with positions left
            out.

    Examples:
        >>> import jax, jaxalign
        >>> x, noise = jax.random.normal(jax.random.key(0), (2, 50, 8))
        >>> test = jaxalign.permutation_test(x, x + noise, key=jax.random.key(1), permutations=999)
        >>> round(float(test.p_value), 4)
        0.001
        >>> video = jax.numpy.arange(50) // 5  # ten videos of five frames
        >>> test = jaxalign.permutation_test(x, x + noise, groups=video, key=jax.random.key(1), permutations=999)
        >>> round(float(test.p_value), 4)
        0.001
    """
    entry, filled, specification = specified(measure, options)
    _checks.random_key(key)
    permutations = _checks.whole("permutations", permutations)
    _checks.choice("null", null, ("groups", "grid"))
    rows, columns = _name("x", x), _name("y", y)
    named, split = _name_pair(rows, columns)
    if null == "grid" and groups is not None:
        raise ValueError('groups has no effect with null="grid", which moves each image for itself. Leave it out.')
    samples = _valid_samples(named, groups, positions, mask, missing, specification)
    moves = _grid_moves(named, positions, samples) if null == "grid" else _exchange(samples)
    value, values = permuted_values(samples.sets, split, list(named), specification, filled, moves, key, permutations)
    single = "" in rows and "" in columns
    direction, best = entry.direction_with(filled), float(entry.best_with(filled))
    _check_varies(values, best, entry.name, samples.sets)
    statistics = _statistics(value, values, _finite_pairs(samples.sets, split), direction == "similarity", best)
    if single:
        statistics = {name: a[..., 0, 0] for name, a in statistics.items()}
    return PermutationTest(
        **statistics,
        measure=entry.name,
        direction=direction,
        best=best,
        rows=() if single else tuple(rows),
        columns=() if single else tuple(columns),
    )


def calibrate(test: PermutationTest, *, alpha: float = 0.05, aggregate: Aggregate | None = None) -> Calibration:
    """Rescale values so that 0 is what chance reaches and 1 the value of equal representations (Gröger et al. 2026).

    (value - threshold) / (best - threshold), or 0 if that is negative, where the threshold is the 1 - alpha quantile
    of the null with the observed value, the ceil((1 - alpha) (m + 1))-th smallest of m + 1 (of distances, largest).
    Values of measures, sample sizes and widths whose chance levels differ become comparable. An aggregate of a grid has
    its own null, from the same permutations for all cells, so searching many layers for the best does not raise it.

    Args:
        test: the result of `permutation_test`, of two representations or of a grid.
        alpha: the probability, under the null, of a calibrated value above 0.
        aggregate: of the cells of a grid: "max", the most similar; "mean"; "mean_of_best", the mean over rows of the
            most similar column; or "symmetric_best", the mean of that and of the same over columns, which does not
            depend on which model is x. None calibrates every cell.

    Returns:
        A `Calibration`; calibrated is nan for measures without a largest value, such as hsic.

    Raises:
        TypeError, ValueError: test is not a `PermutationTest`; alpha does not lie between 0 and 1, or is too small for
            the number of permutations; an aggregate of a single pair.

    Examples:
        >>> import jax, jaxalign
        >>> x, noise = jax.random.normal(jax.random.key(0), (2, 50, 8))
        >>> layers = {"first": x + noise, "second": x + 2 * noise}
        >>> test = jaxalign.permutation_test({"x": x}, layers, key=jax.random.key(1))
        >>> bool(0 < jaxalign.calibrate(test, aggregate="max").calibrated < test.value.max())
        True
    """
    if not isinstance(test, PermutationTest):
        raise TypeError(
            f"test must be the result of permutation_test; got {type(test).__name__}. Use "
            "calibrate(permutation_test(x, y, key=key))."
        )
    _checks.probability("alpha", alpha)
    needed = math.ceil(1 / alpha - 1e-9) - 1
    if test.null.shape[0] < needed:
        raise ValueError(
            f"alpha={alpha:g} needs at least {needed} permutations; the test has {test.null.shape[0]}. Use more "
            "permutations or groups, or a larger alpha."
        )
    sign = 1 if test.direction == "similarity" else -1
    value, null, p_value = test.value, test.null, test.p_value
    if aggregate is not None:
        _checks.choice("aggregate", aggregate, AGGREGATES)
        if value.ndim != 2:
            raise ValueError("aggregate has no effect on a single pair. Leave it out, or test named representations.")
        value, null = (aggregated(a, aggregate, larger_is_better=sign > 0) for a in (value, null))
        p_value = (_count_beyond(value, null, sign) + 1) / (null.shape[0] + 1)
    calibrated, threshold = _calibrate(value, null, sign, test.best, float(alpha))
    return Calibration(value, calibrated, threshold, p_value, float(alpha), aggregate)


def bootstrap(
    x: Any,
    y: Any,
    measure: str = "cka",
    *,
    key: Array,
    resamples: int = 1000,
    level: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    aggregate: Aggregate | None = None,
    groups: Any = None,
    positions: Positions | None = None,
    mask: Any = None,
    missing: Missing = "raise",
    **options: Any,
) -> Interval:
    """A confidence interval of a measure, from resampling samples, or groups of samples, with replacement.

    Two copies of one sample in a resample are not a pair: their distance of 0 is no evidence, and would raise the
    similarity. So pairs of different samples are weighted by the number of times each was drawn; pairs within a group
    count once for each copy of it. That is possible for cka, hsic and distance_correlation (debiased), and for rsa
    (pearson, cosine). Bandwidths and means are those of all samples. Resamples of debiased estimates vary up to three
    times as much as new samples would, the more so the more channels there are; this is corrected (Efron & Stein 1981).
    To test for any similarity, use `permutation_test`.

    Args:
        x: features, shape (n, d1); with `aggregate`, a mapping of names to the features of layers.
        y: features of the same samples, shape (n, d2), or a mapping.
        measure: a name in `jaxalign.measures.REGISTRY`.
        key: a `jax.random.key` for the resamples: of equally many samples or groups, equal keys draw the same.
        resamples: the number of resamples. Below about 20 / (1 - level), the ends are the smallest and largest of them.
        level: nominal coverage of the interval, 0 < level < 1.
        method: "bca", bias-corrected and accelerated (Efron 1987), or "percentile". Both are expanded for few samples
            (Hesterberg 2015), the more so the fewer of them determine the value.
        aggregate: one number from the grid of all layers of x and y, see `calibrate`. Best matches are found anew in
            every resample.
        groups: a label for each sample, (n,): whole groups are resampled. None: see `permutation_test`. Pairs within
            groups count in the value, so the interval is about its expectation for as many groups.
        positions: see `jaxalign.compare`.
        mask: see `permutation_test`.
        missing: see `jaxalign.compare`.
        options: options of the measure.

    Returns:
        An `Interval`.

    Raises:
        TypeError, ValueError: see `jaxalign.compare`; a measure or estimator that duplicates would bias; fewer than 10
            samples or groups; mappings without `aggregate`, or an aggregate of a single pair.

    Examples:
        >>> import jax, jaxalign
        >>> x, noise = jax.random.normal(jax.random.key(0), (2, 100, 8))
        >>> interval = jaxalign.bootstrap(x, x + noise, kernel="linear", key=jax.random.key(1))
        >>> bool(interval.low < interval.value < interval.high)
        True
    """
    entry, filled, specification = specified(measure, options)
    named, split = _name_pair(x, y)
    has_layers = list(named) != ["x", "y"]
    if has_layers and aggregate is None:
        side = "x" if "x" not in named else "y"
        raise TypeError(
            f"{side} must be one array (n, d); got named layers. For an interval of all of them, pass "
            'aggregate="symmetric_best".'
        )
    if aggregate is not None:
        _checks.choice("aggregate", aggregate, AGGREGATES)
        if not has_layers:
            raise ValueError("aggregate has no effect on a single pair. Leave it out, or pass mappings of layers.")
    samples = _valid_samples(named, groups, positions, mask, missing, specification)
    weights = _weights(samples, key, resamples, level, method)
    found = _resampled(samples, split, named, weights, entry.name, filled, specification)
    larger_is_better = entry.direction_with(filled) == "similarity"
    found = found.then(lambda cells: aggregated(cells, aggregate or "max", larger_is_better=larger_is_better))
    return _interval(found, weights, level, method, specification)


def paired_difference(
    first: tuple[Any, Any],
    second: tuple[Any, Any],
    measure: str = "cka",
    *,
    key: Array,
    resamples: int = 1000,
    level: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    groups: Any = None,
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
        groups: see `bootstrap`.
        positions: see `jaxalign.compare`.
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
    entry, filled, specification = specified(measure, options)
    named = {"first[0]": first[0], "first[1]": first[1], "second[0]": second[0], "second[1]": second[1]}
    samples = _valid_samples(named, groups, positions, mask, missing, specification)
    weights = _weights(samples, key, resamples, level, method)
    found = [
        _resampled(
            samples._replace(sets=samples.sets[k]), 1, list(named)[k], weights, entry.name, filled, specification
        ).then(lambda cells: cells[:, 0, 0])
        for k in (slice(2), slice(2, 4))
    ]
    return _interval(found[0] - found[1], weights, level, method, specification)


def noise_ceiling(
    subjects: Sequence[Any],
    measure: str = "rsa",
    *,
    key: Array | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    groups: Any = None,
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
        key: a `jax.random.key`: adds bootstrap intervals of both bounds, as `bootstrap` makes them.
        resamples: see `bootstrap`.
        level: see `bootstrap`.
        groups: see `bootstrap`; needs a key.
        positions: see `jaxalign.compare`.
        mask: see `permutation_test`.
        missing: see `jaxalign.compare`.
        options: options of the measure.

    Returns:
        A `NoiseCeiling`, the lower and upper bound of the ceiling.

    Raises:
        TypeError, ValueError: fewer than two subjects; a measure that is not an inner product; groups without a key;
            with a key, see `bootstrap`; see `jaxalign.compare`.

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
    if not is_product(specification) or entry.name == "hsic" or entry.direction_with(filled) == "distance":
        raise ValueError(
            f"measure {entry.name!r} with these options is not a normalized inner product of pair matrices: use "
            "cka, rsa with pearson, cosine or a whitened comparison, or distance_correlation."
        )
    if key is None and groups is not None:
        raise ValueError("groups has no effect without key=, which adds bootstrap intervals over groups.")
    assert isinstance(specification, PairMeasure)
    named = {f"subjects[{k}]": subject for k, subject in enumerate(subjects)}
    samples = _valid_samples(named, groups, positions, mask, missing, specification)
    matrices, _ = pair_matrices(samples.sets, filled, specification, list(named))
    weights = None
    if key is not None:
        _check_bootstrap(entry.name, specification)
        weights = _weights(samples, key, resamples, level, "bca")
    gram = _gram(matrices, _groups_of(samples), weights)
    observed = gram[0]
    if _arrays.is_concrete(observed):  # under a trace the result is nan, 0 / 0
        constant = np.flatnonzero(_arrays.on_host(jnp.diagonal(observed)) == 0)
        if constant.size:
            raise ValueError(f"{list(named)[constant[0]]} does not vary: leave it out.")
    each, overall = _ceilings(gram[:1], specification)
    bounds = (jnp.mean(each), jnp.mean(overall), each[0])
    if weights is None:
        return NoiseCeiling(*bounds)
    both = Resampled.of(lambda gram: jnp.mean(jnp.stack(_ceilings(gram, specification)), 2).T, gram)
    lower, upper = (
        _interval(Resampled(both.values[:, k], both.linear[:, k]), weights, level, "bca", specification)
        for k in range(2)
    )
    return NoiseCeiling(*bounds, lower, upper)


# --- checks of arguments --------------------------------------------------------------------------------------------


class _Samples(NamedTuple):
    """Features (n, d) of valid samples, and their groups, if any."""

    sets: tuple[Array, ...]
    groups: Groups | None
    left_out: bool

    @property
    def number(self) -> int:
        """The number of groups."""
        return self.sets[0].shape[0] if self.groups is None else int(self.groups.number.max()) + 1


def _name(argument: str, features: Any) -> dict[str, Any]:
    named = isinstance(features, (Mapping, str, os.PathLike))
    return named_sets(argument, features) if named else {"": features}


def _name_pair(x: Any, y: Any) -> tuple[dict[str, Any], int]:
    """Features of both sides by their names in messages, and the number of those of x."""
    sides = {side: _name(side, features) for side, features in (("x", x), ("y", y))}
    named = {f"{side}[{n!r}]" if n else side: a for side, part in sides.items() for n, a in part.items()}
    return named, len(sides["x"])


def _valid_samples(
    named: dict[str, Any],
    groups: Any,
    positions: Positions | None,
    mask: Any,
    missing: Missing,
    measure: PairMeasure | SummaryMeasure,
) -> _Samples:
    """Checked features and groups, without masked and omitted samples."""
    for name, value in named.items():
        if isinstance(value, Mapping):
            raise TypeError(
                f"{name} must be one array (n, d); got a mapping. permutation_test and bootstrap accept named features."
            )
    rows = check_positions(named, positions)
    center = depends_on_differences(measure)
    sets, mask = check_representations(
        list(rows.items()), mask, missing, measure.min_samples, measure.label, center=center
    )
    checked = check_groups(groups, named, positions)
    if mask is None:
        return _Samples(sets, checked, left_out=False)
    kept = np.flatnonzero(_arrays.on_host(mask))
    left_out = len(kept) < sets[0].shape[0]
    return _Samples(tuple(x[kept] for x in sets), None if checked is None else checked.take(kept), left_out)


def _check_varies(null: Array, best: float, name: str, sets: tuple[Array, ...]) -> None:
    """Raise if every permutation has the value of equal representations, so that no test can reject."""
    if not _arrays.is_concrete(null) or not np.isfinite(best):
        return
    values = _arrays.on_host(null)
    if np.isfinite(values).all() and np.abs(values - best).max() < _ROUNDING_OF_BEST * max(abs(best), 1):
        n, d = sets[0].shape[0], max(a.shape[-1] for a in sets)
        raise ValueError(
            f"{name} is {best:g} for every permutation, so it cannot tell any representations apart: with {n} samples "
            f"of up to {d} channels everything fits. Use more samples, fewer channels (svcca) or another measure."
        )


def _exchange(samples: _Samples) -> Permutations:
    n = samples.sets[0].shape[0]
    exchange = GroupExchange.of(samples.groups, n)
    if 2 * exchange.movable < n:
        raise ValueError(
            f"groups: only {exchange.movable} of {n} samples are in groups that can be exchanged, as few of the "
            f"{samples.number} groups have samples at the same places. Leave out samples with mask= so that groups "
            "have equal sizes, or average over each group."
        )
    return exchange


def _grid_moves(named: dict[str, Any], positions: Positions | None, samples: _Samples) -> Permutations:
    shapes = {name: np.shape(value) for name, value in named.items()}
    told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    if positions != "samples" or any(len(shape) != 4 for shape in shapes.values()):
        raise ValueError(
            f'null="grid" needs maps (n, h, w, d) with positions="samples"; got {told} with positions={positions!r}.'
        )
    if samples.left_out:
        raise ValueError(
            'null="grid" moves whole grids, so no position can be left out: pass x and y without such images.'
        )
    if len({shape[:3] for shape in shapes.values()}) > 1:
        raise ValueError(f'null="grid" needs maps of one grid; got {told}.')
    images, height, width, _ = next(iter(shapes.values()))
    if height * width == 1:
        raise ValueError('null="grid" needs maps with more than one position. Use null="groups".')
    return GridMoves(images, height, width)


@partial(jax.jit, static_argnames="split")
def _finite_pairs(sets: tuple[Array, ...], split: int) -> Array:
    """Whether both representations of a pair are finite, (L, M)."""
    finite = jnp.stack([jnp.isfinite(x).all() for x in sets])
    return finite[:split, None] & finite[None, split:]


# --- statistics of permutations -------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("larger", "best"))
def _statistics(value: Array, null: Array, usable: Array, larger: bool, best: float) -> dict[str, Array]:
    """The array fields of `PermutationTest`; nan where a pair is not `usable`."""
    value, null = (jnp.where(usable, a, jnp.nan) for a in (value, null))
    m = null.shape[0]
    sign = 1 if larger else -1
    unusable = jnp.isnan(value)
    mean, std = jnp.mean(null, 0), jnp.std(null, 0)
    positive = jnp.where(std > 0, std, 1)
    score = jnp.where(std > 0, sign * (value - mean) / positive, 0)
    # The largest scores of a grid use the spread of observed and permuted values together. If the observed value did
    # not count in the spread, its score could exceed that of any permuted value.
    every = jnp.concatenate((value[None], null))
    spread = jnp.std(every, 0, keepdims=True)
    wide = jnp.where(spread > 0, spread, 1)
    scores = jnp.where(spread > 0, sign * (every - jnp.mean(every, 0, keepdims=True)) / wide, 0)
    scores = jnp.where(unusable, -jnp.inf, scores)
    largest = jnp.max(scores[1:], (-2, -1), keepdims=True)
    any_beyond = jnp.sum(largest >= scores[:1] - _rounding(value, null)[None] / wide, 0, dtype=null.dtype)
    beyond, any_beyond = (
        jnp.where(unusable, jnp.nan, count) for count in (_count_beyond(value, null, sign), any_beyond)
    )
    calibrated, threshold = _calibrate(value, null, sign, best, _ALPHA)
    return {
        "value": value,
        "p_value": (beyond + 1) / (m + 1),
        "corrected": (any_beyond + 1) / (m + 1),
        "null": null,
        "null_mean": mean,
        "null_std": std,
        "score": jnp.where(unusable, jnp.nan, score),
        "threshold": threshold,
        "calibrated": calibrated,
    }


def _rounding(value: Array, null: Array) -> Array:
    """Differences that rounding can cause: permutations with the observed value up to these are as extreme."""
    return 100 * float(jnp.finfo(null.dtype).eps) * jnp.maximum(jnp.abs(value), jnp.max(jnp.abs(null), 0))


def _count_beyond(value: Array, null: Array, sign: int) -> Array:
    """How many permutations have a value at least as extreme, (...)."""
    return jnp.sum(sign * (null - value[None]) >= -_rounding(value, null)[None], 0, dtype=null.dtype)


@partial(jax.jit, static_argnames=("sign", "best", "alpha"))
def _calibrate(value: Array, null: Array, sign: int, best: float, alpha: float) -> tuple[Array, Array]:
    """The calibrated value (...) and its threshold, from the null (m, ...); see `calibrate`."""
    total = null.shape[0] + 1
    if total < math.ceil(1 / alpha - 1e-9):  # no permutation exceeds the threshold
        return jnp.full_like(value, jnp.nan), jnp.full_like(value, jnp.nan)
    below = total - math.floor(alpha * total + 1e-9)
    every = jnp.sort(sign * jnp.concatenate((value[None], null)), 0)
    threshold = sign * every[below - 1]
    reach = sign * (best - threshold)
    has_scale = (reach > 0) & math.isfinite(best)
    scaled = jnp.maximum(sign * (value - threshold), 0) / jnp.where(has_scale, reach, 1)
    defined = math.isfinite(best) & ~jnp.isnan(value)
    return jnp.where(defined, jnp.where(has_scale, jnp.minimum(scaled, 1), 0), jnp.nan), threshold


# --- resampling -------------------------------------------------------------------------------------------------------


def _weights(samples: _Samples, key: Any, resamples: Any, level: Any, method: Any) -> Array:
    """How often each sample or group is in all samples, without each in turn, and in each resample."""
    _checks.random_key(key)
    resamples = _checks.whole("resamples", resamples, 2)
    _checks.choice("method", method, ("bca", "percentile"))
    _checks.probability("level", level)
    if samples.number < _MIN_RESAMPLED:
        what = "samples" if samples.groups is None else "groups"
        raise ValueError(
            f"the bootstrap needs at least {_MIN_RESAMPLED} {what}; got {samples.number}. Resamples of fewer {what} "
            "are mostly copies of each other."
        )
    return draw_weights(key, resamples, samples.number, samples.sets[0].dtype)


def _check_bootstrap(name: str, measure: PairMeasure | SummaryMeasure) -> None:
    if measure.samples_channels:
        raise ValueError("sampled_channels=True has no bootstrap: use sampled_channels=False.")
    centering = measure.centering if isinstance(measure, PairMeasure) else None
    if centering is None or not centering.has_bootstrap:
        raise ValueError(
            f"measure {name!r} with these options has no bootstrap: copies of a sample would count as evidence, "
            'or cause overfitting. Use cka, hsic or distance_correlation with estimator="debiased", or rsa with '
            'comparison="pearson" or "cosine"; or use permutation_test.'
        )


def _resampled(
    samples: _Samples,
    split: int,
    names: Iterable[str],
    weights: Array,
    measure_name: str,
    options: dict[str, Any],
    measure: PairMeasure | SummaryMeasure,
) -> Resampled:
    """Values (b, rows, columns) of the first `split` representations and the others, with every row of weights."""
    _check_bootstrap(measure_name, measure)
    assert isinstance(measure, PairMeasure)
    matrices, units = pair_matrices(samples.sets, options, measure, list(names))
    for name, matrix in zip(names, matrices, strict=True):
        if _arrays.is_concrete(matrix) and not _arrays.read_on_host(jnp.any, matrix):
            raise ValueError(f"all samples of {name} are equal or equidistant, so there is nothing to resample.")
    found = resampled_values(matrices[:split], matrices[split:], units, _groups_of(samples), weights, measure)
    return found._replace(values=jnp.where(_finite_pairs(samples.sets, split), found.values, jnp.nan))


def _groups_of(samples: _Samples) -> Array | None:
    return None if samples.groups is None else jnp.asarray(samples.groups.number)


def _interval(
    found: Resampled, weights: Array, level: float, method: str, measure: PairMeasure | SummaryMeasure
) -> Interval:
    """The interval of a statistic."""
    assert isinstance(measure, PairMeasure)
    assert measure.centering is not None
    value, resampled = found.values[0], found.values[weights.shape[1] + 1 :]
    if measure.centering.is_double:
        resampled = without_noise_of_pairs(found, weights)
    return Interval(value, *interval_ends(found, resampled, level, method), resampled, float(level), method)


# --- noise ceilings ---------------------------------------------------------------------------------------------------


def _gram(matrices: Array, groups: Array | None, weights: Array | None) -> Array:
    """Inner products (b, subjects, subjects) of the matrices, with every row of weights; without weights b is 1."""
    if weights is None:
        return jnp.einsum("aij,bij->ab", matrices, matrices, precision=lax.Precision.HIGHEST)[None]

    def row(f: Array) -> Array:
        return lax.map(lambda g: resampled_products(f, g, groups, weights), matrices)

    return jnp.transpose(lax.map(row, matrices), (2, 0, 1))


@partial(jax.jit, static_argnames="measure")
def _ceilings(gram: Array, measure: PairMeasure) -> tuple[Array, Array]:
    """Each subject compared with the mean of the others, and with the mean of all, (b, subjects)."""
    sizes = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))
    cosines = gram / sizes[:, :, None] / sizes[:, None, :]
    row = jnp.sum(cosines, 2)
    total = jnp.sum(row, 1, keepdims=True)
    norms = total - 2 * row + 1  # squared norm of the sum of the other matrices
    each = (row - 1) / jnp.sqrt(jnp.maximum(norms, float(jnp.finfo(norms.dtype).tiny)))

    def finish(ratio: Array) -> Array:  # the root of the ratio for distance correlation
        one = jnp.ones((*ratio.shape, 1), ratio.dtype)
        inner = InnerProducts.of(ratio[..., None, None], (one, one), (one, one), one[..., 0])
        return measure.finish(inner)[..., 0, 0]

    return finish(each), finish(row / jnp.sqrt(total))
