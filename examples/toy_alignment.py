"""What relative features survive: 30 points on a plane, moved, stretched, spoilt by outliers, bent by a network.

Two networks see the same things, but nothing says where each puts them: one point set may be a rotated, shrunken,
shifted copy of the other. Coordinates then cannot be compared. A point's affinities to the other points can, if their
bandwidth follows the set. This script makes a first set of three clusters and five second sets from it, and looks up
every point of the first in the second:

    moved       rotated by 45 degrees, scaled by 1/4, shifted by 10
    stretched   moved, then scaled by 1/4 along one axis and by 4 along the other
    flattened   moved, then scaled by 1/1000 along one axis
    outliers    moved, then two of the 30 points thrown out to 50
    network     through a random network, 2-32-32-2 with tanh

in five ways:

    before            the coordinates themselves, the nearest is the one at the smallest distance
    variance-scaled   affinities exp(-D / (2 sigma^2)), sigma = the standard deviation of the features (the root of
                      the variance, averaged over the two coordinates): a usual heuristic
    auto-scaled       affinities with the sigma at which their mean is 0.2
    per row           the same, but each point has its own sigma
    standardized      auto-scaled after each coordinate was divided by its standard deviation, channels="standardize"

A point's affinity with itself is 1 in both sets, which would give every match away. So half of the points, five a
cluster, are landmarks; the relative feature of each of the other 15 is its row of affinities to the landmarks, and only
these 15 are looked up, by the correlation of the rows. Two scores are counted: the share whose best row in the second
set is the same point (chance: 1/15), and the share whose best row is a point of the same cluster (chance: 1/3).

The mean is 0.2 and not the default 0.05, because with 15 landmarks the ones on the diagonal alone give 1/15. With three
equal clusters 0.2 is reached when the points of a cluster have an affinity of about 0.6 and clusters do not touch.

    python examples/toy_alignment.py                    # prints the table, writes toy_alignment/toy_alignment.png
    python examples/toy_alignment.py --out elsewhere --draws 100

The table shows the means over several random draws, because 15 points are few; the figure shows the first draw.

What to look for. Rotation, scale and shift leave every affinity as it was. Two outliers blow up the standard deviation,
so that all other points look alike under it; the mean affinity hardly notices them. A stretch changes which points are
near, and no single sigma can undo that: auto-scaling then finds a few points more than the variance, and no more
clusters. Standardizing undoes any stretch along the axes: moved, stretched and flattened score the same. But it is a
stretch itself, along other axes in each of two sets that are rotated against each other: where stretched rises to,
moved falls to. (For what it does to the features of real networks see docs/pages/alignment.md.)
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
QUERIES = LANDMARKS + 1  # the others: the ones that are looked up
OUTLIERS = LANDMARKS[[0, 5]]  # two landmarks, of different clusters, so that every query still has its partner
DENSITY = 0.2
PLAIN = {"channels": None, "decorrelate": None, "standardize": False}  # rows of the affinity as they are

BEFORE, VARIANCE, AUTO, PER_ROW, STANDARDIZED = (
    "before",
    "variance-scaled",
    "auto-scaled",
    "per row",
    "standardized",
)
METHODS = (BEFORE, VARIANCE, AUTO, PER_ROW, STANDARDIZED)
COLOURS = ("#0072b2", "#e69f00", "#009e73")  # told apart with colour-blind eyes too


class Score(NamedTuple):
    """Shares of the queries, 0 to 1."""

    point: float
    cluster: float


@dataclass(frozen=True)
class Outcome:
    """One method on one pair of sets: the relative features that were compared, shape (15, 15), and their score."""

    first: np.ndarray
    second: np.ndarray
    score: Score


def draw_points(seed: int) -> np.ndarray:
    """The first set: three blobs of ten points with standard deviation 1, centres uniform in a square of side 20."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-10, 10, (CLUSTERS, 2))
    return centres[CLUSTER] + rng.normal(size=(len(CLUSTER), 2))


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
    """A network 2-32-32-2 with tanh and random weights, always the same, on features of mean 0 and variance 1."""
    rng = np.random.default_rng(1)
    x = (x - x.mean(0)) / x.std()
    for width in (32, 32):
        x = np.tanh(x @ rng.normal(size=(x.shape[1], width)) / np.sqrt(x.shape[1]))
    return x @ rng.normal(size=(x.shape[1], 2)) / np.sqrt(x.shape[1])


