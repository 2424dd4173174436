"""A measure as a function of the number of samples.

What a measure finds among a thousand samples need not hold among a million: nearest neighbors in a small set are far
apart and share only coarse structure, those in a large set are close and differ in fine structure.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array

from jaxalign import _arrays, _checks, _features
from jaxalign._groups import check_groups
from jaxalign._positions import Positions, check_positions
from jaxalign._repr import short_repr
from jaxalign.grid import compare, compare_grid
from jaxalign.io import named_sets
from jaxalign.measures._registry import specified
from jaxalign.plan import Plan

# Sizes by default: all samples, halved down to at least this many.
_SMALLEST = 64
# Subsamples of files with more bytes than this are not copied to memory: other rows are masked instead.
_COPIED = 2**30


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("sizes", "value", "low", "high", "each"),
    meta_fields=("measure", "direction", "level"),
)
@dataclass(frozen=True, repr=False)
class ScalingCurve:
    """A measure as a function of the number of samples; made by `scaling_curve`.

    Attributes:
        sizes: numbers of samples, shape (sizes,), increasing.
        value: mean value over disjoint subsamples of that size, shape (sizes,); nan if one of them has no value.
        low: lower end of the interval of the mean, shape (sizes,); nan if there is only one subsample.
        high: upper end of that interval.
        each: values of the subsamples, shape (sizes, subsamples); nan where there are fewer.
        measure: the name of the measure.
        direction: "similarity" or "distance".
        level: nominal coverage of the intervals.
    """

    sizes: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    each: np.ndarray
    measure: str
    direction: Literal["similarity", "distance"]
    level: float

    def __repr__(self) -> str:
        return short_repr(self)

    def to_pandas(self) -> Any:
        """Return one row per size as a pandas DataFrame (needs pandas)."""
        number = np.isfinite(self.each).sum(1)
        columns = {"size": self.sizes, "value": self.value, "low": self.low, "high": self.high, "subsamples": number}
        return _arrays.pandas().DataFrame(columns)


def scaling_curve(
    x: Any,
    y: Any,
    measure: str = "cka",
    *,
    key: Array,
    sizes: Iterable[int] | int | None = None,
    max_subsamples: int = 20,
    level: float = 0.95,
    groups: Any = None,
    positions: Positions | None = None,
    mask: Any = None,
    plan: Plan | None = None,
    **options: Any,
) -> ScalingCurve:
    """A measure of random subsamples of every size, up to all samples.

    Subsamples of one size are disjoint, so their values are independent, and the interval of their mean (by Student's
    t) holds for the expected value at that size. Those of different sizes share samples. Options such as the k of
    `mutual_knn` and the density of a kernel are the same for all sizes.

    Args:
        x: features, shape (n, d1): an array, a memory map, or the path of a file that `jaxalign.io.read_features`
            reads, of which .npy files are not read as a whole.
        y: features of the same samples, shape (n, d2).
        measure: a name in `jaxalign.measures.REGISTRY`.
        key: a `jax.random.key` for the subsamples.
        sizes: numbers of samples, or of groups. None: all, a half, a quarter, ... down to at least 64.
        max_subsamples: the largest number of subsamples of one size.
        level: nominal coverage of the intervals, 0 < level < 1.
        groups: a label for each sample, (n,), such as the image of each of several captions or frames: subsamples hold
            one random sample of each group. None: with positions="samples" the images or texts are the groups,
            otherwise all samples are independent.
        positions: see `jaxalign.compare`.
        mask: shape (n,), True marks valid samples; others are left out, such as those with nan.
        plan: see `jaxalign.Plan`.
        options: options of the measure.

    Returns:
        A `ScalingCurve`.

    Raises:
        TypeError, ValueError: a size of less than 2, or above the number of samples or groups; see `jaxalign.compare`.

    Examples:
        >>> import jax, jaxalign
        >>> x, noise = jax.random.normal(jax.random.key(0), (2, 400, 8))
        >>> curve = jaxalign.scaling_curve(x, x + noise, kernel="linear", key=jax.random.key(1), sizes=[50, 100, 400])
        >>> bool(curve.low[0] < curve.value[2] < curve.high[0])
        True
    """
    entry, filled, _ = specified(measure, options)
    _checks.random_key(key)
    most = _checks.whole("max_subsamples", max_subsamples)
    _checks.probability("level", level)
    named = {"x": _opened("x", x), "y": _opened("y", y)}
    if not _arrays.is_concrete(*named.values(), key, mask):
        raise TypeError(
            "scaling_curve computes on the host: call it outside of jit, with arrays and a key that are known."
        )
    rows = check_positions(named, positions)
    chosen = _random_members(named, groups, positions, mask, key, len(rows["x"]))
    if len(rows["x"]) != len(rows["y"]):
        raise ValueError(f"x and y must hold the same samples, row by row: {len(rows['x'])} and {len(rows['y'])} rows.")
    checked = _check_sizes(sizes, len(chosen))
    each = np.full((len(checked), most), np.nan)
    for k, size in enumerate(checked):
        for number in range(min(len(chosen) // size, most)):
            subsample = np.sort(chosen[number * size : (number + 1) * size])
            each[k, number] = _value(rows, subsample, entry.name, plan, options)
    runs = np.minimum(len(chosen) // np.asarray(checked), most)
    each = each[:, : int(runs.max())]
    value, low, high = _intervals(each, runs, level)
    return ScalingCurve(
        np.asarray(checked), value, low, high, each, entry.name, entry.direction_with(filled), float(level)
    )


def _opened(name: str, features: Any) -> Any:
    """An array; a path becomes a memory map or an array."""
    if not isinstance(features, (str, os.PathLike)):
        return features
    sets = named_sets(name, features)
    if len(sets) != 1:
        raise ValueError(f"{name}: {features} holds {len(sets)} representations: pass the path of one.")
    (value,) = sets.values()
    return value


def _random_members(named: Any, groups: Any, positions: Any, mask: Any, key: Array, n: int) -> np.ndarray:
    """One random valid sample of each group, in random order."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    order = rng.permutation(n)
    valid = _features.row_mask("mask", mask, (n,))
    if valid is not None:
        order = order[_arrays.on_host(valid)[order]]
    checked = check_groups(groups, named, positions)
    if checked is not None:
        order = order[np.sort(np.unique(checked.number[order], return_index=True)[1])]
    if len(order) < 2:
        what = "samples are" if checked is None else "groups have samples that are"
        raise ValueError(f"scaling_curve needs at least 2 samples or groups; {len(order)} {what} left.")
    return order


