"""The parts of a reduction over pairs of samples: all pairs, a tile of them, and what is summed over a tile.

`core.reduce` visits the pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._linalg import root, transposed
from jaxalign.core.devices import over_devices, varying_like
from jaxalign.core.features import (
    CenteredFeatures,
    accurate_distances,
    attach_formula,
    fast_distances,
)

# What one gamma belongs to: all pairs, a row, or a column.
GammaPer = Literal["all", "row", "column"]

# The share of pairs that carry a sum over a kernel if the density is unknown: the default density.
_DEFAULT_SHARE = 0.05
# Without derivatives, distances of more representations than this are computed one after the other.
_MAX_CONCURRENT = 2


class Side(NamedTuple):
    """The rows or the columns of a tile, with their values. Every leaf has its samples on axis 0."""

    raw: tuple[Array, ...]  # (n, d) as given, not centered; one per representation
    weights: Array  # (n,): 1 for a valid sample, 0 for a masked one or padding
    sample: Array  # (n,): index of the sample
    gammas: tuple[Array | None, ...]  # (n,) if every row, or every column, has its own gamma
    row_values: Any  # values of a sample as the row of a pair
    column_values: Any  # and as the column


class Tile(NamedTuple):
    """A block of pairs: some rows with some columns."""

    distances: tuple[Array, ...]  # (r, c) per representation, in scaled units: squared, or Euclidean if `euclidean`
    row: Side
    column: Side
    shared_gammas: tuple[Array | None, ...]  # () if there is one gamma for all pairs
    gamma_per: GammaPer
    pairs_in_sum: Array | float  # approximate number of pairs that carry a sum: sets the accuracy of distances
    weighted: bool  # whether any weight is not 1
    skip_self: bool

    @property
    def gammas(self) -> tuple[Array | None, ...]:
        """One per representation, broadcasting against its distances; None for a representation without gamma."""
        if self.gamma_per == "all":
            return self.shared_gammas
        if self.gamma_per == "column":
            return tuple(None if gamma is None else gamma[None] for gamma in self.column.gammas)
        return tuple(None if gamma is None else gamma[:, None] for gamma in self.row.gammas)

    def apply_weights(self, values: Array) -> Array:
        """Values (r, c) times the weights of both samples; 0 for pairs that are left out."""
        if self.weighted:
            values = values * self.row.weights[:, None] * self.column.weights[None]
        return jnp.where(self.same_sample(), 0, values) if self.skip_self else values

    def same_sample(self) -> Array:
        """Whether a pair is a sample with itself, (r, c)."""
        return self.row.sample[:, None] == self.column.sample[None]

    def mirrored(self) -> Tile:
        """The mirror image of this tile: rows and columns swapped."""
        return self._replace(distances=jax.tree.map(transposed, self.distances), row=self.column, column=self.row)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


class Reduction(NamedTuple):
    """What is summed over the pairs.

    Attributes:
        terms: tile -> a pytree of weighted values (r, c): pass them through `Tile.apply_weights`.
        sums: (terms, tile) -> (totals, row results). Totals are added over all tiles. Row results have the rows of the
            tile on axis 0 and are combined over the tiles of a row.
        symmetric: terms and totals are the same for the transposed tile, so neither is computed again for the mirror
            image. The dense visit, which has no mirror images, ignores it.
        combine: two partial row results -> their combination, row by row; addition by default. Leaves are (r, ...) or
            (tiles, r, ...), so other axes are counted from the end.
        init: a partial row result, of which only shapes and dtypes count -> the identity of `combine`; zeros by
            default.

    Without row results (an empty pytree) `combine` and `init` get empty pytrees.
    """

    terms: Callable[[Tile], Any]
    sums: Callable[[Any, Tile], tuple[Any, Any]]
    symmetric: bool = True
    combine: Callable[[Any, Any], Any] = _add
    init: Callable[[Any], Any] = _zeros_like


def over_all(terms: Any, tile: Tile) -> tuple[Any, Any]:
    """The sum of each term over all pairs."""
    del tile
    # Rows first: the partial sums keep digits, and XLA spreads the rows over the cores.
    return jax.tree.map(lambda term: jnp.sum(jnp.sum(term, 1)), terms), ()


def over_rows(terms: Any, tile: Tile) -> tuple[Any, Any]:
    """The sum of each term over the pairs of each row, (r,)."""
    del tile
    return (), jax.tree.map(lambda term: jnp.sum(term, 1), terms)


def stacked_over_all(terms: tuple[Array, ...], tile: Tile) -> tuple[Array, Any]:
    """The sums of k terms over all pairs in one array, (k,): one reduction on a GPU."""
    del tile
    return jnp.sum(jnp.stack([jnp.sum(term, 1) for term in terms]), 1), ()


def kernel(distances: Array, gamma: Array) -> Array:
    """The RBF affinity exp(-gamma D), gamma = 1 / (2 sigma^2): the only definition in this library.

    For Euclidean distances it is the Laplacian kernel, gamma = 1 / sigma.
    """
    return jnp.exp(log_kernel(distances, gamma))


def log_kernel(distances: Array, gamma: Array) -> Array:
    """The logarithm of `kernel`, finite also where the kernel underflows to 0."""
    return -gamma * distances  # not -(gamma * D): XLA would store that n x n product to share it with other terms


def kernel_minus_one(distances: Array, gamma: Array) -> Array:
    """`kernel` - 1, accurate also where the kernel is close to 1."""
    return jnp.expm1(log_kernel(distances, gamma))


def smooth(fn: Callable[[Array], Any], distances: Array) -> Any:
    """Apply fn to squared distances. If it has no derivative at distance 0, as exp(-sqrt(D)), use the derivative 0."""
    zero = jnp.zeros((1,) * distances.ndim, distances.dtype)
    value, slope = jax.jvp(fn, (zero,), (jnp.ones_like(zero),))
    infinite = [~jnp.isfinite(leaf) for leaf in jax.tree.leaves(slope)]
    cusp = (distances == 0) & jnp.any(jnp.stack(infinite), 0)
    values = fn(jnp.where(cusp, 1, distances))
    return jax.tree.map(lambda at_zero, elsewhere: jnp.where(cusp, at_zero, elsewhere), value, values)


def kernel_terms(tile: Tile) -> Array:
    """The weighted affinity of the first representation."""
    gamma = tile.gammas[0]
    assert gamma is not None
    return tile.apply_weights(kernel(tile.distances[0], gamma))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("features", "distances", "density"),
    meta_fields=("skip_self", "tile_size", "axis_name", "precision", "differentiable", "fast_only", "euclidean"),
)
@dataclass(frozen=True)
class Pairs:
    """All pairs of rows of one or several representations of the same samples.

    Attributes:
        features: one per representation; all use the masks of the first.
        distances: stored squared distances (n, m), one per representation; None: computed per tile.
        skip_self: leave out pairs of a sample with itself.
        tile_size: rows and columns of a tile at most; None: one tile.
        axis_name: the named axis over which rows and columns are sharded.
        precision: of the products in the distances.
        differentiable: False if no derivative is needed, which saves a pass over each tile.
        fast_only: the fast formula is known to be accurate enough.
        euclidean: tiles hold Euclidean distances, not squared ones.
        density: (), approximate mean of the kernel that is summed, if known: the fewer pairs carry a sum, the more
            accurate their distances must be.
    """

    features: tuple[CenteredFeatures, ...]
    distances: tuple[Array, ...] | None = None
    skip_self: bool = False
    tile_size: int | None = None
    axis_name: str | None = None
    precision: lax.PrecisionLike = None
    differentiable: bool = True
    fast_only: bool = False
    euclidean: bool = False
    density: Array | None = None

    @property
    def is_self(self) -> bool:
        """Whether the rows are paired with themselves."""
        return self.features[0].is_self

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and columns on all devices together."""
        first, devices = self.features[0], self.device_count()
        return first.raw_x.shape[0] * devices, first.raw_columns.shape[0] * devices

    def weights(self) -> tuple[Array, Array]:
        """Weights of the local rows, (n,), and columns, (m,)."""
        first = self.features[0]
        return _weights(first.raw_x, first.mask), _weights(first.raw_columns, first.column_mask)

    def total(self, *, per_row: bool) -> Array:
        """The total weight of all pairs, or of the pairs of each row, (n,)."""
        rows, columns = self.weights()
        row_total = over_devices(lax.psum, jnp.sum(columns), self.axis_name)
        totals = rows * (row_total - rows if self.skip_self and self.is_self else row_total)
        return totals if per_row else over_devices(lax.psum, jnp.sum(totals), self.axis_name)

    def self_total(self, *, per_row: bool) -> Array:
        """The total weight of the pairs of a sample with itself, left out or not: () or, per row, (n,)."""
        rows = self.weights()[0]
        weights = rows * rows
        return weights if per_row else over_devices(lax.psum, jnp.sum(weights), self.axis_name)

    def subset(self, size: int, *, all_rows: bool) -> Pairs:
        """Pairs of about `size` rows (or all rows) with `size` columns, none of a sample with itself.

        Only of the first representation. Distances are stored unless all rows are kept. With several devices, columns
        come from all of them, and so do rows unless all are kept. `total` does not hold for a subset.
        """
        first = self.features[0]
        index = self._index(first.raw_x)
        x = (first.raw_x, first.mask, index)
        y = x if self.is_self else (first.raw_y, first.mask_y, None)
        n, m = self.shape
        row_step, column_step = 1 if all_rows else max(1, n // size), max(1, m // size)
        rows = x if all_rows else self._thin(x, row_step)
        columns = self._thin(y, column_step)
        part = first._replace(raw_x=rows[0], mask=rows[1], raw_y=columns[0], mask_y=columns[1])
        if self.is_self:
            part = part._replace(sample=rows[2], sample_y=columns[2])
        pairs = replace(self, features=(part,), distances=None, skip_self=self.is_self, axis_name=None)
        if self.distances is not None:
            return replace(pairs, distances=(self.distances[0][::row_step, ::column_step],))
        return pairs if all_rows else pairs.stored()

    def stored(self) -> Pairs:
        """The same pairs with stored distances, by the fast formula."""
        return replace(self, distances=tuple(fast_distances(features, self.precision) for features in self.features))

    def pairs_in_sum(self, gamma_per: GammaPer) -> Array | float:
        """The approximate number of pairs that carry a kernel sum over all pairs, over a row or over a column."""
        n, m = self.shape
        number = {"all": n * m, "row": m, "column": n}[gamma_per]
        return float(number) * (_DEFAULT_SHARE if self.density is None else self.density)

    def side(self, *, columns: bool, gammas: tuple[Array | None, ...], row_values: Any, column_values: Any) -> Side:
        """All rows, or all columns, with their values."""
        first = self.features[0]
        arrays = tuple(f.raw_columns if columns else f.raw_x for f in self.features)
        index = first.sample_y if columns else first.sample
        index = self._index(arrays[0]) if index is None else index
        weights = _weights(arrays[0], first.mask_y if columns else first.mask)
        return Side(arrays, weights, index, gammas, row_values, column_values)

    def device_count(self) -> int:
        """The number of devices that hold the rows."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def _index(self, rows: Array) -> Array:
        n = rows.shape[0]
        start = 0 if self.axis_name is None else lax.axis_index(self.axis_name) * n
        return start + jnp.arange(n, dtype=jnp.int32)

    def _thin(self, arrays: tuple[Any, ...], step: int) -> tuple[Any, ...]:
        """Every `step`-th row of each array, gathered from all devices."""

        def gather(a: Array) -> Array:
            if self.axis_name is None:
                return a
            numbers = a.astype(jnp.int32) if a.dtype == bool else a
            is_local = jnp.arange(self.device_count(), dtype=jnp.int32) == lax.axis_index(self.axis_name)
            is_local = is_local.reshape(-1, *[1] * a.ndim)
            # Not all_gather, whose result counts as varying over the devices.
            rows = lax.psum(jnp.where(is_local, numbers[None], 0), self.axis_name)
            return rows.reshape(-1, *a.shape[1:]).astype(a.dtype)

        return tuple(None if a is None else gather(a[::step]) for a in arrays)


def _weights(rows: Array, mask: Array | None) -> Array:
    return varying_like(rows, jnp.ones(rows.shape[0], rows.dtype)) if mask is None else mask.astype(rows.dtype)


def empty_tile(
    pairs: Pairs, gammas: tuple[Array | None, ...], gamma_per: GammaPer, row_values: Any, column_values: Any
) -> Tile:
    """One tile of all rows and columns, without distances."""
    none = (None,) * len(gammas)
    gamma, row_gammas, column_gammas = (
        gammas if gamma_per == "all" else none,
        gammas if gamma_per == "row" or (gamma_per == "column" and pairs.is_self) else none,
        gammas if gamma_per == "column" else none,
    )
    # Inside shard_map, arrays that rotate around the ring vary over devices, even if they start out replicated.
    varying = partial(jax.tree.map, partial(varying_like, pairs.features[0].raw_x))
    if pairs.is_self:
        row = pairs.side(columns=False, gammas=row_gammas, row_values=row_values, column_values=column_values)
        row = column = varying(row)
    else:
        row = varying(pairs.side(columns=False, gammas=row_gammas, row_values=row_values, column_values=()))
        column = varying(pairs.side(columns=True, gammas=column_gammas, row_values=(), column_values=column_values))
    weighted = pairs.features[0].mask is not None or pairs.features[0].column_mask is not None
    return Tile((), row, column, gamma, gamma_per, pairs.pairs_in_sum(gamma_per), weighted, pairs.skip_self)


def with_distances(pairs: Pairs, tile: Tile) -> Tile:
    """The tile with its distances, computed."""
    mask, mask_y = (side.weights > 0 if tile.weighted else None for side in (tile.row, tile.column))

    def distances_of(k: int) -> Array:
        features = pairs.features[k]._replace(raw_x=tile.row.raw[k], raw_y=tile.column.raw[k], mask=mask, mask_y=mask_y)
        if pairs.is_self or features.sample is not None:
            features = features._replace(sample=tile.row.sample, sample_y=tile.column.sample)
        # Each gamma is tested on its own row or column: a row with a small sigma must not decide for all rows.
        row_gamma, column_gamma = tile.row.gammas[k], tile.column.gammas[k]
        row_gamma = None if row_gamma is None else row_gamma[:, None]
        column_gamma = None if column_gamma is None else column_gamma[None]
        gammas = [gamma for gamma in (tile.shared_gammas[k], row_gamma, column_gamma) if gamma is not None]
        precision, pairs_in_sum = pairs.precision, tile.pairs_in_sum
        if gammas and not pairs.fast_only:
            squared = accurate_distances(
                features, *gammas, pairs_in_sum=pairs_in_sum, precision=precision, euclidean=pairs.euclidean
            )
        else:
            squared = fast_distances(features, precision)
        squared = attach_formula(features, squared, precision) if pairs.differentiable else squared
        return root(squared) if pairs.euclidean else squared

    number = len(pairs.features)
    if pairs.differentiable or number <= _MAX_CONCURRENT:
        return tile._replace(distances=tuple(distances_of(k) for k in range(number)))
    # A loop: left to itself, the compiler holds the intermediate arrays of all representations at once.
    distances = lax.map(lambda k: lax.switch(k, [partial(distances_of, k) for k in range(number)]), jnp.arange(number))
    return tile._replace(distances=tuple(distances))


def inverse_rms_distance(features: CenteredFeatures, axis_name: str | None) -> Array:
    """1 / the root mean square distance: a gamma that makes distances accurate relative to the typical one."""
    means = []
    for rows, weights in zip(lax.stop_gradient(features.sides), Pairs((features,)).weights(), strict=True):
        sums = jnp.stack((jnp.sum(rows * rows), jnp.sum(weights)))
        total, count = over_devices(lax.psum, sums, axis_name)
        means.append(total / jnp.maximum(count, 1))
    mean = means[0] + means[1]
    return jnp.where(mean > 0, lax.rsqrt(jnp.where(mean > 0, mean, 1)), 1)
