"""The tiled visit of pairs, on one device or around a ring of devices.

Rows compared with themselves are split into an odd number of tiles, arranged in a ring. Tile i is visited with tile
i + k for k = 0 .. half way around, and every pair of tiles also stands for its mirror image. With several devices, the
tiles of the other devices rotate around the ring, half way as well. Reverse mode stores nothing per tile; per rotation
it stores the features of the device that passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._linalg import transposed
from jaxalign.core.devices import over_devices, varying_like
from jaxalign.core.tiles import Pairs, Reduction, Side, Tile, with_distances

# Rematerialized in reverse mode. Inside a loop there is nothing that CSE could share.
_checkpoint = partial(jax.checkpoint, prevent_cse=False)


def visit_tiles(reduction: Reduction, pairs: Pairs, tile: Tile, *, both_sides: bool = False) -> tuple[Any, Any, Any]:
    """Totals, sums per row and, with `both_sides` of x with a separate y, sums per column."""
    n, m = tile.row.sample.shape[0], tile.column.sample.shape[0]
    count, size = split_rows(n, pairs.tile_size, odd=pairs.is_self)
    count_y, size_y = (count, size) if pairs.is_self else split_rows(m, pairs.tile_size)
    tile = tile._replace(weighted=tile.weighted or count * size != n or count_y * size_y != m)
    rows = _split_tiles(tile.row, count, size)
    columns = rows if pairs.is_self else _split_tiles(tile.column, count_y, size_y)
    visitor = _TileVisitor(reduction, pairs, tile, mirror=pairs.is_self, both_sides=pairs.is_self or both_sides)
    _, shape, _ = jax.eval_shape(visitor.visit_pair, _tile_at(rows, 0), _tile_at(columns, 0), False)
    init = _repeat(reduction.init(jax.tree.map(_zeros, shape)), count)
    column_sums: Any = ()
    if pairs.is_self:
        totals, *sums = visitor.half_ring(rows, rows, init)
        sums = reduction.combine(*sums)
        if pairs.device_count() > 1:
            totals, sums = _visit_half_device_ring(visitor, rows, totals, sums, init)
    elif pairs.device_count() == 1:
        totals, sums, column_sums = visitor.rectangle(rows, columns, init)
    else:
        totals, sums = _visit_device_ring(visitor, rows, columns, init)
    totals = jax.tree.map(lambda t: over_devices(lax.psum, t, pairs.axis_name), totals)
    return totals, _join_tiles(sums, n), _join_tiles(column_sums, m)


class _TileVisitor(NamedTuple):
    """Visits one pair of tiles, or many: tiles of rows with tiles of columns."""

    reduction: Reduction
    pairs: Pairs
    tile: Tile  # a template, with everything but rows, columns and distances
    mirror: bool  # rows and columns are of one representation: a pair of tiles may stand for its mirror image too
    both_sides: bool  # whether columns collect sums too

    def visit_pair(self, rows: Side, columns: Side, mirrored: Array | bool) -> tuple[Any, Any, Any]:
        """One pair of tiles: totals, sums per row and per column; sums per column only if the pair is `mirrored`."""
        reduction = self.reduction
        tile = with_distances(self.pairs, self.tile._replace(row=rows, column=columns))
        terms = reduction.terms(tile)
        totals, row_sums = reduction.sums(terms, tile)
        if not self.both_sides:
            return totals, row_sums, ()
        mirror_tile = tile.mirrored()
        terms = jax.tree.map(transposed, terms) if reduction.symmetric else reduction.terms(mirror_tile)
        mirror_totals, column_sums = reduction.sums(terms, mirror_tile)
        if not self.mirror:
            return totals, row_sums, column_sums
        mirror_totals = totals if reduction.symmetric else mirror_totals
        totals = jax.tree.map(lambda a, b: a + jnp.where(mirrored, b, 0), totals, mirror_totals)
        init = reduction.init(column_sums)
        return totals, row_sums, jax.tree.map(lambda a, b: jnp.where(mirrored, a, b), column_sums, init)

    def half_ring(self, rows: Side, columns: Side, init: Any) -> tuple[Any, Any, Any]:
        """An odd number of tiles of rows and as many of columns: tile i with tile i + k, half way around the ring.

        All pairs with k > 0 stand for their mirror images. This covers all pairs of tiles where rows and columns are
        the same tiles, and also those of two devices if the other device does the same.
        """
        count = rows.sample.shape[0]
        visit_pair = _checkpoint(self.visit_pair)

        @_checkpoint
        def visit_offset(k: Array) -> tuple[Any, Any, Any]:
            if not self.pairs.differentiable:  # indexing avoids a copy of the columns

                def visit_row(i: Array) -> tuple[Any, Any, Any]:
                    return visit_pair(_tile_at(rows, i), _tile_at(columns, (i + k) % count), k > 0)

                return lax.map(visit_row, jnp.arange(count))
            # Reverse mode would add an array as large as all columns for every tile that is indexed.
            return lax.map(lambda pair: visit_pair(*pair, k > 0), (rows, _rotate(columns, k)))

        def step(sums: tuple[Any, Any], k: Array) -> tuple[tuple[Any, Any], Any]:
            totals, row_sums, column_sums = visit_offset(k)
            combine = self.reduction.combine
            return (combine(sums[0], row_sums), combine(sums[1], _rotate(column_sums, count - k))), totals

        (row_sums, column_sums), totals = lax.scan(step, (init, init), jnp.arange(count // 2 + 1))
        return _sum_tiles(totals), row_sums, column_sums

    def rectangle(self, rows: Side, columns: Side, init: Any) -> tuple[Any, Any, Any]:
        """All tiles of rows with all tiles of columns."""
        visit_pair = _checkpoint(self.visit_pair)

        @_checkpoint
        def visit_column(column: Side) -> tuple[Any, Any, Any]:
            totals, row_sums, column_sums = lax.map(lambda row: visit_pair(row, column, True), rows)
            return totals, row_sums, self.combine_parts(column_sums)

        def step(sums: Any, column: Side) -> tuple[Any, Any]:
            totals, row_sums, column_sums = visit_column(column)
            return self.reduction.combine(sums, row_sums), (totals, column_sums)

        row_sums, (totals, column_sums) = lax.scan(step, init, columns)
        return _sum_tiles(totals), row_sums, column_sums

    def combine_parts(self, parts: Any) -> Any:
        """Combine the sums of the same rows over several tiles, stacked on axis 0."""
        if not jax.tree.leaves(parts):
            return parts
        init = self.reduction.init(_tile_at(parts, 0))
        return lax.scan(lambda sums, part: (self.reduction.combine(sums, part), None), init, parts)[0]


_RingState = tuple[Side, Any, Any]  # columns that rotate, their sums, sums of the local rows


def _visit_half_device_ring(visitor: _TileVisitor, rows: Side, totals: Any, sums: Any, init: Any) -> tuple[Any, Any]:
    """Local tiles with those of all other devices. Columns rotate half way around, with the sums that they collect."""
    devices, combine = visitor.pairs.device_count(), visitor.reduction.combine

    def rotate_and_visit(visit: Callable[..., tuple[Any, Any, Any]], state: _RingState) -> tuple[_RingState, Any]:
        columns, column_sums = _from_device(state[:2], 1, visitor.pairs)
        totals, row_sums, new_column_sums = visit(rows, columns, init)
        return (columns, combine(column_sums, new_column_sums), combine(state[2], row_sums)), totals

    state, parts = (rows, init, sums), [totals]
    if devices > 2:
        steps = jnp.arange((devices - 1) // 2)
        state, part = lax.scan(lambda state, _: rotate_and_visit(visitor.rectangle, state), state, steps)
        parts.append(jax.tree.map(pairwise_sum, part))
    if devices % 2 == 0:  # the opposite device visits the other half of these pairs
        state, part = rotate_and_visit(visitor.half_ring, state)
        parts.append(part)
    returned_sums = _from_device(state[1], -(devices // 2), visitor.pairs)
    return reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts), combine(state[2], returned_sums)


def _visit_device_ring(visitor: _TileVisitor, rows: Side, columns: Side, init: Any) -> tuple[Any, Any]:
    """Local tiles of rows with the columns of all devices, which rotate once around the ring."""

    def step(state: tuple[Side, Any], _: Array) -> tuple[tuple[Side, Any], Any]:
        columns, sums = state
        totals, row_sums, _ = visitor.rectangle(rows, columns, init)
        return (_from_device(columns, 1, visitor.pairs), visitor.reduction.combine(sums, row_sums)), totals

    (_, sums), totals = lax.scan(step, (columns, init), jnp.arange(visitor.pairs.device_count()))
    return jax.tree.map(pairwise_sum, totals), sums


def _from_device(tree: Any, offset: int, pairs: Pairs) -> Any:
    """On device i, what device i + offset holds."""
    devices = pairs.device_count()
    return lax.ppermute(tree, pairs.axis_name, [((i + offset) % devices, i) for i in range(devices)])


def split_rows(n: int, tile_size: int | None, *, odd: bool = False) -> tuple[int, int]:
    """The number of tiles for n rows (`odd`: an odd number), and the rows per tile."""
    count = 1 if tile_size is None else -(-n // tile_size)
    if odd:
        count |= 1
    return count, -(-n // count)


def half_ring_of_blocks(count: int) -> Iterator[tuple[int, int, bool]]:
    """All pairs (i, j) of blocks, each once, and whether a pair stands for (j, i) too. j varies first."""
    for i in range(count):
        for k in range(count // 2 + 1):
            if 2 * k == count and i >= k:  # opposite blocks of an even ring: the pair was visited from the other one
                continue
            yield i, (i + k) % count, k > 0


def _split_tiles(tree: Any, count: int, size: int) -> Any:
    """Split rows into tiles: leaves (n, ...) become (count, size, ...). The last tile is padded with 0, indices -1."""

    def split(a: Array) -> Array:
        padding = count * size - a.shape[0]
        if padding:
            value = -1 if jnp.issubdtype(a.dtype, jnp.integer) else 0
            a = jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1), constant_values=value)
        return a.reshape(count, size, *a.shape[1:])

    return jax.tree.map(split, tree)


def _join_tiles(tree: Any, n: int) -> Any:
    """The first n rows of all tiles: leaves (count, size, ...) become (n, ...)."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], tree)


def _tile_at(tree: Any, k: Array | int) -> Any:
    """The k-th tile."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, k, 0, keepdims=False), tree)


def _rotate(tree: Any, k: Array) -> Any:
    """All tiles, starting with the k-th."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(jnp.concatenate((a, a)), k, a.shape[0], 0), tree)


def _repeat(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), tree)


def _zeros(like: Any) -> Array:
    return varying_like(like, jnp.zeros(like.shape, like.dtype))


def _sum_tiles(totals: Any) -> Any:
    """Add the totals of two nested loops over tiles."""
    return jax.tree.map(lambda t: pairwise_sum(t.reshape(-1, *t.shape[2:])), totals)


def pairwise_sum(a: Array) -> Array:
    """The sum over axis 0, pair by pair: the error grows with the logarithm of the number of terms."""
    while a.shape[0] > 1:
        half = a.shape[0] // 2
        rest = a[2 * half :]
        a = a[:half] + a[half : 2 * half]
        if rest.shape[0]:
            a = jnp.concatenate((a, rest))
    return a[0]
