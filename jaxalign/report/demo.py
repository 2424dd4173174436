"""The demo: relative features of real networks, scored on held-out samples.

This module computes the results from the shipped features; `jaxalign demo` prints and draws them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxalign.alignment import PUBLISHED, align
from jaxalign.datasets import DigitFeatures, PatchFeatures, load_digit_features, load_patch_features
from jaxalign.matching import Matching, MatchScore, match
from jaxalign.report.baselines import (
    best_ridge,
    compiled_correspondence,
    padded,
    prepare_ridge,
    variance_scaled_rows,
)

Score = tuple[float, float, float]  # top-1, top-5, mean reciprocal rank
AUTO_SCALED, PER_ROW, DECORRELATED = (
    "auto-scaled RBF (as published)",
    "auto-scaled, one sigma per row",
    "decorrelated (the default)",
)
METHODS: dict[str, Mapping[str, Any]] = {
    AUTO_SCALED: PUBLISHED,
    PER_ROW: {**PUBLISHED, "bandwidth": "per_row"},
    DECORRELATED: {},
}
VARIANCE = "variance-scaled RBF"
CSLS = "decorrelated + CSLS"
RIDGE = "ridge map fitted on the landmarks"
DIGIT_LANDMARKS = 300
# What `match` does with the shuffled digits. From 30 landmarks it stops by itself after 20 rounds, at a top-1 of 0.91.
# With 12 it takes two thirds of the time and reaches 0.88; with 8 only 0.76.
MATCH_ROUNDS = 12
SEARCH = "bridges and rounds"
MATCHINGS: dict[str, Mapping[str, Any]] = {
    "two networks, no rounds": {"bridges": False, "rounds": 0},
    "bridges, no rounds": {"rounds": 0},
    SEARCH: {"rounds": MATCH_ROUNDS},
}
# The networks that are compared on patches, with one layer each. The first two are drawn.
PATCH_NETWORKS: tuple[str, ...] = (
    "vit-s14 layer 8",
    "efficientnet-lite0 block 10",
    "mobilenet-v2 block 13",
    "pp-ocrv4 stride 16",
)
POSITION = "position only"


@dataclass(frozen=True)
class Rows:
    """Relative features of the queries, by method and by name."""

    by_method: dict[str, dict[str, np.ndarray]]
    sigma: dict[str, float]  # of the auto-scaled affinity, by name
    landmarks: np.ndarray  # indices
    queries: np.ndarray  # indices


def relative_rows(features: Mapping[str, np.ndarray], landmarks: np.ndarray, tick: Callable[[str], None]) -> Rows:
    """Relative features by every method, for the samples that are not landmarks."""
    n = len(next(iter(features.values())))
    features = same_width(features)
    queries = np.setdiff1d(np.arange(n), landmarks)
    by_method, sigma = {}, {}
    tick(VARIANCE)
    by_method[VARIANCE] = {name: variance_scaled_rows(x, landmarks, queries) for name, x in features.items()}
    indices = tuple(landmarks.tolist())
    for method in METHODS:
        tick(method)
        aligned = {name: _align_one(x, indices, method) for name, x in features.items()}
        by_method[method] = {name: np.asarray(rows)[queries] for name, (rows, _) in aligned.items()}
        if method == AUTO_SCALED:
            sigma = {name: float(bandwidth) for name, (_, bandwidth) in aligned.items()}
    return Rows(by_method, sigma, landmarks, queries)


@partial(jax.jit, static_argnames=("landmarks", "method"))
def _align_one(x: jax.Array, landmarks: tuple[int, ...], method: str) -> tuple[jax.Array, jax.Array]:
    """Relative features and sigma of one network.

    With fixed landmarks `align` treats networks independently. One by one, they all share one compiled program.
    """
    alignment = align({"x": x}, landmarks=np.array(landmarks), **METHODS[method])
    return alignment.features["x"], alignment.sigma["x"]


def same_width(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features padded with channels of zeros to one shape, so that programs are compiled once.

    A channel of zeros changes no distance, and no statistics of other channels.
    """
    width = max(x.shape[1] for x in features.values())
    return {name: padded(x, width) for name, x in features.items()}


def score(rows: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]], csls: int | None = None) -> Score:
    """Mean scores over pairs of representations, in both directions."""
    results = [compiled_correspondence(rows[a], rows[b], csls) for a, b in _both_ways(pairs)]
    top1, top5, mrr = ([float(getattr(result, part)) for result in results] for part in ("top1", "top5", "mrr"))
    return float(np.mean(top1)), float(np.mean(top5)), float(np.mean(mrr))


def ridge_score(
    features: Mapping[str, np.ndarray], rows: Rows, pairs: Sequence[tuple[str, str]], csls: int | None = None
) -> Score:
    """Mean scores of the fitted map over pairs of representations, in both directions."""
    width = max(x.shape[1] for x in features.values())
    sides = {
        name: prepare_ridge(features[name], rows.landmarks, rows.queries, width)
        for name in dict.fromkeys(itertools.chain(*pairs))
    }
    scores = [best_ridge(sides[a], sides[b], csls) for a, b in _both_ways(pairs)]
    top1, top5, mrr = np.mean(scores, 0)
    return float(top1), float(top5), float(mrr)


def _both_ways(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for a, b in pairs for pair in ((a, b), (b, a))]


@dataclass(frozen=True)
class DigitReport:
    """Scores of each method over all pairs of networks, and the relative features."""

    data: DigitFeatures
    rows: Rows
    scores: dict[str, Score]


