"""Images in the colors of several networks: aligned, cut together and colored by one map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxalign import _arrays, _checks
from jaxalign._repr import short_repr
from jaxalign._typing import AnyArray, Data, Numbers
from jaxalign.alignment import Alignment, align
from jaxalign.colors import ColorMap, ColorMethod, fit_colors
from jaxalign.segments import nested_segments
from jaxalign.spectral import NormalizedCut, normalized_cut

# Up to this many rows of all networks the cut is exact; beyond, it is approximated from this many landmarks, which
# takes time and memory in proportion to the rows.
_EXACT = 4096
_CUT_LANDMARKS = 1024


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("colors", "alignment", "cut", "color_map", "images"),
    meta_fields=(),
)
@dataclass(frozen=True, eq=False, repr=False)
class ColoredImages:
    """Images in the colors of several networks, the result of `color_images`.

    Attributes:
        colors: red, green and blue from 0 to 1 by network, shape (images, h, w, 3).
        alignment: the relative features of all patches.
        cut: the joint cut: the patches of the first network, then of the second, ...
        color_map: the map from rows of the cut to colors.
        images: the images that were passed, for figures.
    """

    colors: dict[str, Float[Array, "images h w 3"]]
    alignment: Alignment
    cut: NormalizedCut
    color_map: ColorMap
    images: AnyArray | None = None

    def __repr__(self) -> str:
        return short_repr(self, omit=("images", "color_map", "alignment", "cut"))

    def transform(self, maps: Mapping[str, Numbers[Data, "q h w d"]]) -> dict[str, Float[Array, "q h w 3"]]:
        """Colors of new images, by the same landmarks, cut and map: the same part has the same color as before.

        Args:
            maps: maps of new images by network, shape (q, h, w, d), on any grid; one network or several.

        Returns:
            Colors by network, shape (q, h, w, 3).

        Raises:
            KeyError: a network that was not aligned.
            ValueError: maps with another number of channels, or not of shape (q, h, w, d).
        """
        colors = {}
        for name, value in maps.items():
            of_network = _check_maps(name, value)
            relative = self.alignment.transform(name, of_network.reshape(-1, of_network.shape[-1]))
            colors[name] = self.color_map(self.cut.transform(relative)).reshape(*of_network.shape[:-1], 3)
        return colors

    def segments(self, number: int | None = None) -> dict[str, Int[Array, "images h w"]]:
        """Segments, numbered the same in all images and networks, see `nested_segments`.

        Args:
            number: the number of segments, at most that of the components of the cut. Default: as many.

        Returns:
            Labels by network, shape (images, h, w).

        Raises:
            ValueError: more segments than components.
        """
        k = self.cut.eigenvectors.shape[1]
        number = k if number is None else _checks.whole("number", number, 1, k, most_is="the components of the cut, ")
        labels = nested_segments(self.cut)[number - 1]
        shape = next(iter(self.colors.values())).shape[:-1]
        return dict(zip(self.colors, labels.reshape(-1, *shape), strict=True))

    def figure(self) -> Any:
        """Draw the images and, below them, their colors in every network; see `plots.color_panels`.

        Returns:
            The figure of matplotlib.

        Raises:
            ImportError: without the extra [viz].
        """
        from jaxalign import plots

        return plots.color_panels({"": self.colors}, self.images, smooth=True)


def color_images(
    maps: Mapping[str, Numbers[Data, "_ _ _ _"]],
    images: AnyArray | None = None,
    *,
    landmarks: int | Int[AnyArray, " m"] = 512,
    num_components: int = 16,
    method: ColorMethod = "rotate",
    key: Array | None = None,
) -> ColoredImages:
    """Color the patches of images in several networks, so that the same part has the same color in all of them.

    The patches of all images are aligned over shared landmarks (`align`), the relative features of all networks are cut
    together with one bandwidth per row (`normalized_cut`), and one map gives rows their colors (`rgb`). Beyond 4096
    rows the cut is approximated from 1024 landmarks.

    Args:
        maps: {network: features of the patches, shape (images, h, w, d)}, channels last. The images are the same in all
            networks; maps of other grids are resized to the most rows and columns of any.
        images: the images themselves, shape (images, H, W, 3), for `ColoredImages.figure`: integers to 255, or numbers
            from 0 to 1.
        landmarks: the number of random patches that are landmarks, at most half, or their indices.
        num_components: the number of eigenvectors, and of columns that determine colors: few show large parts, more
            show details.
        method: how rows become colors, see `rgb`; not "tsne", which has no map for new images.
        key: a `jax.random.key` for the random choices. None: `jax.random.key(0)`.

    Returns:
        `ColoredImages`: colors by network, and `transform`, `segments` and `figure`.

    Raises:
        TypeError, ValueError: maps that are not (images, h, w, d), of different numbers of images, or with nan; see
            also `align`, `normalized_cut` and `rgb`.

    Examples:
        >>> import jaxalign
        >>> parts = jaxalign.datasets.load_part_features()
        >>> maps = {name: parts.maps(name)[:1, ::2, ::2] for name in ("vit-s14 layer 8", "pp-ocrv4 stride 16")}
        >>> colored = jaxalign.color_images(maps, parts.images[:1], landmarks=100)
        >>> colored.colors["vit-s14 layer 8"].shape
        (1, 16, 16, 3)
        >>> colored.transform({"vit-s14 layer 8": parts.maps("vit-s14 layer 8")[1:2]})["vit-s14 layer 8"].shape
        (1, 32, 32, 3)
    """
    if not isinstance(maps, Mapping) or not maps:
        raise TypeError(
            f"maps must be a mapping {{network: array}} of at least one network; got {type(maps).__name__}."
        )
    arrays = {name: _check_maps(name, value) for name, value in maps.items()}
    counts = {name: len(a) for name, a in arrays.items()}
    if images is not None:
        images = _check_images(images)
        counts["images"] = len(images)
    if len(set(counts.values())) > 1:
        raise ValueError(f"all networks must have the same images in the same order; got {counts}.")
    arrays = on_one_grid(arrays)
    shape = next(iter(arrays.values())).shape[:-1]
    features = {name: a.reshape(-1, a.shape[-1]) for name, a in arrays.items()}
    start = jax.random.key(0) if key is None else key
    _checks.random_key(start)
    if isinstance(landmarks, (int, np.integer)):
        number = min(int(landmarks), math.prod(shape) // 2)
        alignment = align(features, landmarks=number, key=start)
    else:
        alignment = align(features, landmarks=landmarks)
    cut = cut_rows(alignment.stacked, num_components, key=start)
    color_map = fit_colors(cut, method, num_components=num_components)
    colors = dict(zip(features, color_map(cut).reshape(len(features), *shape, 3), strict=True))
    return ColoredImages(colors, alignment, cut, color_map, images)


def cut_rows(
    x: Numbers[Data, "n d"], num_components: int, *, density: ArrayLike = 0.05, key: Array | None = None
) -> NormalizedCut:
    """The cut of rows with one sigma each: exact up to 4096 rows, beyond from 1024 landmarks.

    Args:
        x: rows, shape (n, d).
        num_components: the number of eigenvectors.
        density: see `rbf_affinity`.
        key: for the random choices.

    Returns:
        The cut, with a `transform`.

    Raises:
        ValueError: see `normalized_cut`.

    Examples:
        >>> import jax, jaxalign
        >>> jaxalign.images.cut_rows(jax.random.normal(jax.random.key(0), (60, 8)), 4).eigenvectors.shape
        (60, 4)
    """
    how: dict[str, Any] = {"method": "nystroem", "landmarks": _CUT_LANDMARKS} if np.shape(x)[0] > _EXACT else {}
    return normalized_cut(x, num_components, kind="features", density=density, bandwidth="per_row", key=key, **how)


def on_one_grid(maps: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """Maps resized bilinearly to the most rows and the most columns of any.

    Args:
        maps: maps by network, shape (images, h, w, d).

    Returns:
        Maps of one h and one w. Maps that have these already are returned as they are.

    Raises:
        No errors.

    Examples:
        >>> import numpy as np, jaxalign
        >>> maps = {"a": np.ones((2, 4, 9, 3)), "b": np.ones((2, 8, 8, 5))}
        >>> [a.shape for a in jaxalign.images.on_one_grid(maps).values()]
        [(2, 8, 9, 3), (2, 8, 9, 5)]
    """
    grid = tuple(max(a.shape[axis] for a in maps.values()) for axis in (1, 2))
    resized = {}
    for name, a in maps.items():
        if a.shape[1:3] != grid:
            a = a - a.mean((0, 1, 2), keepdims=True)  # an offset would cost digits
            a = jax.image.resize(jnp.asarray(a), (a.shape[0], *grid, a.shape[-1]), "bilinear")
        resized[name] = a
    return resized


def _check_maps(name: str, value: Any) -> AnyArray:
    """Maps as they are: `align` centers them before it rounds to float32."""
    a = _arrays.numbers(f"maps[{name!r}]", value)
    if a.ndim != 4:
        raise ValueError(
            f"maps[{name!r}] must have shape (images, h, w, d); got {a.shape}. Reshape tokens to the grid of their "
            "patches, and put channels last."
        )
    return a


def _check_images(images: Any) -> AnyArray:
    a = _arrays.numbers("images", images)
    if a.ndim != 4 or a.shape[-1] != 3:
        raise ValueError(f"images must have shape (images, H, W, 3), colors last; got {a.shape}.")
    if np.issubdtype(a.dtype, np.floating) and _arrays.is_concrete(a) and not 0 <= a.min() <= a.max() <= 1:
        raise ValueError(f"images must be from 0 to 1, or integers to 255; got {a.min():.3g} to {a.max():.3g}.")
    return a
