"""Colors of the same patches in several networks, before and after alignment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxalign.alignment import align
from jaxalign.colors import ColorMethod, rgb
from jaxalign.images import cut_rows
from jaxalign.report.baselines import standardized
from jaxalign.spectral import NormalizedCut

Colors = dict[str, Float[np.ndarray, "n 3"]]
Features = Mapping[str, Float[np.ndarray, "n _"]]
COMPONENTS = 8


def separate_colors(features: Features, method: ColorMethod = "rotate") -> Colors:
    """Before alignment: the standardized features of each network are cut and colored separately."""
    colors = {}
    for name, x in features.items():
        cut = cut_rows(standardized(x).astype(np.float32), COMPONENTS)
        colors[name] = np.asarray(rgb(cut, method))
    return colors


def joint_cut(
    features: Features, landmarks: Int[np.ndarray, " m"], options: Mapping[str, Any] | None = None
) -> NormalizedCut:
    """One cut of the relative features of all networks.

    Args:
        features: the features of each network, for the same samples.
        landmarks: indices of the landmarks.
        options: options of `jaxalign.align`.
    """
    return cut_rows(align(features, landmarks=landmarks, **(options or {})).stacked, COMPONENTS)


def joint_colors(
    features: Features,
    landmarks: Int[np.ndarray, " m"],
    options: Mapping[str, Any] | None = None,
    *,
    method: ColorMethod = "rotate",
) -> Colors:
    """After alignment: the colors of the joint cut, by one map for all networks. Options as in `joint_cut`."""
    return by_network(np.asarray(rgb(joint_cut(features, landmarks, options), method)), features)


def by_network(stacked: Float[np.ndarray, "stacked 3"], features: Features) -> Colors:
    """Split colors that are stacked network after network."""
    return dict(zip(features, np.split(stacked, len(features)), strict=True))


def checkerboard_landmarks(number_of_images: int, grid: tuple[int, int], most: int, seed: int) -> Int[np.ndarray, " m"]:
    """Random landmarks among every second position of all images, so that no two are neighbors."""
    candidates = np.flatnonzero(np.tile(checkerboard(grid), number_of_images))
    return np.sort(np.random.default_rng(seed).permutation(candidates)[:most])


def checkerboard(grid: tuple[int, int]) -> Bool[np.ndarray, " positions"]:
    """Every second position of a grid."""
    return np.indices(grid).sum(0).ravel() % 2 == 0
