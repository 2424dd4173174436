"""Robustness of relative features: 30 points on a plane, moved, stretched, with outliers, or mapped by a network.

Two networks may place the same samples anywhere: one point set may be a rotated, scaled, shifted copy of the other.
Coordinates then cannot be compared. The affinities of a point to other points can, if their bandwidth adapts to the
point set. This script draws a first set of three clusters and makes five second sets from it:

    moved       rotated by 45 degrees, scaled by 1/4, shifted by 10
    stretched   moved, then scaled by 1/4 along one axis and by 4 along the other
    flattened   moved, then scaled by 1/1000 along one axis
    outliers    moved, then two of the 30 points moved to 50
    network     mapped by a random network, 2-32-32-2 with tanh

It then matches every point of the first set with a point of the second set, in five ways:

    before            by the distance of coordinates
    variance-scaled   affinities exp(-D / (2 sigma^2)), sigma = the standard deviation of the features (the root of
                      the variance, averaged over the two coordinates): a common heuristic
    auto-scaled       affinities with the sigma at which their mean is 0.2
    per row           the same with one sigma per point
    standardized      auto-scaled after dividing each coordinate by its standard deviation, channels="standardize"

The affinity of a point with itself is 1 in both sets and would reveal every match. So half of the points, five per
cluster, are landmarks. The relative feature of each of the other 15 points is its row of affinities to the landmarks;
only these 15 points are matched, by the correlation of rows. There are two scores: the share of points whose best match
is the same point (chance: 1/15), and the share whose best match is in the same cluster (chance: 1/3).

The mean is 0.2 instead of the default 0.05, because with 15 landmarks the ones on the diagonal alone contribute 1/15.
With three equal clusters that do not touch, it is 0.2 if affinities within a cluster are about 0.6.

    python examples/toy_alignment.py                    # prints the table, writes toy_alignment/toy_alignment.png
    python examples/toy_alignment.py --out elsewhere --draws 100

The table shows means over several random draws, because 15 points are few; the figure shows the first draw.

Results. Rotation, scale and shift do not change affinities. Two outliers inflate the standard deviation, so all other
points become similar under it; the mean affinity hardly changes. A stretch changes which points are near, and no single
sigma can undo that: auto-scaling then matches a few more points than the variance, but no more clusters. Standardizing
undoes any stretch along the axes, so moved, stretched and flattened have equal scores. But it is itself a stretch,
along different axes in two sets that are rotated against each other: it raises the score of stretched and lowers that
of moved to the same value. (For its effect on features of real networks see docs/pages/alignment.md.)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jaxalign

CLUSTERS, PER_CLUSTER = 3, 10
CLUSTER = np.repeat(np.arange(CLUSTERS), PER_CLUSTER)
LANDMARKS = np.arange(0, CLUSTERS * PER_CLUSTER, 2)  # every second point: five a cluster
QUERIES = LANDMARKS + 1  # the other points, which are matched
OUTLIERS = LANDMARKS[[0, 5]]  # two landmarks of different clusters, so that no query is an outlier
DENSITY = 0.2
PLAIN = {"channels": None, "decorrelate": None, "standardize": False}  # plain rows of the affinity

BEFORE, VARIANCE, AUTO, PER_ROW, STANDARDIZED = (
    "before",
    "variance-scaled",
    "auto-scaled",
    "per row",
    "standardized",
)
METHODS = (BEFORE, VARIANCE, AUTO, PER_ROW, STANDARDIZED)
COLORS = ("#0072b2", "#e69f00", "#009e73")  # color-blind safe


class Score(NamedTuple):
    """Shares of the queries, 0 to 1."""

    point: float
    cluster: float


@dataclass(frozen=True)
class Outcome:
    """One method on one pair of point sets: the relative features, shape (15, 15), and their score."""

    first: np.ndarray
    second: np.ndarray
    score: Score


def draw_points(seed: int) -> np.ndarray:
    """The first set: three blobs of ten points with standard deviation 1, centers uniform in a square of side 20."""
    rng = np.random.default_rng(seed)
    centers = rng.uniform(-10, 10, (CLUSTERS, 2))
    return centers[CLUSTER] + rng.normal(size=(len(CLUSTER), 2))


def second_sets(first: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The second sets by name; row i is the same point as row i of the first set."""
    angle = np.pi / 4
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = 0.25 * first @ rotation.T + 10
    outliers = moved.copy()
    outliers[OUTLIERS] = 50 + 0.25 * np.random.default_rng(seed).normal(size=(len(OUTLIERS), 2))
    return {
        "moved": moved,
        "stretched": moved * [0.25, 4],
        "flattened": moved * [0.001, 1],
        "outliers": outliers,
        "network": random_network(first),
    }


