"""Comparisons by name: of two representations, or of all layers of one model with all layers of another.

Measures that are inner products of pair functions are computed for all representations in one pass over the pairs of
samples, so a grid of L x M layers costs L + M distances per pair instead of 2 L M. Files are read block by block, and
finished parts are written to a checkpoint, from which an interrupted job resumes.
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

from jaxalign import _arrays, _checks, _features
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

# Two cores compute this many products in less time than compilation for one more width takes.
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
    """Compare two representations of the same samples with a measure, by its name.

    Args:
        x: features, shape (n, d1); or, with `positions`, of tokens (n, tokens, d1) or maps (n, h, w, d1).
        y: features of the same samples, shape (n, d2), or tokens or maps.
        measure: a name in `jaxalign.measures.REGISTRY`, which also holds its direction and range.
        positions: for tokens and maps: "samples" makes every position a sample (x and y need the same positions),
            "channels" concatenates the positions of a sample, (n, h w d), as Kornblith et al. (2019) do, and "mean"
            averages over them.
        mask: shape (n,), True marks valid samples; with positions="samples" one entry per position.
        missing: what to do about nan and inf: "raise", "omit" such samples, or "propagate" nan.
        options: options of the measure, see the function of that name in `jaxalign.measures`; also its `plan`, if it
            has one.

    Returns:
        A scalar. For batches use the functions in `jaxalign.measures`, or `jax.vmap`.

    Raises:
        TypeError, ValueError: an unknown measure or option; more than two dimensions without `positions`; and the
            errors of the measure.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> round(float(jaxalign.compare(x, 2 * x, "rsa", comparison="spearman")), 4)
        1.0
    """
    how = {"plan": options.pop("plan")} if "plan" in options else {}
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
    """All representations of one model compared with all of another; made by `compare_grid`.

    Attributes:
        values: shape (rows, columns); nan for representations with nan if missing is "propagate".
        sigma: one bandwidth per representation, of the rows and then of the columns (only of the rows if `itself`), in
            units of its features; nan if the measure has none.
        measure: the name of the measure.
        direction: "similarity" if larger values mean more similar, "distance" if smaller values do.
        rows: names of the representations in the rows.
        columns: names of the representations in the columns.
        itself: whether a model was compared with itself, so that rows and columns are the same representations.
        settings: options of the measure, as pairs (name, value).
        samples: the number of valid samples.
        versions: versions of packages, as pairs (package, version).
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
        """The most similar column of each row, and its value; a representation is not its own match.

        Rows that are all nan are left out.
        """
        values = np.array(self.values, np.float64)
        if self.itself:
            np.fill_diagonal(values, np.nan)
        signed = values if self.direction == "similarity" else -values
        matches = {}
        for row, name in zip(signed, self.rows, strict=True):
            if not np.isnan(row).all():
                best = int(np.nanargmax(row))
                value = abs(row[best]) if self.direction == "distance" else row[best]
                matches[name] = (self.columns[best], float(value))
        return matches

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the grid as JSON text, and write it to a file if `path` is set; nan and inf become null."""
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
        """Read a grid from a file, or from text, that `to_json` wrote."""
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
            prefix = "" if is_text else f"{source} is "
            raise ValueError(f"{prefix}not a comparison grid as to_json writes it: {error!r}.") from None

    def to_pandas(self) -> Any:
        """Return the values as a pandas DataFrame (needs pandas)."""
        return _arrays.pandas().DataFrame(np.asarray(self.values), index=list(self.rows), columns=list(self.columns))


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
    """Compare all layers of one model with each other, or with all layers of another model.

    Args:
        features: named features of the same n samples: a mapping of names to arrays (n, d), memory maps or paths of
            files; pairs (name, array); or a folder or file that `jaxalign.io.read_features` reads: numbers in names
            sort as numbers, .npy files become memory maps and other files arrays.
        other: the features to compare with, in the same forms. None compares `features` with each other.
        measure: a name in `jaxalign.measures.REGISTRY`.
        positions: see `jaxalign.compare`.
        mask: shape (n,), True marks valid samples.
        missing: what to do about nan and inf: "raise"; "omit" samples that are missing in any representation; or
            "propagate", which returns nan for representations with nan or inf.
        plan: how pairs are visited, see `jaxalign.Plan`.
        block_rows: the number of rows that are read from files at a time. None: as many as take 256 MB for all
            representations. Pairwise measures, `mutual_knn` and `jaccard` hold two blocks in memory and read a third;
            others hold as many whole representations as fit in 1 GB, at least two.
        checkpoint: a file for finished parts. If it exists, the job resumes from it; it is removed at the end. A
            checkpoint with other features or options raises. (A kernel that is a function is identified by its name and
            a few of its values.)
        progress: True shows a progress bar (needs tqdm); or a function of (stage, done, total).
        options: options of the measure. The sigma of a kernel is one number, or one per representation.

    Returns:
        A `ComparisonGrid`. Each bandwidth without a sigma is solved for once per representation.

    Raises:
        TypeError, ValueError: an unknown measure or option; no features, features of different samples or repeated
            names; a checkpoint that is damaged or belongs to another job; and the errors of the measure, which name the
            representation.

    Examples:
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
    row_features = named_sets("features", features)
    column_features = {} if other is None else named_sets("other", other)
    sides = (("features", row_features), ("other", column_features))
    rows = check_positions({f"{side}[{name!r}]": a for side, named in sides for name, a in named.items()}, positions)
    names = list(row_features) if other is None else list(rows)
    _check_same_samples(names, list(rows.values()))
    check_block_rows(block_rows)
    filled = {name: _kernel_of_grid(value, len(rows)) for name, value in filled.items()}
    task = GridTask(list(rows.values()), names, len(row_features), filled, mask, missing, plan, progress)
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
        rows=tuple(row_features),
        columns=tuple(column_features or row_features),
        itself=other is None,
        settings=tuple((name, _hashable(value)) for name, value in filled.items()),
        samples=samples,
        versions=(("jaxalign", __version__), ("jax", jax.__version__), ("numpy", np.__version__)),
    )


