"""From what a user hands in to a value: checks, missing samples, and the two kinds of measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign import _checks
from jaxalign._memory import check_stored
from jaxalign._plan import Plan, TileSize, make_plan, rows_are_local
from jaxalign._problem import check_density, check_problem, check_rtol, raise_if_failed
from jaxalign.core.bandwidth import CONVERGED, NON_FINITE, is_bandwidth
from jaxalign.core.devices import batched
from jaxalign.core.features import valid_rows
from jaxalign.measures._centering import Centering
from jaxalign.measures._pair_sums import Inner, PairFunction, pair_products_jit

Missing = Literal["raise", "omit", "propagate"]
# What to do about missing samples where there is no option `missing`.
MASKED = "Leave such samples out with mask=."


@dataclass(frozen=True)
class PairMeasure:
    """A measure by centered inner products of pair functions.

    Attributes:
        name: as users know it.
        function: what a pair gives.
        centering: of the matrices; None: their differences are compared, not their products.
        finish: from the inner products to values (..., L, M).
        least: samples that it needs.
    """

    name: str
    function: PairFunction
    centering: Centering | None
    finish: Callable[[Inner], Array]
    least: int

    @property
    def needs(self) -> str:
        """What needs so many samples, for a message."""
        return self.name


class Setting(NamedTuple):
    """What a set is looked at with."""

    mask: Array | None  # (..., n)
    sigma: Array | None  # (...)
    density: Array | None  # (...)
    rtol: float
    plan: Plan


_ANY = PairFunction("squared")  # rows as they are, no sigma


@dataclass(frozen=True)
class SetMeasure:
    """A measure that looks at each set alone, and then at what two of them gave.

    Attributes:
        name: as users know it.
        prepare: (features (..., n, d), setting) -> a pytree, and a status (...) as of `solve_sigma` or None.
        combine: (that of x, that of y, mask) -> values (...).
        least: samples that it needs.
        function: what it takes of a pair of samples, if it does: tells what rows and sigma have to be.
        label: the name with the option that `least` depends on.
        stores_pairs: whether it sorts values of all pairs, which are stored for that.
    """

    name: str
    prepare: Callable[[Array, Setting], tuple[Any, Array | None]]
    combine: Callable[[Any, Any, Array | None], Array]
    least: int
    function: PairFunction = _ANY
    label: str = ""
    stores_pairs: bool = False

    @property
    def needs(self) -> str:
        """What needs so many samples, for a message."""
        return self.label or self.name


def check_sets(
    named: Sequence[tuple[str, Any]],
    mask: Any,
    missing: Any,
    least: int,
    measure: str,
    way_out: str = 'missing="omit" leaves out samples that are missing in any set.',
) -> tuple[tuple[Array, ...], Array | None]:
    """Features of the same samples in one dtype and batch shape, and the mask of those that count in all of them."""
    _checks.choice("missing", missing, ("raise", "omit", "propagate"))
    sets = [_checks.features(name, value) for name, value in named]
    n = sets[0].shape[-2]
    for (name, _), features in zip(named, sets, strict=True):
        if features.shape[-2] != n:
            raise ValueError(
                f"{named[0][0]} and {name} must hold the same samples, row by row: {n} and {features.shape[-2]} rows."
            )
    try:
        batch = np.broadcast_shapes(*(features.shape[:-2] for features in sets))
    except ValueError:
        told = ", ".join(f"{name} {features.shape}" for (name, _), features in zip(named, sets, strict=True))
        raise ValueError(f"batch dimensions do not broadcast: {told}.") from None
    dtype = np.result_type(*(features.dtype for features in sets))
    sets = [jnp.broadcast_to(features, batch + features.shape[-2:]).astype(dtype) for features in sets]
    mask = _checks.row_mask("mask", mask, (*batch, n))
    if missing == "raise":
        for (name, _), features in zip(named, sets, strict=True):
            _checks.finite_rows(name, features, mask, way_out=way_out, differences=True)
    if missing == "omit":
        real = [jnp.isfinite(features).all(-1) for features in sets]
        for more in real:
            mask = more if mask is None else mask & more
    counts = np.asarray(n)
    if mask is not None and _checks.is_concrete(mask):
        counts = _checks.on_host(mask).sum(-1)
    if (counts < least).any():
        left = "" if mask is None else " are left by the mask" if missing != "omit" else " are left, not missing"
        raise ValueError(f"{measure} needs at least {least} samples; {int(np.min(counts))}{left or ' are there (n)'}.")
    return tuple(sets), mask


def evaluate(
    measure: PairMeasure | SetMeasure,
    x: Any,
    y: Any,
    *,
    sigma: Any = None,
    density: Any = None,
    mask: Any = None,
    missing: Missing = "raise",
    tile_size: TileSize = "auto",
    mesh: Any = None,
    axis_name: Any = None,
) -> Array:
    """The value of a measure for one pair of sets, (...)."""
    least = 1 if rows_are_local(mesh, axis_name) else measure.least
    (x, y), mask = check_sets((("x", x), ("y", y)), mask, missing, least, measure.needs)
    plan = make_plan(x, None, tile_size, mesh, axis_name, representations=2)
    if isinstance(measure, PairMeasure):
        return values_of(products_of((x, y), 1, mask, sigma, density, measure, plan), measure)[..., 0, 0]
    problem = check_function(("x", "y"), (x, y), mask, sigma, density, measure.function, plan)
    if measure.stores_pairs:
        refuse_spread(measure, mesh, axis_name)
        check_stored("dissimilarities to be sorted", x, None)
    value, *status = _evaluate_sets(x, y, mask, *problem, measure, plan)
    for name, one in zip(("x", "y"), status, strict=True):
        explain_status(name, one)
    return value


def refuse_spread(measure: PairMeasure | SetMeasure, mesh: Any, axis_name: Any) -> None:
    """Raise where a measure that sorts all pairs is to be computed from rows on several devices."""
    if isinstance(measure, SetMeasure) and measure.stores_pairs and (mesh is not None or axis_name is not None):
        raise ValueError(
            f"{measure.needs} sorts the values of all pairs, on one device: leave out mesh= and axis_name=, or take a "
            'comparison that is an inner product, such as "pearson".'
        )


def check_function(
    names: Sequence[str],
    sets: tuple[Array, ...],
    mask: Array | None,
    sigma: Any,
    density: Any,
    function: PairFunction,
    plan: Plan,
) -> tuple[Array | None, Array | None]:
    """What a function of pairs needs: a sigma for each set (..., sets), or a density (...)."""
    for name, features in zip(names, sets, strict=True):
        check_directions(name, features, function.rows, mask)
    if sigma is not None and not function.needs_sigma:
        given = _checks.shown(sigma)
        raise ValueError(f"sigma = {given} has no meaning here, where no affinity is taken. Leave it out.")
    sigmas = None if sigma is None else sigma_of_each(sigma, len(sets), sets[0])
    if not function.solves:
        return sigmas, None
    problem = check_problem(sets[0], None, mask, None, function.diagonal, local_rows=plan.rows_are_local)
    return None, jnp.asarray(check_density(density, problem, "global", plan))


def products_of(
    sets: tuple[Array, ...],
    split: int,
    mask: Array | None,
    sigma: Any,
    density: Any,
    measure: PairMeasure,
    plan: Plan,
    names: Sequence[str] = ("x", "y"),
) -> Inner:
    """The inner products of checked sets."""
    sigmas, target = check_function(names, sets, mask, sigma, density, measure.function, plan)
    rtol = check_rtol(None, sets[0].dtype)
    inner = pair_products_jit(sets, split, mask, sigmas, target, measure.function, measure.centering, rtol, plan)
    for k, name in enumerate(names):
        explain_status(name, inner.status[..., k])
    return inner


def explain_status(name: str, status: Array | None) -> None:
    """Raise where the sigma of a set could not be found; not under a trace, and not for nan that is propagated."""
    if status is None or not _checks.is_concrete(status):
        return
    try:
        raise_if_failed(jnp.where(status == NON_FINITE, CONVERGED, status))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@partial(jax.jit, static_argnames="measure")
def values_of(inner: Inner, measure: PairMeasure) -> Array:
    """The values (..., L, M) of a measure; nan where a set holds nan or has no bandwidth, or is too small."""
    value = measure.finish(inner)
    usable = inner.usable & (inner.samples >= measure.least)[..., None, None]
    return jnp.where(usable, value, jnp.nan)


@partial(jax.jit, static_argnames=("measure", "plan"))
def _evaluate_sets(
    x: Array,
    y: Array,
    mask: Array | None,
    sigmas: Array | None,
    density: Array | None,
    measure: SetMeasure,
    plan: Plan,
) -> tuple[Array, Array | None, Array | None]:
    def evaluate_pair(
        x: Array, y: Array, mask: Array | None, sigmas: Array | None, density: Array | None
    ) -> tuple[Array, Array | None, Array | None]:
        parts = [
            prepare_set(rows, mask, None if sigmas is None else sigmas[k], density, measure, plan)
            for k, rows in enumerate((x, y))
        ]
        value = combine_sets(parts[0], parts[1], mask, measure)
        return value.astype(x.dtype), parts[0].status, parts[1].status

    return batched(evaluate_pair, x.ndim - 2)(x, y, mask, sigmas, density)


class Part(NamedTuple):
    """What one representation gave."""

    content: Any
    status: Array | None  # ()
    usable: Array  # ()


def prepare_set(
    x: Array, mask: Array | None, sigma: Array | None, density: Array | None, measure: SetMeasure, plan: Plan
) -> Part:
    """Look at one representation, (n, d)."""
    x = valid_rows(x, mask)
    content, status = measure.prepare(x, Setting(mask, sigma, density, check_rtol(None, x.dtype), plan))
    usable = jnp.isfinite(x).all()
    if mask is not None:
        usable &= jnp.sum(mask) >= measure.least
    if status is not None:
        usable &= status == CONVERGED
    if sigma is not None:
        usable &= is_bandwidth(sigma)
    return Part(content, status, usable)


def combine_sets(x: Part, y: Part, mask: Array | None, measure: SetMeasure) -> Array:
    """The value of two of them."""
    return jnp.where(x.usable & y.usable, measure.combine(x.content, y.content, mask), jnp.nan)


def sigma_of_each(sigma: Any, sets: int, like: Array) -> Array:
    """Given bandwidths as (..., sets): one for all, or a tuple or list of one a set."""
    batch = like.shape[:-2]
    each = sigma if isinstance(sigma, (tuple, list)) else (sigma,) * sets
    if len(each) != sets:
        raise ValueError(f"sigma must be one number, or a tuple of one for each of the {sets} sets; got {len(each)}.")
    values = []
    for one in each:
        meaning = "the batch dimensions of the features (one a set is a tuple)"
        value = _checks.parameter("sigma", one, like.dtype, batch, meaning)
        _checks.positive("sigma", one)
        values.append(value)
    return jnp.stack(values, -1)


def check_directions(name: str, x: Array, how: str | None, mask: Array | None) -> None:
    """Raise where a sample has no direction."""
    if how is None:
        return
    if how == "correlation" and x.shape[-1] < 2:
        raise ValueError(f"{name} has one feature: a correlation between samples needs at least 2.")
    if not _checks.is_concrete(x, mask):
        return
    bad = _checks.looked_at(lambda x: (x == (x[..., :1] if how == "correlation" else 0)).all(-1), x)
    bad = bad if mask is None else bad & _checks.on_host(mask)
    if bad.any():
        row = int(np.argwhere(bad)[0][-1])
        what = "has the same value everywhere" if how == "correlation" else "is 0 everywhere"
        raise ValueError(
            f"{name}: row {row} {what}, so its {how} with others is not defined ({int(bad.sum())} such rows). "
            "Leave it out with mask=."
        )
