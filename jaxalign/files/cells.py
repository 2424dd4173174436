"""Grids of measures that look at one representation at a time, and then at two: cell by cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign import _checks
from jaxalign._plan import Plan, make_plan, usual_block_rows
from jaxalign.files.checkpoint import Checkpoint
from jaxalign.files.progress import reporting
from jaxalign.files.sources import checksum_of, rows_are_finite
from jaxalign.files.task import GridResult, GridTask
from jaxalign.measures._evaluate import (
    SetMeasure,
    check_function,
    check_sets,
    combine_sets,
    explain_status,
    prepare_set,
)

# Prepared representations are kept up to so many bytes, and two at least.
_KEPT_BYTES = 2**30


def compare_cells_of_files(
    task: GridTask, measure: SetMeasure, block_rows: int | None, checkpoint: Path | None
) -> GridResult:
    """A grid of representations that are each read as a whole when their turn comes."""
    rows = block_rows or usual_block_rows(max(value.shape[1] for value in task.features) * 8)
    mask = _valid_samples(task, rows)
    least = [(task.names[0], np.zeros((task.num_samples, 1), np.float32))]
    check_sets(least, mask, "raise", measure.least, measure.needs)
    checksums = [checksum_of(value, rows) for value in task.features]
    checksums += [] if mask is None else [checksum_of(mask, task.num_samples)]
    saved = Checkpoint(checkpoint, "compare_grid", {**task.inputs(measure.name), "checksums": checksums})

    def load(k: int) -> Array:
        features = [(task.names[k], np.asarray(task.features[k]))]
        return check_sets(features, mask, "propagate", 1, measure.name)[0][0]

    return compare_cells(Preparation(task, measure, load, mask), saved)


def _valid_samples(task: GridTask, block_rows: int) -> Array | None:
    """The mask of the samples that count; raises for nan and inf among them if they are not to be left out."""
    _checks.choice("missing", task.missing, ("raise", "omit", "propagate"))
    mask = _checks.row_mask("mask", task.mask, (task.num_samples,))
    finite = [rows_are_finite(value, block_rows) for value in task.features]
    if task.missing == "omit":
        return jnp.asarray(np.logical_and.reduce(finite) & (True if mask is None else np.asarray(mask)))
    for name, is_finite in zip(task.names, finite, strict=True):
        usable = is_finite if mask is None else is_finite | ~np.asarray(mask)
        if task.missing == "raise" and not usable.all():
            raise ValueError(
                f"{name} has nan or inf in row {int(np.argmin(usable))}. "
                'missing="omit" leaves out samples that are missing in any set.'
            )
    return mask


@dataclass(frozen=True)
class Preparation:
    """Representations as the measure looks at them; those that were used last are kept."""

    task: GridTask
    measure: SetMeasure
    load: Callable[[int], Array]
    mask: Array | None
    mesh: Any = None
    axis_name: Any = None
    kept: dict[int, Any] = field(default_factory=dict)  # the one that was used last at the end

    def __getitem__(self, k: int) -> Any:
        self.kept[k] = self.kept.pop(k) if k in self.kept else self._prepare(k)
        while len(self.kept) > 2 and sum(leaf.nbytes for leaf in jax.tree.leaves(self.kept)) > _KEPT_BYTES:
            del self.kept[next(iter(self.kept))]
        return self.kept[k]

    def _prepare(self, k: int) -> Any:
        x, name, function = self.load(k), self.task.names[k], self.measure.function
        plan = make_plan(x, None, self.task.tile_size, self.mesh, self.axis_name)
        density = self.task.options.get("density")
        sigmas, target = check_function([name], (x,), self.mask, self.task.sigma_of(k), density, function, plan)
        sigma = None if sigmas is None else sigmas[..., 0]
        prepared = _prepare_set(x, self.mask, sigma, target, self.measure, plan)
        explain_status(name, prepared.status)
        return prepared


@partial(jax.jit, static_argnames=("measure", "plan"))
def _prepare_set(x: Any, mask: Any, sigma: Any, density: Any, measure: SetMeasure, plan: Plan) -> Any:
    return prepare_set(x, mask, sigma, density, measure, plan)


@partial(jax.jit, static_argnames="measure")
def _combine_sets(x: Any, y: Any, mask: Any, measure: SetMeasure) -> Array:
    return combine_sets(x, y, mask, measure)


def compare_cells(prepared: Preparation, checkpoint: Checkpoint) -> GridResult:
    """Look at every two representations; every cell that is done is saved."""
    task, measure, mask = prepared.task, prepared.measure, prepared.mask
    state = checkpoint.load({"values": np.full(task.shape, np.nan), "done": np.zeros(task.shape, bool)})
    values, done = state["values"], state["done"]
    with reporting(task.progress, measure.name, values.size, unit="comparison") as show:
        for i in range(task.split):
            # To and fro, so that what was used last comes first if not all can be kept.
            for j, column in list(enumerate(task.columns))[:: 1 if i % 2 == 0 else -1]:
                if not done[i, j]:
                    values[i, j] = _combine_sets(prepared[i], prepared[column], mask, measure)
                    done[i, j] = True
                    checkpoint.save(state)
                show(int(done.sum()))
    checkpoint.remove()
    num_samples = task.num_samples if mask is None else int(_checks.on_host(mask).sum())
    return GridResult(values, np.full(len(task.names), np.nan), num_samples)
