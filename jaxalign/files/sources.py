"""Representations read block by block, and their statistics from a first reading."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign import _arrays, _checks, _directions, _features, _numbers
from jaxalign._linalg import power_of_two
from jaxalign.core.bandwidth import SUBSAMPLE
from jaxalign.core.features import CenteredFeatures
from jaxalign.files.readers import open_npy
from jaxalign.plan import Plan, choose_tile_size, default_block_rows

Rows = Any  # a path to a .npy file, an array or memory map (n, d), or a sequence of arrays (n_i, d)

_HEAD = 64  # rows read for the dtype and an approximate mean


class Block(NamedTuple):
    """Rows of one or several representations of the same samples, on the device."""

    rows: slice  # row numbers
    features: tuple[Array, ...]  # one per representation
    mask: Array | None


@dataclass(frozen=True)
class Source:
    """A representation read block by block."""

    name: str
    read: Callable[[int], np.ndarray]  # reads the block with a number
    sizes: tuple[int, ...]  # rows of each block
    width: int
    stored: Any  # dtype of the blocks
    dtype: Any  # dtype of the computation
    mask: np.ndarray | None  # (n,), True = a valid sample
    direction: _directions.Rows | None  # divide rows by their norms
    shift: np.ndarray | None = None  # (1, d), subtracted from the rows of a wider dtype before they are narrowed
    way_out: str = "Remove these samples, or exclude them with mask=."  # for nan and inf

    @cached_property
    def slices(self) -> list[slice]:
        """The rows of each block."""
        ends = list(accumulate(self.sizes))
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    @property
    def num_rows(self) -> int:
        """The number of rows of all blocks."""
        return sum(self.sizes)

    @property
    def num_valid(self) -> int:
        """The number of valid samples."""
        return self.num_rows if self.mask is None else int(self.mask.sum())

    def mask_of(self, i: int) -> np.ndarray | None:
        """The mask of a block."""
        return None if self.mask is None else self.mask[self.slices[i]]

    def load(self, i: int) -> np.ndarray:
        """A shifted block in the dtype of the computation; masked rows are 0. NumPy only, so any thread may call it."""
        rows = np.asarray(self.read(i))
        if rows.dtype != self.stored:
            raise TypeError(f"block {i} of {self.name} has dtype {rows.dtype}, but block 0 has {self.stored}.")
        if rows.shape != (self.sizes[i], self.width):
            raise ValueError(
                f"block {i} of {self.name} has shape {rows.shape}, but had {(self.sizes[i], self.width)} before."
            )
        mask, narrowed = self.mask_of(i), _numbers.narrow(rows, self.dtype, self.shift)
        is_wide = not _numbers.holds_exactly(self.dtype, self.stored)
        if is_wide and not _numbers.is_in_range(narrowed) and _numbers.overflows(rows, narrowed, mask):
            raise ValueError(
                f"block {i} of {self.name} holds numbers up to {_numbers.largest(rows):.3g}, beyond the range of "
                f"{self.dtype}. Store it in another unit."
            )
        return narrowed if mask is None else np.where(mask[:, None], narrowed, 0)

    def prepare(self, i: int, rows: np.ndarray) -> np.ndarray:
        """A loaded block prepared for distances: unit rows if there is a `direction`."""
        if self.direction is None:
            return rows
        units = np.asarray(_unit_rows(rows, self.mask_of(i), self.direction))
        undefined = np.isfinite(rows).all(1) & np.isnan(units).any(1)
        if undefined.any():
            row = self.slices[i].start + int(np.argmax(undefined))
            raise ValueError(
                f"{self.name}: row {row} has no direction, so its {self.direction} is not defined. "
                "Exclude it with mask=."
            )
        return units


_unit_rows = jax.jit(_directions.unit_rows, static_argnames="rows")


def load_block(sources: Sequence[Source], i: int) -> list[np.ndarray]:
    """Rows of every representation on the host; any thread may call this."""
    return [source.load(i) for source in sources]


def to_device(sources: Sequence[Source], i: int, loaded: list[np.ndarray]) -> Block:
    """Loaded rows on the device; called in the thread of the caller, whose jax.enable_x64 etc. hold for one thread."""
    features = tuple(jnp.asarray(source.prepare(i, rows)) for source, rows in zip(sources, loaded, strict=True))
    mask = sources[0].mask_of(i)
    return Block(sources[0].slices[i], features, None if mask is None else jnp.asarray(mask))


# --- opening ---------------------------------------------------------------------------------------------------------


def open_source(
    name: str,
    rows: Rows,
    mask: np.ndarray | None = None,
    block_rows: int | None = None,
    direction: _directions.Rows | None = None,
) -> Source:
    """Open a path, an array or a sequence of blocks as a `Source`; reads the first rows only."""
    code = name  # code for an array with a dtype, for messages that show a conversion
    if isinstance(rows, (str, os.PathLike)):
        code = f"np.load({str(rows)!r})"
        rows = _memory_map(name, Path(rows))
    check_block_rows(block_rows)
    if isinstance(rows, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost: pass {name}.data, and mask=.")
    if isinstance(rows, (np.ndarray, jax.Array)):
        read, sizes = _array_blocks(name, np.asanyarray(rows), block_rows)
    elif hasattr(rows, "__getitem__") and hasattr(rows, "__len__") and not isinstance(rows, Mapping) and len(rows) > 0:
        read, sizes = _sequence_blocks(name, rows, block_rows)
        code = f"{name}[0]"
    else:
        raise TypeError(
            f"{name} must be a path to a .npy file, an array or memory map (n, d), or a sequence of arrays (n_i, d); "
            f"got {type(rows).__name__}."
        )
    head = read(0)[:_HEAD]
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != (sum(sizes),):
            raise ValueError(
                f"the mask of {name} must be boolean of shape {(sum(sizes),)}; got {mask.dtype} {mask.shape}."
            )
    _arrays.numbers(code, head)
    dtype, shift = _numbers.computing_dtype(head.dtype), None
    if _numbers.is_wide(head.dtype):
        if direction is None:
            # The mean of the first rows serves as well as the mean of all rows, which would need another reading.
            shift = _numbers.mean_row(head, None if mask is None else mask[: len(head)])
        else:
            _features.refuse_rounding(code, head)
    return Source(name, read, sizes, head.shape[1], head.dtype, dtype, mask, direction, shift)


_Blocks = tuple[Callable[[int], np.ndarray], tuple[int, ...]]  # a function that reads a block, and the sizes


def _memory_map(name: str, path: Path) -> np.ndarray:
    try:
        return open_npy(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{name}: {path} is not a complete .npy file of numbers ({error}).") from None


def _array_blocks(name: str, array: np.ndarray, block_rows: int | None) -> _Blocks:
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must have shape (n, d), both at least 1; got {array.shape}.")
    n, width = array.shape
    size = default_block_rows(width * max(4, array.dtype.itemsize)) if block_rows is None else int(block_rows)
    sizes = tuple(min(size, n - start) for start in range(0, n, size))
    return lambda i: np.asarray(array[i * size : (i + 1) * size]), sizes


def _sequence_blocks(name: str, blocks: Sequence[Any], block_rows: int | None) -> _Blocks:
    if block_rows is not None:
        raise ValueError(f"block_rows={block_rows} has no effect with a sequence: the arrays of {name} are the blocks.")
    shapes = [np.shape(blocks[i]) for i in range(len(blocks))]
    if any(len(shape) != 2 or 0 in shape or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"the blocks of {name} must have shapes (n_i, d) with the same d; got {shapes[:5]} ...")
    return lambda i: np.asarray(blocks[i]), tuple(shape[0] for shape in shapes)


def check_block_rows(block_rows: Any) -> None:
    """Raise unless `block_rows` is a number of rows, or None."""
    if block_rows is not None:
        _checks.whole("block_rows", block_rows, of=" of rows")


# --- statistics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowPairs:
    """Pairs of rows read block by block, with statistics from a first reading of all rows."""

    x: Source
    y: Source | None  # None: x
    center: Array  # (1, d), the mean of the valid rows
    scale: Array  # (), a power of two
    inverse: Array
    sample: tuple[Array, Array | None]  # rows of x and of y
    total: float  # total weight of the pairs that count
    diagonal_sum: float  # weight of the pairs of a sample with itself, if they count
    skip_self: bool
    tile_size: int | None
    identity: dict[str, Any]  # identifies the features in a checkpoint

    @property
    def dtype(self) -> Any:
        """The dtype of the computation."""
        return self.x.dtype

    def centered(
        self, x: Array, y: Array | None = None, mask: Array | None = None, mask_y: Array | None = None
    ) -> CenteredFeatures:
        """Centered features for distances of x to y; y = None: to x."""
        return CenteredFeatures(x, y, mask, mask_y, self.center, self.scale, self.inverse, jnp.ones((), bool))


class _Summary(NamedTuple):
    total: np.ndarray
    least: np.ndarray
    most: np.ndarray
    checksum: int
    sample: np.ndarray


def _summarize(source: Source) -> _Summary:
    """Sums, extremes, a checksum and a subsample of the rows; raises for nan and inf."""
    count, checksum = 0, 0
    total = np.zeros(source.width)
    least, most = np.full(source.width, np.inf), np.full(source.width, -np.inf)
    step = max(1, source.num_valid // SUBSAMPLE)
    sample: list[np.ndarray] = []
    for i, numbers in enumerate(source.slices):
        rows, mask = source.prepare(i, source.load(i)), source.mask_of(i)
        valid = np.arange(len(rows)) if mask is None else np.flatnonzero(mask)
        checksum = zlib.crc32(rows.tobytes(), checksum)
        if mask is not None:
            checksum = zlib.crc32(np.packbits(mask).tobytes(), checksum)
            rows = rows[mask]
        invalid = ~np.isfinite(rows).all(1)
        if invalid.any():
            raise ValueError(
                f"{source.name} has nan or inf in row {numbers.start + valid[invalid][0]} (block {i}). {source.way_out}"
            )
        sample.append(rows[(count + np.arange(len(rows))) % step == 0])
        count += len(rows)
        total += rows.sum(0, dtype=np.float64)
        least = np.minimum(least, rows.min(0, initial=np.inf))
        most = np.maximum(most, rows.max(0, initial=-np.inf))
    return _Summary(total, least, most, checksum, np.concatenate(sample))


def open_pairs(x: Source, y: Source | None, diagonal: Any, plan: Plan) -> RowPairs:
    """Read all rows once, for the statistics that later visits need; raises for nan and inf."""
    _check_sides(x, y, diagonal)
    sides = [x] if y is None else [x, y]
    summaries = [_summarize(side) for side in sides]
    center = sum(summary.total for summary in summaries) / sum(side.num_valid for side in sides)
    largest = max(float(np.max(np.maximum(part.most - center, center - part.least))) for part in summaries)
    scale, inverse = power_of_two(jnp.asarray(largest, x.dtype))
    skip_self, n, m = diagonal == "exclude", float(sides[0].num_valid), float(sides[-1].num_valid)
    rows = max(size for side in sides for size in side.sizes)
    tile = choose_tile_size(plan.tile_size, rows, rows, 1, x.dtype.itemsize, may_store=False, by_memory=False)
    identity = {
        "rows": [side.num_rows for side in sides],
        "width": x.width,
        "dtype": str(x.dtype),
        "checksums": [summary.checksum for summary in summaries],
        "blocks": [side.sizes for side in sides],
        "diagonal": diagonal,
        "tile_size": tile,
    }
    return RowPairs(
        x=x,
        y=y,
        center=jnp.asarray(center, x.dtype)[None],
        scale=scale,
        inverse=inverse,
        sample=(jnp.asarray(summaries[0].sample), None if y is None else jnp.asarray(summaries[-1].sample)),
        total=n * (n - 1) if skip_self else n * m,
        diagonal_sum=n if y is None and not skip_self else 0.0,
        skip_self=skip_self,
        tile_size=tile,
        identity=identity,
    )


def _check_sides(x: Source, y: Source | None, diagonal: Any) -> None:
    _checks.choice("diagonal", diagonal, ("include", "exclude"))
    if y is not None and diagonal != "include":
        raise ValueError(f"diagonal={diagonal!r} has no meaning with y: all n x m pairs count.")
    for side, least in ((x, 2 if y is None else 1), (y, 1)):
        if side is not None and side.mask is not None and side.num_valid < least:
            raise ValueError(
                f"the mask of {side.name} leaves {side.num_valid} valid sample(s), at least {least} needed."
            )
    if y is not None and (x.width, x.dtype) != (y.width, y.dtype):
        raise ValueError(
            f"x and y must have the same number of features and dtype: {x.width} of {x.dtype}, {y.width} of {y.dtype}."
        )
    if y is None and x.num_rows < 2:
        raise ValueError(f"{x.name} has n = {x.num_rows} sample(s); at least 2 are needed.")


def rows_are_finite(values: Any, block_rows: int) -> np.ndarray:
    """Whether each row of (n, d) holds neither nan nor inf, shape (n,)."""
    starts = range(0, values.shape[0], block_rows)
    return np.concatenate([np.isfinite(np.asarray(values[i : i + block_rows])).all(1) for i in starts])
