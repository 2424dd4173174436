"""The bandwidth sigma for a target mean density of the affinity, and the density for a given sigma."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxalign._problem import (
    Bandwidth,
    Diagonal,
    Problem,
    check_density,
    check_finite,
    check_problem,
    check_rtol,
    check_sigma,
    explain_failure,
    raise_if_failed,
)
from jaxalign._repr import describe_codes, short_repr
from jaxalign._status import Status
from jaxalign._typing import AnyArray, Data, Mask, Numbers
from jaxalign.core.bandwidth import gamma_of, pairs_of, solve_pairs
from jaxalign.core.devices import NO_ROWS, ROWS_LAST, on_mesh
from jaxalign.core.features import center_features
from jaxalign.core.reduce import reduce_pairs
from jaxalign.core.tiles import Reduction, kernel_terms, over_all
from jaxalign.plan import Plan, check_plan, resolve_plan

__all__ = ["Bandwidth", "Diagonal", "SigmaSolution", "mean_density", "solve_sigma"]


@partial(jax.tree_util.register_dataclass, data_fields=("sigma", "density", "passes", "status"), meta_fields=())
@dataclass(frozen=True, repr=False)
class SigmaSolution:
    """The result of `solve_sigma`: a pytree of arrays of shape (...) or, with one sigma per row, (..., n).

    Attributes:
        sigma: the bandwidth, in units of the features; nan where no sigma exists (see status) and in masked rows.
        density: the mean density at sigma.
        passes: number of passes over all pairs, an integer array of shape (...).
        status: how the search for each sigma ended, an integer code of `jaxalign.Status`; 0 is success.
    """

    sigma: Float[Array, "..."]
    density: Float[Array, "..."]
    passes: Int[Array, "..."]
    status: Int[Array, "..."]

    def __repr__(self) -> str:
        return short_repr(self, status=describe_codes(self.status, Status))

    def raise_if_failed(self) -> SigmaSolution:
        """Return self, or raise a ValueError that says what went wrong and where; never raises under a trace."""
        raise_if_failed(self.status)
        return self


def mean_density(
    x: Numbers[Data, "*#batch n d"],
    y: Numbers[Data, "*#batch m d"] | None = None,
    *,
    sigma: ArrayLike,
    diagonal: Diagonal = "include",
    bandwidth: Bandwidth = "global",
    mask: Mask[Data, "*#batch n"] | None = None,
    mask_y: Mask[Data, "*#batch m"] | None = None,
    plan: Plan | None = None,
) -> Float[Array, "*batch"]:
    """Mean of the affinity exp(-||x_i - y_j||^2 / (2 sigma^2)) over pairs, at a fixed sigma.

    Args:
        x: features, shape (..., n, d).
        y: features, shape (..., m, d); None compares x with itself.
        sigma: bandwidth in units of the features, > 0; broadcasts to (...).
        diagonal: "include" counts the n ones on the diagonal, "exclude" averages over i != j. Only for y = None.
        bandwidth: "per_row": sigma has shape (..., n), one per row of x.
        mask: shape (..., n), True = a valid sample; other samples do not count.
        mask_y: the same for y, shape (..., m).
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        The density, shape (...), between 0 and 1; nan without valid pairs. Differentiable in x, y and sigma.

    Raises:
        TypeError, ValueError: see `solve_sigma`; also sigma not above 0.

    Examples:
        >>> import jax.numpy as jnp, jaxalign
        >>> x = jnp.array([[0.0], [1.0]])
        >>> float(jaxalign.mean_density(x, sigma=1.0))  # (1 + exp(-1/2)) / 2
        0.80326...
    """
    plan = check_plan(plan)
    problem = check_problem(x, y, mask, mask_y, diagonal, local_rows=plan.rows_are_local)
    plan = resolve_plan(plan, problem.x, problem.y)
    bandwidths, per_row = check_sigma(sigma, problem, bandwidth), bandwidth == "per_row"
    check_finite(problem)
    return _mean_density(problem.x, problem.y, bandwidths, problem.mask, problem.mask_y, diagonal, per_row, plan)


@partial(jax.jit, static_argnames=("diagonal", "per_row", "plan"))
def _mean_density(
    x: Array,
    y: Array | None,
    sigma: AnyArray,
    mask: Array | None,
    mask_y: Array | None,
    diagonal: Diagonal,
    per_row: bool,
    plan: Plan,
) -> Array:
    def local(x: Array, y: Array | None, mask: Array | None, mask_y: Array | None, sigma: Array) -> Array:
        features = center_features(x, y, mask, mask_y, plan.axis_name)
        gamma = gamma_of(sigma, features.scale)
        pairs = pairs_of(features, None, skip_self=diagonal == "exclude", plan=plan)
        reduction = Reduction(kernel_terms, over_all, symmetric=not per_row)
        total = reduce_pairs(reduction, pairs, gammas=(gamma,), gamma_per="row" if per_row else "all")[0]
        return jnp.where(features.finite, total / pairs.total(per_row=False), jnp.nan)

    rows = ROWS_LAST if per_row else NO_ROWS
    return on_mesh(local, plan, (x, y, mask, mask_y), (sigma,), (rows,), NO_ROWS)


def solve_sigma(
    x: Numbers[Data, "*#batch n d"],
    y: Numbers[Data, "*#batch m d"] | None = None,
    *,
    density: ArrayLike = 0.05,
    diagonal: Diagonal = "include",
    bandwidth: Bandwidth = "global",
    mask: Mask[Data, "*#batch n"] | None = None,
    mask_y: Mask[Data, "*#batch m"] | None = None,
    rtol: float | None = None,
    plan: Plan | None = None,
    throw: bool = True,
) -> SigmaSolution:
    """The sigma at which mean(exp(-||x_i - y_j||^2 / (2 sigma^2))) equals a density.

    Args:
        x: features, shape (..., n, d), n >= 2 (n >= 1 with y): an array of any real dtype, nested lists, or a table.
            Without x64, float64 is centered before it becomes float32, so that distances lose no digits to an offset.
        y: features, shape (..., m, d); None compares x with itself.
        density: the target mean c of the affinity, 0 < c < 1: a number or an array that broadcasts to (...), possibly
            traced.
        diagonal: "include" counts the n ones on the diagonal, as in the published method; "exclude" averages over
            i != j. For n = 32 and c = 0.05, "include" leaves a density of 0.019 off the diagonal. Only for y = None.
        bandwidth: "global": one sigma per representation. "per_row": one sigma per row, so that the mean of every row
            is c.
        mask: shape (..., n), True = a valid sample; other samples do not count in any mean or in n.
        mask_y: the same for y, shape (..., m).
        rtol: relative tolerance of the density; errors of derivatives are about as large. None: 1e-6 in float32, 1e-13
            in float64.
        plan: how pairs are visited, see `jaxalign.Plan`.
        throw: whether to raise if no sigma reaches the density. False: do not read the status, so the call does not
            wait for the device; without a solution sigma is nan, and the status says why.

    Returns:
        `SigmaSolution` with sigma, its density, the number of passes over all pairs, and a status. sigma has exact
        derivatives of every order in x, y and density, by the implicit function theorem:
        d sigma / d D_ij = sigma A_ij / (2 sum_kl A_kl D_kl).

    Raises:
        TypeError: features that are not real numbers (complex, strings, dates, objects), or are a torch tensor.
        ValueError: wrong shapes; density outside (0, 1); a density that the diagonal alone exceeds (also under jit) or
            that duplicates exceed; nan or inf; an empty mask. Under a trace, bad values give sigma = nan and a status
            instead. (`jax.jit(checkify.checkify(f, errors=checkify.float_checks))` turns these nans into errors.)

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (200, 16))
        >>> solution = jaxalign.solve_sigma(x, density=0.05)
        >>> abs(float(jaxalign.mean_density(x, sigma=solution.sigma)) - 0.05) < 1e-6
        True
    """
    plan = check_plan(plan)
    problem = check_problem(x, y, mask, mask_y, diagonal, local_rows=plan.rows_are_local, throw=throw)
    plan = resolve_plan(plan, problem.x, problem.y)
    target = check_density(density, problem, bandwidth, plan, throw=throw)
    rtol = check_rtol(rtol, problem.x.dtype)
    solution = solve_checked(problem, target, bandwidth, rtol, plan)
    if throw:
        explain_failure(solution.status, problem)
    return solution


def solve_checked(
    problem: Problem,
    density: AnyArray,
    bandwidth: Bandwidth,
    rtol: float,
    plan: Plan,
    precision: lax.PrecisionLike = None,
) -> SigmaSolution:
    """`solve_sigma` for checked arguments; failures show up in the status only."""
    x, y, mask, mask_y, diagonal = problem
    return _solve_sigma(x, y, density, mask, mask_y, diagonal, bandwidth, rtol, plan, precision)


@partial(jax.jit, static_argnames=("diagonal", "bandwidth", "rtol", "plan", "precision"))
def _solve_sigma(
    x: Array,
    y: Array | None,
    density: AnyArray,
    mask: Array | None,
    mask_y: Array | None,
    diagonal: Diagonal,
    bandwidth: Bandwidth,
    rtol: float,
    plan: Plan,
    precision: lax.PrecisionLike,
) -> SigmaSolution:
    def local(x: Array, y: Array | None, mask: Array | None, mask_y: Array | None, density: Array) -> tuple[Array, ...]:
        features = center_features(x, y, mask, mask_y, plan.axis_name)
        ((solution, _),) = solve_pairs(
            (features,),
            density,
            rtol,
            skip_self=diagonal == "exclude",
            per_row=bandwidth == "per_row",
            plan=plan,
            precision=precision,
        )
        return solution.sigma, solution.density, solution.passes, solution.status

    rows = NO_ROWS if bandwidth == "global" else ROWS_LAST
    result_rows = (rows, rows, NO_ROWS, rows)
    return SigmaSolution(*on_mesh(local, plan, (x, y, mask, mask_y), (density,), (NO_ROWS,), result_rows))
