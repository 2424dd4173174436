"""The measures by name, with their direction, range, invariances and source.

`compare` and `compare_grid` look measures up here. tests/test_measures_facts.py checks that every claimed invariance
holds and that no other does, and writes the table in docs/pages/measures.md.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from jaxalign._repr import shown
from jaxalign.kernels import kernel_of
from jaxalign.measures import _affinities, _cca, _hsic, _neighbors, _predictivity, _rsa, _shape
from jaxalign.measures._evaluate import PairMeasure, SummaryMeasure
from jaxalign.measures._pair_sums import kernel_function

Invariance = Literal["orthogonal", "shift", "scale", "channel scale", "affine"]


@dataclass(frozen=True)
class Entry:
    """A measure and its properties with default options.

    Attributes:
        name: the name in `compare` and `compare_grid`.
        function: the public function of two feature arrays.
        specify: maps options to the specification of the measure.
        direction: "similarity" if larger values mean more similar, "distance" if smaller values do.
        range: the smallest and the largest value.
        invariances: maps of the features of one representation that do not change the value: "orthogonal" (rotations
            and reflections), "shift" (a constant vector), "scale" (one factor), "channel scale" (one factor per
            feature), "affine" (any invertible linear map and shift).
        symmetric: whether measure(x, y) = measure(y, x).
        differentiable: "yes", "once" (first derivatives only), or "no" (piecewise constant).
        source: the publications.
    """

    name: str
    function: Callable[..., Any]
    specify: Callable[..., PairMeasure | SummaryMeasure]
    direction: Literal["similarity", "distance"]
    range: tuple[float, float]
    invariances: frozenset[Invariance]
    symmetric: bool
    differentiable: Literal["yes", "once", "no"]
    source: str

    @property
    def options(self) -> dict[str, Any]:
        """The options that define the measure, and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.name not in ("x", "y", *_HOW)}

    def direction_with(self, options: dict[str, Any]) -> Literal["similarity", "distance"]:
        """The direction with these options: some measures return a similarity or a distance."""
        result = options.get("result")
        return "similarity" if result == "similarity" else "distance" if result == "angular" else self.direction

    def best_with(self, options: dict[str, Any]) -> float:
        """The value of equal representations with these options; infinite if it depends on the features."""
        if self.direction_with(options) != self.direction:
            return 1.0 if self.direction == "distance" else 0.0
        return self.range[1] if self.direction == "similarity" else self.range[0]

    def range_with(self, options: dict[str, Any]) -> tuple[float, float]:
        """The range with these options: without normalization a distance has no maximum."""
        return (self.range[0], _INFINITY) if options.get("normalize") is False else self.range

    def invariances_with(self, options: dict[str, Any]) -> frozenset[Invariance]:
        """The invariances with these options: without normalization a distance has the unit of the features."""
        return self.invariances - {"scale"} if options.get("normalize") is False else self.invariances


_INFINITY = float("inf")

# Options of how the measure is computed.
_HOW = ("mask", "missing", "plan")

_RIGID: frozenset[Invariance] = frozenset({"orthogonal", "shift", "scale"})
_AFFINE: frozenset[Invariance] = frozenset({"orthogonal", "shift", "scale", "channel scale", "affine"})
_ROTATION: frozenset[Invariance] = frozenset({"orthogonal", "scale"})


def _specify_hsic(kernel: Any, estimator: Any) -> PairMeasure:
    return _hsic.hsic_measure(kernel_function(kernel_of(kernel)), estimator)


def _specify_cka(kernel: Any, estimator: Any, result: Any, sampled_channels: Any) -> PairMeasure:
    return _hsic.cka_measure(kernel_function(kernel_of(kernel)), estimator, result, sampled_channels)


def _specify_rsa(metric: Any, comparison: Any) -> PairMeasure | SummaryMeasure:
    return _rsa.rsa_measure(_rsa.metric_function(metric, _rsa.metric_kernel(metric)), comparison)


def _specify_affinity_distance(kernel: Any, result: Any) -> PairMeasure:
    return _affinities.affinity_distance_measure(kernel_function(kernel_of(kernel)), result)


def _specify_linear_predictivity(folds: Any, strengths: Any) -> SummaryMeasure:
    return _predictivity.linear_predictivity_measure(folds, strengths)


