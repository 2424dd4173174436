"""Colors of an embedding: nearby samples have similar colors, in all networks and images embedded together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxalign import _checks, _features
from jaxalign._linalg import matmul, unit
from jaxalign._typing import Data, Numbers
from jaxalign.spectral import NormalizedCut, signs

ColorMethod = Literal["rotate", "distances", "umap", "tsne"]
_METHODS = ("rotate", "distances", "umap", "tsne")

# Rows: an orthonormal basis of the color cube, two axes of hue and the gray diagonal (last).
_CUBE = np.array(
    [
        [2 / np.sqrt(6), -1 / np.sqrt(6), -1 / np.sqrt(6)],
        [0, 1 / np.sqrt(2), -1 / np.sqrt(2)],
        [1 / np.sqrt(3), 1 / np.sqrt(3), 1 / np.sqrt(3)],
    ]
)
_MEAN_DISTANCE = 0.6617  # of two random points in the unit cube (Robbins 1978)
# The network of "distances", and how it is fitted: half a second on two cores.
_HIDDEN, _STEPS, _PAIRS, _LEARNING_RATE = 64, 500, 2048, 3e-3


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("center", "turn", "low", "width", "network"),
    meta_fields=("method", "num_components", "layout"),
)
@dataclass(frozen=True, repr=False)
class ColorMap:
    """The map from rows of an embedding to colors, fitted by `fit_colors`.

    Attributes:
        method: see `rgb`.
        num_components: the number of leading columns that are used.
        center, turn, low, width: of the linear map into the color cube.
        network: layers of the network of "distances".
        layout: the fitted object of umap-learn.
    """

    method: ColorMethod
    num_components: int
    center: Float[Array, "1 c"]
    turn: Float[Array, "c 3"]
    low: Float[Array, "1 3"]
    width: Float[Array, "1 3"]
    network: tuple[tuple[Array, Array], ...] = ()
    layout: Any = None

    def __repr__(self) -> str:
        return f"ColorMap(method={self.method!r}, num_components={self.num_components})"

    def __call__(self, embedding: NormalizedCut | Numbers[Data, "n k"]) -> Float[Array, "n 3"]:
        """Colors of rows of the embedding, of new samples too (`NormalizedCut.transform`).

        Args:
            embedding: a `NormalizedCut` or rows, shape (n, k), in the space of the embedding that was fitted.

        Returns:
            Red, green and blue from 0 to 1, shape (n, 3). Rows of zeros are black.

        Raises:
            ValueError: fewer columns than were fitted.
        """
        rows = _rows("embedding", embedding, self.num_components, min_rows=1)
        if rows.shape[1] != self.num_components:
            raise ValueError(f"the colors were fitted to {self.num_components} columns, embedding has {rows.shape[1]}.")
        present = jnp.any(rows != 0, 1)
        return _color(self, unit(rows), present)


def fit_colors(
    embedding: NormalizedCut | Numbers[Data, "n k"],
    method: ColorMethod = "rotate",
    *,
    num_components: int = 8,
    quantile: float = 0.02,
    seed: int = 0,
) -> ColorMap:
    """Fit the map from rows to colors of `rgb`, to color new samples as the old ones.

    Args:
        embedding: see `rgb`.
        method: see `rgb`; not "tsne", which has no map.
        num_components: see `rgb`.
        quantile: see `rgb`.
        seed: see `rgb`.

    Returns:
        A `ColorMap`, a function of rows.

    Raises:
        ValueError, ImportError: see `rgb`.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (90, 5))
        >>> cut = jaxalign.normalized_cut(x[:80], 4, density=0.3)
        >>> colors = jaxalign.fit_colors(cut)
        >>> colors(cut.transform(x[80:])).shape
        (10, 3)
    """
    if method == "tsne":
        raise ValueError('"tsne" has no map for new rows: use "rotate", "distances" or "umap".')
    return _fit(embedding, method, num_components, quantile, seed)[0]


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
    `normalized_cut` of an `Alignment`, and `color_images`.

    Args:
        embedding: a `NormalizedCut`, or any embedding, shape (n, k), k >= 3.
        method: "rotate" scales rows to unit norm, as spectral clustering does (Ng, Jordan & Weiss 2001), and rotates
            their first three principal axes into the color cube: two axes are hues, the third is brightness. It is
            linear in the unit rows, deterministic and differentiable. "distances" fits a small network from unit rows
            into the color cube, so that distances between colors are proportional to those between rows
            (multidimensional scaling, Kruskal 1964, of a map as in Lowe & Tipping 1997). "umap" and
            "tsne" first embed the rows in three dimensions, which separates more groups but preserves large distances
            less well. All but "rotate" need an extra of their name, such as jaxalign[umap].
        num_components: the number of leading columns that are used, at least 3, at most k: few show large parts, more
            show details.
        like: an embedding whose map from rows to colors is used: a new image in the colors of an old one (its rows by
            `NormalizedCut.transform`). Not for "tsne", which has no map. `fit_colors` keeps the map.
        quantile: share of rows that are clipped at both ends of each axis, so that outliers do not determine the
            colors. Not for "distances".
        seed: random seed of "distances", "umap" and "tsne".

    Returns:
        Red, green and blue from 0 to 1, shape (n, 3). Rows of zeros (masked samples) are black.

    Raises:
        ValueError: fewer than three columns or samples; nan; an unknown method; `like` of another width or with
            "tsne".
        ImportError: a method without its extra.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (90, 5))
        >>> colors = jaxalign.rgb(jaxalign.normalized_cut(x, 4, density=0.3))
        >>> colors.shape, bool((colors >= 0).all() and (colors <= 1).all())
        ((90, 3), True)
    """
    if like is None:
        return _fit(embedding, method, num_components, quantile, seed)[1]
    rows, reference = _rows("embedding", embedding, num_components), _rows("like", like, num_components)
    if reference.shape[1] != rows.shape[1]:
        raise ValueError(f"like has {reference.shape[1]} columns, embedding has {rows.shape[1]}.")
    if method == "tsne":
        raise ValueError(
            'like= needs a map for new rows, which "tsne" does not have: use "rotate", "distances" or "umap".'
        )
    return _fit(reference, method, num_components, quantile, seed)[0](rows)


