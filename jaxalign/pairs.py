"""The pair reduction: the only place that visits pairs of rows.

Density, its derivatives and therefore sigma, products with the affinity, kernel alignment, nearest neighbours: each is
a reduction over pairs (i, j) of a function of the squared distance. `reduce_pairs` visits the pairs tile by tile and
hands every tile to that function. The distances of a tile are

- stored (`Pairs.distances`): read in blocks of rows that stay in cache, so that several sums cost one pass;
- or computed from the features when the tile is visited, and again when it is differentiated: memory is a tile and a
  few times the features, never n x m.

Rows that are compared with themselves form a ring of an odd number of tiles, of which half is visited: tile i meets
tile i + k for k = 0 .. half way round, and each meeting stands for its mirror image too. With several devices, the
tiles of the others come by, half way round as well. Masks, padding of the last tile and uneven shards are weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._linalg import root, transposed
from jaxalign.distances import (
    Frame,
    accurate_distances,
    attach_formula,
    fast_distances,
    norms_of,
    over_devices,
    suspicious,
    varying_like,
    when_any,
)

# What has a rate of its own: all pairs together one, or each row, or each column.
RatesOf = Literal["all", "rows", "columns"]

# Share of the pairs that bear a sum over a kernel, where it is not known: the default density.
_USUAL_SHARE = 0.05
# Computes again what reverse mode wants to know; in a loop there is nothing to share with.
_again = partial(jax.checkpoint, prevent_cse=False)
# The distances of so many sets are computed side by side.
_FEW_SETS = 2
# Stored pairs in a block: 4 MB of float32. (n = 4096 on 2 cores: six sums take 14 ms in such blocks, 94 ms in one.)
_PAIRS_PER_BLOCK = 2**20


class Side(NamedTuple):
    """Rows on one side of a tile, and what belongs to each: every leaf has its rows on axis -2."""

    features: tuple[Array, ...]  # (..., n, d), one a feature set
    weights: Array  # (..., n, 1): 1 a real row, 0 one that is masked or padding
    sample: Array  # (n, 1) number of the sample
    rates: tuple[Array | None, ...]  # (..., n, 1) where every row has its own
    as_row: Any  # values that a row brings to its pairs as the first of the two
    as_column: Any  # and as the second


class Tile(NamedTuple):
    """Some rows against some others."""

    distances: tuple[Array, ...]  # squared (not where rooted), (..., r, c), one a set, in the units of its frame
    row: Side
    column: Side
    one_rate: tuple[Array | None, ...]  # (..., 1, 1), where there is one rate for all rows
    rates_of: RatesOf  # what has a rate
    counted: Array  # (..., 1, 1): about how many pairs bear a sum, for the accuracy of distances
    weighted: bool  # whether any weight is not 1
    skip_self: bool

    @property
    def rates(self) -> tuple[Array | None, ...]:
        """One a feature set, broadcasting against its distances; None where none was given."""
        by_column = self.rates_of == "columns"
        owners = self.column.rates if by_column else self.row.rates
        each = (rate if rate is None or not by_column else transposed(rate) for rate in owners)
        return tuple(own if only is None else only for own, only in zip(each, self.one_rate, strict=True))

    def weigh(self, values: Array) -> Array:
        """Values (..., r, c) times the weights of both rows; 0 for pairs that do not count."""
        if self.weighted:
            values = values * self.row.weights * transposed(self.column.weights)
        return jnp.where(self.same(), 0, values) if self.skip_self else values

    def same(self) -> Array:
        """Where a pair is a sample with itself, (r, c)."""
        return self.row.sample == transposed(self.column.sample)

    def mirrored(self) -> Tile:
        """The same pairs, the other way round."""
        return self._replace(distances=jax.tree.map(transposed, self.distances), row=self.column, column=self.row)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _no(like: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, like)


class Reduction(NamedTuple):
    """What is summed up.

    Attributes:
        terms: tile -> a pytree of weighted values, (..., r, c): pass them through `Tile.weigh`.
        sums: (terms, tile) -> (totals, rows). Totals are added up over all tiles: any shape that begins with the batch
            dimensions. Rows belong to the tile's rows, (..., r, k), and are combined over the tiles of a row.
        symmetric: a term does not change when its pair is turned round, so the mirror image needs no second look.
        combine: of two partial results of a row; addition unless told otherwise.
        nothing: what a row starts with, of the shape of its partial results; zeros unless told otherwise.

    Without rows (an empty pytree) `combine` and `nothing` are given empty pytrees.
    """

    terms: Callable[[Tile], Any]
    sums: Callable[[Any, Tile], tuple[Any, Any]]
    symmetric: bool = True
    combine: Callable[[Any, Any], Any] = _add
    nothing: Callable[[Any], Any] = _no


def over_all(terms: Any, tile: Tile) -> tuple[Any, Any]:
    """The sum of each term over all pairs, shape (...)."""
    del tile
    # Rows first: the partial sums keep digits, and XLA spreads the rows over the cores.
    return jax.tree.map(lambda term: jnp.sum(jnp.sum(term, -1), -1), terms), ()


def over_rows(terms: Any, tile: Tile) -> tuple[Any, Any]:
    """The sum of each term over each row's pairs, shape (..., r, 1)."""
    del tile
    return (), jax.tree.map(lambda term: jnp.sum(term, -1, keepdims=True), terms)


