"""The pair reduction: the only place that visits pairs of rows.

Density, its derivatives and therefore sigma are sums over pairs (i, j) of a function of the squared distance. The
function is handed to `reduce_pairs`, which visits the distances in blocks of rows that stay in cache, so that
several sums cost one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# Pairs in a block: 4 MB of float32. (n = 4096 on 2 cores: six sums take 14 ms in such blocks, 94 ms in one.)
_PAIRS_PER_BLOCK = 2**20


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("distances", "row_weights", "column_weights"),
    meta_fields=("skip_self", "row_step", "column_step"),
)
@dataclass(frozen=True)
class Pairs:
    """Squared distances between rows, and how much each pair counts."""

    distances: Array  # (..., n, m)
    row_weights: Array | None = None  # (..., n); None: all 1
    column_weights: Array | None = None  # (..., m); None: all 1
    skip_self: bool = False  # pairs of a sample with itself do not count
    row_step: int = 1  # row i is sample i row_step,
    column_step: int = 1  # column j is sample j column_step

    def every(self, row_step: int, column_step: int, *, skip_self: bool) -> Pairs:
        """The pairs of every row_step-th row with every column_step-th column."""
        rows, columns = slice(None, None, row_step), slice(None, None, column_step)
        return Pairs(
            self.distances[..., rows, columns],
            None if self.row_weights is None else self.row_weights[..., rows],
            None if self.column_weights is None else self.column_weights[..., columns],
            skip_self,
            self.row_step * row_step,
            self.column_step * column_step,
        )

    def total(self, *, by_row: bool) -> Array:
        """The weight of all pairs that count, shape (...), or of each row's, (..., n)."""
        columns = self._columns()
        rows = jnp.sum(columns, -1, keepdims=True) - (self.self_weights() if self.skip_self else 0)
        rows = self._rows() * jnp.broadcast_to(rows, self.distances.shape[:-1])
        return rows if by_row else jnp.sum(rows, -1)

    def own(self, *, by_row: bool) -> Array:
        """The weight of the pairs of a sample with itself, if they counted: shape (...) or, by row, (..., n)."""
        own = self._rows() * self.self_weights()
        return own if by_row else jnp.sum(own, -1)

    def self_weights(self) -> Array:
        """The column weight of the sample that row i is, 0 where no column is that sample: shape (..., n)."""
        n, m = self.distances.shape[-2:]
        sample = jnp.arange(n) * self.row_step
        column = sample // self.column_step
        here = (sample % self.column_step == 0) & (column < m)
        return jnp.where(here, self._columns()[..., jnp.minimum(column, m - 1)], 0)

    def _rows(self) -> Array:
        shape, dtype = self.distances.shape[:-1], self.distances.dtype
        return jnp.ones(shape, dtype) if self.row_weights is None else self.row_weights

    def _columns(self) -> Array:
        shape, dtype = self.distances.shape[:-2] + self.distances.shape[-1:], self.distances.dtype
        return jnp.ones(shape, dtype) if self.column_weights is None else self.column_weights


def kernel(d2: Array, rate: Array) -> tuple[Array]:
    """The RBF affinity of squared distances: its definition in this library. rate = 1 / (2 sigma^2)."""
    return (jnp.exp(-rate * d2),)


def reduce_pairs(
    fn: Callable[..., tuple[Array, ...]],
    pairs: Pairs,
    *values: Array,
    by_row: bool,
    in_blocks: bool = True,
) -> tuple[Array, ...]:
    """Sum terms over all pairs, or over each row's pairs.

    Args:
        fn: fn(d2, *values) -> terms, each of the shape of d2. d2 is a block (..., r, m) of squared distances, the
            values are the parts of `values` that belong to it. Terms are multiplied by the pairs' weights.
        pairs: the pairs, n x m of them.
        values: arrays (..., n, m), one value a pair, (..., n, 1), one a row, or (..., 1, 1), one for all.
        by_row: sums over each row instead of over all pairs.
        in_blocks: False visits all pairs at once: for what reverse mode differentiates, as the transpose of a loop
            over blocks would add up one n x m array a block.

    Returns:
        One sum a term, of shape (...) or, by row, (..., n).
    """
    n, m = pairs.distances.shape[-2:]
    batch = pairs.distances.size // (n * m)
    block = min(n, max(1, _PAIRS_PER_BLOCK // (m * batch))) if in_blocks else n

    def visit(start: Array | int, size: int) -> tuple[Array, ...]:
        def part(a: Array, axis: int) -> Array:
            return a if size == n else lax.dynamic_slice_in_dim(a, start, size, axis)

        d2 = part(pairs.distances, -2)
        terms = fn(d2, *(value if value.shape[-2] == 1 else part(value, -2) for value in values))
        if pairs.row_weights is not None:
            rows = part(pairs.row_weights, -1)[..., :, None]
            terms = tuple(term * rows for term in terms)
        if pairs.column_weights is not None:
            columns = pairs.column_weights[..., None, :]
            terms = tuple(term * columns for term in terms)
        if pairs.skip_self:
            sample = (start + lax.broadcasted_iota(jnp.int32, (size, m), 0)) * pairs.row_step
            same = sample == lax.broadcasted_iota(jnp.int32, (size, m), 1) * pairs.column_step
            terms = tuple(jnp.where(same, 0, term) for term in terms)
        # Rows first, also for a sum over all: the partial sums keep digits, and XLA spreads the rows over the cores.
        sums = tuple(jnp.sum(term, -1) for term in terms)
        return sums if by_row else tuple(jnp.sum(rows, -1) for rows in sums)

    if block == n:
        return visit(0, n)
    whole = n // block
    sums = lax.map(lambda i: visit(i * block, block), jnp.arange(whole))
    if by_row:
        sums = tuple(jnp.moveaxis(s, 0, -2).reshape(s.shape[1:-1] + (whole * block,)) for s in sums)
    else:
        sums = tuple(jnp.sum(s, 0) for s in sums)
    if whole * block == n:
        return sums
    rest = visit(whole * block, n - whole * block)
    if by_row:
        return tuple(jnp.concatenate(both, -1) for both in zip(sums, rest, strict=True))
    return tuple(a + b for a, b in zip(sums, rest, strict=True))
