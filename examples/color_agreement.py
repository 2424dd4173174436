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
        p_value: by permutations of the patches of each image.
    """

    value: float
    p_value: float


def agreement(
    colors: Colors,
    pairs: list[tuple[str, str]],
    images: Int[np.ndarray, " n"],
    *,
    permutations: int = 999,
    seed: int = 0,
) -> Agreement:
    """Mean agreement over pairs of networks, and its permutation p-value.

    Args:
        colors: of each network, shape (n, 3), for the same patches, which are not landmarks.
        pairs: the networks to compare.
        images: the image of each patch.
        permutations: number of permutations of the patches within each image, the same for all pairs.
        seed: seed of the permutations.
    """
    distances = {pair: _distances(colors[pair[0]], colors[pair[1]], images) for pair in pairs}
    chance = np.mean([np.mean([block.mean() for block in blocks]) for blocks in distances.values()])
    rng = np.random.default_rng(seed)
    blocks = [np.mean([distances[pair][k] for pair in pairs], 0) for k in range(len(next(iter(distances.values()))))]
    same = np.mean([np.diagonal(block).mean() for block in blocks])
    shuffled = np.array(
        [
            np.mean([block[np.arange(len(block)), rng.permutation(len(block))].mean() for block in blocks])
            for _ in range(permutations)
        ]
    )
    return Agreement(float(1 - same / chance), float((1 + np.sum(shuffled <= same)) / (1 + permutations)))


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
