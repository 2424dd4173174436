"""What a reduction over pairs of samples is made of: all pairs, a tile of them, and what is summed over a tile.

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

# What has a gamma: all pairs together, or each row, or each column.
GammaPer = Literal["all", "row", "column"]

# Share of the pairs that carry a sum over a kernel, where it is not known: the default density.
_USUAL_SHARE = 0.05
# Distances of up to this many representations are computed side by side.
_SIDE_BY_SIDE = 2


class Side(NamedTuple):
    """Rows on one side of a tile and what belongs to each: every leaf has its rows on axis 0."""

    features: tuple[Array, ...]  # (n, d), one per representation
    weights: Array  # (n,): 1 for a valid sample, 0 for one that is masked or padding
    sample: Array  # (n,) number of the sample
    gammas: tuple[Array | None, ...]  # (n,) where every row has its own
    as_row: Any  # values of a sample as the first of a pair
    as_column: Any  # and as the second


class Tile(NamedTuple):
    """Pairs of some rows with some columns."""

    distances: tuple[Array, ...]  # (r, c) squared (Euclidean where asked for), one per representation, in scaled units
    row: Side
    column: Side
    gamma: tuple[Array | None, ...]  # () where there is one gamma for all pairs
    gamma_per: GammaPer
    pairs_in_sum: Array | float  # about how many pairs carry a sum, for the accuracy of distances
    weighted: bool  # whether any weight is not 1
    skip_self: bool

    @property
    def gammas(self) -> tuple[Array | None, ...]:
        """One per representation, broadcasting against its distances; None where none was given."""
        if self.gamma_per == "all":
            return self.gamma
        if self.gamma_per == "column":
            return tuple(None if gamma is None else gamma[None] for gamma in self.column.gammas)
        return tuple(None if gamma is None else gamma[:, None] for gamma in self.row.gammas)

    def apply_weights(self, values: Array) -> Array:
        """Values (r, c) times the weights of both samples; 0 for pairs that do not count."""
        if self.weighted:
            values = values * self.row.weights[:, None] * self.column.weights[None]
        return jnp.where(self.same_sample(), 0, values) if self.skip_self else values

    def same_sample(self) -> Array:
        """Where a pair is a sample with itself, (r, c)."""
        return self.row.sample[:, None] == self.column.sample[None]

    def mirrored(self) -> Tile:
        """The same pairs, transposed."""
        return self._replace(distances=jax.tree.map(transposed, self.distances), row=self.column, column=self.row)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


class Reduction(NamedTuple):
    """What is summed.

    Attributes:
        terms: tile -> a pytree of weighted values (r, c): pass them through `Tile.apply_weights`.
        sums: (terms, tile) -> (totals, rows). Totals are added over all tiles. Rows belong to the rows of the tile, on
            axis 0, and are combined over the tiles of a row.
        symmetric: a term does not change when its pair is transposed, so the mirror image needs no second look.
        combine: of two partial results of a row; addition by default.
        init: what a row starts with, from the shape of its partial results; zeros by default.

    Without rows (an empty pytree) `combine` and `init` are given empty pytrees.
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
    """The sum of each term over each row's pairs, (r,)."""
    del tile
    return (), jax.tree.map(lambda term: jnp.sum(term, 1), terms)


def stacked_over_all(terms: tuple[Array, ...], tile: Tile) -> tuple[Array, Any]:
    """The sums of k terms over all pairs in one array, (k,): a GPU adds them all at once."""
    del tile
    return jnp.sum(jnp.stack([jnp.sum(term, 1) for term in terms]), 1), ()


def kernel(distances: Array, gamma: Array) -> Array:
    """The RBF affinity exp(-gamma D): its definition in this library. gamma = 1 / (2 sigma^2).

    Of Euclidean distances it is the Laplacian kernel, gamma = 1 / sigma.
    """
    return jnp.exp(log_kernel(distances, gamma))


def log_kernel(distances: Array, gamma: Array) -> Array:
    """The logarithm of `kernel`, which is a number also where the kernel is 0."""
    return -gamma * distances  # not -(gamma * D): XLA would store a product that other terms need too, n x n numbers


def kernel_less_one(distances: Array, gamma: Array) -> Array:
    """`kernel` - 1, which keeps its digits where the kernel is close to 1."""
    return jnp.expm1(log_kernel(distances, gamma))