def _fit(
    embedding: Any, method: ColorMethod, num_components: int, quantile: float, seed: int
) -> tuple[ColorMap, Array]:
    """The map, and the colors of the rows that it was fitted to."""
    _checks.choice("method", method, _METHODS)
    if not 0 <= quantile < 0.5:
        raise ValueError(f"quantile must be at least 0 and below 0.5; got {quantile}.")
    rows = _rows("embedding", embedding, _checks.whole("num_components", num_components, 3))
    width, present = rows.shape[1], jnp.any(rows != 0, 1)
    rows = unit(rows)
    if method == "distances":
        center, turn, network = _fit_distances(rows, present, seed)
        nothing = jnp.zeros((1, 3), rows.dtype)
        colors = ColorMap(method, width, center, turn, nothing, nothing + 1, network)
        return colors, _color(colors, rows, present)
    layout = None
    if method != "rotate":
        layout, rows = _embed_rows(method, rows, present, seed)
    parts = _axes(rows, present, float(quantile))
    linear = ColorMap("rotate", width, *parts)
    return replace(linear, method=method, layout=layout), _color(linear, rows, present)


def _color(colors: ColorMap, rows: Array, present: Array) -> Array:
    """Colors of unit rows."""
    if colors.method == "distances":
        found = jax.nn.sigmoid(_forward(colors.network, rows - colors.center, colors.turn))
        return jnp.where(present[:, None], found, 0)
    if colors.method == "umap":
        known = np.asarray(present)
        embedded = colors.layout.transform(np.asarray(rows)[known])
        rows = jnp.zeros((len(rows), 3), rows.dtype).at[np.flatnonzero(known)].set(embedded)
    found = (matmul(rows - colors.center, colors.turn) - colors.low) / colors.width
    return jnp.where(present[:, None], jnp.clip(found, 0, 1), 0)


def _rows(name: str, value: Any, num_components: int, min_rows: int = 3) -> Array:
    rows = value.eigenvectors if isinstance(value, NormalizedCut) else _features.features(name, value)
    if rows.ndim != 2 or rows.shape[1] < 3 or rows.shape[0] < min_rows:
        raise ValueError(
            f"{name} must have at least three samples and three columns (pass num_components=3 or more to the cut); "
            f"got shape {rows.shape}."
        )
    _features.finite_rows(name, rows, way_out="Colors need finite rows: leave such rows out.")
    return rows[:, :num_components]


def _principal_axes(rows: Array, valid: Array) -> tuple[Array, Array, Array]:
    """The mean (1, c) of the valid rows, their first three principal axes (c, 3), and the spread along these (3,)."""
    count = jnp.maximum(jnp.sum(valid.astype(rows.dtype)), 1)
    center = jnp.sum(jnp.where(valid[:, None], rows, 0), 0, keepdims=True) / count
    _, spread, axes = jnp.linalg.svd(jnp.where(valid[:, None], rows - center, 0), full_matrices=False)
    axes = axes[:3].T
    return center, axes * signs(axes), spread[:3]


@partial(jax.jit, static_argnums=2)
def _axes(rows: Array, valid: Array, quantile: float) -> tuple[Array, Array, Array, Array]:
    """Center, turn, low and width of the linear map into the color cube."""
    center, axes, spread = _principal_axes(rows, valid)
    scale = jnp.where(spread > 1e-6 * spread[0], 1 / jnp.where(spread > 0, spread, 1), 0)
    turn = matmul(axes * scale[None], jnp.asarray(_CUBE, rows.dtype))
    ends = jnp.asarray([quantile, 1 - quantile], rows.dtype)
    projected = jnp.where(valid[:, None], matmul(rows - center, turn), jnp.nan)
    low, high = jnp.nanquantile(projected, ends, axis=0)[:, None]
    return center, turn, low, jnp.where(high > low, high - low, 1)


