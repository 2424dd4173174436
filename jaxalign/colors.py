"""Colours of an embedding: what lies together gets one colour, in every network and picture embedded together."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxalign import _checks
from jaxalign._linalg import matmul, unit
from jaxalign._typing import Data, Numbers
from jaxalign.spectral import NormalizedCut, signs

ColorMethod = Literal["rotate", "umap", "tsne"]

# Rows: the axes of the colour cube in terms of its grey diagonal (last) and the plane of hues.
_CUBE = np.array(
    [
        [2 / np.sqrt(6), -1 / np.sqrt(6), -1 / np.sqrt(6)],
        [0, 1 / np.sqrt(2), -1 / np.sqrt(2)],
        [1 / np.sqrt(3), 1 / np.sqrt(3), 1 / np.sqrt(3)],
    ]
)


def rgb(
    embedding: NormalizedCut | Numbers[Data, "n k"],
    method: ColorMethod = "rotate",
    *,
    num_components: int = 8,
    like: NormalizedCut | Numbers[Data, "m k"] | None = None,
    quantile: float = 0.02,
    seed: int = 0,
) -> Float[Array, "n 3"]:
    """Colours of samples from their embedding: near samples get near colours.

    Colours mean the same in all networks and pictures whose rows are given together, so cut them together: see
    `normalized_cut` of an `Alignment`.

    Args:
        embedding: a `NormalizedCut`, or any embedding, shape (n, k), k >= 3.
        method: "rotate" takes rows to unit length, as spectral clustering does (Ng, Jordan & Weiss 2001), and turns
            their first three principal axes into the colour cube: two are hues, the third is brightness. Linear, the
            same every time, differentiable. "umap" and "tsne" lay them out in three dimensions first, which
            separates more groups and keeps less of what is far from what; they need the extras [umap] and [tsne].
        num_components: how many leading columns count, from 3 to k at most: few for the large parts, more for details.
        like: colours as they would be in this embedding, whose map from rows to colours is taken: a new picture in the
            colours of an old one (its rows by `NormalizedCut.transform`). Not for "tsne", which has no map.
        quantile: of each axis so many rows at either end are clipped, so that outliers do not use up the colours.
        seed: of "umap" and "tsne".

    Returns:
        Red, green and blue from 0 to 1, shape (n, 3). Rows of zeros (masked samples) are black.

    Raises:
        ValueError: fewer than three columns or samples; nan; an unknown method; `like` of another width or with "tsne".
        ImportError: "umap" or "tsne" without their packages.

    Example:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (90, 5))
        >>> colours = jaxalign.rgb(jaxalign.normalized_cut(x, 4, density=0.3))
        >>> colours.shape, bool((colours >= 0).all() and (colours <= 1).all())
        ((90, 3), True)
    """
    _checks.choice("method", method, ("rotate", "umap", "tsne"))
    if not 0 <= quantile < 0.5:
        raise ValueError(f"quantile must be at least 0 and below 0.5; got {quantile}.")
    rows = _rows("embedding", embedding, _checks.whole("num_components", num_components, 3))
    reference = rows if like is None else _rows("like", like, num_components)
    if reference.shape[1] != rows.shape[1]:
        raise ValueError(f"like has {reference.shape[1]} columns, embedding has {rows.shape[1]}.")
    if method == "tsne" and like is not None:
        raise ValueError('like= needs a map for new rows, which "tsne" does not have: take "rotate" or "umap".')
    present, counted = jnp.any(rows != 0, 1), jnp.any(reference != 0, 1)
    rows, reference = unit(rows), unit(reference)
    if method != "rotate":
        rows, reference = _laid_out(method, rows, reference, present, counted, like is not None, seed)
    return _painted(rows, reference, present, counted, float(quantile))


def _rows(name: str, value: Any, num_components: int) -> Array:
    rows = value.eigenvectors if isinstance(value, NormalizedCut) else _checks.features(name, value)
    if rows.ndim != 2 or rows.shape[1] < 3 or rows.shape[0] < 3:
        raise ValueError(
            f"{name} must have at least three samples and three columns, of a cut num_components=3 or more; "
            f"got shape {rows.shape}."
        )
    _checks.finite_rows(name, rows, way_out="Colours need finite rows.")
    return rows[:, :num_components]


@partial(jax.jit, static_argnums=4)
def _painted(rows: Array, reference: Array, present: Array, counted: Array, quantile: float) -> Array:
    real = counted[:, None]
    centre = jnp.sum(jnp.where(real, reference, 0), 0, keepdims=True) / jnp.maximum(
        jnp.sum(counted.astype(rows.dtype)), 1
    )
    centred = jnp.where(real, reference - centre, 0)
    _, spread, axes = jnp.linalg.svd(centred, full_matrices=False)
    axes, spread = axes[:3], spread[:3]
    axes = axes.T * signs(axes.T)
    scale = jnp.where(spread > 1e-6 * spread[0], 1 / jnp.where(spread > 0, spread, 1), 0)
    turn = matmul(axes * scale[None], jnp.asarray(_CUBE, rows.dtype))

    def place(some: Array) -> Array:
        return matmul(some - centre, turn)

    ends = jnp.asarray([quantile, 1 - quantile], rows.dtype)
    low, high = jnp.nanquantile(jnp.where(real, place(reference), jnp.nan), ends, axis=0)[:, None]
    width = jnp.where(high > low, high - low, 1)
    return jnp.where(present[:, None], jnp.clip((place(rows) - low) / width, 0, 1), 0)


def _laid_out(
    method: str, rows: Array, reference: Array, present: Array, counted: Array, apart: bool, seed: int
) -> tuple[Array, Array]:
    """Rows in three dimensions by the usual libraries, those of zeros left out."""
    which = np.asarray(counted)
    known = np.asarray(reference)[which]
    if len(known) < 4:
        raise ValueError(f'method="{method}" needs at least 4 rows that are not all zeros; there are {len(known)}.')
    try:
        if method == "umap":
            import umap

            neighbours = min(15, len(known) - 1)
            layout = umap.UMAP(n_components=3, n_neighbors=neighbours, random_state=seed, n_jobs=1).fit(known)
            found = np.asarray(layout.embedding_)
            others = layout.transform(np.asarray(rows)[np.asarray(present)]) if apart else found
        else:
            from sklearn.manifold import TSNE

            perplexity = min(30.0, (len(known) - 1) / 3)
            found = TSNE(3, perplexity=perplexity, init="pca", random_state=seed).fit_transform(known)
            others = found
    except ImportError as error:
        raise ImportError(f'method="{method}" needs an extra: python -m pip install "jaxalign[{method}]"') from error

    def everywhere(some: np.ndarray, where: Array) -> Array:
        return jnp.zeros((len(where), 3), rows.dtype).at[np.flatnonzero(np.asarray(where))].set(some)

    return everywhere(others, present), everywhere(found, counted)