def smooth(fn: Callable[[Array], Any], distances: Array) -> Any:
    """Apply fn to squared distances; where it has no derivative at distance 0, as exp(-sqrt(D)), that is taken as 0."""
    zero = jnp.zeros((1,) * distances.ndim, distances.dtype)
    value, slope = jax.jvp(fn, (zero,), (jnp.ones_like(zero),))
    bad = [~jnp.isfinite(leaf) for leaf in jax.tree.leaves(slope)]
    cusp = (distances == 0) & jnp.any(jnp.stack(bad), 0)
    away = fn(jnp.where(cusp, 1, distances))
    return jax.tree.map(lambda at_zero, at: jnp.where(cusp, at_zero, at), value, away)


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
        features: of each representation; they share the masks of the first.
        distances: stored squared distances (n, m), one per representation; None: computed tile by tile.
        skip_self: pairs of a sample with itself do not count.
        tile_size: rows and columns of a tile at most; None: one tile.
        axis_name: the named axis over whose devices the rows, of both sides, are spread.
        precision: of the products in the distances.
        differentiable: False where no derivative is wanted, which saves a pass over each tile.
        fast_only: the fast formula is known to be accurate enough.
        euclidean: tiles hold Euclidean distances, not squared ones.
        density: (), about the mean of the kernel that is summed, if known: the fewer pairs carry a sum, the more
            accurate their distances have to be.
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
        """Whether the rows are compared with themselves."""
        return self.features[0].is_self

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, those of all devices."""
        first, devices = self.features[0], self.device_count()
        return first.raw_x.shape[0] * devices, first.raw_columns.shape[0] * devices

    def weights(self) -> tuple[Array, Array]:
        """Of the rows, (n,), and of the columns, (m,); those on this device."""
        first = self.features[0]
        return _weights(first.raw_x, first.mask), _weights(first.raw_columns, first.column_mask)

    def total(self, *, per_row: bool) -> Array:
        """The weight of all pairs that count, or of each row's, (n,)."""
        rows, columns = self.weights()
        row_total = over_devices(lax.psum, jnp.sum(columns), self.axis_name)
        totals = rows * (row_total - rows if self.skip_self and self.is_self else row_total)
        return totals if per_row else over_devices(lax.psum, jnp.sum(totals), self.axis_name)

    def self_total(self, *, per_row: bool) -> Array:
        """The weight of the pairs of a sample with itself, if they counted: () or, per row, (n,)."""
        rows = self.weights()[0]
        weights = rows * rows if self.is_self else jnp.zeros_like(rows)
        return weights if per_row else over_devices(lax.psum, jnp.sum(weights), self.axis_name)

    def subset(self, size: int, *, all_rows: bool) -> Pairs:
        """Pairs of about `size` rows (or all rows) with `size` columns, none of a sample with itself.

        Every device gets the columns (and, unless all rows are kept, the rows) of all. Of the first representation.
        """
        first = self.features[0]
        index = self._index(first.raw_x)
        x = (first.raw_x, first.mask, index)
        y = x if self.is_self else (first.raw_y, first.mask_y, None)
        n, m = self.shape
        row_step, column_step = 1 if all_rows else max(1, n // size), max(1, m // size)
        rows = x if all_rows else self._thinned(x, row_step)
        columns = self._thinned(y, column_step)
        part = first._replace(raw_x=rows[0], mask=rows[1], raw_y=columns[0], mask_y=columns[1])
        if self.is_self:
            part = part._replace(sample=rows[2], sample_y=columns[2])
        pairs = replace(self, features=(part,), distances=None, skip_self=self.is_self, axis_name=None)
        if self.distances is not None:
            return replace(pairs, distances=(self.distances[0][::row_step, ::column_step],))
        return pairs if all_rows else pairs.stored()

    def stored(self) -> Pairs:
        """The same with their distances stored, by the fast formula."""
        return replace(self, distances=tuple(fast_distances(features, self.precision) for features in self.features))

    def pairs_in_sum(self, gamma_per: GammaPer) -> Array | float:
        """About how many pairs carry the sum over a kernel: of all, of a row or of a column."""
        n, m = self.shape
        number = {"all": n * m, "row": m, "column": n}[gamma_per]
        return float(number) * (_USUAL_SHARE if self.density is None else self.density)

    def side(self, *, columns: bool, gammas: tuple[Array | None, ...], as_row: Any, as_column: Any) -> Side:
        """All rows of one side, with what belongs to them."""
        first = self.features[0]
        arrays = tuple(f.raw_columns if columns else f.raw_x for f in self.features)
        index = first.sample_y if columns else first.sample
        index = self._index(arrays[0]) if index is None else index
        weights = _weights(arrays[0], first.mask_y if columns else first.mask)
        return Side(arrays, weights, index, gammas, as_row, as_column)

    def device_count(self) -> int:
        """How many devices share the rows."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def _index(self, rows: Array) -> Array:
        n = rows.shape[0]
        first = 0 if self.axis_name is None else lax.axis_index(self.axis_name) * n
        return first + jnp.arange(n, dtype=jnp.int32)

    def _thinned(self, arrays: tuple[Any, ...], step: int) -> tuple[Any, ...]:
        """Every `step`-th row of each array, of all devices, the same on each."""

        def gathered(a: Array) -> Array:
            if self.axis_name is None:
                return a
            number = a.astype(jnp.int32) if a.dtype == bool else a
            place = jnp.arange(self.device_count(), dtype=jnp.int32) == lax.axis_index(self.axis_name)
            place = place.reshape(-1, *[1] * a.ndim)
            rows = lax.psum(jnp.where(place, number[None], 0), self.axis_name)  # all_gather would be typed as varying
            return rows.reshape(-1, *a.shape[1:]).astype(a.dtype)

        return tuple(None if a is None else gathered(a[::step]) for a in arrays)


def _weights(rows: Array, mask: Array | None) -> Array:
    return varying_like(rows, jnp.ones(rows.shape[0], rows.dtype)) if mask is None else mask.astype(rows.dtype)


def empty_tile(
    pairs: Pairs, gammas: tuple[Array | None, ...], gamma_per: GammaPer, as_row: Any, as_column: Any
) -> Tile:
    """All rows and columns as one tile, without distances."""
    none = (None,) * len(gammas)
    shared, row_gammas, column_gammas = (
        gammas if gamma_per == "all" else none,
        gammas if gamma_per == "row" or (gamma_per == "column" and pairs.is_self) else none,
        gammas if gamma_per == "column" else none,
    )
    # Inside shard_map what travels varies from device to device, also where it started as the same on all.
    varying = partial(jax.tree.map, partial(varying_like, pairs.features[0].raw_x))
    if pairs.is_self:
        row = column = varying(pairs.side(columns=False, gammas=row_gammas, as_row=as_row, as_column=as_column))
    else:
        row = varying(pairs.side(columns=False, gammas=row_gammas, as_row=as_row, as_column=()))
        column = varying(pairs.side(columns=True, gammas=column_gammas, as_row=(), as_column=as_column))
    weighted = pairs.features[0].mask is not None or pairs.features[0].column_mask is not None
    return Tile((), row, column, shared, gamma_per, pairs.pairs_in_sum(gamma_per), weighted, pairs.skip_self)


def with_distances(pairs: Pairs, tile: Tile) -> Tile:
    """Compute the distances of a tile."""
    mask, mask_y = (side.weights > 0 if tile.weighted else None for side in (tile.row, tile.column))

    def distances_of(k: int) -> Array:
        features = pairs.features[k]._replace(
            raw_x=tile.row.features[k], raw_y=tile.column.features[k], mask=mask, mask_y=mask_y
        )
        if pairs.is_self or features.sample is not None:
            features = features._replace(sample=tile.row.sample, sample_y=tile.column.sample)
        # Each gamma is tested on its own row or column: a row of a small sigma must not decide for the others.
        own, others = tile.row.gammas[k], tile.column.gammas[k]
        gammas = [tile.gamma[k], None if own is None else own[:, None], None if others is None else others[None]]
        gammas = [gamma for gamma in gammas if gamma is not None]
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
    if pairs.differentiable or number <= _SIDE_BY_SIDE:
        return tile._replace(distances=tuple(distances_of(k) for k in range(number)))
    # One after the other: the compiler would rather have what all of them need in memory at once.
    distances = lax.map(lambda k: lax.switch(k, [partial(distances_of, k) for k in range(number)]), jnp.arange(number))
    return tile._replace(distances=tuple(distances))


def inverse_rms_distance(features: CenteredFeatures, axis_name: str | None) -> Array:
    """1 / the root mean square distance: where distances are to be accurate in proportion to it."""
    means = []
    for rows, weights in zip(lax.stop_gradient(features.sides), Pairs((features,)).weights(), strict=True):
        sums = jnp.stack((jnp.sum(rows * rows), jnp.sum(weights)))
        total, count = over_devices(lax.psum, sums, axis_name)
        means.append(total / jnp.maximum(count, 1))
    mean = means[0] + means[1]
    return jnp.where(mean > 0, lax.rsqrt(jnp.where(mean > 0, mean, 1)), 1)
