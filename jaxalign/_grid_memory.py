"""Comparison grids of sets in memory: one visit of the pairs for all of them, or set by set and then two by two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign import _checks, streaming
from jaxalign._plan import Plan, make_plan
from jaxalign._saved import Saved, told
from jaxalign.bandwidth import check_rtol
from jaxalign.measures._evaluate import (
    Missing,
    PairMeasure,
    SetMeasure,
    check_function,
    check_sets,
    combine_sets,
    explain_status,
    prepare_set,
    products_of,
    values_of,
)
from jaxalign.measures._pair_sums import bandwidth_of_jit
from jaxalign.streaming import Progress

# What was found of so many bytes of sets is kept, and of two sets at least.
_KEPT_BYTES = 2**30


class Job(NamedTuple):
    """What is to be compared with what, and how."""

    sets: list[Any]  # features (n, d), those of the rows of the grid first
    names: list[str]
    split: int  # how many sets are rows of the grid; all of them: they are its columns too
    options: dict[str, Any]
    mask: Any
    missing: Missing
    tile_size: Any
    progress: Progress

    @property
    def shape(self) -> tuple[int, int]:
        """Of the grid."""
        return self.split, len(self.sets) - self.split or self.split

    def told(self, task: str) -> dict[str, Any]:
        """What a checkpoint must have been written for."""
        return {
            "task": task,
            "options": {name: told(value) for name, value in self.options.items()},
            "kernels": {name: _values_of(value) for name, value in self.options.items() if callable(value)},
            "names": self.names,
            "split": self.split,
            "missing": self.missing,
        }


def _values_of(kernel: Callable[..., Any]) -> list[float]:
    """A few values of a function of distances: two with one name may differ."""
    return [float(value) for value in kernel(jnp.logspace(-3, 3, 13))]


Found = tuple[np.ndarray, np.ndarray, int]  # values, sigma of each set, samples that counted


def in_one_visit(job: Job, measure: PairMeasure | SetMeasure, mesh: Any = None, axis_name: Any = None) -> Found:
    """Sets in memory, spread over devices or not."""
    sets, names, split, options, mask, missing, tile_size, progress = job
    ready, mask = check_sets(list(zip(names, sets, strict=True)), mask, missing, measure.least, measure.needs)
    sigma, density = options.get("sigma"), options.get("density")
    if isinstance(measure, SetMeasure):
        return cells(job, measure, lambda k: ready[k], mask, mesh=mesh, axis_name=axis_name)
    plan = replace(make_plan(ready[0], None, tile_size, mesh, axis_name, sets=len(ready)), fixed=True)
    function = measure.function
    if function.solves:
        alone = make_plan(ready[0], None, tile_size, mesh, axis_name)
        _, target = check_function(names, ready, mask, None, density, function, alone)
        assert target is not None
        found = []
        report = streaming.reporter(progress, "sigma", len(ready), unit="set")
        for k, (name, x) in enumerate(zip(names, ready, strict=True)):
            one, status = bandwidth_of_jit(x, mask, target, function, check_rtol(None, x.dtype), alone)
            explain_status(name, status)
            found.append(jnp.where(jnp.isnan(one), 1, one))  # of a set that holds nan: its values become nan
            report(k + 1)
        report(-1)
        sigma = found
        measure = replace(measure, function=replace(function, solves=False))
    inner = products_of(ready, split, mask, sigma, None, measure, plan, names)
    values = values_of(inner, measure)
    sigmas = np.asarray(inner.sigma) if function.needs_sigma else np.full(len(ready), np.nan)
    return np.asarray(values), sigmas, int(inner.samples)


@partial(jax.jit, static_argnames=("measure", "plan"))
def _prepare_set(x: Any, mask: Any, sigma: Any, density: Any, measure: SetMeasure, plan: Plan) -> Any:
    return prepare_set(x, mask, sigma, density, measure, plan)


@partial(jax.jit, static_argnames="measure")
def _combine_sets(x: Any, y: Any, mask: Any, measure: SetMeasure) -> Array:
    return combine_sets(x, y, mask, measure)


def _bytes(part: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(part))


def no_cells(job: Job) -> dict[str, np.ndarray]:
    """The cells of a grid before any of them is done."""
    return {"values": np.full(job.shape, np.nan), "done": np.zeros(job.shape, bool)}


def cells(
    job: Job,
    measure: SetMeasure,
    load: Callable[[int], Array],
    mask: Array | None,
    saved: Saved | None = None,
    mesh: Any = None,
    axis_name: Any = None,
) -> Found:
    """Look at every set once, and then at every two of them; cells that are done are saved."""
    sets, names, split, options, _, _, tile_size, progress = job
    sigma, density, n = options.get("sigma"), options.get("density"), sets[0].shape[0]
    number = len(names)
    columns = range(split, number) if number > split else range(split)
    state = no_cells(job) if saved is None else saved.arrays
    values, done = state["values"], state["done"]
    parts: dict[int, Any] = {}  # the one that was used last stands last

    def part(k: int) -> Any:
        if k in parts:
            parts[k] = parts.pop(k)
        else:
            x = load(k)
            plan = make_plan(x, None, tile_size, mesh, axis_name)
            given = sigma[k] if isinstance(sigma, (tuple, list)) else sigma
            sigmas, target = check_function(names[k : k + 1], (x,), mask, given, density, measure.function, plan)
            own = None if sigmas is None else sigmas[..., 0]
            parts[k] = _prepare_set(x, mask, own, target, measure, plan)
            explain_status(names[k], parts[k].status)
            while len(parts) > 2 and sum(map(_bytes, parts.values())) > _KEPT_BYTES:
                del parts[next(iter(parts))]
        return parts[k]

    report = streaming.reporter(progress, measure.name, values.size, unit="comparison")
    for i in range(split):
        # To and fro, so that what was used last comes first if not all can be kept.
        for j, column in list(enumerate(columns))[:: 1 if i % 2 == 0 else -1]:
            if not done[i, j]:
                values[i, j] = _combine_sets(part(i), part(column), mask, measure)
                done[i, j] = True
                if saved is not None:
                    saved.write({"values": values, "done": done})
            report(int(done.sum()))
    report(-1)
    if saved is not None:
        saved.remove()
    samples = n if mask is None else int(_checks.on_host(mask).sum())
    return values, np.full(number, np.nan), samples
