"""Small features of real networks that ship with the library: no download needed.

`load_patch_features` has one sample per patch of three photographs, `load_part_features` one per patch
of four crops whose parts are labeled, `load_digit_features` one per handwritten digit, of 1000. All
representations of a dataset have the same samples in the same order, so any two can be compared or
aligned row by row. `examples/extract_features.py` creates the files; `jaxalign/data/README.md`
documents the origin of networks and images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

_GRID = (16, 16)
_FINE_GRID = (32, 32)
_FEATURES = "features/"


@dataclass(frozen=True, eq=False, repr=False)
class PatchFeatures:
    """Features of the 768 patches of three photographs: a 16 x 16 grid on each.

    Row i of every representation is the patch at `positions[i]` of `pictures[picture_index[i]]`.
    Patches are ordered by picture, grid row and grid column: `features[name].reshape(3, 16, 16, -1)`
    holds a map of each picture.

    Attributes:
        features: Features by name, float32, shape (768, channels); stored as float16.
        pictures: The photographs, RGB, uint8, shape (3, 224, 224, 3). A patch is 14 x 14 pixels.
        picture_names: Names of the three photographs.
        picture_index: Index of the photograph of each patch, shape (768,).
        positions: Row and column of each patch in its grid, shape (768, 2).
        grid: Rows and columns of the grid, (16, 16).
        controls: Names of the features of an untrained network.
        provenance: Network, package, version, layer and preprocessing of the features by name.
        licenses: License of each representation and photograph by name.
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
        from jaxalign._repr import short_repr  # imported late: this module itself needs only NumPy

        return short_repr(self, omit=("provenance", "licenses"))


@dataclass(frozen=True, eq=False, repr=False)
class PartFeatures:
    """Features of the patches of four crops of photographs, on a 32 x 32 grid, with the parts that they show.

    Row i of every representation is the patch at `positions[i]` of `images[image_index[i]]`, ordered by
    image, grid row and grid column: `maps(name)` holds a map of each image.

    Attributes:
        features: Features by name, float32, shape (4096, channels): the leading principal components of
            all crops together, in the original channels.
        images: The crops, RGB, uint8, shape (4, 224, 224, 3).
        image_names: "portrait", "face", "cat" and "astronaut" (a whole photograph).
        image_index: Index of the crop of each patch, shape (4096,).
        positions: Row and column of each patch in its grid, shape (4096, 2).
        grid: Rows and columns of the grid, (32, 32).
        part_names: Names of the parts: hair, eyes, nose, mouth, background, ...
        part_index: Index of the part of each patch, from boxes drawn by hand; -1 outside of them.
        controls: Names of the features of an untrained network.
        provenance: Network, package, version, layer and preprocessing of the features by name.
        licenses: License of each representation and crop by name.
    """

    features: Mapping[str, np.ndarray]
    images: np.ndarray
    image_names: tuple[str, ...]
    image_index: np.ndarray
    positions: np.ndarray
    grid: tuple[int, int]
    part_names: tuple[str, ...]
    part_index: np.ndarray
    controls: tuple[str, ...]
    provenance: Mapping[str, str]
    licenses: Mapping[str, str]

    def __repr__(self) -> str:
        from jaxalign._repr import short_repr  # imported late: this module itself needs only NumPy

        return short_repr(self, omit=("part_names", "positions", "provenance", "licenses"))

    def maps(self, name: str) -> np.ndarray:
        """Features of a name as a map of each image, shape (4, 32, 32, channels)."""
        return self.features[name].reshape(len(self.images), *self.grid, -1)


@dataclass(frozen=True, eq=False, repr=False)
class DigitFeatures:
    """Features of 1000 handwritten digits, one vector per digit and network.

    Row i of every representation belongs to `images[i]`, which shows the digit `labels[i]`.

    Attributes:
        features: Features by name, float32, shape (1000, channels); stored as float16.
        images: The digits, uint8, shape (1000, 8, 8), 0 (paper) to 16 (ink).
        labels: The digits as integers from 0 to 9, shape (1000,).
        provenance: Network, package, version, layer and preprocessing of the features by name.
        licenses: License of each representation by name, and of the images as "digits".
    """

    features: Mapping[str, np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    provenance: Mapping[str, str]
    licenses: Mapping[str, str]

    def __repr__(self) -> str:
        from jaxalign._repr import short_repr  # imported late: this module itself needs only NumPy

        return short_repr(self, omit=("provenance", "licenses"))


def load_patch_features() -> PatchFeatures:
    """Load features of four networks and an untrained control for patches of three photographs.

    Returns:
        Features, photographs and metadata. Every call reads the file and returns new arrays.

    Examples:
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
        controls=tuple(name for name, entry in text["sets"].items() if entry["control"]),
        provenance=_provenance(text),
        licenses=_licenses(text),
    )


def load_part_features() -> PartFeatures:
    """Load features of three networks and an untrained control for crops of photographs with labeled parts.

    Returns:
        Features, images, parts and metadata. Every call reads the file and returns new arrays.

    Examples:
        >>> from jaxalign.datasets import load_part_features
        >>> parts = load_part_features()
        >>> parts.maps("vit-s14 layer 8").shape
        (4, 32, 32, 384)
        >>> parts.part_names[:5]
        ('hair', 'eyes', 'nose', 'mouth', 'background')
    """
    arrays, text = _read("part_features.npz")
    names = [key.removeprefix("scores/") for key in arrays if key.startswith("scores/")]
    index = np.indices((len(text["data"]), *_FINE_GRID)).reshape(3, -1)
    return PartFeatures(
        features={name: _decompress(arrays, name) for name in names},
        images=arrays["images"],
        image_names=tuple(text["data"]),
        image_index=index[0],
        positions=index[1:].T.copy(),
        grid=_FINE_GRID,
        part_names=tuple(arrays["part_names"].tolist()),
        part_index=arrays["parts"].astype(np.int64),
        controls=tuple(name for name, entry in text["sets"].items() if entry["control"]),
        provenance=_provenance(text),
        licenses=_licenses(text),
    )


def load_digit_features() -> DigitFeatures:
    """Load features of four networks for 1000 handwritten digits.

    Returns:
        Features, images and metadata. Every call reads the file and returns new arrays.

    Examples:
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


def _decompress(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Features from the leading principal components, which are stored with 8 bits."""
    scores, scale, axes, mean = (
        arrays[f"{part}/{name}"].astype(np.float32) for part in ("scores", "scale", "axes", "mean")
    )
    return (scores * scale) @ axes + mean


def _provenance(text: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["provenance"] for name, entry in text["sets"].items()}


def _licenses(text: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["licence"] for name, entry in {**text["sets"], **text["data"]}.items()}
