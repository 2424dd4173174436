"""Sigma and density of rows read block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign._problem import check_rtol, raise_if_failed
from jaxalign.bandwidth import SigmaSolution
from jaxalign.core.bandwidth import (
    CONVERGED,
    INFEASIBLE,
    MAX_PASSES,
    NOT_CONVERGED,
    Search,
    advance,
    begin,
    gamma_of,
    guess_from,
    moments,
    sigma_of,
    sums_over,
)
from jaxalign.core.features import CenteredFeatures
from jaxalign.core.tiles import Pairs, Tile, kernel_terms
from jaxalign.files.checkpoint import Checkpoint, State
from jaxalign.files.sources import Block, RowPairs
from jaxalign.files.visit import BlockSums, Progress, reporting, totals_of, visit, zero_sums


@dataclass(frozen=True)
class _Terms:
    """A function of tiles, summed over all pairs of rows."""

    function: Callable[[Tile], tuple[Array, ...]]
    pairs: RowPairs
    euclidean: bool = False

    def zero_sums(self) -> State:
        """The state of a visit before its first pair of blocks."""
        x, y = self.pairs.sample
        sums = partial(_sum_terms, self.function, skip_self=False, tile_size=None, euclidean=self.euclidean)
        return zero_sums(jax.eval_shape(sums, self.pairs.centered(x, y), jnp.ones((), self.pairs.dtype)).size)

    def sum(self, gamma: Array, state: State, checkpoint: Checkpoint, progress: Progress, number: int) -> State:
        """The state with all sums at a gamma; `number` is that of the pass."""
        pairs = self.pairs

        def sum_pairs(x: Block, y: Block | None) -> BlockSums:
            (rows,), (columns,), mask_y = x.features, (None,) if y is None else y.features, y and y.mask
            features, skip_self = pairs.centered(rows, columns, x.mask, mask_y), pairs.skip_self and y is None
            return BlockSums(_sum_terms(self.function, features, gamma, skip_self, pairs.tile_size, self.euclidean))

        report = partial(reporting, progress, number, label=f"pass {number}")
        return visit(sum_pairs, [pairs.x], pairs.y and [pairs.y], state, checkpoint, report)


@partial(jax.jit, static_argnames=("terms", "skip_self", "tile_size", "euclidean"))
def _sum_terms(
    terms: Any, features: CenteredFeatures, gamma: Array, skip_self: bool, tile_size: int | None, euclidean: bool
) -> Array:
    pairs = Pairs((features,), None, skip_self, tile_size, differentiable=False, euclidean=euclidean)
    return sums_over(terms, pairs, gamma, per_row=False)


def density_of_rows(pairs: RowPairs, sigma: float, checkpoint: Path | None, progress: Progress) -> Array:
    """`streaming.mean_density` for opened rows."""
    saved = Checkpoint(checkpoint, "mean_density", {**pairs.identity, "sigma": sigma})
    terms = _Terms(_kernel_only, pairs)
    gamma = gamma_of(jnp.asarray(sigma, pairs.dtype), pairs.scale)
    state = terms.sum(gamma, saved.load(terms.zero_sums()), saved, progress, 1)
    saved.remove()
    return jnp.asarray(totals_of(state)[0] / pairs.total, pairs.dtype)


def _kernel_only(tile: Tile) -> tuple[Array]:
    return (kernel_terms(tile),)


def solve_rows(
    pairs: RowPairs,
    density: float,
    rtol: float | None = None,
    checkpoint: Path | None = None,
    progress: Progress = False,
    *,
    euclidean: bool = False,
) -> SigmaSolution:
    """`streaming.solve_sigma` for opened rows; `euclidean`: for the Laplacian kernel."""
    _check_reachable(density, pairs)
    rtol = check_rtol(rtol, pairs.dtype)
    inputs = {**pairs.identity, "density": density, "rtol": rtol, "euclidean": euclidean}
    saved = Checkpoint(checkpoint, "solve_sigma", inputs)
    target, terms = density * pairs.total, _Terms(moments, pairs, euclidean)
    off_diagonal = (target - pairs.diagonal_sum) / (pairs.total - pairs.diagonal_sum)
    search = _first_search(pairs.centered(*pairs.sample), jnp.asarray(off_diagonal, pairs.dtype), euclidean)
    zero = terms.zero_sums()
    state = saved.load({"search": _pack(search), **zero})
    search = _unpack(state["search"], search)
    while not bool(search.done) and int(search.passes) < MAX_PASSES:
        state = terms.sum(search.gamma, state, saved, progress, int(search.passes) + 1)
        search = _advance(search, jnp.asarray(totals_of(state) / target, pairs.dtype), rtol)
        state = {"search": _pack(search), **zero}
        saved.save(state)
    saved.remove()
    failure = INFEASIBLE if bool(search.infeasible) else NOT_CONVERGED
    raise_if_failed(jnp.asarray(CONVERGED if bool(search.converged) else failure))
    sigma = sigma_of(search.gamma, pairs.scale, euclidean=euclidean)
    final_density = search.density * jnp.asarray(density, pairs.dtype)
    return SigmaSolution(sigma, final_density, search.passes, jnp.asarray(CONVERGED))


_advance = jax.jit(advance, static_argnames="rtol")


def _check_reachable(density: float, pairs: RowPairs) -> None:
    least = pairs.diagonal_sum / pairs.total
    if density <= least:
        n = f"n = {pairs.diagonal_sum:.0f}"
        raise ValueError(
            f"density = {density} cannot be reached with {n} samples: the ones on the diagonal alone "
            f'give {least:.4g}. Use a density above that, or leave the diagonal out with diagonal="exclude".'
        )


@partial(jax.jit, static_argnames="euclidean")
def _first_search(features: CenteredFeatures, density: Array, euclidean: bool) -> Search:
    """A search that starts from the gamma of a subsample, without pairs of a sample with itself."""
    pairs = Pairs((features,), skip_self=features.is_self, euclidean=euclidean).stored()
    idle = jnp.zeros((), bool)
    return begin(guess_from(pairs, density, idle, per_row=False), idle)


def _pack(search: Search) -> np.ndarray:
    return np.array([float(value) for value in search])  # float64 holds all fields exactly: floats, bools and counts


def _unpack(values: np.ndarray, template: Search) -> Search:
    return Search(*(jnp.asarray(value, field.dtype) for value, field in zip(values, template, strict=True)))
