"""Colours of the same patches in several networks, before and after alignment, and a number for how well they agree."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxalign.alignment import align
from jaxalign.colors import ColorMethod, rgb
from jaxalign.report.baselines import standardized, variance_scaled_rows
from jaxalign.report.demo import RECOMMENDED
from jaxalign.spectral import NormalizedCut, normalized_cut

Colors = dict[str, Float[np.ndarray, "n 3"]]
Features = Mapping[str, Float[np.ndarray, "n _"]]
COMPONENTS = 8


def own_colors(features: Features, method: ColorMethod = "rotate") -> Colors:
    """Before alignment: every network's own cut, of its standardised features, in colours of its own."""
    found = {}
    for name, x in features.items():
        cut = normalized_cut(standardized(x).astype(np.float32), COMPONENTS, kind="features", bandwidth="per_row")
        found[name] = np.asarray(rgb(cut, method))
    return found


def joint_cut(
    features: Features,
    landmarks: Int[np.ndarray, " m"],
    *,
    bandwidth: Any = "per_row",
    density: float = 0.05,
    **options: Any,
) -> NormalizedCut:
    """One cut of the relative features of all networks.

    Args:
        features: of each network, for the same samples.
        landmarks: which samples all are described by.
        bandwidth: of the joint affinity.
        density: of the joint affinity.
        options: of `jaxalign.align`; the recommended ones where none are given.
    """
    alignment = align(features, landmarks=landmarks, standardize=True, **(options or RECOMMENDED))
    return normalized_cut(alignment, COMPONENTS, bandwidth=bandwidth, density=density)


def joint_colors(
    features: Features, landmarks: Int[np.ndarray, " m"], method: ColorMethod = "rotate", **options: Any
) -> Colors:
    """After alignment: the colours of the joint cut, one map for all networks; options are those of `joint_cut`."""
    return _split(np.asarray(rgb(joint_cut(features, landmarks, **options), method)), features)


def variance_scaled_colors(features: Features, landmarks: Int[np.ndarray, " m"]) -> Colors:
    """One cut of affinities to the landmarks with the usual bandwidth: what scaling by the variance gives."""
    everyone = np.arange(len(next(iter(features.values()))))
    rows = np.concatenate([variance_scaled_rows(x, landmarks, everyone) for x in features.values()])
    cut = normalized_cut(rows.astype(np.float32), COMPONENTS, kind="features", bandwidth="per_row")
    return _split(np.asarray(rgb(cut)), features)


def _split(stacked: np.ndarray, features: Features) -> Colors:
    return dict(zip(features, np.split(stacked, len(features)), strict=True))


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
