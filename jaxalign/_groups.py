"""Groups of dependent samples, such as the patches of an image or the tokens of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxalign import _arrays
from jaxalign._positions import Positions


def check_groups(groups: Any, named: Mapping[str, Any], positions: Positions | None) -> np.ndarray | None:
    """The number of the group of each row, (n,), from labels; None if every row is its own group.

    If each position is a sample, the default groups are the images or texts that positions belong to, and labels may
    have one entry per image instead of one per position.
    """
    shapes = [np.shape(value) for value in named.values()]
    per_image, images = 1, shapes[0][0]
    if positions == "samples":
        images, *inner, _ = next(shape for shape in shapes if len(shape) > 2)
        per_image = math.prod(inner)
    if groups is None:
        return np.repeat(np.arange(images, dtype=np.int32), per_image) if per_image > 1 else None
    if not _arrays.is_concrete(groups):
        raise TypeError("groups must be known when the function is traced; got a traced array. Call it outside of jit.")
    labels = _arrays.on_host(_arrays.array("groups", groups))
    rows = images * per_image
    if labels.shape not in ((rows,), (images,)):
        either = f"({rows},)" if rows == images else f"({rows},) or ({images},)"
        raise ValueError(f"groups must have shape {either}, a label for each sample; got {labels.shape}.")
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise ValueError(f"groups holds nan, at {int(np.flatnonzero(np.isnan(labels))[0])}: label every sample.")
    if len(labels) < rows:
        labels = np.repeat(labels, per_image)
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)
