"""Joint checks of features, masks, density and sigma, and the errors for a failed search for sigma."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign import _arrays, _checks, _features
from jaxalign._repr import shown
from jaxalign._status import Status
from jaxalign._typing import AnyArray
from jaxalign.plan import STORED, Plan

Diagonal = Literal["include", "exclude"]
Bandwidth = Literal["global", "per_row"]

# The default target density.
DENSITY = 0.05


class Problem(NamedTuple):
    """Checked features and masks."""

    x: Array
    y: Array | None
    mask: Array | None
    mask_y: Array | None
    diagonal: Diagonal

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading dimensions."""
        return self.x.shape[:-2]


def check_problem(
    x: Any, y: Any, mask: Any, mask_y: Any, diagonal: Any, *, local_rows: bool = False, throw: bool = True
) -> Problem:
    """Check everything but density and sigma. `local_rows`: x holds the rows of one device out of several.

    With throw=False, here and below, nothing is read from a device, which would block: bad values then show up in the
    status only.
    """
    _checks.choice("diagonal", diagonal, ("include", "exclude"))
    x, y = _features.feature_pair(x, y, min_rows=1 if local_rows else 2, mask=mask, mask_y=mask_y)
    if y is None and mask_y is not None:
        raise ValueError("mask_y needs y: without y, mask applies to both sides.")
    if y is not None and diagonal != "include":
        raise ValueError(
            f"diagonal={shown(diagonal)} has no meaning with y: all n x m pairs count. Leave diagonal out, "
            "or leave y out to compare x with itself."
        )
    mask = _features.row_mask("mask", mask, x.shape[:-1])
    mask_y = None if y is None else _features.row_mask("mask_y", mask_y, y.shape[:-1])
    for name, value, min_samples in (("mask", mask, 2 if y is None else 1), ("mask_y", mask_y, 1)):
        if value is not None and throw and _arrays.is_concrete(value) and not local_rows:
            counts = _arrays.on_host(value).sum(-1)
            if (counts < min_samples).any():
                raise ValueError(
                    f"{name} leaves {int(counts.min())} valid sample(s), at least {min_samples} needed: "
                    "True marks a valid sample."
                )
    return Problem(x, y, mask, mask_y, diagonal)


def _number_hint(bandwidth: Any) -> str:
    """' A number is passed as sigma.', or an empty string."""
    return " A number is passed as sigma." if isinstance(bandwidth, float) else ""


def check_density(
    density: Any, problem: Problem, bandwidth: Any, plan: Plan = STORED, *, throw: bool = True
) -> AnyArray:
    """The density as an array (...); raises if no sigma can reach it."""
    _checks.choice("bandwidth", bandwidth, ("global", "per_row"), _number_hint(bandwidth))
    target = _checks.parameter(
        "density", density, problem.x.dtype, problem.batch, "the batch dimensions of the features"
    )
    if not _may_read(density, throw):
        return target
    _checks.density_value(density)
    if problem.y is None and problem.diagonal == "include":
        if problem.mask is None or plan.rows_are_local or not _may_read(problem.mask, throw):
            counts = plan.total_rows(problem.x.shape[-2])  # an upper bound: the number of valid samples is unknown
        else:
            counts = _arrays.on_host(problem.mask).sum(-1)
        floor = 1 / np.asarray(counts, np.float64)
        infeasible = np.broadcast_arrays(_arrays.on_host(density) <= floor)[0]
        if infeasible.any():
            n = np.broadcast_to(counts, infeasible.shape)[infeasible].min()
            lowest = float(np.min(_arrays.on_host(density)))
            raise ValueError(
                f"density = {lowest} cannot be reached with n = {n} samples: the ones on the diagonal alone give "
                f"1/n = {1 / n:.4g}. Use a density above that, leave the diagonal out of the mean with "
                f'diagonal="exclude", or pass at least {math.floor(1 / lowest) + 1} samples.'
            )
    return target


