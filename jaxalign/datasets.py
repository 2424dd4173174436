"""Features of real networks that ship with the library: small, read with NumPy, without a download.

`load_patch_features` has one sample for each patch of three photographs, `load_digit_features` one
for each of 1000 handwritten digits. The samples are the same, in the same order, in every set of a
file, so that any two sets can be compared or aligned row by row. `examples/extract_features.py`
makes the files, `jaxalign/data/README.md` says where networks and pictures come from.
"""

# The project's docstrings are of the Google style, these of NumPy's, whose titles have no colon.

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

_GRID = (16, 16)
_FEATURES = "features/"


@dataclass(frozen=True, eq=False, repr=False)
class PatchFeatures:
    """Features of the 768 patches of three photographs: a 16 x 16 grid on each.

    Row i of every set is the patch at `positions[i]` of `pictures[picture_index[i]]`. Patches run
    over the pictures, then the rows of the grid, then its columns: `features[name].reshape(3, 16,
    16, -1)` is a map of each picture.

    Attributes:
        features: By the name of the set, float32 of shape (768, channels); stored as float16.
        pictures: uint8, shape (3, 224, 224, 3), RGB. A patch covers 14 x 14 pixels.
        picture_names: The names of the three pictures.
        picture_index: Integers, shape (768,): the picture of a patch.
        positions: Integers, shape (768, 2): row and column of a patch in its grid.
        grid: Rows and columns of the grid, (16, 16).
        controls: The sets of a network that was never trained.
        provenance: By the name of the set, its network, package, version, layer and preprocessing.
        licenses: By the name of the set or picture.
    """

    features: Mapping[str, np.ndarray]
    pictures: np.ndarray
    picture_names: tuple[str, ...]
    picture_index: np.ndarray
    positions: np.ndarray
    grid: tuple[int, int]
    controls: tuple[str, ...]
    provenance: Mapping[str, str]
    licenses: Mapping[str, str]

    def __repr__(self) -> str:
        from jaxalign._repr import short_repr  # not at the top: the module alone needs numpy only

        return short_repr(self, omit=("provenance", "licenses"))


@dataclass(frozen=True, eq=False, repr=False)
class DigitFeatures:
    """Features of 1000 handwritten digits, one vector for each digit and network.

    Row i of every set is the digit `images[i]`, which shows `labels[i]`.

    Attributes:
        features: By the name of the set, float32 of shape (1000, channels); stored as float16.
        images: uint8, shape (1000, 8, 8), 0 (paper) to 16 (ink).
        labels: Integers, shape (1000,), 0 to 9.
        provenance: By the name of the set, its network, package, version, layer and preprocessing.
        licenses: By the name of the set, and of the images as "digits".
    """

    features: Mapping[str, np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    provenance: Mapping[str, str]
    licenses: Mapping[str, str]

    def __repr__(self) -> str:
        from jaxalign._repr import short_repr  # not at the top: the module alone needs numpy only

        return short_repr(self, omit=("provenance", "licenses"))


def load_patch_features() -> PatchFeatures:
    """Load features of four networks, and an untrained control, for patches of three photographs.

    Returns:
        The features and what belongs to them. Every call reads the file anew and returns fresh
        arrays.

    Example:
        >>> from jaxalign.datasets import load_patch_features
        >>> patches = load_patch_features()
        >>> patches.features["vit-s14 layer 8"].shape
        (768, 384)
        >>> patches.picture_names
        ('astronaut', 'chelsea', 'coffee')
        >>> patches.positions[17].tolist()
        [1, 1]
    """
    arrays, text = _read("patch_features.npz")
    picture_names = tuple(text["data"])
    index = np.indices((len(picture_names), *_GRID)).reshape(3, -1)
    return PatchFeatures(
        features=_features(arrays),
        pictures=arrays["pictures"],
        picture_names=picture_names,
        picture_index=index[0],
        positions=index[1:].T.copy(),
        grid=_GRID,
        controls=tuple(name for name, one in text["sets"].items() if one["control"]),
        provenance=_provenance(text),
        licenses=_licenses(text),
    )


def load_digit_features() -> DigitFeatures:
    """Load features of four networks for 1000 handwritten digits.

    Returns:
        The features and what belongs to them. Every call reads the file anew and returns fresh
        arrays.

    Example:
        >>> from jaxalign.datasets import load_digit_features
        >>> digits = load_digit_features()
        >>> for name, features in digits.features.items():
        ...     print(name, features.shape)
        vit-s14 layer 8 (1000, 384)
        efficientnet-lite0 block 10 (1000, 112)
        mobilenet-v2 block 13 (1000, 96)
        pp-ocrv4 stride 16 (1000, 96)
        >>> digits.labels.shape
        (1000,)
    """
    arrays, text = _read("digit_features.npz")
    return DigitFeatures(
        features=_features(arrays),
        images=arrays["images"],
        labels=arrays["labels"].astype(np.int64),
        provenance=_provenance(text),
        licenses=_licenses(text),
    )


def _read(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file, and its metadata: {"sets": {name: ...}, "data": {name: ...}}."""
    with (
        (resources.files("jaxalign") / "data" / name).open("rb") as stream,
        np.load(stream, allow_pickle=False) as file,
    ):
        arrays = dict(file)
    return arrays, json.loads(arrays["metadata"].item())


def _features(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        key.removeprefix(_FEATURES): array.astype(np.float32)
        for key, array in arrays.items()
        if key.startswith(_FEATURES)
    }


def _provenance(text: Mapping[str, Any]) -> dict[str, str]:
    return {name: one["provenance"] for name, one in text["sets"].items()}


def _licenses(text: Mapping[str, Any]) -> dict[str, str]:
    return {name: one["licence"] for name, one in {**text["sets"], **text["data"]}.items()}
