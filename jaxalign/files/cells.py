"""The task of a grid, and grids of measures that compare summaries of two representations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign.files.checkpoint import Checkpoint
from jaxalign.files.storage import json_value
from jaxalign.files.visit import Progress, reporting
from jaxalign.kernels import RBF, Laplacian, Linear, for_representations, with_bandwidth
from jaxalign.measures._evaluate import (
    Missing,
    Summary,
    SummaryMeasure,
    check_function,
    compare_summaries,
    explain_status,
    summarize,
)
from jaxalign.plan import Plan, resolve_plan

# Keep summaries up to this many bytes, but at least two of them.
_KEPT_BYTES = 2**30


@dataclass(frozen=True)
class GridTask:
    """The representations of a grid, and how they are compared."""

    features: list[Any]  # (n, d) of each representation, the rows of the grid first
    names: list[str]
    split: int  # the number of rows of the grid; if it includes all representations, they are the columns too
    options: dict[str, Any]  # of the measure
    mask: Any
    missing: Missing
    plan: Plan
    progress: Progress

    @property
    def num_samples(self) -> int:
        """The number of rows of every representation."""
        return self.features[0].shape[0]

    @property
    def columns(self) -> range:
        """The representations that are columns of the grid."""
        return range(self.split, len(self.names)) if len(self.names) > self.split else range(self.split)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the grid."""
        return self.split, len(self.columns)

    @property
    def kernel(self) -> RBF | Laplacian | None:
        """The kernel with a bandwidth, or None."""
        return with_bandwidth(self.options)

    def bandwidth_of(self, k: int) -> RBF | Laplacian:
        """The kernel of a representation; the task must have a kernel with a bandwidth."""
        assert self.kernel is not None
        return for_representations(self.kernel, k)

    def subset(self, numbers: Sequence[int], mask: np.ndarray | None) -> GridTask:
        """The task for a subset of the representations, and for the samples of a mask."""
        options = {
            name: for_representations(value, *numbers) if isinstance(value, (RBF, Laplacian)) else value
            for name, value in self.options.items()
        }
        features, names = [self.features[k] for k in numbers], [self.names[k] for k in numbers]
        split = sum(k < self.split for k in numbers)
        return replace(self, features=features, names=names, split=split, options=options, mask=mask)

    def inputs(self, measure: str) -> dict[str, Any]:
        """The inputs that identify a checkpoint, besides the features."""
        return {
            "measure": measure,
            "options": {name: option_value(value) for name, value in self.options.items()},
            # A few values of each custom kernel, because two functions with the same name may differ.
            "kernels": {
                name: np.asarray(value(jnp.logspace(-3, 3, 13))).tolist()
                for name, value in self.options.items()
                if callable(value)
            },
            "names": self.names,
            "split": self.split,
            "missing": self.missing,
        }


def option_value(option: Any) -> Any:
    """An option as JSON; a kernel becomes its repr."""
    return repr(option) if isinstance(option, (RBF, Laplacian, Linear)) else json_value(option)


class GridResult(NamedTuple):
    """The values of a grid."""

    values: np.ndarray
    sigma: np.ndarray  # of each representation
    num_samples: int  # valid samples


@dataclass(frozen=True)
class Summaries:
    """Summaries of the representations, with a cache of the most recently used ones."""

    task: GridTask
    measure: SummaryMeasure
    load: Callable[[int], Array]
    mask: Array | None
    by_blocks: Callable[[int], Summary] | None = None  # for summaries that do not need all rows in memory
    kept: dict[int, Any] = field(default_factory=dict)  # in order of use, the most recent last

    def __getitem__(self, k: int) -> Any:
        self.kept[k] = self.kept.pop(k) if k in self.kept else self._summarize(k)
        while len(self.kept) > 2 and sum(leaf.nbytes for leaf in jax.tree.leaves(self.kept)) > _KEPT_BYTES:
            del self.kept[next(iter(self.kept))]
        return self.kept[k]

    def _summarize(self, k: int) -> Any:
        if self.by_blocks is not None:
            return self.by_blocks(k)
        x, name, function = self.load(k), self.task.names[k], self.measure.function
        kernel = None if self.task.kernel is None else self.task.bandwidth_of(k)
        plan = resolve_plan(self.task.plan, x, None)
        sigmas, target = check_function([name], (x,), self.mask, kernel, function, plan)
        sigma = None if sigmas is None else sigmas[0]
        summary = _summarize_jit(x, self.mask, sigma, target, self.measure, plan)
        explain_status(name, summary.status)
        return summary


_summarize_jit = jax.jit(summarize, static_argnames=("measure", "plan"))
_compare_summaries_jit = jax.jit(compare_summaries, static_argnames="measure")


def compare_cells(summaries: Summaries, checkpoint: Checkpoint) -> np.ndarray:
    """The values for all pairs of representations; the checkpoint is saved after every cell."""
    task, measure = summaries.task, summaries.measure
    state = checkpoint.load({"values": np.full(task.shape, np.nan), "done": np.zeros(task.shape, bool)})
    values, done = state["values"], state["done"]
    with reporting(task.progress, measure.name, values.size, unit="comparison") as show:
        for i in range(task.split):
            # Alternate the direction, so that the most recently used summaries come first if the cache is full.
            for j, column in list(enumerate(task.columns))[:: 1 if i % 2 == 0 else -1]:
                if not done[i, j]:
                    values[i, j] = _compare_summaries_jit(summaries[i], summaries[column], summaries.mask, measure)
                    done[i, j] = True
                    checkpoint.save(state)
                show(int(done.sum()))
    return values
