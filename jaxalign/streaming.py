"""Features that do not fit in memory: the same sigma and density, from blocks of rows read one after another.

Blocks of rows come from a file, a memory map or anything that yields arrays by number. Two blocks at a time are in
memory, and the next one is read while the pairs of these are visited. What has been summed up is written to a
checkpoint after every pair of blocks, so that a job that was killed goes on where it was.
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
    """`jaxalign.solve_sigma` for features that are read block by block: one sigma, the same to rounding.

    Args:
        x: a path to a .npy file with an (n, d) array, such an array or memory map, or a sequence of arrays (n_i, d):
            anything with len() and [i]; each is read once more for its shape. What it gives for a number must not
            change while the function runs.
        y: the same, or None to compare x with itself.
        density: the wanted mean c of the affinity, 0 < c < 1: one number.
        diagonal: whether the n ones on the diagonal count in it, "include" or "exclude". Only for y = None.
        mask: shape (n,), True = a real sample.
        mask_y: the same for y.
        rtol: relative error allowed in the density; None: 1e-6 in float32, 1e-13 in float64.
        block_rows: rows in a block, of which three are in memory; None: 256 MB, 65536 rows at most. A sequence has its
            own blocks.
        plan: `jaxalign.Plan(tile_size=...)`: of the tiles within a pair of blocks.
        checkpoint: a file to write progress to, and to go on from if it is there. Removed at the end. One that was
            written for other features or options is refused.
        progress: True shows a bar (needs tqdm); or a function of (pass, block pairs done, block pairs in a pass).

    Returns:
        `SigmaSolution` of scalars. Not differentiable.

    Raises:
        TypeError, ValueError: see `jaxalign.solve_sigma`; also nan or inf (the row is named), a checkpoint that is
            truncated or belongs to something else, density out of reach.
        OSError: a file cannot be read or written.

    Example:
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
    """`jaxalign.mean_density` for features that are read block by block, at one sigma: a scalar.

    Arguments and errors are those of `solve_sigma` here; sigma is in units of the features, > 0.

    Example:
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
        raise ValueError("mask_y is given without y; mask serves both sides when y is None.")
    rows = open_source("x", x, mask, block_rows)
    # Both are shifted alike, as their distances count.
    others = None if y is None else replace(open_source("y", y, mask_y, block_rows), shift=rows.shift)
    return rows, others


def _plan_for_files(plan: Plan | None) -> Plan:
    plan = check_plan(plan)
    check_single_device(plan, "features are read block by block on a single device")
    return plan


def _number(name: str, value: Any) -> float:
    """A number as a float of Python, as a checkpoint holds it."""
    _checks.parameter(name, value, np.float32, (), "one number")
    return float(value)
