"""The tiled visit of pairs, on one device or around a ring of devices.

Rows that are compared with themselves form a ring of an odd number of tiles, of which half is visited: tile i meets
tile i + k for k = 0 .. half way around, and each meeting stands for its mirror image too. With several devices, the
tiles of the others travel past, half way around as well. Reverse mode keeps nothing of a tile; of a device whose tiles
travel past it keeps the features.
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

# Rematerialized in reverse mode; inside a loop, there is nothing that CSE could share.
_recomputed = partial(jax.checkpoint, prevent_cse=False)


def visit_tiles(reduction: Reduction, pairs: Pairs, tile: Tile, *, both_sides: bool = False) -> tuple[Any, Any, Any]:
    """Totals, sums of the rows and, with `both_sides` of x with a separate y, sums of the columns."""
    n, m = tile.row.sample.shape[0], tile.column.sample.shape[0]
    count, size = split_rows(n, pairs.tile_size, odd=pairs.is_self)
    count_y, size_y = (count, size) if pairs.is_self else split_rows(m, pairs.tile_size)
    tile = tile._replace(weighted=tile.weighted or count * size != n or count_y * size_y != m)
    rows = _split(tile.row, count, size)
    columns = rows if pairs.is_self else _split(tile.column, count_y, size_y)
    meetings = _Meetings(reduction, pairs, tile, mirror=pairs.is_self, both_sides=pairs.is_self or both_sides)
    _, shape, _ = jax.eval_shape(meetings.meet, _take(rows, 0), _take(columns, 0), False)
    init = _repeated(reduction.init(jax.tree.map(_zeros, shape)), count)
    column_sums: Any = ()
    if pairs.is_self:
        totals, *sums = meetings.half_ring(rows, rows, init)
        sums = reduction.combine(*sums)
        if pairs.device_count() > 1:
            totals, sums = _around_half(meetings, rows, totals, sums, init)
    elif pairs.device_count() == 1:
        totals, sums, column_sums = meetings.rectangle(rows, columns, init)
    else:
        totals, sums = _around(meetings, rows, columns, init)
    totals = jax.tree.map(lambda t: over_devices(lax.psum, t, pairs.axis_name), totals)
    return totals, _join(sums, n), _join(column_sums, m)


_Carry = tuple[Side, Any, Any]  # columns that travel, their sums, sums of the rows at home


class _Meetings(NamedTuple):
    """What happens where two tiles of rows meet, or many."""

    reduction: Reduction
    pairs: Pairs
    tile: Tile  # with everything but rows, columns and distances
    mirror: bool  # both sides are rows of one representation: a meeting may stand for its mirror image too
    both_sides: bool  # whether sums belong to the rows of both sides

    def meet(self, rows: Side, columns: Side, mirrored: Array | bool) -> tuple[Any, Any, Any]:
        """Two tiles: totals, sums of the rows and of the columns; the latter only where the pair is `mirrored`."""
        reduction = self.reduction
        tile = with_distances(self.pairs, self.tile._replace(row=rows, column=columns))
        terms = reduction.terms(tile)
        totals, row_sums = reduction.sums(terms, tile)
        if not self.both_sides:
            return totals, row_sums, ()
        back = tile.mirrored()
        terms = jax.tree.map(transposed, terms) if reduction.symmetric else reduction.terms(back)
        totals_back, column_sums = reduction.sums(terms, back)
        if not self.mirror:
            return totals, row_sums, column_sums
        totals_back = totals if reduction.symmetric else totals_back
        totals = jax.tree.map(lambda a, b: a + jnp.where(mirrored, b, 0), totals, totals_back)
        init = reduction.init(column_sums)
        return totals, row_sums, jax.tree.map(lambda a, b: jnp.where(mirrored, a, b), column_sums, init)

    def half_ring(self, rows: Side, columns: Side, init: Any) -> tuple[Any, Any, Any]:
        """An odd number of tiles of rows and as many of columns: tile i meets tile i + k, half way around.

        Each meeting but those of k = 0 stands for its mirror image. So tiles that meet themselves have then all met;
        and so have those of two devices, if the other device does the same.
        """
        count = rows.sample.shape[0]
        meet = _recomputed(self.meet)

        @_recomputed
        def offset(k: Array) -> tuple[Any, Any, Any]:
            if not self.pairs.differentiable:  # no copy of the columns

                def at(i: Array) -> tuple[Any, Any, Any]:
                    return meet(_take(rows, i), _take(columns, (i + k) % count), k > 0)

                return lax.map(at, jnp.arange(count))
            # Reverse mode would add one array as large as all columns for every tile that is taken from them.
            return lax.map(lambda two: meet(*two, k > 0), (rows, _rotated(columns, k)))

        def step(sums: tuple[Any, Any], k: Array) -> tuple[tuple[Any, Any], Any]:
            totals, row_sums, column_sums = offset(k)
            combine = self.reduction.combine
            return (combine(sums[0], row_sums), combine(sums[1], _rotated(column_sums, count - k))), totals

        (row_sums, column_sums), totals = lax.scan(step, (init, init), jnp.arange(count // 2 + 1))
        return _sum_of_tiles(totals), row_sums, column_sums

    def rectangle(self, rows: Side, columns: Side, init: Any) -> tuple[Any, Any, Any]:
        """All tiles of rows with all of columns."""
        meet = _recomputed(self.meet)

        @_recomputed
        def meet_column(column: Side) -> tuple[Any, Any, Any]:
            totals, row_sums, column_sums = lax.map(lambda row: meet(row, column, True), rows)
            return totals, row_sums, self.combined(column_sums)

        def step(sums: Any, column: Side) -> tuple[Any, Any]:
            totals, row_sums, column_sums = meet_column(column)
            return self.reduction.combine(sums, row_sums), (totals, column_sums)

        row_sums, (totals, column_sums) = lax.scan(step, init, columns)
        return _sum_of_tiles(totals), row_sums, column_sums

    def combined(self, parts: Any) -> Any:
        """Sums of the same rows from several tiles, combined."""
        if not jax.tree.leaves(parts):
            return parts
        init = self.reduction.init(_take(parts, 0))
        return lax.scan(lambda sums, part: (self.reduction.combine(sums, part), None), init, parts)[0]


def _around_half(meetings: _Meetings, rows: Side, totals: Any, sums: Any, init: Any) -> tuple[Any, Any]:
    """Tiles with those of all other devices, which travel past with the sums that they collect, half way around."""
    devices, combine = meetings.pairs.device_count(), meetings.reduction.combine

    def pass_by(visit: Callable[..., tuple[Any, Any, Any]], carry: _Carry) -> tuple[_Carry, Any]:
        columns, column_sums = _from_device(carry[:2], 1, meetings.pairs)
        totals, row_sums, more = visit(rows, columns, init)
        return (columns, combine(column_sums, more), combine(carry[2], row_sums)), totals

    carry, parts = (rows, init, sums), [totals]
    if devices > 2:
        steps = jnp.arange((devices - 1) // 2)
        carry, part = lax.scan(lambda carry, _: pass_by(meetings.rectangle, carry), carry, steps)
        parts.append(jax.tree.map(pairwise_sum, part))
    if devices % 2 == 0:  # the device opposite does the other half
        carry, part = pass_by(meetings.half_ring, carry)
        parts.append(part)
    home = _from_device(carry[1], -(devices // 2), meetings.pairs)
    return reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts), combine(carry[2], home)


def _around(meetings: _Meetings, rows: Side, columns: Side, init: Any) -> tuple[Any, Any]:
    """Tiles of rows with the columns of all devices, which travel past."""

    def step(carry: tuple[Side, Any], _: Array) -> tuple[tuple[Side, Any], Any]:
        columns, sums = carry
        totals, row_sums, _ = meetings.rectangle(rows, columns, init)
        return (_from_device(columns, 1, meetings.pairs), meetings.reduction.combine(sums, row_sums)), totals

    (_, sums), totals = lax.scan(step, (columns, init), jnp.arange(meetings.pairs.device_count()))
    return jax.tree.map(pairwise_sum, totals), sums


def _from_device(tree: Any, distance: int, pairs: Pairs) -> Any:
    """On each device what the device at this distance has."""
    devices = pairs.device_count()
    return lax.ppermute(tree, pairs.axis_name, [((i + distance) % devices, i) for i in range(devices)])


def split_rows(n: int, tile_size: int | None, *, odd: bool = False) -> tuple[int, int]:
    """How many tiles n rows make (an odd number, if asked for), and the rows of a tile."""
    count = 1 if tile_size is None else -(-n // tile_size)
    if odd:
        count |= 1
    return count, -(-n // count)


def half_ring_of_blocks(count: int) -> Iterator[tuple[int, int, bool]]:
    """Pairs (i, j) of blocks that meet, each pair once, and whether one stands for (j, i) too; j varies first."""
    for i in range(count):
        for k in range(count // 2 + 1):
            if 2 * k == count and i >= k:  # opposite each other in an even ring: they have met
                continue
            yield i, (i + k) % count, k > 0


def _split(tree: Any, count: int, size: int) -> Any:
    """Rows in tiles: leaves (n, ...) become (count, size, ...); what is missing in the last tile is 0, its index -1."""

    def split(a: Array) -> Array:
        missing = count * size - a.shape[0]
        if missing:
            outside = -1 if jnp.issubdtype(a.dtype, jnp.integer) else 0
            a = jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1), constant_values=outside)
        return a.reshape(count, size, *a.shape[1:])

    return jax.tree.map(split, tree)


def _join(tree: Any, n: int) -> Any:
    """The first n rows of tiles: leaves (count, size, ...) become (n, ...)."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], tree)


def _take(tree: Any, k: Array | int) -> Any:
    """One of the tiles."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, k, 0, keepdims=False), tree)


def _rotated(tree: Any, k: Array) -> Any:
    """All tiles, beginning with the k-th."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(jnp.concatenate((a, a)), k, a.shape[0], 0), tree)


def _repeated(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), tree)


def _zeros(like: Any) -> Array:
    return varying_like(like, jnp.zeros(like.shape, like.dtype))


def _sum_of_tiles(totals: Any) -> Any:
    """Totals of tiles in two loops, added."""
    return jax.tree.map(lambda t: pairwise_sum(t.reshape(-1, *t.shape[2:])), totals)


def pairwise_sum(a: Array) -> Array:
    """The sum over the first axis, pair by pair: the error grows with the logarithm of the number of terms."""
    while a.shape[0] > 1:
        half = a.shape[0] // 2
        rest = a[2 * half :]
        a = a[:half] + a[half : 2 * half]
        if rest.shape[0]:
            a = jnp.concatenate((a, rest))
    return a[0]
