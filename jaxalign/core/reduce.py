"""The pair reduction: the only place that visits pairs of rows.

The density, its derivatives and thus sigma, products with the affinity, kernel alignment, nearest neighbors: each is a
reduction over pairs (i, j) of a function of their squared distance. `reduce_pairs` visits the pairs and passes every
tile of them to that function. There are three kinds of visits:

- dense: distances are stored and read in blocks of rows that stay in cache, so several sums cost one read;
- tiled: the distances of a tile are computed when it is visited, and again when it is differentiated, so memory is a
  tile and a few times the features, never n x m;
- ring: tiled, with several devices whose tiles rotate around a ring.

Masks, padding of the last tile and uneven shards are expressed as weights of the samples.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._linalg import root
from jaxalign.core.devices import on_any_device
from jaxalign.core.features import may_be_coarse, squared_norms, when_any
from jaxalign.core.ring import visit_tiles
from jaxalign.core.tiles import GammaPer, Pairs, Reduction, Side, Tile, empty_tile

# Rows and pairs per block of stored distances: at most 4 MB of float32 per representation of a batch.
# (n = 4096 on 2 cores: seven sums take 14 ms in blocks, 94 ms in one.)
_ROWS_PER_BLOCK = 64
_PAIRS_PER_BLOCK = 2**20


def reduce_pairs(
    reduction: Reduction,
    pairs: Pairs,
    *,
    gammas: tuple[Array | None, ...] = (None,),
    gamma_per: GammaPer = "all",
    row_values: Any = (),
    column_values: Any = (),
    in_blocks: bool = True,
) -> tuple[Any, Any]:
    """Sum over all pairs.

    Args:
        reduction: what is summed.
        pairs: the pairs.
        gammas: one per representation, in scaled units. Tiles hold it, and computed distances are accurate enough for
            it. None: accurate to the rounding error of the largest distance.
        gamma_per: "all": a gamma has shape (); "row": (n,); "column": (m,).
        row_values: a pytree of arrays (n, ...), the values of a sample as the row of a pair: `Tile.row.row_values`.
        column_values: the same for columns, (m, ...): `Tile.column.column_values`.
        in_blocks: False visits all stored pairs at once. Use it under reverse mode: the transpose of a loop over blocks
            would add one n x m array per block.

    Returns:
        (totals, row results) of the reduction; row results have shape (n, ...). With `axis_name`, totals are over all
        devices and row results are local.
    """
    tile = empty_tile(pairs, gammas, gamma_per, row_values, column_values)
    if pairs.distances is not None:
        return _visit_dense(reduction, pairs, tile, in_blocks)
    gamma = gammas[0] if len(gammas) == 1 else None
    if jax.default_backend() != "gpu" or pairs.differentiable or pairs.euclidean or gamma is None:
        return visit_tiles(reduction, pairs, tile)[:2]
    # Test once, not per tile, whether any tile needs explicit differences: each test is read by the host of a GPU.
    fast = visit_tiles(reduction, replace(pairs, fast_only=True), tile)[:2]
    norms = squared_norms(pairs.features[0])
    coarse = may_be_coarse(norms, gamma, pairs_in_sum=tile.pairs_in_sum, axis_name=pairs.axis_name)

    def visit_accurately(_: tuple[Any, Any], row: Side, column: Side) -> tuple[Any, Any]:
        return visit_tiles(reduction, pairs, tile._replace(row=row, column=column))[:2]

    return when_any(on_any_device(coarse, pairs.axis_name), visit_accurately, fast, tile.row, tile.column)


def reduce_both_sides(
    reduction: Reduction,
    pairs: Pairs,
    *,
    gammas: tuple[Array | None, ...],
    row_values: Any = (),
    column_values: Any = (),
) -> tuple[Any, Any, Any]:
    """`reduce_pairs` of x with a separate y on one device, with results for the columns too.

    Returns:
        (totals, row results, column results); the latter, (m, ...), are the row results of the transposed pairs.
    """
    assert not pairs.is_self
    assert pairs.distances is None
    assert pairs.axis_name is None
    tile = empty_tile(pairs, gammas, "all", row_values, column_values)
    return visit_tiles(reduction, pairs, tile, both_sides=True)


def _visit_dense(reduction: Reduction, pairs: Pairs, tile: Tile, in_blocks: bool) -> tuple[Any, Any]:
    """Visit all stored pairs, on a CPU in blocks of rows."""
    distances = pairs.distances
    assert distances is not None

    def visit(block: tuple[tuple[Array, ...], Side]) -> tuple[Any, Any]:
        tile_distances = tuple(root(d) if pairs.euclidean else d for d in block[0])
        block_tile = tile._replace(distances=tile_distances, row=block[1])
        return reduction.sums(reduction.terms(block_tile), block_tile)

    stored, n = (distances, tile.row), distances[0].shape[0]
    most = min(_ROWS_PER_BLOCK, max(1, _PAIRS_PER_BLOCK // sum(d.shape[1] for d in distances)))
    if not in_blocks or most >= n or jax.default_backend() != "cpu":  # a GPU reads all pairs once as they are
        return visit(stored)
    size = next((size for size in range(most, most // 8, -1) if n % size == 0), most)
    num_rows = n // size * size  # in whole blocks
    # Slices by start index: mapped over, blocks would make vmap transpose all stored pairs in every pass.
    block_at = partial(lax.dynamic_slice_in_dim, slice_size=size, allow_negative_indices=False)
    starts = jnp.arange(0, num_rows, size)
    totals, rows = lax.map(lambda start: visit(jax.tree.map(lambda a: block_at(a, start), stored)), starts)
    totals = jax.tree.map(lambda t: jnp.sum(t, 0), totals)
    rows = jax.tree.map(lambda r: r.reshape(-1, *r.shape[2:]), rows)
    if num_rows == n:
        return totals, rows
    last_totals, last_rows = visit(jax.tree.map(lambda a: a[num_rows:], stored))
    rows = jax.tree.map(lambda a, b: jnp.concatenate((a, b)), rows, last_rows)
    return jax.tree.map(jnp.add, totals, last_totals), rows