def is_default(density: Any) -> bool:
    """Whether the density is the default; a traced density counts as the default."""
    if not _arrays.is_concrete(density):
        return True
    return np.ndim(density) == 0 and bool(np.float32(density) == np.float32(DENSITY))


def check_unused(sigma: Any, density: Any, diagonal: Any) -> None:
    """Raise if density or diagonal are passed together with sigma, where they have no effect."""
    if not is_default(density):
        raise ValueError(f"density={shown(density)} has no effect with sigma={shown(sigma)}. Leave one of them out.")
    if diagonal != "include":
        raise ValueError(
            f"diagonal={shown(diagonal)} has no effect with sigma={shown(sigma)}, which is not solved "
            "for. Leave it out."
        )


def check_sigma(sigma: Any, problem: Problem, bandwidth: Any, *, throw: bool = True) -> AnyArray:
    """The sigma of the caller as an array (...), or (..., n) with one sigma per row."""
    _checks.choice("bandwidth", bandwidth, ("global", "per_row"), _number_hint(bandwidth))
    n, batch, shape = problem.x.shape[-2], problem.batch, np.shape(sigma)
    per_row = bandwidth == "per_row"
    if per_row and shape[-1:] != (n,):
        raise ValueError(
            f'bandwidth="per_row" with sigma of shape {shape}: one sigma per row of x has shape {(*batch, n)}. Leave '
            "bandwidth out for a single sigma."
        )
    meaning = "the batch dimensions of the features"
    if shape[-1:] == (n,):
        meaning += '. One sigma per row needs bandwidth="per_row"'
    value = _checks.parameter("sigma", sigma, problem.x.dtype, (*batch, n) if per_row else batch, meaning)
    valid = problem.mask if per_row else None
    if _may_read(sigma, throw) and _may_read(valid, throw):
        _checks.positive("sigma", sigma, valid)
    if per_row and problem.mask is not None:  # nan in a masked row would reach the gradients of valid rows
        value = jnp.where(problem.mask, value, 1)
    return value


def _may_read(value: Any, throw: bool) -> bool:
    """Whether a value may be read: it is concrete, and on the host unless `throw` permits waiting for a device."""
    return _arrays.is_concrete(value) and (throw or not isinstance(value, jax.Array))


def check_rtol(rtol: float | None, dtype: Any) -> float:
    """The relative tolerance of the density, as a Python float."""
    if rtol is None:
        return 1e-6 if dtype == jnp.float32 else 1e-13
    lowest = 4 * float(jnp.finfo(dtype).eps)
    if not lowest <= rtol < 1:
        raise ValueError(f"rtol must lie between {lowest:.2g} (rounding of {dtype}) and 1; got {rtol}.")
    return float(rtol)


def check_finite(problem: Problem) -> None:
    """Raise on nan or inf in concrete x and y, and on numbers so small that distances are 0."""
    _features.finite_rows("x", problem.x, problem.mask, differences=True)
    if problem.y is not None:
        _features.finite_rows("y", problem.y, problem.mask_y, differences=True)


def explain_failure(status: Array, problem: Problem) -> None:
    """Raise a ValueError for a failed status, naming the row of any nan or inf. Under a trace do nothing."""
    if _arrays.is_concrete(status) and _arrays.on_host(status).any():
        check_finite(problem)
        raise_if_failed(status)


def raise_if_failed(status: Array) -> None:
    """Raise a ValueError for the first status that is not `CONVERGED`. Under a trace do nothing."""
    if not _arrays.is_concrete(status):
        return
    values = _arrays.on_host(status)
    if values.any():
        index = tuple(int(i) for i in np.argwhere(values != Status.CONVERGED)[0])
        position = f" (at index {index} of {values.shape})" if index else ""
        message = Status(int(values[index])).message
        raise ValueError(f"no sigma found{position}: {message[0].lower()}{message[1:]}")
