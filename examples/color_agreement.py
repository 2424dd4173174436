"""How alike the colours of the same patch are in two networks, as a number: shared by case_study.py and sam_vs_dino.py.

1 where the same patch has the same colour in both, 0 where it is no closer than any other patch of the picture.
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
    """One cut of affinities to the landmarks with the usual bandwidth: what scaling by the variance gives."""
    everyone = np.arange(len(next(iter(features.values()))))
    rows = np.concatenate([variance_scaled_rows(x, landmarks, everyone) for x in features.values()])
    cut = jaxalign.normalized_cut(rows.astype(np.float32), COMPONENTS, kind="features", bandwidth="per_row")
    return by_network(np.asarray(jaxalign.rgb(cut)), features)


@dataclass(frozen=True)
class Agreement:
    """How alike the colours of the same patch are in two networks: 1 equal, 0 as those of any two patches of a picture.

    Attributes:
        value: 1 - (mean distance of the colours of the same patch) / (of all pairs of patches of the same picture).
        p_value: of the value among those with the patches of each picture shuffled.
    """

    value: float
    p_value: float


def agreement(
    colors: Colors,
    pairs: list[tuple[str, str]],
    pictures: Int[np.ndarray, " n"],
    *,
    permutations: int = 999,
    seed: int = 0,
) -> Agreement:
    """Mean agreement over pairs of networks, and its permutation p-value.

    Args:
        colors: of each network, shape (n, 3), of the same patches: those that were not landmarks.
        pairs: which networks are compared.
        pictures: which picture each patch is of.
        permutations: of the patches within each picture, the same for all pairs.
        seed: of the permutations.
    """
    apart = {pair: _distances(colors[pair[0]], colors[pair[1]], pictures) for pair in pairs}
    chance = np.mean([np.mean([block.mean() for block in blocks]) for blocks in apart.values()])
    rng = np.random.default_rng(seed)
    blocks = [np.mean([apart[pair][k] for pair in pairs], 0) for k in range(len(next(iter(apart.values()))))]
    same = np.mean([np.diagonal(block).mean() for block in blocks])
    shuffled = np.array(
        [
            np.mean([block[np.arange(len(block)), rng.permutation(len(block))].mean() for block in blocks])
            for _ in range(permutations)
        ]
    )
    return Agreement(float(1 - same / chance), float((1 + np.sum(shuffled <= same)) / (1 + permutations)))


def _distances(a: np.ndarray, b: np.ndarray, pictures: np.ndarray) -> list[np.ndarray]:
    """Distances of all colours of a picture in one network from all in the other, picture by picture."""
    blocks = []
    for picture in np.unique(pictures):
        here = pictures == picture
        blocks.append(np.linalg.norm(a[here][:, None] - b[here][None], axis=-1))
    return blocks


def pairs_of_networks(names: list[str]) -> list[tuple[str, str]]:
    """All pairs of sets that are of different networks (the first word of a name)."""
    return [(a, b) for a, b in itertools.combinations(names, 2) if a.split()[0] != b.split()[0]]
