"""Nearest neighbors of samples in files: of each row the nearest in every block, merged block by block."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign.core.features import CenteredFeatures
from jaxalign.core.reduce import reduce_both_sides, reduce_pairs
from jaxalign.core.tiles import Pairs
from jaxalign.files.checkpoint import Checkpoint, State
from jaxalign.files.sources import Block, RowPairs
from jaxalign.files.visit import BlockSums, Reporting, visit, zero_sums
from jaxalign.measures._neighbors import NO_SAMPLE, Near, keep_nearest, nearer, resolution


def neighbors_in_blocks(pairs: RowPairs, k: int, checkpoint: Path | None, report: Reporting) -> Array:
    """Indices of the k nearest neighbors, (n, k), as `jaxalign.measures.nearest_neighbors` finds them."""
    n = pairs.x.num_rows
    near = {"distance": np.full((n, k), np.inf, pairs.dtype), "sample": np.full((n, k), NO_SAMPLE, np.int32)}
    saved = Checkpoint(checkpoint, "nearest_neighbors", {"k": k, **pairs.identity})
    gamma = resolution(pairs.centered(pairs.sample[0]))

    def nearest(x: Block, y: Block | None) -> BlockSums:
        column, mask_y = (None, None) if y is None else (y.features[0], y.mask)
        features = pairs.centered(x.features[0], column, x.mask, mask_y)
        starts = x.rows.start, (x if y is None else y).rows.start
        return BlockSums(0, *_nearest_in_block(features, gamma, *starts, k, pairs.tile_size))

    state = visit(nearest, [pairs.x], None, saved.load({**zero_sums(0), **near}), saved, report, add=_merge)
    saved.remove()
    return jnp.asarray(state["sample"])


@partial(jax.jit, static_argnames=("k", "tile_size"))
def _nearest_in_block(
    features: CenteredFeatures, gamma: Array, start_x: Any, start_y: Any, k: int, tile_size: int | None
) -> tuple[Near, Any]:
    """The nearest of each row among the columns and, for a separate y, of each column among the rows."""
    reduction = keep_nearest(k)
    pairs = Pairs((features,), None, features.is_self, tile_size, differentiable=False, euclidean=True)
    if features.is_self:
        return _numbered(reduce_pairs(reduction, pairs, gammas=(gamma,))[1], start_x), ()
    _, rows, columns = reduce_both_sides(reduction, pairs, gammas=(gamma,))
    return _numbered(rows, start_y), _numbered(columns, start_x)


def _numbered(near: Near, start: Any) -> Near:
    """With row numbers of the file instead of the block."""
    return near._replace(sample=jnp.where(near.sample == NO_SAMPLE, NO_SAMPLE, near.sample + start))


_nearer_jit = jax.jit(nearer)


def _merge(state: State, found: BlockSums, rows: slice, mirrored: slice | None) -> State:
    """The state with the nearest of two blocks; updates its arrays in place."""
    for part, near in ((rows, found.rows), (mirrored, found.columns)):
        if part is not None:
            before = Near(jnp.asarray(state["distance"][part]), jnp.asarray(state["sample"][part]))
            state["distance"][part], state["sample"][part] = _nearer_jit(before, near)
    return {**state, "done": np.asarray(state["done"] + 1)}
