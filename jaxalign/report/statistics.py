"""Permutation tests and intervals of the command line: of which samples, in which groups, and what is reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign._groups import Groups, check_groups
from jaxalign.inference import Aggregate, Interval, PermutationTest, bootstrap, calibrate, permutation_test
from jaxalign.io import FeatureSet

# Samples in a permutation test, which stores n x n values per representation.
TEST_SAMPLES = 1000
_ALL = slice(None)
_AGGREGATES: tuple[Aggregate, ...] = ("max", "mean_of_best", "symmetric_best")


@dataclass(frozen=True)
class Tested:
    """A permutation test, and what it was of."""

    test: PermutationTest
    samples: int
    groups: int | None  # None: every sample is a group
    what: str  # the name of the groups

    @property
    def permutations(self) -> int:
        """The number of permutations, which few groups have few of."""
        return self.test.null.shape[0]

    def exact(self, p: Any) -> Any:
        """P-values in float64: multiples of 1 / (permutations + 1), which float32 rounds."""
        whole = self.permutations + 1
        return (np.round(np.asarray(p, np.float64) * whole) / whole).tolist()

    def summary(self) -> dict[str, Any]:
        """What a report says about how p-values came about."""
        return {
            "permutations": self.permutations, "samples": self.samples, "groups": self.groups, "what": self.what,
            "smallest_p_value": self.test.smallest_p_value,
        }  # fmt: skip

    def values(self) -> dict[str, Any]:
        """The statistics of every comparison."""
        test = self.test
        others = {
            name: np.asarray(getattr(test, name)).tolist() for name in ("null_mean", "score", "calibrated", "threshold")
        }
        return {"p_value": self.exact(test.p_value), "corrected": self.exact(test.corrected), **others}

    def aggregates(self, rows: slice = _ALL, columns: slice = _ALL) -> dict[str, Any]:
        """The most similar pair of layers, and means of best matches, each against its own null."""
        if not is_calibrated(self.test.threshold):
            return {}
        part = replace(self.test, value=self.test.value[rows, columns], null=self.test.null[:, rows, columns])
        found = {name: calibrate(part, aggregate=name) for name in _AGGREGATES}
        return {
            name: {"value": float(v.value), "calibrated": float(v.calibrated), "p_value": self.exact(v.p_value)}
            for name, v in found.items()
        }


def is_calibrated(threshold: Any) -> bool:
    """Whether there were enough permutations for the thresholds of a test."""
    return not np.isnan(np.asarray(threshold, np.float64)).all()


@dataclass(frozen=True)
class Intervals:
    """Bootstrap intervals of the similarities of pairs of models, on the same resamples."""

    found: list[Interval]
    samples: int
    groups: int | None  # None: every sample is a group
    what: str  # the name of the groups


def run_test(
    x: Mapping[str, Any], y: Mapping[str, Any], arrays: Mapping[str, FeatureSet], options: Mapping[str, Any],
    measure_options: Mapping[str, Any],
) -> Tested:  # fmt: skip
    """Test rows x (n, d) against rows y, on at most `TEST_SAMPLES` of the samples; `arrays` tell what rows are."""
    how: dict[str, Any] = {
        "key": jax.random.key(options["seed"]),
        "permutations": options["permutations"],
        **measure_options,
    }
    if options["null"] == "grid":
        return _test_grids(x, y, {name: array.values for name, array in arrays.items()}, options, how)
    subset, groups, what = _samples(len(next(iter(x.values()))), arrays, options)
    test = permutation_test(_take(x, subset), _take(y, subset), options["measure"], groups=groups, **how)
    return Tested(test, len(subset), None if groups is None else len(np.unique(groups)), what)


def run_intervals(
    pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], arrays: Mapping[str, FeatureSet],
    options: Mapping[str, Any], measure_options: Mapping[str, Any],
) -> Intervals:  # fmt: skip
    """Intervals of the mean of best matches of pairs of models, on the samples of `run_test`; all share resamples."""
    subset, groups, what = _samples(len(next(iter(arrays.values())).rows(options["positions"])), arrays, options)
    how: dict[str, Any] = {"key": jax.random.key(options["seed"]), "resamples": options["resamples"], "groups": groups}
    found = [
        bootstrap(
            _take(x, subset), _take(y, subset), options["measure"], aggregate="symmetric_best", **how, **measure_options
        )
        for x, y in pairs
    ]
    return Intervals(found, len(subset), None if groups is None else len(np.unique(groups)), what)


def _samples(
    n: int, arrays: Mapping[str, FeatureSet], options: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Numbers of at most `TEST_SAMPLES` samples, their groups, if any, and the name of these."""
    positions = options["positions"] if any(stored.values.ndim > 2 for stored in arrays.values()) else None
    labels = check_groups(_labels(options["groups"]), {name: array.values for name, array in arrays.items()}, positions)
    subset = _subset(n, labels)
    what = "images or texts" if options["groups"] is None else f"groups of {options['groups']}"
    return subset, None if labels is None else labels.number[subset], what