def compare(first: np.ndarray, second: np.ndarray) -> dict[str, Outcome]:
    """All five methods on one pair of sets."""
    sets = {"first": first.astype(np.float32), "second": second.astype(np.float32)}
    outcomes = {BEFORE: look_up(*(x[QUERIES] for x in sets.values()), metric="euclidean")}

    def variance_scaled(x: np.ndarray) -> np.ndarray:
        sigma = np.sqrt(np.mean(np.var(x[LANDMARKS], axis=0)))
        return np.asarray(jaxalign.rbf_affinity(x[QUERIES], x[LANDMARKS], sigma))

    outcomes[VARIANCE] = look_up(*(variance_scaled(x) for x in sets.values()))
    for method, settings in {
        AUTO: {},
        PER_ROW: {"bandwidth": "per_row"},
        STANDARDIZED: {"channels": "standardize"},
    }.items():
        alignment = jaxalign.align(sets, landmarks=LANDMARKS, density=DENSITY, **{**PLAIN, **settings})
        outcomes[method] = look_up(*(np.asarray(rows)[QUERIES] for rows in alignment.features.values()))
    return outcomes


def look_up(first: np.ndarray, second: np.ndarray, metric: jaxalign.alignment.Metric = "correlation") -> Outcome:
    """Look up every query of the first set among those of the second."""
    found = jaxalign.correspondence(first, second, metric=metric)
    cluster = CLUSTER[QUERIES]
    same = cluster[np.asarray(found.index)] == cluster
    return Outcome(first, second, Score(float(found.top1), float(np.mean(same))))


def mean_scores(draws: Sequence[dict[str, dict[str, Outcome]]]) -> dict[str, dict[str, Score]]:
    """Mean score by second set and method over draws."""

    def mean(name: str, method: str) -> Score:
        scores = np.array([draw[name][method].score for draw in draws])
        return Score(*(float(share) for share in scores.mean(0)))

    return {name: {method: mean(name, method) for method in METHODS} for name in draws[0]}


def table(scores: dict[str, dict[str, Score]]) -> str:
    """The scores in per cent, one line a second set."""
    lines = ["per cent found: same point / same cluster", ""]
    lines.append(f"{'':12}" + "".join(f"{method:>17}" for method in METHODS))
    for name, by_method in scores.items():
        cells = [f"{100 * score.point:.0f} / {100 * score.cluster:3.0f}" for score in by_method.values()]
        lines.append(f"{name:12}" + "".join(f"{cell:>17}" for cell in cells))
    lines.append(f"{'chance':12}{f'{100 / len(QUERIES):.0f} / {100 / CLUSTERS:3.0f}':>17}")
    return "\n".join(lines)


def draw_figure(first: np.ndarray, seconds: dict[str, np.ndarray], outcomes: dict[str, dict[str, Outcome]]) -> Figure:
    """Left the first set, right of it the second sets; below each the relative features that were compared."""
    affine = METHODS[1:]
    figure = Figure(figsize=(2.05 * (1 + len(seconds)) + 0.8, 2.2 * (1 + len(affine))), layout="constrained")
    axes = figure.subplots(1 + len(affine), 1 + len(seconds))
    any_outcome = next(iter(outcomes.values()))
    draw_set(axes[0, 0], first, "first set")
    axes[0, 0].set_ylabel("coordinates\n(dot: query, ring: landmark)", fontsize=8.5)
    for column, (name, second) in enumerate(seconds.items(), 1):
        draw_set(axes[0, column], second, name)
        axes[0, column].set_xlabel(caption(outcomes[name][BEFORE].score), fontsize=8.5)
    for row, method in enumerate(affine, 1):
        draw_affinity(axes[row, 0], any_outcome[method].first)
        axes[row, 0].set_ylabel(method)
        for column, name in enumerate(seconds, 1):
            image = draw_affinity(axes[row, column], outcomes[name][method].second)
            axes[row, column].set_xlabel(caption(outcomes[name][method].score), fontsize=8.5)
    bar = figure.colorbar(image, ax=axes[1:, :], shrink=0.4, aspect=30, pad=0.01)
    bar.set_label("affinity of a query (row) to a landmark (column)")
    figure.suptitle(
        "Relative features of the first set (left) and of five second sets made from it: "
        "a method survives a change if the picture stays the same along its row",
        fontsize=11,
    )
    return figure


def caption(score: Score) -> str:
    """A score in words."""
    return f"point {100 * score.point:.0f} %, cluster {100 * score.cluster:.0f} %"


def draw_set(axes: Axes, points: np.ndarray, title: str) -> None:
    """Points coloured by cluster, landmarks as rings."""
    colours = np.array(COLOURS)[CLUSTER]
    axes.scatter(*points[QUERIES].T, s=14, c=colours[QUERIES])
    axes.scatter(*points[LANDMARKS].T, s=22, facecolors="none", edgecolors=colours[LANDMARKS])
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
    """Print the table and write the figure into the folder `out`.

    Args:
        out: folder, made if it is not there.
        draws: how many random draws of the points the table averages over, at least 1.

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
    print(f"\nmeans over {draws} draws; the first draw is in {out / 'toy_alignment.png'}")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Relative features of 30 points under five changes of the plane.")
    parser.add_argument("--out", type=Path, default=Path("toy_alignment"), help="folder for the figure")
    parser.add_argument("--draws", type=int, default=20, help="random draws that the table averages over")
    arguments = parser.parse_args()
    main(arguments.out, arguments.draws)
