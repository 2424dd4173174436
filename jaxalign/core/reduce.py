"""The pair reduction: the only place that visits pairs of rows.

Density, its derivatives and therefore sigma, products with the affinity, kernel alignment, nearest neighbors: each is
a reduction over pairs (i, j) of a function of their squared distance. `reduce_pairs` visits the pairs and hands every
tile of them to that function. There are three visits:

- dense: distances are stored and read in blocks of rows that stay in cache, so that several sums cost one read;
- tiled: the distances of a tile are computed when it is visited, and again when it is differentiated, so memory is a
  tile and a few times the features, never n x m;
- ring: the same with several devices, whose tiles travel around.

Masks, padding of the last tile and uneven shards are weights of the samples.
"""

from __future__ import annotations

from dataclasses import replace
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

# Rows and pairs in a block of stored ones: at most 4 MB of float32, also of a batch of small representations. (n = 4096
# on 2 cores: seven sums take 14 ms in blocks, 94 ms in one.)
_ROWS_PER_BLOCK = 64
_PAIRS_PER_BLOCK = 2**20


def reduce_pairs(
    reduction: Reduction,
    pairs: Pairs,
    *,
    gammas: tuple[Array | None, ...] = (None,),
    gamma_per: GammaPer = "all",
    as_row: Any = (),
    as_column: Any = (),
    in_blocks: bool = True,
) -> tuple[Any, Any]:
    """Visit all pairs and sum.

    Args:
        reduction: what is summed.
        pairs: the pairs.
        gammas: one per representation, in scaled units; it comes with the tile, and computed distances are accurate
            enough for it. None: accurate to rounding of the largest.
        gamma_per: "all": a gamma has shape (); "row": (n,); "column": (m,).
        as_row: a pytree of arrays (n, ...): values that a row brings to its pairs, `Tile.row.as_row`.
        as_column: the same for columns, (m, ...), `Tile.column.as_column`.
        in_blocks: False visits stored pairs all at once: for what reverse mode differentiates, as the transpose of a
            loop over blocks would add one n x m array per block.

    Returns:
        (totals, rows) of the reduction; rows have shape (n, ...). With `axis_name`, totals are over all devices, rows
        are those of this device.
    """
    tile = empty_tile(pairs, gammas, gamma_per, as_row, as_column)
    if pairs.distances is not None:
        return _visit_dense(reduction, pairs, tile, in_blocks)
    gamma = gammas[0] if len(gammas) == 1 else None
    if jax.default_backend() != "gpu" or pairs.differentiable or pairs.euclidean or gamma is None:
        return visit_tiles(reduction, pairs, tile)[:2]
    # Whether any tile needs explicit differences is asked once, not per tile: the host of a GPU has to look each time.
    fast = visit_tiles(reduction, replace(pairs, fast_only=True), tile)[:2]
    norms = squared_norms(pairs.features[0])
    coarse = may_be_coarse(norms, gamma, pairs_in_sum=tile.pairs_in_sum, axis_name=pairs.axis_name)

    def visit_accurately(_: tuple[Any, Any], row: Side, column: Side) -> tuple[Any, Any]:
        return visit_tiles(reduction, pairs, tile._replace(row=row, column=column))[:2]

    return when_any(on_any_device(coarse, pairs.axis_name), visit_accurately, fast, tile.row, tile.column)


def reduce_both_sides(
    reduction: Reduction, pairs: Pairs, *, gammas: tuple[Array | None, ...], as_row: Any = (), as_column: Any = ()
) -> tuple[Any, Any, Any]:
    """`reduce_pairs` of x with a separate y on one device, that sums for the columns too.

    Returns:
        (totals, rows, columns); columns have shape (m, ...), of the transposed pairs.
    """
    assert not pairs.is_self
    assert pairs.distances is None
    assert pairs.axis_name is None
    return visit_tiles(reduction, pairs, empty_tile(pairs, gammas, "all", as_row, as_column), both_sides=True)


def _visit_dense(reduction: Reduction, pairs: Pairs, tile: Tile, in_blocks: bool) -> tuple[Any, Any]:
    """All stored pairs once, on a CPU in blocks of rows."""
    distances = pairs.distances
    assert distances is not None

    def visit(start: Array | int, size: int) -> tuple[Any, Any]:
        part, row = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size), (distances, tile.row))
        part = tuple(root(d) if pairs.euclidean else d for d in part)
        part = tile._replace(distances=part, row=row)
        return reduction.sums(reduction.terms(part), part)

    n = distances[0].shape[0]
    most = min(_ROWS_PER_BLOCK, max(1, _PAIRS_PER_BLOCK // sum(d.shape[1] for d in distances)))
    if not in_blocks or most >= n or jax.default_backend() != "cpu":  # a GPU reads all pairs once as they are
        return visit(0, n)
    size = next((size for size in range(most, most // 8, -1) if n % size == 0), most)
    whole = n // size * size
    # Slices by their number, not blocks to map over: vmap would transpose those, all stored pairs in every pass.
    totals, rows = lax.map(lambda start: visit(start, size), jnp.arange(0, whole, size))
    totals = jax.tree.map(lambda t: jnp.sum(t, 0), totals)
    rows = jax.tree.map(lambda r: r.reshape(-1, *r.shape[2:]), rows)
    if whole == n:
        return totals, rows
    more_totals, more_rows = visit(whole, n - whole)
    rows = jax.tree.map(lambda a, b: jnp.concatenate((a, b)), rows, more_rows)
    return jax.tree.map(jnp.add, totals, more_totals), rows
