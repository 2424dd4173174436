"""What a report says in words: the measure, the null of its p-values, its intervals, its map of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.kernels import RBF, Laplacian, Linear, kernel_of
from jaxalign.measures._registry import specified
from jaxalign.report.statistics import is_calibrated

_NAMES = {name: name.upper() for name in ("cka", "hsic", "rsa", "cknna", "cca", "pwcca", "svcca")}
_ESTIMATORS = {
    "debiased": "The estimator is debiased: its mean is 0 for unrelated representations.",
    "biased": "The estimator is biased: it is above 0 for unrelated representations, the more so the fewer samples.",
}


def measure_name(measure: str) -> str:
    """A measure as text."""
    return _NAMES.get(measure, measure.replace("_", " "))


def measure_words(measure: str, measure_options: Mapping[str, Any]) -> str:
    """What is compared: the measure, its kernel, its estimator and other options."""
    entry, options, _ = specified(measure, dict(measure_options))
    text = measure_name(measure)
    kernel = options.pop("kernel", None)
    if kernel is not None:
        text += f" of {kernel_words(kernel)}"
    estimator = options.pop("estimator", None)
    switches = (None, False, True)
    plain = [
        f"{name} = {_plain(value)}"
        for name, value in options.items()
        if name != "result" and (value not in switches or value != entry.options[name])
    ]
    text += f" ({', '.join(plain)})" if plain else ""
    larger = "Larger" if entry.direction_with(options) == "similarity" else "Smaller"
    sentences = [f"{text[0].upper()}{text[1:]}.", f"{larger} values are more similar."]
    if estimator is not None:
        sentences.append(_ESTIMATORS.get(estimator, f"The estimator is {estimator}."))
    if not entry.symmetric:
        sentences.append("The measure is not symmetric: values are of the rows (x) with the columns (y).")
    return " ".join(sentences)


def kernel_words(kernel: Any) -> str:
    """A kernel in words."""
    kernel = kernel_of(kernel)
    if isinstance(kernel, Linear):
        return "inner products of centered features (linear kernel)"
    assert isinstance(kernel, (RBF, Laplacian))
    name = f"{type(kernel).__name__} affinities"
    if kernel.sigma is not None:
        return f"{name} with sigma = {_plain(kernel.sigma)}"
    counted = " with the diagonal" if kernel.diagonal == "include" else ""
    return f"{name} whose mean{counted} is {float(kernel.density):g}"  # pyright: ignore[reportArgumentType]


def _plain(value: Any) -> str:
    return (
        kernel_words(value)
        if isinstance(value, (RBF, Laplacian))
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def null_words(statistics: Mapping[str, Any] | None, samples: int, comparisons: int, pairs: int = 0) -> str:
    """What is permuted, how often, and what p-values can be."""
    if statistics is None:
        return "No p-values (--permutations 0)."
    number, groups, what = statistics["permutations"], statistics["groups"], statistics["what"]
    used = f", of {statistics['samples']} of the {samples} samples" if statistics["samples"] != samples else ""
    if groups is None:
        null = f"exchange the samples of one representation, which are taken to be independent{used}"
    elif what.startswith("images that"):
        null = f"flip and rotate the grid of each of {groups} images{used}"
    else:
        null = f"exchange whole {what}, {groups} in all, and so keep their samples together{used}"
    smallest = f"{statistics['smallest_p_value']:.3g}"
    calibrated = is_calibrated(statistics["threshold"])
    calibration = (
        "Calibrated values are 0 up to what 5% of permutations exceed, and 1 for equal representations."
        if calibrated
        else "Values are not calibrated, and pairs of models not tested: that takes at least 19 permutations."
    )
    return (
        f"p-values: {number} permutations {null}. The smallest attainable p-value is {smallest}. Corrected p-values "
        f"allow for all {comparisons} comparisons of layers (the largest score of each permutation, Westfall & Young "
        f"1993){'; those of models are each for one pair' if pairs and calibrated else ''}. {calibration}"
    )


def interval_words(intervals: Mapping[str, Any] | None, samples: int) -> str:
    """What the intervals of models are."""
    if intervals is None:
        return ""
    if "problem" in intervals:
        return f"No intervals: {intervals['problem']}."
    what = "samples" if intervals["groups"] is None else f"whole {intervals['what']}, {intervals['groups']} in all"
    used = ""
    if intervals["samples"] != samples:
        used = (
            f" They use {intervals['samples']} of the {samples} samples, so they are wider than those of all would be."
        )
    number = intervals["resamples"]
    return (
        f"Intervals of models: {intervals['level']:.0%} bootstrap intervals (BCa) from {number} "
        f"resamples of {what}; best matches are found anew in each.{used} They are about other samples, not about "
        "other training runs."
    )


def similarity_words(direction: str) -> str:
    """What the similarity, or distance, of two models is."""
    return (
        f"The {direction} of two models is the mean, over the layers of each, of the best match in the other, averaged "
        "over both directions."
    )


def map_words(direction: str, ellipses: bool) -> str:
    """What the map of models shows."""
    distance = "arc cosines of similarities" if direction == "similarity" else "mean distances of best matches"
    text = f"The map places models by classical multidimensional scaling of {distance}."
    if ellipses:
        text += " Ellipses hold about 95% of the maps of resamples, each moved and turned onto the map (Procrustes)."
    return text
