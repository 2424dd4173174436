"""Comparison grids of sets in files: the same numbers, from blocks of rows that are read two at a time."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign import _checks, streaming
from jaxalign._directions import unit_rows
from jaxalign._grid_memory import Found, Job, cells, no_cells
from jaxalign._plan import choose_tiles, usual_block_rows
from jaxalign._saved import Saved, checkpoint_of_one_job, damaged
from jaxalign._version import __version__
from jaxalign.bandwidth import rate_of
from jaxalign.distances import Frame
from jaxalign.io import rows_are_finite
from jaxalign.measures._evaluate import PairMeasure, SetMeasure, check_sets, values_of
from jaxalign.measures._pair_sums import (
    Centring,
    Facts,
    PairFunction,
    Sums,
    centred,
    largest_square,
    sums_of,
    typical_rate,
)
from jaxalign.pairs import Pairs, Reduction, Tile, half_ring, over_rows, reduce_both_sides, reduce_pairs
from jaxalign.streaming import Progress


def set_by_set(job: Job, measure: SetMeasure, block_rows: int | None, checkpoint: Any) -> Found:
    """A measure that looks at one set at a time, each read as a whole when its turn comes."""
    sets, names, _, _, mask, missing, _, _ = job
    rows = block_rows or usual_block_rows(max(value.shape[1] for value in sets) * 8)
    mask = _checks.row_mask("mask", mask, (sets[0].shape[0],))
    found = [rows_are_finite(value, rows) for value in sets]
    if missing == "omit":
        mask = jnp.asarray(np.logical_and.reduce(found) & (True if mask is None else np.asarray(mask)))
    _checks.choice("missing", missing, ("raise", "omit", "propagate"))
    for name, finite in zip(names, found, strict=True):
        counts = finite if mask is None else finite | ~np.asarray(mask)
        if missing == "raise" and not counts.all():
            raise ValueError(
                f"{name} has nan or inf in row {int(np.argmin(counts))}. "
                'missing="omit" leaves out samples that are missing in any set.'
            )
    check = [_checksum(value, rows) for value in sets] + [0 if mask is None else _crc(np.asarray(mask))]
    identity = {**job.told(measure.name), "version": __version__, "checksums": check}
    check_sets([(names[0], np.zeros((len(found[0]), 1), np.float32))], mask, "raise", measure.least, measure.needs)
    saved = Saved.open(checkpoint, identity, no_cells(job))

    def load(k: int) -> Array:
        return check_sets([(names[k], np.asarray(sets[k]))], mask, "propagate", 1, measure.name)[0][0]

    return cells(job, measure, load, mask, saved)


def _checksum(value: Any, rows: int) -> int:
    check = 0
    for i in range(0, value.shape[0], rows):
        check = _crc(np.asarray(value[i : i + rows]), check)
    return check


def _crc(array: np.ndarray, start: int = 0) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes(), start)


@dataclass(frozen=True)
class _UnitRows:
    """Blocks of rows of unit length."""

    name: str
    value: Any
    size: int
    how: str
    mask: np.ndarray | None

    def __len__(self) -> int:
        return -(-self.value.shape[0] // self.size)

    def __getitem__(self, i: int) -> np.ndarray:
        here = slice(i * self.size, (i + 1) * self.size)
        rows = np.asarray(self.value[here])
        mask = None if self.mask is None else self.mask[here]
        unit = np.asarray(_unit_rows(_checks.features(self.name, rows), mask, self.how))
        lost = np.isfinite(rows).all(1) & np.isnan(unit).any(1)
        if lost.any():
            raise ValueError(
                f"{self.name}: row {i * self.size + int(np.argmax(lost))} has no direction, so its {self.how} with "
                "others is not defined. Leave it out with mask=."
            )
        return unit


_unit_rows = jax.jit(unit_rows, static_argnames="rows")


def from_blocks(job: Job, measure: PairMeasure, block_rows: int | None, checkpoint: Any) -> Found:
    """A measure by pairs: two blocks of rows of each set are in memory at a time."""
    sets, names, split, options, mask, missing, tile_size, progress = job
    _checks.choice("missing", missing, ("raise", "omit", "propagate"))
    function, centring, n = measure.function, measure.centring, sets[0].shape[0]
    mask = None if mask is None else np.asarray(_checks.row_mask("mask", mask, (n,)))
    size = block_rows or min(n, usual_block_rows(sum(value.shape[1] for value in sets) * 8))
    left = list(range(len(sets)))
    if missing != "raise":
        found = [rows_are_finite(value, size) for value in sets]
        if missing == "omit":
            mask = np.logical_and.reduce(found) & (True if mask is None else mask)
        else:
            counts = np.ones(n, bool) if mask is None else mask
            left = [k for k in left if found[k][counts].all()]
    samples = n if mask is None else int(mask.sum())
    if samples < measure.least:
        raise ValueError(f"{measure.needs} needs at least {measure.least} samples; {samples} are left.")
    number = len(sets)
    values, sigma = np.full(job.shape, np.nan), np.full(number, np.nan)
    here = (
        [k for k in left if k < split],
        [k - split for k in left if k >= split] if number > split else left,
    )
    if not here[0] or not here[1]:
        return values, sigma, samples

    diagonal = function.diagonal if function.solves else "include"
    jobs = []
    for k in left:
        rows = sets[k] if function.rows is None else _UnitRows(names[k], sets[k], size, function.rows, mask)
        own_blocks = size if function.rows is None else None
        jobs.append(streaming.open_rows(rows, None, mask, None, diagonal, own_blocks, tile_size, names[k]))
    dtype = np.result_type(*(job.dtype for job in jobs))
    if any(job.dtype != dtype for job in jobs):
        raise ValueError("all sets must have the same dtype; got " + ", ".join(str(job.dtype) for job in jobs) + ".")
    identity = {**job.told(measure.name), "sets": [rows.identity for rows in jobs]}
    pairs = len(here[0]) * len(here[1])
    saved = Saved.open(checkpoint, identity, _nothing_done(n, len(left), len(here[0]), pairs, centring))
    state = dict(saved.arrays)
    found_sigma = _sigmas(jobs, [names[k] for k in left], left, options, function, state, saved, progress)
    sums = _sums(jobs, len(here[0]), found_sigma, function, centring, state, saved, progress, tile_size)
    inner = centred(*sums, len(here[0]), centring, function)
    saved.remove()
    values[np.ix_(*here)] = np.asarray(values_of(inner, measure))
    sigma[left] = found_sigma
    return values, sigma, samples


def _nothing_done(n: int, number: int, split: int, pairs: int, centring: Centring) -> dict[str, np.ndarray]:
    """What a visit of the block pairs gathers, before any of them is done."""
    return {
        "sigma": np.full(number, np.nan),
        "done": np.asarray(0),
        "cross": np.zeros((split, pairs // split)),
        "own": np.zeros(number),
        "rows": np.zeros((n, pairs if centring == "difference" else number)),
    }


def _sigmas(
    jobs: list[streaming.Job],
    names: list[str],
    left: list[int],
    options: dict[str, Any],
    function: PairFunction,
    state: dict[str, np.ndarray],
    saved: Saved,
    progress: Progress,
) -> np.ndarray:
    """The bandwidth of every set; those that are found are saved."""
    given, sigma = options.get("sigma"), state["sigma"]
    if not function.needs_sigma:
        return sigma
    if not function.solves:
        each = [given[k] for k in left] if isinstance(given, (tuple, list)) else [given] * len(left)
        return np.asarray(each, np.float64)
    report = streaming.reporter(progress, "sigma", len(jobs), unit="set")
    for k, job in enumerate(jobs):
        if np.isnan(sigma[k]):
            beside = None if saved.path is None else saved.path.with_name(saved.path.name + ".sigma")
            try:
                density = float(options["density"])  # as JSON holds it
                with checkpoint_of_one_job(beside):
                    solution = streaming.solve_rows(job, density, checkpoint=beside, rooted=function.rooted)
            except ValueError as error:
                raise ValueError(f"{names[k]}: {error}") from None
            sigma[k] = float(solution.sigma)
            state["sigma"] = sigma
            saved.write(state)
        report(k + 1)
    report(-1)
    return sigma


def _sums(
    jobs: list[streaming.Job],
    split: int,
    sigma: np.ndarray,
    function: PairFunction,
    centring: Centring,
    state: dict[str, np.ndarray],
    saved: Saved,
    progress: Progress,
    tile_size: Any,
) -> tuple[Sums, Array, Facts]:
    """All that one visit of the block pairs gathers, in float64; block pairs that are done are saved."""
    blocks, n, number = jobs[0].x, jobs[0].x.rows, len(jobs)
    dtype = blocks.dtype
    largest = max(blocks.sizes)
    tile = choose_tiles(tile_size, largest, largest, number, dtype.itemsize, may_store=False, by_memory=False)[1]
    starts = np.cumsum((0, *blocks.sizes))

    def load(i: int) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
        parts = [job.x.block(i) for job in jobs]
        return tuple(part[0] for part in parts), parts[0][1]

    def frames(x: Any, mask: Any, y: Any = None, mask_y: Any = None) -> tuple[Frame, ...]:
        others = (None,) * number if y is None else y
        return tuple(job.frame_of((a, b), (mask, mask_y)) for job, a, b in zip(jobs, x, others, strict=True))

    samples = tuple(jnp.asarray(job.sample[0]) for job in jobs)
    rates = _rates(frames(samples, None), jnp.asarray(np.nan_to_num(sigma, nan=1.0), dtype), function)

    shift, sizes = np.zeros((n, number), dtype), np.zeros(number, dtype)
    for i in range(len(blocks.sizes)):
        x, mask = _on_device(load(i))
        means, squares = _row_means(frames(x, mask, samples), rates, function)
        shift[starts[i] : starts[i + 1]] = means
        sizes = np.maximum(sizes, squares)
    weights = np.ones(n, dtype) if blocks.mask is None else blocks.mask.astype(dtype)
    half = 0.5 * np.sum(shift * weights[:, None], 0, dtype=np.float64) / weights.sum(dtype=np.float64)
    if centring in ("none", "difference"):
        shift = np.zeros_like(shift)
    else:
        shift = (half if centring == "pearson" else shift - half) * weights[:, None]
    shift = shift.astype(dtype)

    plan = list(half_ring(len(blocks.sizes)))
    done, cross, own, rows = int(state["done"]), state["cross"], state["own"], state["rows"]
    if not 0 <= done <= len(plan):
        raise damaged(saved.path, "compare_grid")
    report = streaming.reporter(progress, "pairs", len(plan))
    report(done)
    held: tuple[int, Any] | None = None
    for i, j, mirror in plan[done:]:
        if held is None or held[0] != i:
            held = (i, _on_device(load(i)))
        (x, mask), alone = held[1], i == j
        y, mask_y = (None, None) if alone else _on_device(load(j))
        a, b = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
        totals, here, there = _block_pair(
            frames(x, mask, y, mask_y),
            jnp.asarray(shift[a]),
            jnp.asarray(shift[b]),
            rates,
            split,
            function,
            centring,
            tile,
        )
        times = 2 if mirror else 1
        if centring != "difference":
            cross = cross + times * np.asarray(totals[0], np.float64)
            own = own + times * np.asarray(totals[1], np.float64)
        rows[a] += np.asarray(here, np.float64)
        if mirror:
            rows[b] += np.asarray(there, np.float64)
        done += 1
        state.update(done=np.asarray(done), cross=cross, own=own, rows=rows)
        saved.write(state)
        report(done)
    report(-1)
    facts = Facts(
        weights=jnp.asarray(weights),
        scales=jnp.stack([job.scale[0, 0] for job in jobs]),
        sizes=jnp.asarray(sizes),
        usable=jnp.ones(number, bool),
        status=jnp.zeros(number, jnp.int32),
        sigma=jnp.asarray(sigma, dtype),
    )
    sums = Sums(*(jnp.asarray(part, dtype) for part in (cross, own, rows)))
    return sums, jnp.asarray(shift), facts


def _on_device(block: tuple[tuple[np.ndarray, ...], np.ndarray | None]) -> Any:
    return jax.tree.map(jnp.asarray, block)


@partial(jax.jit, static_argnames="function")
def _rates(frames: tuple[Frame, ...], sigma: Array, function: PairFunction) -> tuple[Array | None, ...]:
    if function.needs_sigma:
        each = enumerate(frames)
        return tuple(rate_of(sigma[k][None, None], frame, rooted=function.rooted) for k, frame in each)
    return tuple(typical_rate(frame, None) if function.rooted else None for frame in frames)


@partial(jax.jit, static_argnames="function")
def _row_means(
    frames: tuple[Frame, ...], rates: tuple[Array | None, ...], function: PairFunction
) -> tuple[Array, Array]:
    """About the row means of f_ij, (b, sets), and the largest square of a row, (sets,)."""
    means = []
    for frame, rate in zip(frames, rates, strict=True):

        def terms(tile: Tile, frame: Frame = frame) -> Array:
            return tile.weigh(function.of(tile.distances[0], tile.rates[0], frame.scale))

        pairs = Pairs((frame,), fixed=True, rooted=function.rooted)
        _, rows = reduce_pairs(Reduction(terms, over_rows), pairs, rates=(rate,))
        means.append(rows[..., 0] / frame.raw_other.shape[-2])
    return jnp.stack(means, -1), jnp.stack([largest_square(frame) for frame in frames])


@partial(jax.jit, static_argnames=("split", "function", "centring", "tile_size"))
def _block_pair(
    frames: tuple[Frame, ...],
    shift: Array,
    shift_y: Array,
    rates: tuple[Array | None, ...],
    split: int,
    function: PairFunction,
    centring: Centring,
    tile_size: int | None,
) -> tuple[Any, Array, Any]:
    """The sums over pairs of a block with itself or with another: totals, of its rows, and of the other's."""
    alone = frames[0].raw_y is None
    pairs = Pairs(frames, None, alone, tile_size, fixed=True, rooted=function.rooted)
    reduction = sums_of(frames, split, function, centring)
    if alone:
        return *reduce_pairs(reduction, pairs, rates=rates, as_row=shift, as_column=shift), ()
    return reduce_both_sides(reduction, pairs, rates=rates, as_row=shift, as_column=shift_y)
