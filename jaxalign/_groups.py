"""Groups of dependent samples, such as the patches of an image or the tokens of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxalign import _arrays
from jaxalign._positions import Positions
from jaxalign._repr import shown


class Groups(NamedTuple):
    """The group of each sample, and its place there.

    Attributes:
        number: of the group, (n,), from 0, in the order in which groups appear.
        place: of the sample within its group, (n,), counted before samples are left out.
    """

    number: np.ndarray
    place: np.ndarray

    def take(self, kept: np.ndarray) -> Groups:
        """The groups of some samples."""
        return Groups(_numbered(self.number[kept]), self.place[kept])


def check_groups(groups: Any, named: Mapping[str, Any], positions: Positions | None) -> Groups | None:
    """The groups of rows, from a label for each; None if every row is its own group.

    If each position is a sample, the default groups are the images or texts that positions belong to, and labels may
    have one entry per image instead of one per position.
    """
    shapes = {name: np.shape(value) for name, value in named.items()}
    inner: tuple[int, ...] = ()
    images = next(iter(shapes.values()))[0]
    if positions == "samples":
        several = {name: shape for name, shape in shapes.items() if len(shape) > 2}
        images, *inner_list, _ = next(iter(several.values()))
        inner = tuple(inner_list)
        if len({shape[0] for shape in several.values()}) > 1:
            text = ", ".join(f"{name} {shape}" for name, shape in several.items())
            raise ValueError(f"representations must be of the same images or texts; got {text}.")
    per_image = math.prod(inner)
    if groups is None:
        return _grouped(np.repeat(np.arange(images), per_image)) if per_image > 1 else None
    labels = _labels(groups)
    rows = images * per_image
    if labels.shape == (images, *inner):
        labels = labels.reshape(-1)
    if labels.shape not in ((rows,), (images,)):
        either = f"({rows},)" if rows == images else f"({rows},) or ({images},)"
        raise ValueError(f"groups must have shape {either}, a label for each sample; got {labels.shape}.")
    return _grouped(np.repeat(labels, per_image) if len(labels) < rows else labels)


def _labels(groups: Any) -> np.ndarray:
    """Labels as an array that can be sorted, none of them missing."""
    if not _arrays.is_concrete(groups):
        raise TypeError("groups must be known when the function is traced; got a traced array. Call it outside of jit.")
    if isinstance(groups, np.ma.MaskedArray):
        raise TypeError(
            "groups is a masked array, whose mask would be lost. Leave its samples out by the mask of the function."
        )
    labels = _arrays.on_host(_arrays.array("groups", groups))
    is_missing = np.array([value is None or value != value for value in labels.ravel().tolist()], bool)
    is_missing |= np.isnat(labels.ravel()) if labels.dtype.kind in "mM" else False
    if is_missing.any():
        first = int(np.flatnonzero(is_missing)[0])
        raise ValueError(f"groups has no label at {first}: label every sample; those that are masked out may have any.")
    if labels.dtype == object:
        kinds = {type(value) for value in labels.ravel().tolist()}
        if len(kinds) > 1:
            raise TypeError(
                f"groups must hold labels of one type; got {shown(sorted(kind.__name__ for kind in kinds))}."
            )
    return labels


def _grouped(labels: np.ndarray) -> Groups:
    number = _numbered(labels)
    by_group = np.argsort(number, kind="stable")
    sizes = np.bincount(number)
    place = np.empty(len(number), np.int32)
    place[by_group] = np.arange(len(number)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return Groups(number, place)


def _numbered(labels: np.ndarray) -> np.ndarray:
    """Numbers of labels in the order in which they appear."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int32)
