"""Grids of representations in files: pairwise measures from blocks of rows, other measures cell by cell."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign import _checks, _features
from jaxalign.core.bandwidth import gamma_of
from jaxalign.core.features import CenteredFeatures
from jaxalign.core.reduce import reduce_both_sides, reduce_pairs
from jaxalign.core.tiles import Pairs, Reduction, Tile, inverse_rms_distance, over_rows
from jaxalign.files.cells import GridResult, GridTask, Summaries, compare_cells
from jaxalign.files.checkpoint import Checkpoint, State, locked_checkpoint
from jaxalign.files.neighbors import neighbors_in_blocks
from jaxalign.files.sigma import solve_rows
from jaxalign.files.sources import Block, RowPairs, open_pairs, open_source, rows_are_finite
from jaxalign.files.visit import BlockSums, Reporting, read_ahead, reporting, totals_of, visit, zero_sums
from jaxalign.measures._centering import Centering
from jaxalign.measures._evaluate import (
    PairMeasure,
    Summary,
    SummaryMeasure,
    check_representations,
    compute_values,
    depends_on_differences,
)
from jaxalign.measures._pair_sums import (
    PairFunction,
    Properties,
    ShiftedSums,
    centered_products,
    make_reduction,
    max_square_norm,
)
from jaxalign.plan import choose_tile_size, default_block_rows


def compare_files(
    task: GridTask, measure: PairMeasure | SummaryMeasure, block_rows: int | None, checkpoint: Path | None
) -> GridResult:
    """The values of a grid, with two blocks of rows, or two representations, in memory at a time."""
    _checks.choice("missing", task.missing, ("raise", "omit", "propagate"))
    widths = sum(value.shape[1] for value in task.features)
    size = block_rows or min(task.num_samples, default_block_rows(widths * 8))
    mask, complete = _complete(task, size)
    num_samples = task.num_samples if mask is None else int(mask.sum())
    if num_samples < measure.min_samples:
        raise ValueError(f"{measure.label} needs at least {measure.min_samples} samples; {num_samples} are left.")
    result = GridResult(np.full(task.shape, np.nan), np.full(len(task.names), np.nan), num_samples)
    rows, columns = ([i for i, k in enumerate(side) if k in complete] for side in (range(task.split), task.columns))
    if rows and columns:
        values, sigma = _compare_complete(task.subset(complete, mask), measure, size, checkpoint)
        result.values[np.ix_(rows, columns)] = values
        result.sigma[complete] = sigma
    return result


def _complete(task: GridTask, block_rows: int) -> tuple[np.ndarray | None, list[int]]:
    """The mask of valid samples, and the representations without missing values in them."""
    mask = _features.row_mask("mask", task.mask, (task.num_samples,))
    mask, numbers = None if mask is None else np.asarray(mask), list(range(len(task.names)))
    if task.missing == "raise":  # raises when all rows are read
        return mask, numbers
    finite = [rows_are_finite(value, block_rows) for value in task.features]
    if task.missing == "omit":
        return np.logical_and.reduce(finite) & (True if mask is None else mask), numbers
    return mask, [k for k in numbers if finite[k][slice(None) if mask is None else mask].all()]


def _compare_complete(
    task: GridTask, measure: PairMeasure | SummaryMeasure, block_rows: int, checkpoint: Path | None
) -> tuple[Any, Any]:
    """The values, and the sigma of each representation."""
    function, by_cells = measure.function, isinstance(measure, SummaryMeasure) and measure.num_neighbors is None
    diagonal = function.diagonal if not by_cells and function.solves else "include"
    direction = None if by_cells else function.normalization
    pairs: list[RowPairs] = []
    for name, value in zip(task.names, task.features, strict=True):
        source = open_source(name, value, task.mask, block_rows, direction)
        source = replace(source, way_out='missing="omit" leaves out samples that are missing in any representation.')
        pairs.append(open_pairs(source, None, diagonal, task.plan))
    identities = {f"features of {name}": features.identity for name, features in zip(task.names, pairs, strict=True)}
    saved = Checkpoint(checkpoint, "compare_grid", {**task.inputs(measure.name), **identities})
    if isinstance(measure, PairMeasure):
        values, sigma = _compare_blocks(task, measure, pairs, saved)
    else:
        mask, sigma = None if task.mask is None else jnp.asarray(task.mask), np.nan

        def load(k: int) -> Array:
            features = [(task.names[k], np.asarray(task.features[k]))]
            center = depends_on_differences(measure)
            return check_representations(features, mask, "propagate", 1, measure.name, center=center)[0][0]

        by_blocks = (
            None if measure.num_neighbors is None else partial(_neighbors, task, measure.num_neighbors, pairs, saved)
        )
        values = compare_cells(Summaries(task, measure, load, mask, by_blocks), saved)
    saved.remove()
    return values, sigma


def _neighbors(task: GridTask, number: int, pairs: list[RowPairs], saved: Checkpoint, k: int) -> Summary:
    """The nearest neighbors in a representation, with two blocks in memory."""
    path = None if saved.path is None else saved.path.with_name(saved.path.name + ".neighbors")
    report = partial(reporting, task.progress, "neighbors", label=f"neighbors in {task.names[k]}")
    with locked_checkpoint(path):
        return Summary(neighbors_in_blocks(pairs[k], number, path, report), None, jnp.ones((), bool))


def _compare_blocks(
    task: GridTask, measure: PairMeasure, pairs: list[RowPairs], saved: Checkpoint
) -> tuple[Array, np.ndarray]:
    if measure.samples_channels:
        raise ValueError(
            "sampled_channels=True needs features in memory: pass arrays, without block_rows or checkpoint."
        )
    number, num_products, rows = len(pairs), math.prod(task.shape), max(pairs[0].x.sizes)
    dtypes = [str(features.dtype) for features in pairs]
    if len(set(dtypes)) > 1:
        raise ValueError("all representations must have the same dtype; got " + ", ".join(dtypes) + ".")
    width = num_products if measure.centering is None else number
    zero = zero_sums(num_products + number, task.num_samples, width)
    state = _with_sigma(saved.load({"sigma": np.full(number, np.nan), **zero}), task, pairs, measure.function, saved)
    itemsize = pairs[0].dtype.itemsize
    tile = choose_tile_size(task.plan.tile_size, rows, rows, number, itemsize, may_store=False, by_memory=False)
    terms = _Terms(measure.function, measure.centering, task.split, tile)
    state, shift, properties = _visit(terms, pairs, state, saved, partial(reporting, task.progress, "pairs"))
    cross, diagonal = np.split(totals_of(state), [num_products])
    sums = ShiftedSums(*(jnp.asarray(a, shift.dtype) for a in (cross.reshape(task.shape), diagonal, state["rows"])))
    inner = centered_products(sums, shift, properties, task.split, measure.centering, measure.function)
    return compute_values(inner, measure), state["sigma"]


def _with_sigma(
    state: State, task: GridTask, pairs: list[RowPairs], function: PairFunction, saved: Checkpoint
) -> State:
    """The state with the sigma of every representation; the checkpoint is saved after each solve."""
    if not function.needs_sigma:
        return state
    if not function.solves:
        return {**state, "sigma": np.asarray([task.bandwidth_of(k).sigma for k in range(len(pairs))], np.float64)}
    path = None if saved.path is None else saved.path.with_name(saved.path.name + ".sigma")
    density = float(np.asarray(task.bandwidth_of(0).density))  # JSON holds Python floats
    with reporting(task.progress, "sigma", len(pairs), unit="representation") as show:
        for k, features in enumerate(pairs):
            if np.isnan(state["sigma"][k]):
                try:
                    with locked_checkpoint(path):
                        solution = solve_rows(features, density, checkpoint=path, euclidean=function.euclidean)
                except ValueError as error:
                    raise ValueError(f"{task.names[k]}: {error}") from None
                state["sigma"][k] = float(solution.sigma)
                saved.save(state)
            show(k + 1)
    return state


@dataclass(frozen=True)
class _Terms:
    """Parameters of the sums over pairs of samples."""

    function: PairFunction
    centering: Centering | None
    split: int  # the number of rows of the grid
    tile_size: int | None


def _visit(
    terms: _Terms, pairs: list[RowPairs], state: State, saved: Checkpoint, report: Reporting
) -> tuple[State, Array, Properties]:
    """The state with all sums, the shift of their values, and the properties of the representations."""
    dtype, sources = pairs[0].dtype, [features.x for features in pairs]
    sample = Block(slice(0), tuple(features.sample[0] for features in pairs), None)
    sigma = jnp.asarray(state["sigma"], dtype)
    gammas = _gammas(_centered(pairs, sample), jnp.nan_to_num(sigma, nan=1.0), terms.function)
    means, squares = np.zeros((sources[0].num_rows, len(pairs)), dtype), np.zeros(len(pairs), dtype)
    for block in read_ahead(sources, range(len(sources[0].sizes))):
        means[block.rows], largest = _row_means(_centered(pairs, block, sample), gammas, terms.function)
        squares = np.maximum(squares, largest)
    weights = np.ones(len(means), dtype) if sources[0].mask is None else sources[0].mask.astype(dtype)
    shift = _shift_of(means, weights[:, None], terms.centering)

    def sum_pairs(x: Block, y: Block | None) -> BlockSums:
        shifts = jnp.asarray(shift[x.rows]), None if y is None else jnp.asarray(shift[y.rows])
        return BlockSums(*_sum_blocks(_centered(pairs, x, y), gammas, *shifts, terms))

    state = visit(sum_pairs, sources, None, state, saved, report)
    properties = Properties(
        weights=jnp.asarray(weights),
        scales=jnp.stack([features.scale for features in pairs]),
        max_square_norms=jnp.asarray(squares),
        is_defined=jnp.ones(len(pairs), bool),
        status=jnp.zeros(len(pairs), jnp.int32),
        sigma=sigma,
    )
    return state, jnp.asarray(shift), properties


def _shift_of(means: np.ndarray, weights: np.ndarray, centering: Centering | None) -> np.ndarray:
    """The shift of f_ij, from its row means, which makes the sums as accurate as those of centered matrices."""
    if centering is None:
        return np.zeros_like(means)
    half = 0.5 * np.sum(means * weights, 0, dtype=np.float64) / weights.sum(dtype=np.float64)
    shift = centering.shift(jnp.asarray(means), jnp.asarray(half.astype(means.dtype))[None])
    return np.asarray(shift) * weights


def _centered(pairs: list[RowPairs], x: Block, y: Block | None = None) -> tuple[CenteredFeatures, ...]:
    columns, mask_y = ((None,) * len(pairs), None) if y is None else (y.features, y.mask)
    sides = zip(pairs, x.features, columns, strict=True)
    return tuple(features.centered(rows, column, x.mask, mask_y) for features, rows, column in sides)


@partial(jax.jit, static_argnames="function")
def _gammas(features: tuple[CenteredFeatures, ...], sigma: Array, function: PairFunction) -> tuple[Array | None, ...]:
    if function.needs_sigma:
        scales = enumerate(part.scale for part in features)
        return tuple(gamma_of(sigma[k], scale, euclidean=function.euclidean) for k, scale in scales)
    return tuple(inverse_rms_distance(part, None) if function.euclidean else None for part in features)


@partial(jax.jit, static_argnames="function")
def _row_means(
    features: tuple[CenteredFeatures, ...], gammas: tuple[Array | None, ...], function: PairFunction
) -> tuple[Array, Array]:
    """Approximate row means of f_ij, (b, L + M), and the largest squared norm of a row, (L + M,)."""
    means: list[Array] = []
    for part, gamma in zip(features, gammas, strict=True):

        def terms(tile: Tile, scale: Array = part.scale) -> Array:
            return tile.apply_weights(function.values(tile.distances[0], tile.gammas[0], scale))

        pairs = Pairs((part,), differentiable=False, euclidean=function.euclidean)
        _, rows = reduce_pairs(Reduction(terms, over_rows), pairs, gammas=(gamma,))
        means.append(rows / part.raw_columns.shape[0])
    return jnp.stack(means, 1), jnp.stack([max_square_norm(part) for part in features])


@partial(jax.jit, static_argnames="terms")
def _sum_blocks(
    features: tuple[CenteredFeatures, ...],
    gammas: tuple[Array | None, ...],
    shift: Array,
    shift_y: Array | None,
    terms: _Terms,
) -> tuple[Any, Any, Any]:
    """The fields of `BlockSums`; totals is 0 if the reduction has no totals."""
    function, is_self = terms.function, shift_y is None
    pairs = Pairs(features, None, is_self, terms.tile_size, differentiable=False, euclidean=function.euclidean)
    reduction = make_reduction(tuple(part.scale for part in features), terms.split, function, terms.centering)
    if is_self:
        totals, rows = reduce_pairs(reduction, pairs, gammas=gammas, row_values=shift, column_values=shift)
        columns = 0
    else:
        totals, rows, columns = reduce_both_sides(
            reduction, pairs, gammas=gammas, row_values=shift, column_values=shift_y
        )
    return jnp.concatenate([jnp.ravel(total) for total in totals]) if totals else 0, rows, columns