def random_network(x: np.ndarray) -> np.ndarray:
    """A network 2-32-32-2 with tanh and fixed random weights, on features of mean 0 and variance 1."""
    rng = np.random.default_rng(1)
    x = (x - x.mean(0)) / x.std()
    for width in (32, 32):
        x = np.tanh(x @ rng.normal(size=(x.shape[1], width)) / np.sqrt(x.shape[1]))
    return x @ rng.normal(size=(x.shape[1], 2)) / np.sqrt(x.shape[1])


def compare(first: np.ndarray, second: np.ndarray) -> dict[str, Outcome]:
    """All five methods on one pair of point sets."""
    features = {"first": first.astype(np.float32), "second": second.astype(np.float32)}
    outcomes = {BEFORE: match_queries(*(x[QUERIES] for x in features.values()), metric="euclidean")}

    def variance_scaled(x: np.ndarray) -> np.ndarray:
        sigma = np.sqrt(np.mean(np.var(x[LANDMARKS], axis=0)))
        return np.asarray(jaxalign.rbf_affinity(x[QUERIES], x[LANDMARKS], sigma))

    outcomes[VARIANCE] = match_queries(*(variance_scaled(x) for x in features.values()))
    for method, settings in {
        AUTO: {},
        PER_ROW: {"bandwidth": "per_row"},
        STANDARDIZED: {"channels": "standardize"},
    }.items():
        alignment = jaxalign.align(features, landmarks=LANDMARKS, density=DENSITY, **{**PLAIN, **settings})
        outcomes[method] = match_queries(*(np.asarray(rows)[QUERIES] for rows in alignment.features.values()))
    return outcomes


def match_queries(first: np.ndarray, second: np.ndarray, metric: jaxalign.alignment.Metric = "correlation") -> Outcome:
    """Match every query of the first set with one of the second set."""
    matches = jaxalign.correspondence(first, second, metric=metric)
    cluster = CLUSTER[QUERIES]
    same = cluster[np.asarray(matches.index)] == cluster
    return Outcome(first, second, Score(float(matches.top1), float(np.mean(same))))


def mean_scores(draws: Sequence[dict[str, dict[str, Outcome]]]) -> dict[str, dict[str, Score]]:
    """Mean score by second set and method over draws."""

    def mean(name: str, method: str) -> Score:
        scores = np.array([draw[name][method].score for draw in draws])
        return Score(*(float(share) for share in scores.mean(0)))

    return {name: {method: mean(name, method) for method in METHODS} for name in draws[0]}


def table(scores: dict[str, dict[str, Score]]) -> str:
    """The scores in percent, one line per second set."""
    lines = ["percent matched with: the same point / the same cluster", ""]
    lines.append(f"{'':12}" + "".join(f"{method:>17}" for method in METHODS))
    for name, by_method in scores.items():
        cells = [f"{100 * score.point:.0f} / {100 * score.cluster:3.0f}" for score in by_method.values()]
        lines.append(f"{name:12}" + "".join(f"{cell:>17}" for cell in cells))
    lines.append(f"{'chance':12}{f'{100 / len(QUERIES):.0f} / {100 / CLUSTERS:3.0f}':>17}")
    return "\n".join(lines)


