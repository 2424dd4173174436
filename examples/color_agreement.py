"""The agreement of the colors of the same patches in two networks; used by case_study.py and sam_vs_dino.py.

It is 1 if the same patch has the same color in both, and 0 if its color is no closer than that of any other patch of
the image.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

import jaxalign
from jaxalign.report.baselines import variance_scaled_rows
from jaxalign.report.coloring import COMPONENTS, Colors, Features, by_network


def variance_scaled_colors(features: Features, landmarks: Int[np.ndarray, " m"]) -> Colors:
    """Colors of one cut of affinities to the landmarks, with a bandwidth scaled by the variance."""
    all_rows = np.arange(len(next(iter(features.values()))))
    rows = np.concatenate([variance_scaled_rows(x, landmarks, all_rows) for x in features.values()])
    cut = jaxalign.normalized_cut(rows.astype(np.float32), COMPONENTS, kind="features", bandwidth="per_row")
    return by_network(np.asarray(jaxalign.rgb(cut)), features)


@dataclass(frozen=True)
class Agreement:
    """The agreement of the colors of the same patch: 1 if equal, 0 if like those of any two patches of an image.

    Attributes:
        value: 1 - (mean color distance of the same patch) / (mean over all pairs of patches of the same image).
        p_value: the share of all flips and rotations of the images of one network that agree at least as well. Colors
            of any network change smoothly over an image, so exchanging single patches would be too weak a null.
    """

    value: float
    p_value: float


def agreement(
    colors: Colors,
    pairs: list[tuple[str, str]],
    images: Int[np.ndarray, " n"],
    positions: Int[np.ndarray, "n 2"],
) -> Agreement:
    """Mean agreement over pairs of networks, and its p-value.

    Args:
        colors: of each network, shape (n, 3), for the same patches, which are not landmarks.
        pairs: the networks to compare.
        images: the image of each patch.
        positions: the row and column of each patch.
    """
    distances = {pair: _distances(colors[pair[0]], colors[pair[1]], images) for pair in pairs}
    chance = np.mean([np.mean([block.mean() for block in blocks]) for blocks in distances.values()])
    blocks = [np.mean([distances[pair][k] for pair in pairs], 0) for k in range(len(next(iter(distances.values()))))]
    moved = [
        np.array([block[np.arange(len(block)), move].mean() for move in _moves(positions[images == image])])
        for image, block in zip(np.unique(images), blocks, strict=True)
    ]
    total = _combinations(moved)
    return Agreement(float(1 - total[0] / chance), float(np.mean(total <= total[0] + 1e-9)))


def _combinations(moved: list[np.ndarray], limit: int = 2**16) -> np.ndarray:
    """Mean distances of every combination of moves, or of `limit` random ones; that of no moves comes first."""
    if np.sum(np.log2([len(values) for values in moved])) > np.log2(limit):
        rng = np.random.default_rng(0)
        columns = [np.append(values[0], rng.choice(values, limit - 1)) for values in moved]
        return np.mean(columns, 0)
    total = np.zeros(1)
    for values in moved:
        total = np.ravel(total[:, None] + values[None] / len(moved))
    return total


def _moves(positions: np.ndarray) -> list[np.ndarray]:
    """The flips and rotations of the plane that map positions to themselves, as orders of the positions."""
    centered = 2 * positions - positions.min(0) - positions.max(0)
    place = {tuple(position): k for k, position in enumerate(centered)}
    moves = []
    for a, b in itertools.product((1, -1), repeat=2):
        for matrix in (np.array([[a, 0], [0, b]]), np.array([[0, a], [b, 0]])):
            images = [place.get(tuple(position)) for position in centered @ matrix]
            if None not in images:
                moves.append(np.array(images))
    return moves


def _distances(a: np.ndarray, b: np.ndarray, images: np.ndarray) -> list[np.ndarray]:
    """Distances between all colors of an image in one network and all in the other, image by image."""
    blocks = []
    for image in np.unique(images):
        in_image = images == image
        blocks.append(np.linalg.norm(a[in_image][:, None] - b[in_image][None], axis=-1))
    return blocks


def pairs_of_networks(names: list[str]) -> list[tuple[str, str]]:
    """All pairs of layers of different networks (the first word of a name)."""
    return [(a, b) for a, b in itertools.combinations(names, 2) if a.split()[0] != b.split()[0]]
