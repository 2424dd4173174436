"""Colors of an embedding: nearby samples have similar colors, in all networks and images embedded together."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxalign import _checks, _features
from jaxalign._linalg import matmul, unit
from jaxalign._typing import Data, Numbers
from jaxalign.spectral import NormalizedCut, signs

ColorMethod = Literal["rotate", "umap", "tsne"]

# Rows: an orthonormal basis of the color cube, two axes of hue and the gray diagonal (last).
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
    """Colors of samples from their embedding: nearby samples have similar colors.

    Colors are comparable among all networks and images whose rows are passed together, so cut them together: see
    `normalized_cut` of an `Alignment`.

    Args:
        embedding: a `NormalizedCut`, or any embedding, shape (n, k), k >= 3.
        method: "rotate" scales rows to unit norm, as spectral clustering does (Ng, Jordan & Weiss 2001), and rotates
            their first three principal axes into the color cube: two axes are hues, the third is brightness. It is
            linear in the unit rows, deterministic and differentiable. "umap" and "tsne" first embed the rows in three
            dimensions, which separates more groups but preserves large distances less well; they need the extras
            [umap] and [tsne].
        num_components: the number of leading columns that are used, at least 3, at most k: few show large parts, more
            show details.
        like: an embedding whose map from rows to colors is used: a new image in the colors of an old one (its rows by
            `NormalizedCut.transform`). Not for "tsne", which has no map.
        quantile: share of rows that are clipped at both ends of each axis, so that outliers do not determine the
            colors.
        seed: random seed of "umap" and "tsne".

    Returns:
        Red, green and blue from 0 to 1, shape (n, 3). Rows of zeros (masked samples) are black.

    Raises:
        ValueError: fewer than three columns or samples; nan; an unknown method; `like` of another width or with
            "tsne".
        ImportError: "umap" or "tsne" without the extra.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (90, 5))
        >>> colors = jaxalign.rgb(jaxalign.normalized_cut(x, 4, density=0.3))
        >>> colors.shape, bool((colors >= 0).all() and (colors <= 1).all())
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
        raise ValueError('like= needs a map for new rows, which "tsne" does not have: use "rotate" or "umap".')
    present, valid = jnp.any(rows != 0, 1), jnp.any(reference != 0, 1)
    rows, reference = unit(rows), unit(reference)
    if method != "rotate":
        rows, reference = _embed_rows(method, rows, reference, present, valid, like is not None, seed)
    return _to_rgb(rows, reference, present, valid, float(quantile))


def _rows(name: str, value: Any, num_components: int) -> Array:
    rows = value.eigenvectors if isinstance(value, NormalizedCut) else _features.features(name, value)
    if rows.ndim != 2 or rows.shape[1] < 3 or rows.shape[0] < 3:
        raise ValueError(
            f"{name} must have at least three samples and three columns (pass num_components=3 or more to the cut); "
            f"got shape {rows.shape}."
        )
    _features.finite_rows(name, rows, way_out="Colors need finite rows: leave such rows out.")
    return rows[:, :num_components]


@partial(jax.jit, static_argnums=4)
def _to_rgb(rows: Array, reference: Array, present: Array, valid: Array, quantile: float) -> Array:
    counts = valid[:, None]
    center = jnp.sum(jnp.where(counts, reference, 0), 0, keepdims=True) / jnp.maximum(
        jnp.sum(valid.astype(rows.dtype)), 1
    )
    centered = jnp.where(counts, reference - center, 0)
    _, spread, axes = jnp.linalg.svd(centered, full_matrices=False)
    axes, spread = axes[:3], spread[:3]
    axes = axes.T * signs(axes.T)
    scale = jnp.where(spread > 1e-6 * spread[0], 1 / jnp.where(spread > 0, spread, 1), 0)
    turn = matmul(axes * scale[None], jnp.asarray(_CUBE, rows.dtype))

    def project(rows: Array) -> Array:
        return matmul(rows - center, turn)

    ends = jnp.asarray([quantile, 1 - quantile], rows.dtype)
    low, high = jnp.nanquantile(jnp.where(counts, project(reference), jnp.nan), ends, axis=0)[:, None]
    width = jnp.where(high > low, high - low, 1)
    return jnp.where(present[:, None], jnp.clip((project(rows) - low) / width, 0, 1), 0)


def _embed_rows(
    method: str, rows: Array, reference: Array, present: Array, valid: Array, has_reference: bool, seed: int
) -> tuple[Array, Array]:
    """Embed rows in three dimensions with umap-learn or scikit-learn, without rows of zeros."""
    known = np.asarray(reference)[np.asarray(valid)]
    if len(known) < 4:
        raise ValueError(f'method="{method}" needs at least 4 rows that are not all zeros; got {len(known)}.')
    try:
        if method == "umap":
            import umap

            neighbors = min(15, len(known) - 1)
            layout = umap.UMAP(n_components=3, n_neighbors=neighbors, random_state=seed, n_jobs=1).fit(known)
            embedded = np.asarray(layout.embedding_)
            new = layout.transform(np.asarray(rows)[np.asarray(present)]) if has_reference else embedded
        else:
            from sklearn.manifold import TSNE

            perplexity = min(30.0, (len(known) - 1) / 3)
            embedded = TSNE(3, perplexity=perplexity, init="pca", random_state=seed).fit_transform(known)
            new = embedded
    except ImportError as error:
        raise ImportError(f'method="{method}" needs an extra: python -m pip install "jaxalign[{method}]"') from error

    def with_zero_rows(values: np.ndarray, mask: Array) -> Array:
        return jnp.zeros((len(mask), 3), rows.dtype).at[np.flatnonzero(np.asarray(mask))].set(values)

    return with_zero_rows(new, present), with_zero_rows(embedded, valid)