def _compare_in_memory(task: GridTask, measure: PairMeasure | SummaryMeasure) -> GridResult:
    """Compare arrays in memory: in one pass over the pairs, or cell by cell."""
    center = depends_on_differences(measure)
    named = [
        (name, _features.features(name, value, center=center, mask=task.mask))
        for name, value in zip(task.names, task.features, strict=True)
    ]
    if isinstance(measure, PairMeasure) and measure.function.normalization is None and not measure.samples_channels:
        named = _pad_widths(named)
    features, mask = check_representations(named, task.mask, task.missing, measure.min_samples, measure.label)
    if isinstance(measure, SummaryMeasure):
        summaries = Summaries(task, measure, lambda k: features[k], mask)
        values = compare_cells(summaries, Checkpoint(None, "compare_grid", {}))
        num_samples = task.num_samples if mask is None else int(_arrays.on_host(mask).sum())
        return GridResult(values, np.full(len(features), np.nan), num_samples)
    plan = resolve_plan(task.plan, features[0], None, representations=len(features))
    function, kernel = measure.function, task.kernel
    if function.solves:
        single_plan = resolve_plan(task.plan, features[0], None)
        target = check_function(task.names, features, mask, kernel, function, single_plan)[1]
        assert kernel is not None
        assert target is not None
        sigma = []
        with reporting(task.progress, "sigma", len(features), unit="representation") as show:
            for name, x in zip(task.names, features, strict=True):
                rtol = check_rtol(None, x.dtype)
                solution, status = solve_bandwidth_jit(x, mask, target, function, rtol, single_plan)
                explain_status(name, status)
                # sigma is nan for features with nan, whose values become nan.
                sigma.append(jnp.where(jnp.isnan(solution), 1, solution))
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
    """Pad representations with channels of zeros to one width, if that saves time.

    Zeros change no distance. A program is compiled for every width, so small problems are faster with one width.
    """
    widths = [features.shape[-1] for _, features in named]
    n, most, added = named[0][1].shape[0], max(widths), max(widths) * len(widths) - sum(widths)
    if n * n * added >= (len(set(widths)) - 1) * _PRODUCTS_PER_WIDTH or added > sum(widths):
        return named
    return [(name, jnp.pad(features, [(0, 0), (0, most - features.shape[-1])])) for name, features in named]


# --- checks of arguments ----------------------------------------------------------------------------------------------


def _kernel_of_grid(option: Any, number: int) -> Any:
    """A kernel with sigma as one number, or as a tuple of one per representation; other options do not change."""
    if not isinstance(option, (RBF, Laplacian)) or option.sigma is None:
        return option
    sigma: Any = option.sigma
    is_single = np.ndim(sigma) == 0
    values = (sigma,) if is_single else tuple(sigma)
    if not is_single and len(values) != number:
        raise ValueError(
            f"sigma must be one number, or one for each of the {number} representations; got {len(values)}."
        )
    for value in values:
        _checks.parameter("sigma", value, np.float32, (), "one number per representation")
        _checks.positive("sigma", value)
    return replace(option, sigma=float(sigma) if is_single else tuple(map(float, values)))


def _check_same_samples(names: list[str], features: list[Any]) -> None:
    n = features[0].shape[0]
    for name, value in zip(names, features, strict=True):
        if value.shape[0] != n:
            raise ValueError(
                f"all features must be of the same samples, row by row: {names[0]} has {n} rows, "
                f"{name} {value.shape[0]}."
            )


def _hashable(value: Any) -> Any:
    option = option_value(value)
    return tuple(map(_hashable, option)) if isinstance(option, list) else option
