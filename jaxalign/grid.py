"""Comparisons by name: of two sets, or of every layer of one model with every layer of another.

What a measure by pairs needs of all sets is gathered in one visit of the pairs of samples, so a grid of L x M layers
costs L + M distances a pair and not 2 L M. Rows that lie in files are read block by block; what is finished is
written down, so that a job that was killed goes on where it was.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxalign import _checks
from jaxalign._positions import Positions, check_positions
from jaxalign._problem import check_rtol
from jaxalign._repr import describe, short_repr
from jaxalign._typing import Data, Mask, Numbers
from jaxalign._version import __version__
from jaxalign.files.cells import GridResult, GridTask, Summaries, compare_cells, option_value
from jaxalign.files.checkpoint import Checkpoint, locked_checkpoint
from jaxalign.files.grid import compare_files
from jaxalign.files.sources import check_block_rows
from jaxalign.files.storage import check_regular, json_value, replace_file
from jaxalign.files.visit import Progress, reporting
from jaxalign.io import named_sets
from jaxalign.kernels import RBF, Laplacian
from jaxalign.measures._evaluate import (
    Missing,
    PairMeasure,
    SummaryMeasure,
    check_function,
    check_pairs_fit,
    check_representations,
    compute_products,
    compute_values,
    depends_on_differences,
    explain_status,
)
from jaxalign.measures._pair_sums import solve_bandwidth_jit
from jaxalign.measures._registry import check_how, specified
from jaxalign.plan import Plan, check_plan, check_single_device, resolve_plan

# Two cores compute so many products in less time than it takes to compile for one more width.
_PRODUCTS_PER_WIDTH = 5e10

Features = Mapping[str, Any] | Iterable[tuple[str, Any]] | str | os.PathLike[str]


def compare(
    x: Numbers[Data, "..."],
    y: Numbers[Data, "..."],
    measure: str = "cka",
    *,
    positions: Positions | None = None,
    mask: Mask[Data, " samples"] | None = None,
    missing: Missing = "raise",
    **options: Any,
) -> Float[Array, ""]:
    """The value of a measure, by its name, for two representations of the same samples.

    Args:
        x: features, shape (n, d1); or, with `positions`, of tokens (n, tokens, d1) or maps (n, h, w, d1).
        y: features of the same samples, shape (n, d2), or likewise.
        measure: a name in `jaxalign.measures.REGISTRY`, which also has its direction and range.
        positions: of tokens and maps: "samples" makes every position a sample (both need the same ones), "channels"
            puts the positions of a sample side by side, (n, h w d), as Kornblith et al. (2019) do; "mean" averages.
        mask: True for valid samples, shape (n,); for every position where those are samples.
        missing: what to do about nan and inf: "raise", "omit" such samples, or "propagate" nan.
        options: of the measure, see the function of its name in `jaxalign.measures`; also `plan` where it takes
            one.

    Returns:
        A scalar. Batches are for the functions in `jaxalign.measures`, or `jax.vmap`.

    Raises:
        TypeError, ValueError: an unknown measure or option, more than two dimensions without `positions`, and what the
            measure refuses.

    Example:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> round(float(jaxalign.compare(x, 2 * x, "rsa", comparison="spearman")), 4)
        1.0
    """
    how = {name: options.pop(name) for name in ("plan",) if name in options}
    entry = specified(measure, options)[0]
    check_how(entry, how)
    x, y = check_positions({"x": x, "y": y}, positions).values()
    return entry.function(x, y, mask=mask, missing=missing, **how, **options)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "sigma"),
    meta_fields=("measure", "direction", "rows", "columns", "itself", "settings", "samples", "versions"),
)
@dataclass(frozen=True, repr=False)
class ComparisonGrid:
    """Every set of one model compared with every set of another; made by `compare_grid`.

    Attributes:
        values: shape (rows, columns); nan where a set holds nan and missing is "propagate".
        sigma: the bandwidth of each set, rows and then columns (of one model: rows), in units of its features; nan
            where the measure has none.
        measure: its name.
        direction: "similarity": more alike is larger; "distance": smaller.
        rows: names of the sets.
        columns: names of those they were compared with.
        itself: whether these are the same sets: a model was compared with itself.
        settings: pairs of option and value.
        samples: how many samples counted.
        versions: pairs of package and version.
    """

    values: Any
    sigma: Any
    measure: str
    direction: Literal["similarity", "distance"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    itself: bool
    settings: tuple[tuple[str, Any], ...]
    samples: int
    versions: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        return short_repr(self, omit=("settings", "versions"), options=describe(self.options))

    @property
    def options(self) -> dict[str, Any]:
        """The options of the measure."""
        return dict(self.settings)

    def best_match(self) -> dict[str, tuple[str, float]]:
        """For each row the column that is most like it, and the value; a set is not its own match.

        Rows without any value, all nan, are left out.
        """
        values = np.array(self.values, np.float64)
        if self.itself:
            np.fill_diagonal(values, np.nan)
        signed = values if self.direction == "similarity" else -values
        found = {}
        for row, name in zip(signed, self.rows, strict=True):
            if not np.isnan(row).all():
                best = int(np.nanargmax(row))
                found[name] = (self.columns[best], float(abs(row[best]) if self.direction == "distance" else row[best]))
        return found

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The grid as JSON text, also written to a file if a path is given; nan and inf are null."""
        content = {
            "jaxalign": "comparison grid",
            "measure": self.measure,
            "direction": self.direction,
            "rows": self.rows,
            "columns": self.columns,
            "itself": self.itself,
            "values": json_value(np.asarray(self.values)),
            "sigma": json_value(np.asarray(self.sigma)),
            "options": {name: option_value(value) for name, value in self.settings},
            "samples": self.samples,
            "versions": dict(self.versions),
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        if path is not None:
            replace_file(Path(path), text.encode())
        return text

    @staticmethod
    def from_json(source: str | os.PathLike[str]) -> ComparisonGrid:
        """A grid from a file, or from the text, that `to_json` wrote."""
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        if not is_text:
            check_regular(Path(source))
        try:
            content = json.loads(str(source) if is_text else Path(source).read_text(encoding="utf-8"))
            if content["jaxalign"] != "comparison grid":
                raise KeyError("jaxalign")
            rows, columns = (tuple(map(str, content[names])) for names in ("rows", "columns"))
            values, sigma = (np.array(content[name], np.float64) for name in ("values", "sigma"))
            itself = bool(content["itself"])
            if values.shape != (len(rows), len(columns)) or (itself and rows != columns):
                raise ValueError(f"values of shape {values.shape} for {len(rows)} rows and {len(columns)} columns")
            if sigma.shape != (len(rows) + (0 if itself else len(columns)),):
                raise ValueError(f"sigma of shape {sigma.shape}")
            if content["direction"] not in ("similarity", "distance"):
                raise ValueError(f"direction {content['direction']!r}")
            return ComparisonGrid(
                values=values,
                sigma=sigma,
                measure=str(content["measure"]),
                direction=content["direction"],
                rows=rows,
                columns=columns,
                itself=itself,
                settings=tuple((name, _hashable(value)) for name, value in content["options"].items()),
                samples=operator.index(content["samples"]),
                versions=tuple(content["versions"].items()),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            where = "" if is_text else f"{source} is "
            raise ValueError(f"{where}not a comparison grid as to_json writes it: {error!r}.") from None

    def to_pandas(self) -> Any:
        """A pandas DataFrame of the values (needs pandas)."""
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("to_pandas() needs pandas: pip install pandas.") from None
        return pd.DataFrame(np.asarray(self.values), index=list(self.rows), columns=list(self.columns))


def compare_grid(
    features: Features,
    other: Features | None = None,
    measure: str = "cka",
    *,
    positions: Positions | None = None,
    mask: np.ndarray | None = None,
    missing: Missing = "raise",
    plan: Plan | None = None,
    block_rows: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = False,
    **options: Any,
) -> ComparisonGrid:
    """Compare every set of features with every other: all layers of one model, or those of two models.

    Args:
        features: named sets of the same n samples: a mapping of name to an array (n, d), a memory map, or a path to a
            file; pairs of name and array; or a folder or file of sets, as `jaxalign.io.read_features` reads them:
            numbers in names in the order of numbers, .npy files as memory maps and others as arrays.
        other: the sets to compare them with; None compares all with each other.
        measure: a name in `jaxalign.measures.REGISTRY`.
        positions: see `jaxalign.compare`.
        mask: shape (n,), True = a real sample.
        missing: what to do about nan and inf: "raise", "omit" samples that are missing in any set, or "propagate": nan
            for the sets that hold some.
        plan: how pairs are visited, see `jaxalign.Plan`.
        block_rows: rows in a block of what is read from files; None: so many that a block of all sets takes 256 MB.
            Measures by pairs hold two blocks in memory and read a third; others hold what 1 GB holds of whole sets, two
            at least.
        checkpoint: a file for what is finished, to go on from if it is there; removed at the end. One that belongs to
            other features or options is refused. (A kernel of your own is told by its name and a few of its values.)
        progress: True shows a bar (needs tqdm); or a function of (stage, done, total).
        options: of the measure. The sigma of a kernel is a number, or one per representation.

    Returns:
        `ComparisonGrid`. Every bandwidth that is left open is solved for once a set.

    Raises:
        TypeError, ValueError: an unknown measure or option, no sets, sets of different samples, names that repeat; a
            checkpoint that is damaged or belongs to something else; and what the measure refuses, with the name of the
            set.

    Example:
        >>> import jax, jaxalign
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 100, 8))
        >>> grid = jaxalign.compare_grid({"first": x, "second": x + y, "third": y}, kernel="linear")
        >>> grid.best_match()["first"][0]
        'second'
    """
    entry, filled, specification = specified(measure, options)
    plan = check_plan(plan)
    check_how(entry, ["plan"] if plan.mesh is not None or plan.axis_name is not None else [])
    check_pairs_fit(specification, plan)
    ours = named_sets("features", features)
    theirs = {} if other is None else named_sets("other", other)
    sides = (("features", ours), ("other", theirs))
    rows = check_positions({f"{side}[{name!r}]": a for side, named in sides for name, a in named.items()}, positions)
    names = list(ours) if other is None else list(rows)
    _check_same_samples(names, list(rows.values()))
    check_block_rows(block_rows)
    filled = {name: _kernel_of_grid(value, len(rows)) for name, value in filled.items()}
    task = GridTask(list(rows.values()), names, len(ours), filled, mask, missing, plan, progress)
    in_memory = not any(isinstance(value, np.memmap) for value in task.features)
    if in_memory and checkpoint is None and block_rows is None:
        result = _compare_in_memory(task, specification)
    else:
        check_single_device(plan, "rows are read block by block from files, or with a checkpoint, on a single device")
        with locked_checkpoint(checkpoint) as path:
            result = compare_files(task, specification, block_rows, path)
    values, sigma, samples = result
    return ComparisonGrid(
        values=values,
        sigma=sigma,
        measure=entry.name,
        direction=entry.direction_with(filled),
        rows=tuple(ours),
        columns=tuple(theirs or ours),
        itself=other is None,
        settings=tuple((name, _hashable(value)) for name, value in filled.items()),
        samples=samples,
        versions=(("jaxalign", __version__), ("jax", jax.__version__), ("numpy", np.__version__)),
    )


def _compare_in_memory(task: GridTask, measure: PairMeasure | SummaryMeasure) -> GridResult:
    """Arrays in memory, spread over devices or not: in one visit of the pairs, or cell by cell."""
    center = depends_on_differences(measure)
    named = [
        (name, _checks.features(name, value, center=center, mask=task.mask))
        for name, value in zip(task.names, task.features, strict=True)
    ]
    if isinstance(measure, PairMeasure) and measure.function.normalization is None:
        named = _pad_widths(named)
    features, mask = check_representations(named, task.mask, task.missing, measure.min_samples, measure.label)
    if isinstance(measure, SummaryMeasure):
        summaries = Summaries(task, measure, lambda k: features[k], mask)
        values = compare_cells(summaries, Checkpoint(None, "compare_grid", {}))
        num_samples = task.num_samples if mask is None else int(_checks.on_host(mask).sum())
        return GridResult(values, np.full(len(features), np.nan), num_samples)
    plan = resolve_plan(task.plan, features[0], None, representations=len(features))
    function, kernel = measure.function, task.kernel
    if function.solves:
        alone = resolve_plan(task.plan, features[0], None)
        target = check_function(task.names, features, mask, kernel, function, alone)[1]
        assert kernel is not None
        assert target is not None
        sigma = []
        with reporting(task.progress, "sigma", len(features), unit="set") as show:
            for name, x in zip(task.names, features, strict=True):
                solution, status = solve_bandwidth_jit(x, mask, target, function, check_rtol(None, x.dtype), alone)
                explain_status(name, status)
                sigma.append(jnp.where(jnp.isnan(solution), 1, solution))  # nan features: their values become nan
                show(len(sigma))
        measure, kernel = (
            replace(measure, function=replace(function, solves=False)),
            replace(kernel, sigma=tuple(sigma)),
        )
    inner = compute_products(features, task.split, mask, kernel, measure, plan, task.names, differentiable=False)
    values = np.asarray(compute_values(inner, measure))
    sigmas = np.asarray(inner.sigma) if function.needs_sigma else np.full(len(features), np.nan)
    return GridResult(values, sigmas, int(inner.num_samples))


def _pad_widths(named: list[tuple[str, Array]]) -> list[tuple[str, Array]]:
    """Representations of one width, padded with channels of zeros, if that saves time.

    Zeros change no distance. Programs are compiled for every width, so small problems are faster with a single one.
    """
    widths = [features.shape[-1] for _, features in named]
    n, most, added = named[0][1].shape[0], max(widths), max(widths) * len(widths) - sum(widths)
    if n * n * added >= (len(set(widths)) - 1) * _PRODUCTS_PER_WIDTH or added > sum(widths):
        return named
    return [(name, jnp.pad(features, [(0, 0), (0, most - features.shape[-1])])) for name, features in named]


# --- what was handed in -----------------------------------------------------------------------------------------------


def _kernel_of_grid(option: Any, number: int) -> Any:
    """The kernel with one number as its sigma, or a tuple of one per representation; other options as they are."""
    if not isinstance(option, (RBF, Laplacian)) or option.sigma is None:
        return option
    sigma: Any = option.sigma
    is_single = np.ndim(sigma) == 0
    values = (sigma,) if is_single else tuple(sigma)
    if not is_single and len(values) != number:
        raise ValueError(f"sigma must be one number, or one for each of the {number} sets; got {len(values)}.")
    for value in values:
        _checks.parameter("sigma", value, np.float32, (), "one number a set")
        _checks.positive("sigma", value)
    return replace(option, sigma=float(sigma) if is_single else tuple(map(float, values)))


def _check_same_samples(names: list[str], features: list[Any]) -> None:
    n = features[0].shape[0]
    for name, value in zip(names, features, strict=True):
        if value.shape[0] != n:
            raise ValueError(
                f"all sets must hold the same samples, row by row: {names[0]} has {n} rows, {name} {value.shape[0]}."
            )


def _hashable(value: Any) -> Any:
    option = option_value(value)
    return tuple(map(_hashable, option)) if isinstance(option, list) else option
