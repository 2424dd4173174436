"""Sigma and density of features that do not fit into memory, from blocks of rows.

Blocks come from a file, a memory map or any sequence of arrays. Two blocks are in memory at a time, and the next one is
read while their pairs are visited. The sums are saved to a checkpoint after every pair of blocks, so a job that was
killed resumes from there.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxalign import _checks
from jaxalign.bandwidth import Diagonal, SigmaSolution
from jaxalign.files.checkpoint import locked_checkpoint
from jaxalign.files.sigma import density_of_rows, solve_rows
from jaxalign.files.sources import Rows, Source, open_pairs, open_source
from jaxalign.files.visit import Progress
from jaxalign.plan import Plan, check_plan, check_single_device


def solve_sigma(
    x: Rows,
    y: Rows | None = None,
    *,
    density: ArrayLike = 0.05,
    diagonal: Diagonal = "include",
    mask: np.ndarray | None = None,
    mask_y: np.ndarray | None = None,
    rtol: float | None = None,
    block_rows: int | None = None,
    plan: Plan | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = False,
) -> SigmaSolution:
    """`jaxalign.solve_sigma` for features read block by block: a single sigma, equal up to rounding.

    Args:
        x: a path to a .npy file with an (n, d) array, such an array or memory map, or a sequence of arrays (n_i, d),
            any object with len() and [i]. Each block is read several times, once for its shape alone, and must not
            change meanwhile.
        y: the same, or None to compare x with itself.
        density: the target mean c of the affinity, 0 < c < 1: a single number.
        diagonal: whether the n ones on the diagonal count in the mean: "include" or "exclude". Only for y = None.
        mask: shape (n,), True = a valid sample.
        mask_y: the same for y.
        rtol: relative tolerance of the density; None: 1e-6 in float32, 1e-13 in float64.
        block_rows: rows per block; three blocks are in memory. None: 256 MB, at most 65536 rows. Not with a sequence,
            whose arrays are the blocks.
        plan: `jaxalign.Plan(tile_size=...)` for the tiles within a pair of blocks.
        checkpoint: a file to save progress to, and to resume from if it exists. Removed at the end. A checkpoint
            with other features or options is rejected.
        progress: True shows a bar (needs tqdm); or a function of (pass, block pairs done, block pairs per pass).

    Returns:
        `SigmaSolution` of scalars. Not differentiable.

    Raises:
        TypeError, ValueError: see `jaxalign.solve_sigma`; also a checkpoint that is truncated or belongs to another
            job. For nan or inf the message names the row.
        OSError: a file cannot be read or written.

    Examples:
        >>> import numpy as np, jaxalign
        >>> x = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
        >>> streamed = jaxalign.streaming.solve_sigma(x, block_rows=100)
        >>> float(abs(streamed.sigma / jaxalign.solve_sigma(x).sigma - 1)) < 1e-5
        True
    """
    target = _number("density", density)
    _checks.density_value(target)
    with locked_checkpoint(checkpoint) as path:
        pairs = open_pairs(*_open_sides(x, y, mask, mask_y, block_rows), diagonal, _plan_for_files(plan))
        return solve_rows(pairs, target, rtol, path, progress)


def mean_density(
    x: Rows,
    y: Rows | None = None,
    *,
    sigma: ArrayLike,
    diagonal: Diagonal = "include",
    mask: np.ndarray | None = None,
    mask_y: np.ndarray | None = None,
    block_rows: int | None = None,
    plan: Plan | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = False,
) -> Array:
    """`jaxalign.mean_density` for features read block by block, at a single sigma.

    Args:
        x: see `solve_sigma`.
        y: see `solve_sigma`.
        sigma: the bandwidth in units of the features, > 0: a single number.
        diagonal: see `solve_sigma`.
        mask: see `solve_sigma`.
        mask_y: see `solve_sigma`.
        block_rows: see `solve_sigma`.
        plan: see `solve_sigma`.
        checkpoint: see `solve_sigma`.
        progress: see `solve_sigma`.

    Returns:
        The density, a scalar between 0 and 1. Not differentiable.

    Raises:
        TypeError, ValueError, OSError: see `solve_sigma`; also sigma not above 0.

    Examples:
        >>> import numpy as np, jaxalign
        >>> x = np.array([[0.0], [1.0], [2.0]], np.float32)
        >>> float(jaxalign.streaming.mean_density(x, sigma=1.0, block_rows=2))  # (3 + 4 exp(-1/2) + 2 exp(-2)) / 9
        0.63297...
    """
    sigma = _number("sigma", sigma)
    _checks.positive("sigma", sigma)
    with locked_checkpoint(checkpoint) as path:
        pairs = open_pairs(*_open_sides(x, y, mask, mask_y, block_rows), diagonal, _plan_for_files(plan))
        return density_of_rows(pairs, sigma, path, progress)


def _open_sides(
    x: Rows, y: Rows | None, mask: Any, mask_y: Any, block_rows: int | None
) -> tuple[Source, Source | None]:
    if y is None and mask_y is not None:
        raise ValueError("mask_y needs y: without y, mask applies to both sides.")
    rows = open_source("x", x, mask, block_rows)
    # Distances between x and y need the same shift for both.
    columns = None if y is None else replace(open_source("y", y, mask_y, block_rows), shift=rows.shift)
    return rows, columns


def _plan_for_files(plan: Plan | None) -> Plan:
    plan = check_plan(plan)
    check_single_device(plan, "features are read block by block on a single device")
    return plan


def _number(name: str, value: Any) -> float:
    """A scalar as a Python float, as saved in checkpoints."""
    _checks.parameter(name, value, np.float32, (), "one number")
    return float(value)