@dataclass(frozen=True)
class PatchReport:
    """Mean scores of each method over the images, of the pairs of networks and of each control with the networks."""

    data: PatchFeatures
    rows: list[Rows]  # one per image
    scores: dict[str, Score]
    controls: dict[str, dict[str, Score]]  # by control, then by method
    layers: dict[str, Score]  # of each layer with all layers of other networks, decorrelated


@dataclass(frozen=True)
class MatchReport:
    """Matchings of the shuffled digits, by number of landmarks and by what `match` does."""

    data: DigitFeatures
    places: np.ndarray  # (n, networks) where each digit is among the shuffled samples of a network
    matchings: dict[int, dict[str, Matching]]

    @property
    def scores(self) -> dict[int, dict[str, MatchScore]]:
        """Mean scores over all pairs of networks, in both directions."""
        return {
            number: {name: matching.score(self.places) for name, matching in by_name.items()}
            for number, by_name in self.matchings.items()
        }


def report_digits(tick: Callable[[str], None]) -> DigitReport:
    """1000 digits: 300 random landmarks; the other 700 are matched between all pairs of networks."""
    data = load_digit_features()
    n = len(data.labels)
    landmarks = np.sort(np.asarray(jax.random.choice(jax.random.key(0), n, (DIGIT_LANDMARKS,), replace=False)))
    rows = relative_rows(data.features, landmarks, lambda method: tick(f"digits: {method}"))
    pairs = list(itertools.combinations(data.features, 2))
    scores = {}
    tick("digits: raw features")
    same_shape = [(a, b) for a, b in pairs if data.features[a].shape == data.features[b].shape]
    if same_shape:
        queries = {name: x[rows.queries] for name, x in data.features.items()}
        scores[f"raw features ({len(same_shape)} of {len(pairs)} pairs: equal width)"] = score(queries, same_shape)
    scores |= _scores_by_method(rows, pairs)
    tick("digits: ridge map")
    scores[RIDGE] = ridge_score(data.features, rows, pairs)
    scores[f"{RIDGE} + CSLS"] = ridge_score(data.features, rows, pairs, csls=10)
    return DigitReport(data, rows, scores)


def report_patches(tick: Callable[[str], None]) -> PatchReport:
    """Each photograph separately: 128 of its 256 patches are landmarks (a checkerboard); the others are matched."""
    data = load_patch_features()
    all_features = {**data.features, POSITION: data.positions.astype(np.float32)}
    controls = (POSITION, *data.controls)
    pairs = {"": list(itertools.combinations(PATCH_NETWORKS, 2))}
    pairs |= {control: [(control, name) for name in PATCH_NETWORKS] for control in controls}
    trained = [name for name in data.features if name not in data.controls]
    across = {a: [(a, b) for b in trained if network_of(a) != network_of(b)] for a in (*trained, *controls)}
    all_rows, scores, layers = [], [], []
    for number, image_name in enumerate(data.picture_names):
        in_image = data.picture_index == number
        features = {name: x[in_image] for name, x in all_features.items()}
        landmarks = np.flatnonzero(data.positions[in_image].sum(-1) % 2 == 0)
        rows = relative_rows(features, landmarks, lambda method, name=image_name: tick(f"{name}: {method}"))
        tick(f"{image_name}: ridge map")
        scores.append(
            {
                control: _scores_by_method(rows, subset) | {RIDGE: ridge_score(features, rows, subset)}
                for control, subset in pairs.items()
            }
        )
        layers.append({name: score(rows.by_method[DECORRELATED], subset) for name, subset in across.items()})
        all_rows.append(rows)
    means = {control: _mean([by_control[control] for by_control in scores]) for control in pairs}
    return PatchReport(data, all_rows, means.pop(""), means, _mean(layers))


def report_matches(numbers: Sequence[int], tick: Callable[[str], None]) -> MatchReport:
    """The same 1000 digits, in an order of its own in each network, are matched from each number of landmarks."""
    data, rng = load_digit_features(), np.random.default_rng(0)
    features, places = shuffled(data.features, rng)
    drawn = places[rng.permutation(len(places))]
    matchings: dict[int, dict[str, Matching]] = {}
    for number in dict.fromkeys(numbers):
        matchings[number] = {}
        for name, how in MATCHINGS.items():
            tick(f"matches, {number} landmarks: {name}")
            matchings[number][name] = match(features, landmarks=drawn[:number], **how)
    return MatchReport(data, places, matchings)


def shuffled(features: Mapping[str, np.ndarray], rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Samples of each network in a random order, and the place of each sample in each network, (n, networks)."""
    orders = {name: rng.permutation(len(x)) for name, x in features.items()}
    return {name: features[name][order] for name, order in orders.items()}, np.argsort(list(orders.values())).T


def network_of(name: str) -> str:
    """The network of a layer: the first word of its name."""
    return name.split()[0]


def _scores_by_method(rows: Rows, pairs: Sequence[tuple[str, str]]) -> dict[str, Score]:
    scores = {method: score(by_name, pairs) for method, by_name in rows.by_method.items()}
    return scores | {CSLS: score(rows.by_method[DECORRELATED], pairs, csls=10)}


def _mean(parts: list[dict[str, Score]]) -> dict[str, Score]:
    means = {name: np.mean([part[name] for part in parts], 0) for name in parts[0]}
    return {name: (float(m[0]), float(m[1]), float(m[2])) for name, m in means.items()}


def steps(numbers: Sequence[int]) -> int:
    """The number of ticks of all reports, for a progress bar, where matches have these numbers of landmarks."""
    digits, patches, images = len(METHODS) + 3, len(METHODS) + 2, 3
    return digits + patches * images + len(MATCHINGS) * len(set(numbers))