def _take(rows: Mapping[str, Any], subset: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.asarray(values[subset]) for name, values in rows.items()}


def check_null(arrays: Mapping[str, FeatureSet], options: Mapping[str, Any]) -> None:
    """Raise what a test would raise on the groups or the grid of samples, before anything is computed."""
    if options["null"] == "grid":
        _grid_shape({name: array.values for name, array in arrays.items()}, options)
    else:
        _samples(len(next(iter(arrays.values())).rows(options["positions"])), arrays, options)


def _grid_shape(stored: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[int, ...]:
    shapes = {values.shape[:-1] for values in stored.values()}
    shape = shapes.pop()
    if options["groups"] is not None or options["positions"] != "samples" or shapes or len(shape) != 3:
        raise ValueError("--null grid needs maps (n, h, w, d) of one grid with --positions samples, without --groups.")
    return shape


def _test_grids(
    x: Mapping[str, Any], y: Mapping[str, Any], stored: Mapping[str, Any], options: Mapping[str, Any],
    how: Mapping[str, Any],
) -> Tested:  # fmt: skip
    """A test that flips and rotates the grid of each image, on as many images as fit."""
    shape = _grid_shape(stored, options)
    size = shape[1] * shape[2]
    kept = np.sort(np.random.default_rng(0).permutation(shape[0])[: max(TEST_SAMPLES // size, 1)])
    maps_x, maps_y = ({name: np.asarray(v).reshape(*shape, -1)[kept] for name, v in rows.items()} for rows in (x, y))
    test = permutation_test(maps_x, maps_y, options["measure"], null="grid", positions="samples", **how)
    return Tested(test, len(kept) * size, len(kept), "images that are flipped and rotated")


def describe(summary: Mapping[str, Any], samples: int) -> str:
    """A sentence on the p-values of a report."""
    part = "" if summary["samples"] == samples else f" of {summary['samples']} of the {samples} samples"
    if summary["groups"] is None:
        return f"p-values from {summary['permutations']} permutations{part}, which are taken to be independent"
    text = f"p-values from {summary['permutations']} permutations of {summary['groups']} {summary['what']}{part}"
    return f"{text}; none can be below {summary['smallest_p_value']:.3g}"


def _labels(path: Path | None) -> np.ndarray | None:
    """Labels from a .npy file, or one per line of a text file."""
    if path is None:
        return None
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path)
        return np.asarray([line.strip() for line in _lines(path)])
    except (OSError, ValueError) as error:
        raise ValueError(f"--groups {path}: {error}") from None


def _lines(path: Path) -> Iterable[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _subset(n: int, groups: Groups | None) -> np.ndarray:
    """Numbers of the samples of a test: all, or random samples, or the same random places of many random groups."""
    rng = np.random.default_rng(0)
    if n <= TEST_SAMPLES:
        return np.arange(n)
    if groups is None:
        return np.sort(rng.choice(n, TEST_SAMPLES, replace=False))
    chosen = rng.permutation(groups.number.max() + 1)[:TEST_SAMPLES]
    # Samples are exchanged with those at the same place: of small groups all are kept, of large ones the same places.
    places = rng.permutation(groups.place.max() + 1)[: max(TEST_SAMPLES // len(chosen), 1)]
    return np.flatnonzero(np.isin(groups.number, chosen) & np.isin(groups.place, places))