def _check_sizes(sizes: Any, number: int) -> list[int]:
    """The sizes, increasing; by default halves of all."""
    if sizes is None:
        halves = [number >> k for k in range(number.bit_length())]
        return sorted(size for size in halves if size >= min(_SMALLEST, number))
    listed = sizes if isinstance(sizes, (int, np.ndarray, jax.Array)) else list(sizes)
    checked = sorted({_checks.whole("sizes", size, 2) for size in np.ravel(_arrays.array("sizes", listed)).tolist()})
    if not checked:
        raise ValueError("sizes is empty: pass at least one number of samples, or None.")
    if checked[-1] > number:
        raise ValueError(f"sizes must be at most the number of samples or groups, {number}; got {checked[-1]}.")
    return checked


def _value(
    rows: dict[str, Any], subsample: np.ndarray, measure: str, plan: Plan | None, options: dict[str, Any]
) -> float:
    """The measure of some rows. Those of large files are read block by block."""
    x, y = rows.values()
    n, in_files = len(x), any(isinstance(value, np.memmap) for value in (x, y))
    copied = sum(len(subsample) * value.nbytes // n for value in (x, y))
    if in_files and copied > _COPIED:
        mask = None if len(subsample) == n else np.isin(np.arange(n), subsample)
        grid = compare_grid({"x": x}, {"y": y}, measure, mask=mask, plan=plan, **options)
        return float(np.asarray(grid.values)[0, 0])
    how = {} if plan is None else {"plan": plan}
    part_x, part_y = (np.asarray(value[subsample]) if in_files else value[subsample] for value in (x, y))
    return float(compare(part_x, part_y, measure, **how, **options))


def _intervals(each: np.ndarray, number: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over subsamples, and the ends of their intervals; nan if a subsample has no value."""
    from scipy.special import stdtrit  # comes with jax, but importing it takes time

    ran = np.arange(each.shape[1])[None] < number[:, None]
    value = np.sum(each, 1, where=ran) / number
    freedom = np.maximum(number - 1, 1)
    spread = np.sqrt(np.sum((each - value[:, None]) ** 2, 1, where=ran) / freedom / number)
    reach = np.where(number > 1, stdtrit(freedom, (1 + level) / 2) * spread, np.nan)
    return value, value - reach, value + reach