_ENTRIES = (
    Entry(
        "cka", _hsic.cka, _specify_cka, "similarity", (-1.0, 1.0), _RIGID, True, "yes",
        "Kornblith et al. 2019; Song et al. 2012",
    ),
    Entry(
        "hsic", _hsic.hsic, _specify_hsic, "similarity", (-_INFINITY, _INFINITY), _RIGID, True, "yes",
        "Gretton et al. 2005; Song et al. 2012",
    ),
    Entry(
        "rsa", _rsa.rsa, _specify_rsa, "similarity", (-1.0, 1.0), _RIGID, True, "yes",
        "Kriegeskorte et al. 2008; Diedrichsen et al. 2021",
    ),
    Entry(
        "distance_correlation", _hsic.distance_correlation, _hsic.distance_correlation_measure,
        "similarity", (-1.0, 1.0), _RIGID, True, "yes",
        "Székely, Rizzo & Bakirov 2007; Székely & Rizzo 2013",
    ),
    Entry(
        "mutual_knn", _neighbors.mutual_knn, _neighbors.mutual_knn_measure,
        "similarity", (0.0, 1.0), _ROTATION, True, "no",
        "Huh et al. 2024",
    ),
    Entry(
        "jaccard", _neighbors.jaccard, _neighbors.jaccard_measure, "similarity", (0.0, 1.0), _ROTATION, True, "no",
        "Jaccard 1901; Klabunde et al. 2025",
    ),
    Entry(
        "cknna", _neighbors.cknna, _neighbors.cknna_measure, "similarity", (-1.0, 1.0), _ROTATION, True, "yes",
        "Huh et al. 2024",
    ),
    Entry(
        "procrustes", _shape.procrustes, _shape.procrustes_measure, "distance", (0.0, 2**0.5), _RIGID, True, "once",
        "Schönemann 1966; Williams et al. 2021",
    ),
    Entry(
        "shape_distance", _shape.shape_distance, _shape.shape_distance_measure,
        "distance", (0.0, 1.5707963267948966), _RIGID, True, "once",
        "Williams et al. 2021",
    ),
    Entry(
        "cca", _cca.cca, _cca.cca_measure, "similarity", (0.0, 1.0), _AFFINE, True, "once",
        "Hotelling 1936; Kornblith et al. 2019",
    ),
    Entry(
        "pwcca", _cca.pwcca, _cca.pwcca_measure, "similarity", (0.0, 1.0), frozenset({"shift", "scale"}), False, "once",
        "Morcos et al. 2018",
    ),
    Entry(
        "svcca", _cca.svcca, _cca.svcca_measure, "similarity", (0.0, 1.0), _RIGID, True, "once",
        "Raghu et al. 2017",
    ),
    Entry(
        "linear_predictivity", _predictivity.linear_predictivity, _specify_linear_predictivity,
        "similarity", (-_INFINITY, 1.0), _RIGID, False, "yes",
        "Yamins et al. 2014; Schrimpf et al. 2018",
    ),
    Entry(
        "affinity_distance", _affinities.affinity_distance, _specify_affinity_distance,
        "distance", (0.0, 1.0), _RIGID, True, "yes",
        "this library",
    ),
)  # fmt: skip

# Options that other packages have, and those here.
_ELSEWHERE = {"unbiased": "estimator", "debiased": "estimator", "n_neighbors": "k", "method": "comparison"}
_ARGUMENTS = {"n_permutations": "permutations", "num_permutations": "permutations", "n_resamples": "resamples"}

REGISTRY: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def find(measure: Any) -> Entry:
    """The entry of a measure; raises if there is none."""
    if isinstance(measure, str) and measure in REGISTRY:
        return REGISTRY[measure]
    raise ValueError(
        f"measure must be one of {', '.join(map(repr, REGISTRY))}; got {shown(measure)}.{closest(measure, REGISTRY)}"
    )


def specified(measure: Any, options: dict[str, Any]) -> tuple[Entry, dict[str, Any], PairMeasure | SummaryMeasure]:
    """The entry of a measure, its options including defaults, and its specification."""
    entry = find(measure)
    known = entry.options
    for name in options:
        if name not in known:
            other = _ELSEWHERE.get(name)
            hint = f" Did you mean {other!r}?" if other in known else closest(name, known)
            if name in _ARGUMENTS:
                hint = f" Did you mean the argument {_ARGUMENTS[name]!r}?"
            if name in ("sigma", "density", "diagonal") and "kernel" in known:
                hint = f" It is an option of the kernel: kernel=jaxalign.kernels.RBF({name}=...)."
            raise TypeError(
                f"measure {entry.name!r} has no option {name!r}; its options are {', '.join(map(repr, known))}.{hint}"
            )
    filled = {**known, **options}
    return entry, filled, entry.specify(**filled)


def check_how(entry: Entry, how: Iterable[str]) -> None:
    """Raise if a measure does not have one of these options, which would have no effect."""
    parameters = inspect.signature(entry.function).parameters
    for name in how:
        if name not in parameters:
            raise TypeError(f"measure {entry.name!r} is computed on one device, from whole arrays: leave out {name}=.")


def closest(name: Any, valid: Any) -> str:
    """' Did you mean ...?', or an empty string."""
    names, text = list(valid), str(name).lower()
    close = [name for name in names if text and text in name.split("_")]
    close = close or difflib.get_close_matches(text, names, 1, 0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