# --- colors whose distances are those of the rows --------------------------------------------------------------------


def _forward(network: Sequence[tuple[Array, Array]], rows: Array, turn: Array) -> Array:
    """A network of two hidden layers beside the linear map `turn`."""
    hidden = rows
    for weight, bias in network[:-1]:
        hidden = jnp.tanh(matmul(hidden, weight) + bias[None])
    weight, bias = network[-1]
    return matmul(rows, turn) + matmul(hidden, weight) + bias[None]


def _fit_distances(rows: Array, valid: Array, seed: int) -> tuple[Array, Array, tuple[tuple[Array, Array], ...]]:
    try:
        import optax  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ImportError('method="distances" needs an extra: python -m pip install "jaxalign[distances]"') from error
    return _fit_network(rows, valid, jax.random.key(seed))


@jax.jit
def _fit_network(rows: Array, valid: Array, key: Array) -> tuple[Array, Array, tuple[tuple[Array, Array], ...]]:
    """Minimize the squared error of distances of random pairs, where distances of colors fill the cube on average."""
    import optax

    center, axes, spread = _principal_axes(rows, valid)
    deviation = spread[0] / jnp.sqrt(jnp.maximum(jnp.sum(valid.astype(rows.dtype)), 1))
    turn = matmul(axes, jnp.asarray(_CUBE, rows.dtype)) / jnp.where(deviation > 0, deviation, 1)
    centered = rows - center
    sizes = (rows.shape[1], _HIDDEN, _HIDDEN, 3)
    keys = jax.random.split(key, len(sizes))
    network = tuple(
        (jax.random.normal(k, (a, b), rows.dtype) / np.sqrt(a).astype(rows.dtype), jnp.zeros(b, rows.dtype))
        for k, a, b in zip(keys[1:], sizes[:-1], sizes[1:], strict=True)
    )
    network = (*network[:-1], jax.tree.map(jnp.zeros_like, network[-1]))  # the linear map at first
    places = jnp.argsort(~valid)  # valid rows first
    number = jnp.sum(valid)

    def draw(key: Array) -> Array:
        """Random valid rows; rows k and k + pairs are a pair."""
        return centered[places[jax.random.randint(key, (2 * _PAIRS,), 0, number)]]

    def apart(rows: Array) -> Array:
        squares = jnp.sum((rows[:_PAIRS] - rows[_PAIRS:]) ** 2, -1)
        return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)

    mean = jnp.mean(apart(draw(keys[0])))
    unit_length = _MEAN_DISTANCE / jnp.where(mean > 0, mean, 1)

    def stress(network: Any, rows: Array) -> Array:
        colors = jax.nn.sigmoid(_forward(network, rows, turn))
        return jnp.mean((apart(colors) - unit_length * apart(rows)) ** 2)

    optimizer = optax.adam(optax.schedules.cosine_decay_schedule(_LEARNING_RATE, _STEPS))

    def step(state: Any, key: Array) -> tuple[Any, None]:
        network, moments = state
        gradient = jax.grad(stress)(network, draw(key))
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(network, updates), moments), None

    start = (network, optimizer.init(network))
    (network, _), _ = lax.scan(step, start, jax.random.split(jax.random.fold_in(key, 1), _STEPS))
    return center, turn, network


# --- packages that embed in three dimensions -------------------------------------------------------------------------


def _embed_rows(method: str, rows: Array, present: Array, seed: int) -> tuple[Any, Array]:
    """Embed rows in three dimensions with umap-learn or scikit-learn, without rows of zeros; and the fitted object."""
    known = np.asarray(rows)[np.asarray(present)]
    if len(known) < 4:
        raise ValueError(f'method="{method}" needs at least 4 rows that are not all zeros; got {len(known)}.')
    layout = None
    try:
        if method == "umap":
            import umap

            neighbors = min(15, len(known) - 1)
            layout = umap.UMAP(n_components=3, n_neighbors=neighbors, random_state=seed, n_jobs=1).fit(known)
            embedded = np.asarray(layout.embedding_)
        else:
            from sklearn.manifold import TSNE

            perplexity = min(30.0, (len(known) - 1) / 3)
            embedded = TSNE(3, perplexity=perplexity, init="pca", random_state=seed).fit_transform(known)
    except ImportError as error:
        raise ImportError(f'method="{method}" needs an extra: python -m pip install "jaxalign[{method}]"') from error
    places = np.flatnonzero(np.asarray(present))
    return layout, jnp.zeros((len(rows), 3), rows.dtype).at[places].set(embedded)