def stacked_over_all(terms: tuple[Array, ...], tile: Tile) -> tuple[Array, Any]:
    """The sums of k terms over all pairs in one array, shape (..., k): a GPU adds up all of them at once."""
    del tile
    return jnp.sum(jnp.stack([jnp.sum(term, -1) for term in terms], -2), -1), ()


def kernel(d2: Array, rate: Array) -> Array:
    """The RBF affinity of squared distances: its definition in this library. rate = 1 / (2 sigma^2).

    Of distances that are not squared (`Pairs.rooted`) it is the Laplacian kernel, rate = 1 / sigma.
    """
    return jnp.exp(log_kernel(d2, rate))


def log_kernel(d2: Array, rate: Array) -> Array:
    """The logarithm of `kernel`, which is a number also where the kernel is 0."""
    return -rate * d2  # not -(rate * d2): XLA would store a product that other terms need too, n x n numbers


def kernel_less_one(d2: Array, rate: Array) -> Array:
    """`kernel` - 1, which keeps its digits where the kernel is close to 1."""
    return jnp.expm1(log_kernel(d2, rate))


def kernel_terms(tile: Tile) -> Array:
    """The weighted affinity of the first feature set at its rate."""
    rate = tile.rates[0]
    assert rate is not None
    return tile.weigh(kernel(tile.distances[0], rate))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("frames", "distances", "density"),
    meta_fields=("skip_self", "tile_size", "axis_name", "precision", "fixed", "trusted", "rooted"),
)
@dataclass(frozen=True)
class Pairs:
    """All pairs of rows of one or several feature sets of the same samples.

    Attributes:
        frames: the feature sets; they share the masks of the first.
        distances: stored squared distances (..., n, m), one a set (their roots, if rooted); None: computed tile by
            tile.
        skip_self: pairs of a sample with itself do not count.
        tile_size: rows and columns of a tile at most; None: one tile.
        axis_name: the named axis over whose devices the rows, of both sides, are spread.
        precision: of the products in the distances.
        fixed: no derivative is wanted; computed distances then carry none, which saves a pass over each tile.
        trusted: computed distances by the fast formula are accurate enough.
        rooted: tiles hold Euclidean distances, not squared ones.
        density: (..., 1, 1), about the mean of the kernel that is summed up, if known: the fewer pairs bear a sum, the
            more accurate their distances have to be.
    """

    frames: tuple[Frame, ...]
    distances: tuple[Array, ...] | None = None
    skip_self: bool = False
    tile_size: int | None = None
    axis_name: str | None = None
    precision: lax.PrecisionLike = None
    fixed: bool = False
    trusted: bool = False
    rooted: bool = False
    density: Array | None = None

    @property
    def itself(self) -> bool:
        """Whether the rows are compared with themselves."""
        return self.frames[0].raw_y is None

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading dimensions."""
        return self.frames[0].raw_x.shape[:-2]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, those of all devices."""
        frame, devices = self.frames[0], self.device_count()
        return frame.raw_x.shape[-2] * devices, frame.raw_other.shape[-2] * devices

    def weights(self) -> tuple[Array, Array]:
        """Of the rows, (..., n), and of the columns, (..., m); those on this device."""
        frame = self.frames[0]
        return _weights(frame.raw_x, frame.mask), _weights(frame.raw_other, frame.other_mask)

    def total(self, *, by_row: bool) -> Array:
        """The weight of all pairs that count, shape (...), or of each row's, (..., n)."""
        rows, columns = self.weights()
        each = over_devices(lax.psum, jnp.sum(columns, -1, keepdims=True), self.axis_name)
        totals = rows * (each - rows if self.skip_self and self.itself else each)
        return totals if by_row else over_devices(lax.psum, jnp.sum(totals, -1), self.axis_name)

    def own(self, *, by_row: bool) -> Array:
        """The weight of the pairs of a sample with itself, if they counted: shape (...) or, by row, (..., n)."""
        rows = self.weights()[0]
        own = rows * rows if self.itself else jnp.zeros_like(rows)
        return own if by_row else over_devices(lax.psum, jnp.sum(own, -1), self.axis_name)

    def subset(self, size: int, *, all_rows: bool) -> Pairs:
        """Pairs of about `size` rows with `size` columns (all rows, if told so), without those of a sample with itself.

        Every device gets the sample of all devices. Of the first feature set.
        """
        frame = self.frames[0]
        index = self._index(frame.raw_x)
        x = (frame.raw_x, frame.mask, index)
        y = x if self.itself else (frame.raw_y, frame.mask_y, None)
        n, m = self.shape
        row_step, column_step = 1 if all_rows else max(1, n // size), max(1, m // size)
        rows = x if all_rows else self._thinned(x, row_step)
        columns = self._thinned(y, column_step)
        few = frame._replace(raw_x=rows[0], mask=rows[1], raw_y=columns[0], mask_y=columns[1])
        if self.itself:
            few = few._replace(sample=rows[2], sample_y=columns[2])
        pairs = replace(self, frames=(few,), distances=None, skip_self=self.itself, axis_name=None)
        if self.distances is not None:
            return replace(pairs, distances=(self.distances[0][..., ::row_step, ::column_step],))
        return pairs if all_rows else pairs.stored()

    def stored(self) -> Pairs:
        """The same with their distances stored, by the fast formula."""
        squared = (fast_distances(frame, self.precision) for frame in self.frames)
        return replace(self, distances=tuple(root(d2) if self.rooted else d2 for d2 in squared))

    def counted(self, rates_of: RatesOf) -> Array:
        """About how many pairs bear the sum over a kernel, (..., 1, 1): of all, of a row or of a column."""
        n, m = self.shape
        number = {"all": n * m, "rows": m, "columns": n}[rates_of]
        if self.density is None:
            return usual_count(number, self.frames[0].raw_x)
        return float(number) * self.density  # more than int32 holds, for many rows

    def any(self, condition: Array) -> Array:
        """Whether a condition holds anywhere, on any device: a scalar."""
        return over_devices(lax.psum, jnp.any(condition).astype(jnp.int32), self.axis_name) > 0

    def side(self, *, second: bool, rates: tuple[Array | None, ...], as_row: Any, as_column: Any) -> Side:
        """All rows of one side, with what belongs to them."""
        frame = self.frames[0]
        second = second and not self.itself
        features = tuple(f.raw_other if second else f.raw_x for f in self.frames)
        first = features[0]
        index = frame.sample_y if second else frame.sample
        if index is None:
            index = self._index(first)
        weights = _weights(first, frame.mask_y if second else frame.mask)
        return Side(features, weights[..., None], index[:, None], rates, as_row, as_column)

    def device_count(self) -> int:
        """How many devices share the rows."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def _index(self, rows: Array) -> Array:
        n = rows.shape[-2]
        first = 0 if self.axis_name is None else lax.axis_index(self.axis_name) * n
        return first + jnp.arange(n, dtype=jnp.int32)

    def _thinned(self, side: tuple[Any, Any, Any], step: int) -> tuple[Any, Any, Any]:
        x, mask, index = side

        def gathered(a: Array, axis: int) -> Array:
            if self.axis_name is None:
                return a
            number = a.astype(jnp.int32) if a.dtype == bool else a
            parts = lax.expand_dims(number, (0,))
            devices = jnp.arange(self.device_count(), dtype=jnp.int32)
            place = devices.reshape((-1,) + (1,) * number.ndim) == lax.axis_index(self.axis_name)
            every = jnp.moveaxis(lax.psum(jnp.where(place, parts, 0), self.axis_name), 0, axis - 1)
            shape = list(a.shape)
            shape[axis] *= self.device_count()
            return every.reshape(shape).astype(a.dtype)

        return (
            gathered(x[..., ::step, :], -2),
            None if mask is None else gathered(mask[..., ::step], -1),
            None if index is None else gathered(index[::step], -1),
        )


def usual_count(number: int, like: Array) -> Array:
    """Of so many pairs, how many usually bear a sum over a kernel; with as many dimensions as `like`, and its dtype."""
    return jnp.full((1,) * like.ndim, _USUAL_SHARE * number, like.dtype)


def _weights(rows: Array, mask: Array | None) -> Array:
    return varying_like(rows, jnp.ones(rows.shape[:-1], rows.dtype)) if mask is None else mask.astype(rows.dtype)


def reduce_pairs(
    reduction: Reduction,
    pairs: Pairs,
    *,
    rates: tuple[Array | None, ...] = (None,),
    rates_of: RatesOf = "all",
    as_row: Any = (),
    as_column: Any = (),
    in_blocks: bool = True,
) -> tuple[Any, Any]:
    """Visit all pairs and sum up.

    Args:
        reduction: what is summed up.
        pairs: the pairs.
        rates: one a feature set: 1 / (2 sigma^2) in units of its frame; it comes with the tile, and computed distances
            are accurate enough for it. None: accurate to rounding of the largest.
        rates_of: "all": a rate has shape (..., 1, 1); "rows" (..., n, 1), one a row; "columns" (..., m, 1).
        as_row: a pytree of arrays (..., n, k): values that a row brings to its pairs, `Tile.row.as_row`.
        as_column: the same for columns, (..., m, k), `Tile.column.as_column`.
        in_blocks: False visits stored pairs all at once: for what reverse mode differentiates, as the transpose of a
            loop over blocks would add up one n x m array a block.

    Returns:
        (totals, rows) of the reduction; rows are (..., n, k). With `axis_name`, totals are over all devices, rows are
        those of this device.
    """
    blank = _blank_tile(pairs, rates, rates_of, as_row, as_column)
    if pairs.distances is not None:
        return _visit_stored(reduction, pairs, blank, in_blocks)
    rate = rates[0] if len(rates) == 1 else None
    if jax.default_backend() != "gpu" or not pairs.fixed or pairs.rooted or rate is None:
        return _visit_tiles(reduction, pairs, blank)[:2]
    # Whether some tile needs explicit differences is asked once, not in every tile, as the host of a GPU has to look.
    quick = _visit_tiles(reduction, replace(pairs, trusted=True), blank)[:2]
    norms, counted = norms_of(pairs.frames[0]), blank.counted
    doubtful = suspicious(norms, rate, counted=counted, axis_name=pairs.axis_name)
    return when_any(pairs.any(doubtful), lambda _: _visit_tiles(reduction, pairs, blank)[:2], quick)


def reduce_both_sides(
    reduction: Reduction, pairs: Pairs, *, rates: tuple[Array | None, ...], as_row: Any = (), as_column: Any = ()
) -> tuple[Any, Any, Any]:
    """`reduce_pairs` of rows with other rows, on one device, that sums up for the columns too.

    Returns:
        (totals, rows, columns); columns are (..., m, k), of the pairs turned round.
    """
    assert not pairs.itself
    assert pairs.distances is None
    assert pairs.axis_name is None
    return _visit_tiles(reduction, pairs, _blank_tile(pairs, rates, "all", as_row, as_column), both_sides=True)


def _blank_tile(pairs: Pairs, rates: tuple[Array | None, ...], rates_of: RatesOf, as_row: Any, as_column: Any) -> Tile:
    """All rows and columns as one tile, without distances."""
    none = (None,) * len(rates)
    one_rate, own = (rates, none) if rates_of == "all" else (none, rates)
    if pairs.itself:
        row = column = pairs.side(second=False, rates=own, as_row=as_row, as_column=as_column)
    else:
        row = pairs.side(second=False, rates=none if rates_of == "columns" else own, as_row=as_row, as_column=())
        column = pairs.side(second=True, rates=own if rates_of == "columns" else none, as_row=(), as_column=as_column)
    # Inside shard_map what comes by varies from device to device, also where it started as the same on all.
    features = pairs.frames[0].raw_x
    same = row is column
    row = jax.tree.map(lambda a: varying_like(features, a), row)
    column = row if same else jax.tree.map(lambda a: varying_like(features, a), column)
    weighted = pairs.frames[0].mask is not None or pairs.frames[0].other_mask is not None
    return Tile((), row, column, one_rate, rates_of, pairs.counted(rates_of), weighted, pairs.skip_self)


def _visit_stored(reduction: Reduction, pairs: Pairs, blank: Tile, in_blocks: bool) -> tuple[Any, Any]:
    """All pairs once, in blocks of rows."""
    assert pairs.distances is not None
    n = pairs.distances[0].shape[-2]
    in_a_row = sum(d2.size for d2 in pairs.distances) // n
    in_blocks = in_blocks and jax.default_backend() == "cpu"  # a GPU's fused sums read all pairs once as they are
    block = min(n, max(1, _PAIRS_PER_BLOCK // in_a_row)) if in_blocks else n

    def look(part: Callable[[Array], Array]) -> tuple[Any, Any]:
        distances = tuple(part(d2) for d2 in pairs.distances or ())
        tile = blank._replace(distances=distances, row=jax.tree.map(part, blank.row))
        return reduction.sums(reduction.terms(tile), tile)

    if block == n:
        return look(lambda a: a)
    # Every k-th row, where k divides n: rows that are spread over devices in one piece each then stay where they are.
    least = -(-n // block)
    step = next((k for k in range(least, 4 * least) if n % k == 0), None)
    if step is not None:

        def strided(start: Array) -> Callable[[Array], Array]:
            def part(a: Array) -> Array:
                a = a.reshape(a.shape[:-2] + (n // step, step, a.shape[-1]))
                return lax.dynamic_index_in_dim(a, start, -2, keepdims=False)

            return part

        totals, rows = lax.map(lambda k: look(strided(k)), jnp.arange(step))
        rows = jax.tree.map(lambda r: jnp.moveaxis(r, 0, -2).reshape(r.shape[1:-2] + (n, r.shape[-1])), rows)
        return jax.tree.map(lambda t: jnp.sum(t, 0), totals), rows

    def piece(start: Array | int, size: int) -> tuple[Any, Any]:
        return look(lambda a: lax.dynamic_slice_in_dim(a, start, size, -2))

    whole = n // block
    totals, rows = lax.map(lambda i: piece(i * block, block), jnp.arange(whole))
    rest_totals, rest_rows = piece(whole * block, n - whole * block) if whole * block < n else (None, None)
    totals = jax.tree.map(lambda t: jnp.sum(t, 0), totals)
    rows = jax.tree.map(lambda r: _joined(r, whole * block), rows)
    if rest_totals is None:
        return totals, rows
    return (
        jax.tree.map(jnp.add, totals, rest_totals),
        jax.tree.map(lambda a, b: jnp.concatenate((a, b), -2), rows, rest_rows),
    )


class _Meeting(NamedTuple):
    """What happens where two tiles meet, or many."""

    reduction: Reduction
    pairs: Pairs
    blank: Tile
    both: bool  # whether sums belong to the rows of both sides
    itself: bool  # whether both sides are rows of one set: a meeting then stands for its mirror image too

    def of(self, some: Side, others: Side, mirror: Array | bool) -> tuple[Any, Any, Any]:
        """Two tiles: totals, sums of the rows of one and of the other: none without `mirror`."""
        reduction = self.reduction
        tile = _with_distances(self.pairs, self.blank._replace(row=some, column=others))
        terms = reduction.terms(tile)
        totals, sums = reduction.sums(terms, tile)
        if not self.both:
            return totals, sums, ()
        back = tile.mirrored()
        terms = jax.tree.map(transposed, terms) if reduction.symmetric else reduction.terms(back)
        totals_back, sums_back = reduction.sums(terms, back)
        if not self.itself:
            return totals, sums, sums_back
        totals_back = totals if reduction.symmetric else totals_back
        totals = jax.tree.map(lambda a, b: a + jnp.where(mirror, b, 0), totals, totals_back)
        nothing = reduction.nothing(sums_back)
        return totals, sums, jax.tree.map(lambda a, b: jnp.where(mirror, a, b), sums_back, nothing)

    def ring(self, tiles: Side, others: Side, start: Any) -> tuple[Any, Any, Any]:
        """Half a ring of an odd number of tiles of rows and as many others: tile i meets tile i + k, half way round.

        Each meeting but those of k = 0 stands for its mirror image too. So tiles that meet themselves have all met
        then; and so have those of two devices, if the other device does the same.
        """
        count = tiles.sample.shape[0]

        @_again
        def offset(k: Array) -> tuple[Any, Any, Any]:
            if self.pairs.fixed:  # no copy of the others; reverse mode would add up one as large for every tile
                two = lambda i: (_one(tiles, i), _one(others, (i + k) % count))  # noqa: E731
                return lax.map(lambda i: meet(*two(i), k > 0), jnp.arange(count))
            return lax.map(lambda two: meet(*two, k > 0), (tiles, _turned(others, k)))

        def step(sums: tuple[Any, Any], k: Array) -> tuple[tuple[Any, Any], Any]:
            totals, more, back = offset(k)
            home = _turned(back, count - k)
            return (self.reduction.combine(sums[0], more), self.reduction.combine(sums[1], home)), totals

        meet = _again(self.of)
        (sums, theirs), totals = lax.scan(step, (start, start), jnp.arange(count // 2 + 1))
        return _summed(totals), sums, theirs

    def rectangle(self, tiles: Side, others: Side, start: Any) -> tuple[Any, Any, Any]:
        """All tiles of rows with all of others."""

        @_again
        def column(other: Side) -> tuple[Any, Any, Any]:
            totals, sums, back = lax.map(lambda some: meet(some, other, True), tiles)
            return totals, sums, self.over_tiles(back)

        def step(sums: Any, other: Side) -> tuple[Any, Any]:
            totals, more, back = column(other)
            return self.reduction.combine(sums, more), (totals, back)

        meet = _again(self.of)
        sums, (totals, theirs) = lax.scan(step, start, others)
        return _summed(totals), sums, theirs

    def over_tiles(self, parts: Any) -> Any:
        """Sums of the same rows that several tiles gave, combined."""
        if not jax.tree.leaves(parts):
            return parts
        nothing = self.reduction.nothing(_one(parts, 0))
        return lax.scan(lambda sums, part: (self.reduction.combine(sums, part), None), nothing, parts)[0]


def _visit_tiles(reduction: Reduction, pairs: Pairs, blank: Tile, *, both_sides: bool = False) -> tuple[Any, Any, Any]:
    """Tile after tile; see the top of the module. Columns are summed up for if `both_sides`, of rows with others.

    Reverse mode keeps nothing of a tile; what it keeps of a device that came by is its features.
    """
    itself, devices = pairs.itself, pairs.device_count()
    n, m = blank.row.sample.shape[0], blank.column.sample.shape[0]
    count, size = split_rows(n, pairs.tile_size, odd=itself)
    count_y, size_y = (count, size) if itself else split_rows(m, pairs.tile_size)
    blank = blank._replace(weighted=blank.weighted or count * size != n or count_y * size_y != m)
    tiles = _split(blank.row, count, size)
    others = tiles if itself else _split(blank.column, count_y, size_y)
    meeting = _Meeting(reduction, pairs, blank, both=itself or both_sides, itself=itself)
    _, shape, _ = jax.eval_shape(meeting.of, _one(tiles, 0), _one(others, 0), False)
    start = _stacked(reduction.nothing(jax.tree.map(_zeros, shape)), count)
    if itself:
        totals, mine, met = meeting.ring(tiles, tiles, start)
        sums = reduction.combine(mine, met)
        if devices > 1:
            totals, sums = _around(meeting, tiles, totals, sums, start)
        met = ()
    elif devices == 1:
        totals, sums, met = meeting.rectangle(tiles, others, start)
    else:
        totals, sums, met = *_all_around(meeting, tiles, others, start), ()
    totals = jax.tree.map(lambda t: over_devices(lax.psum, t, pairs.axis_name), totals)
    sums, met = (jax.tree.map(lambda r, k=k: _joined(r, k), part) for part, k in ((sums, n), (met, m)))
    return totals, sums, met


def _around(meeting: _Meeting, tiles: Side, totals: Any, sums: Any, start: Any) -> tuple[Any, Any]:
    """Tiles with those of all other devices, which come by with the sums that they collect, half way round."""
    devices, combine = meeting.pairs.device_count(), meeting.reduction.combine

    def met(
        how: Callable[..., tuple[Any, Any, Any]], carry: tuple[Side, Any, Any]
    ) -> tuple[tuple[Side, Any, Any], Any]:
        come_by, theirs, mine = *_passed_on(carry[:2], 1, meeting.pairs), carry[2]
        totals, more, back = how(tiles, come_by, start)
        return (come_by, combine(theirs, back), combine(mine, more)), totals

    carry, parts = (tiles, start, sums), [totals]
    if devices > 2:
        between = jnp.arange((devices - 1) // 2)
        carry, part = lax.scan(lambda carry, _: met(meeting.rectangle, carry), carry, between)
        parts.append(jax.tree.map(pairwise_sum, part))
    if devices % 2 == 0:  # the device opposite does the other half
        carry, part = met(meeting.ring, carry)
        parts.append(part)
    home = _passed_on(carry[1], -(devices // 2), meeting.pairs)
    return reduce(_add, parts), combine(carry[2], home)


def _all_around(meeting: _Meeting, tiles: Side, others: Side, start: Any) -> tuple[Any, Any]:
    """Tiles with the others of all devices, which come by."""

    def step(carry: tuple[Side, Any], _: Array) -> tuple[tuple[Side, Any], Any]:
        come_by, sums = carry
        totals, more, _ = meeting.rectangle(tiles, come_by, start)
        return (_passed_on(come_by, 1, meeting.pairs), meeting.reduction.combine(sums, more)), totals

    (_, sums), totals = lax.scan(step, (others, start), jnp.arange(meeting.pairs.device_count()))
    return jax.tree.map(pairwise_sum, totals), sums


def _passed_on(tree: Any, distance: int, pairs: Pairs) -> Any:
    """To each device what the one so many further on has."""
    devices = pairs.device_count()
    return lax.ppermute(tree, pairs.axis_name, [((i + distance) % devices, i) for i in range(devices)])


def _with_distances(pairs: Pairs, tile: Tile) -> Tile:
    """Compute the distances of a tile."""
    mask, mask_y = (side.weights[..., 0] > 0 if tile.weighted else None for side in (tile.row, tile.column))

    def of(k: int) -> Array:
        frame = pairs.frames[k]
        part = frame._replace(raw_x=tile.row.features[k], raw_y=tile.column.features[k], mask=mask, mask_y=mask_y)
        if pairs.itself or frame.sample is not None:
            part = part._replace(sample=tile.row.sample[:, 0], sample_y=tile.column.sample[:, 0])
        rate, own, others = tile.one_rate[k], tile.row.rates[k], tile.column.rates[k]
        # The tile serves the rows of both sides; a row of a small sigma must not decide for the others.
        at = [r for r in (rate, own, None if others is None else transposed(others)) if r is not None]
        precision = pairs.precision
        if at and not pairs.trusted:
            d2 = accurate_distances(part, *at, counted=tile.counted, precision=precision, rooted=pairs.rooted)
        else:
            d2 = fast_distances(part, precision)
        d2 = d2 if pairs.fixed else attach_formula(part, d2, precision)
        return root(d2) if pairs.rooted else d2

    every = range(len(pairs.frames))
    if not pairs.fixed or len(every) <= _FEW_SETS:
        return tile._replace(distances=tuple(of(k) for k in every))
    # One after the other: the compiler would rather have what all of them need in memory at once.
    distances = lax.map(lambda k: lax.switch(k, [partial(of, k) for k in every]), jnp.arange(len(every)))
    return tile._replace(distances=tuple(distances))


def split_rows(n: int, tile_size: int | None, *, odd: bool = False) -> tuple[int, int]:
    """How many tiles n rows make, an odd number if told so, and the rows of a tile."""
    count = 1 if tile_size is None else -(-n // tile_size)
    if odd:
        count |= 1
    return count, -(-n // count)


def half_ring(count: int) -> Iterator[tuple[int, int, bool]]:
    """Pairs (i, j) of blocks that meet, each pair once, and whether one stands for (j, i) too; j varies first."""
    for i in range(count):
        for k in range(count // 2 + 1):
            if 2 * k == count and i >= k:  # opposite each other in an even ring: they have met
                continue
            yield i, (i + k) % count, k > 0


def _split(tree: Any, count: int, size: int) -> Any:
    """Rows in tiles: leaves (..., n, k) become (count, ..., size, k); what is missing in the last is 0."""

    def split(a: Array) -> Array:
        missing = count * size - a.shape[-2]
        if missing:
            outside = -1 if jnp.issubdtype(a.dtype, jnp.integer) else 0
            a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, missing), (0, 0)], constant_values=outside)
        return jnp.moveaxis(a.reshape(a.shape[:-2] + (count, size, a.shape[-1])), -3, 0)

    return jax.tree.map(split, tree)


def _joined(a: Array, n: int) -> Array:
    """The first n rows of tiles: (count, ..., size, k) becomes (..., n, k)."""
    a = jnp.moveaxis(a, 0, -3)
    return a.reshape(a.shape[:-3] + (-1, a.shape[-1]))[..., :n, :]


def _one(tree: Any, k: Array | int) -> Any:
    """One of the tiles."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, k, 0, keepdims=False), tree)


def _turned(tree: Any, k: Array) -> Any:
    """All tiles, beginning with the k-th: where the i-th was is the (i + k)-th."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(jnp.concatenate((a, a)), k, a.shape[0], 0), tree)


def _stacked(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), tree)


def _zeros(like: Any) -> Array:
    return varying_like(like, jnp.zeros(like.shape, like.dtype))


def _summed(totals: Any) -> Any:
    """Totals of tiles in two loops, added up."""
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