def draw_figure(first: np.ndarray, seconds: dict[str, np.ndarray], outcomes: dict[str, dict[str, Outcome]]) -> Figure:
    """The first set on the left, then the second sets; below each the relative features."""
    affinity_methods = METHODS[1:]
    figure = Figure(figsize=(2.05 * (1 + len(seconds)) + 0.8, 2.2 * (1 + len(affinity_methods))), layout="constrained")
    axes = figure.subplots(1 + len(affinity_methods), 1 + len(seconds))
    any_outcome = next(iter(outcomes.values()))
    draw_set(axes[0, 0], first, "original")
    axes[0, 0].set_ylabel("coordinates\n(dot: query, ring: landmark)", fontsize=8.5)
    for column, (name, second) in enumerate(seconds.items(), 1):
        draw_set(axes[0, column], second, name)
        axes[0, column].set_xlabel(caption(outcomes[name][BEFORE].score), fontsize=8.5)
    for row, method in enumerate(affinity_methods, 1):
        draw_affinity(axes[row, 0], any_outcome[method].first)
        axes[row, 0].set_ylabel(method)
        for column, name in enumerate(seconds, 1):
            image = draw_affinity(axes[row, column], outcomes[name][method].second)
            axes[row, column].set_xlabel(caption(outcomes[name][method].score), fontsize=8.5)
    bar = figure.colorbar(image, ax=axes[1:, :], shrink=0.4, aspect=30, pad=0.01)
    bar.set_label("affinity of queries (rows) to landmarks (columns)")
    figure.suptitle(
        "Affinities of the original points (left) and of five transformed copies: a method is robust if they agree "
        "along its row.\nBelow each copy: queries matched with the same point, and with the same cluster",
        fontsize=11,
    )
    return figure


def caption(score: Score) -> str:
    """A score as text."""
    return f"point {100 * score.point:.0f}%, cluster {100 * score.cluster:.0f}%"


def draw_set(axes: Axes, points: np.ndarray, title: str) -> None:
    """Points colored by cluster, landmarks as rings."""
    colors = np.array(COLORS)[CLUSTER]
    axes.scatter(*points[QUERIES].T, s=14, c=colors[QUERIES])
    axes.scatter(*points[LANDMARKS].T, s=22, facecolors="none", edgecolors=colors[LANDMARKS])
    axes.set_title(title)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
    axes.tick_params(labelsize=7)
    axes.locator_params(nbins=4)


def draw_affinity(axes: Axes, affinity: np.ndarray) -> object:
    """A matrix of affinities with lines between the clusters."""
    image = axes.imshow(affinity, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    for edge in np.flatnonzero(np.diff(CLUSTER[QUERIES])) + 0.5:
        axes.axhline(edge, color="white", linewidth=0.6)
        axes.axvline(edge, color="white", linewidth=0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def main(out: Path = Path("toy_alignment"), draws: int = 20) -> dict[str, dict[str, Score]]:
    """Print the table and write the figure to the folder `out`.

    Args:
        out: folder, created if needed.
        draws: number of random draws that the table averages over, at least 1.

    Returns:
        The mean scores, by second set and method.
    """
    results = []
    for seed in range(draws):
        points = draw_points(seed)
        seconds = second_sets(points, seed)
        results.append({name: compare(points, second) for name, second in seconds.items()})
    scores = mean_scores(results)
    print(table(scores))

    first = draw_points(0)
    figure = draw_figure(first, second_sets(first, 0), results[0])
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "toy_alignment.png", dpi=150)
    print(f"\nmeans over {draws} draws; figure of the first draw: {out / 'toy_alignment.png'}")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Relative features of 30 points under five changes of the plane.")
    parser.add_argument("--out", type=Path, default=Path("toy_alignment"), help="folder for the figure")
    parser.add_argument("--draws", type=int, default=20, help="number of random draws that the table averages over")
    arguments = parser.parse_args()
    main(arguments.out, arguments.draws)
