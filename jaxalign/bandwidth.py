"""The bandwidth sigma at which the affinity has a wanted mean density, and that density.

`mean_density` evaluates the density at a given sigma, `solve_sigma` finds the sigma of a given density. The solver
works on the rate t = 1 / (2 sigma^2), in units in which the features are about 1, and needs about one pass over all
pairs: see `find_rate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxalign import _checks
from jaxalign._linalg import root
from jaxalign._plan import NO_ROWS, ROWS_LAST, ROWS_SECOND_LAST, STORED, Plan, TileSize, is_shared, make_plan, on_mesh
from jaxalign._rate import LARGEST_RATE, Root, find_rate, sums_over
from jaxalign._typing import AnyArray
from jaxalign.distances import (
    Frame,
    attach_gradient,
    explicit_distances,
    fast_distances,
    inaccurate,
    make_frame,
    norms_of,
    suspicious,
    varying_like,
    when_any,
)
from jaxalign.pairs import Pairs, Reduction, Tile, kernel_terms, over_all, reduce_pairs

Diagonal = Literal["include", "exclude"]
Bandwidth = Literal["global", "per_row"]

CONVERGED = 0
NOT_CONVERGED = 1
INFEASIBLE = 2
NON_FINITE = 3
BAD_DENSITY = 4
NO_SAMPLES = 5

# So small that the kernel is 1 for all distances (about 1), so large that second derivatives of sigma are finite.
_RATE_OF_ALIKE = {"float32": 1e-10, "float64": 1e-20}

_REASONS = {
    NOT_CONVERGED: "the root-finder did not converge (please report this with your data)",
    INFEASIBLE: (
        "too many samples coincide: the share of pairs at zero distance is not below the density, so no sigma "
        "reaches it. Remove duplicate samples, or ask for a larger density"
    ),
    NON_FINITE: "the features hold nan or inf",
    BAD_DENSITY: "density is not between 0 and 1",
    NO_SAMPLES: "the mask leaves too few real samples to form a pair",
}


@partial(jax.tree_util.register_dataclass, data_fields=("sigma", "density", "passes", "status"), meta_fields=())
@dataclass(frozen=True)
class SigmaSolution:
    """What `solve_sigma` found; a pytree of arrays of shape (...) or, with a bandwidth per row, (..., n).

    Attributes:
        sigma: the bandwidth, in units of the features; nan where there is none (see status) and in masked rows.
        density: the mean density that sigma reaches.
        passes: passes over all pairs that were needed, an integer array of shape (...).
        status: 0 = `bandwidth.CONVERGED`, `NOT_CONVERGED`, `INFEASIBLE` (coincident samples), `NON_FINITE` (nan or inf
            in the features), `BAD_DENSITY` or `NO_SAMPLES` (all masked).
    """

    sigma: Float[Array, "..."]
    density: Float[Array, "..."]
    passes: Int[Array, "..."]
    status: Int[Array, "..."]

    def raise_if_failed(self) -> SigmaSolution:
        """Return self, or raise a ValueError that says what went wrong and where; does nothing under a trace."""
        raise_if_failed(self.status)
        return self


def raise_if_failed(status: Array) -> None:
    """Raise a ValueError for the first status that is not `CONVERGED`; nothing under a trace."""
    if not _checks.is_concrete(status):
        return
    values = _checks.on_host(status)
    if values.any():
        where = tuple(int(i) for i in np.argwhere(values != CONVERGED)[0])
        place = f" (at index {where} of {values.shape})" if where else ""
        raise ValueError(f"no sigma found{place}: {_REASONS[int(values[where])]}.")


def mean_density(
    x: Float[AnyArray, "*#batch n d"],
    y: Float[AnyArray, "*#batch m d"] | None = None,
    *,
    sigma: ArrayLike,
    diagonal: Diagonal = "include",
    mask: Bool[AnyArray, "*#batch n"] | None = None,
    mask_y: Bool[AnyArray, "*#batch m"] | None = None,
    tile_size: TileSize = "auto",
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*batch"]:
    """Mean of the affinity exp(-||x_i - y_j||^2 / (2 sigma^2)) over pairs, at a given sigma.

    Args:
        x: features, shape (..., n, d).
        y: features, shape (..., m, d); None compares x with itself.
        sigma: bandwidth in units of the features, > 0; broadcasts to (...), or is (..., n): one a row of x. (n,) is
            read as one a row unless it is also the batch shape.
        diagonal: "include" counts the n ones on the diagonal, "exclude" averages over i != j. Only for y = None.
        mask: shape (..., n), True = a real sample; the others do not count.
        mask_y: the same for y, shape (..., m).
        tile_size: pairs are visited in tiles of at most so many rows and columns, whose distances are computed
            on the way and, for a gradient, once more; memory is a tile and a few times the features. None stores all n
            x m distances, "auto" does where they are few and else chooses a size by the device and its free memory.
        mesh: spread the rows (of x and of y) over the devices along an axis of this mesh; n need not divide. Rows that
            are spread already bring their mesh along.
        axis_name: the axis of the mesh, if it has several and none is called "data". Without a mesh: an axis that is
            bound, inside `jax.shard_map`, `jax.pmap` or `jax.vmap(axis_name=...)`; x, y and the masks then are this
            device's rows, and all devices together form the set.

    Returns:
        The density, shape (...), between 0 and 1. Differentiable in x, y and sigma. nan where no pair is left.

    Raises:
        TypeError, ValueError: see `solve_sigma`; also sigma not above 0.

    Example:
        >>> import jax.numpy as jnp, jaxalign
        >>> x = jnp.array([[0.0], [1.0]])
        >>> float(jaxalign.mean_density(x, sigma=1.0))  # (1 + exp(-1/2)) / 2
        0.80326...
    """
    problem = check_problem(x, y, mask, mask_y, diagonal, shared=is_shared(mesh, axis_name))
    plan = make_plan(problem.x, problem.y, tile_size, mesh, axis_name)
    rate_sigma, by_row = check_sigma(sigma, problem)
    _checks.finite_rows("x", problem.x, problem.mask, differences=True)
    if problem.y is not None:
        _checks.finite_rows("y", problem.y, problem.mask_y, differences=True)
    return _mean_density(problem.x, problem.y, rate_sigma, problem.mask, problem.mask_y, diagonal, by_row, plan)


@partial(jax.jit, static_argnames=("diagonal", "by_row", "plan"))
def _mean_density(
    x: Array,
    y: Array | None,
    sigma: Array,
    mask: Array | None,
    mask_y: Array | None,
    diagonal: Diagonal,
    by_row: bool,
    plan: Plan,
) -> Array:
    def local(x: Array, y: Array | None, mask: Array | None, mask_y: Array | None, sigma: Array) -> Array:
        frame = make_frame(x, y, mask, mask_y, plan.axis_name)
        rate = rate_of(sigma, frame)
        pairs = pairs_of(frame, None, diagonal, plan)
        reduction = Reduction(kernel_terms, over_all, symmetric=not by_row)
        sums = reduce_pairs(reduction, pairs, rates=(rate,), rates_of="rows" if by_row else "all")[0]
        density = sums / pairs.total(by_row=False)
        return jnp.where(frame.finite, density, jnp.nan)

    rows = ROWS_SECOND_LAST if by_row else NO_ROWS
    return on_mesh(local, plan, (x, y, mask, mask_y), (sigma,), (rows,), NO_ROWS)


def solve_sigma(
    x: Float[AnyArray, "*#batch n d"],
    y: Float[AnyArray, "*#batch m d"] | None = None,
    *,
    density: ArrayLike = 0.05,
    diagonal: Diagonal = "include",
    bandwidth: Bandwidth = "global",
    mask: Bool[AnyArray, "*#batch n"] | None = None,
    mask_y: Bool[AnyArray, "*#batch m"] | None = None,
    rtol: float | None = None,
    tile_size: TileSize = "auto",
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str | None = None,
) -> SigmaSolution:
    """The sigma at which mean(exp(-||x_i - y_j||^2 / (2 sigma^2))) equals a density.

    Args:
        x: features, shape (..., n, d), n >= 2 (n >= 1 with y).
        y: features, shape (..., m, d); None compares x with itself.
        density: the wanted mean c of the affinity, 0 < c < 1; a number or an array that broadcasts to (...), may be
            traced.
        diagonal: "include" counts the n ones on the diagonal, as the method was published; "exclude" averages over i !=
            j. At n = 32 and c = 0.05 "include" leaves a density of 0.019 off the diagonal. Only for y = None.
        bandwidth: "global": one sigma a set. "per_row": one a row, so that the mean of every row is c.
        mask: shape (..., n), True = a real sample; the others do not count in any mean or in n.
        mask_y: the same for y, shape (..., m).
        rtol: relative error allowed in the density reached, and about that in derivatives; None: 1e-6 in float32, 1e-13
            in float64.
        tile_size: pairs are visited in tiles of at most so many rows and columns, whose distances are computed
            on the way and, for a gradient, once more; memory is a tile and a few times the features. None stores all n
            x m distances, "auto" does where they are few and else chooses a size by the device and its free memory.
        mesh: spread the rows (of x and of y) over the devices along an axis of this mesh; n need not divide. Rows that
            are spread already bring their mesh along.
        axis_name: the axis of the mesh, if it has several and none is called "data". Without a mesh: an axis that is
            bound, inside `jax.shard_map`, `jax.pmap` or `jax.vmap(axis_name=...)`; x, y and the masks then are this
            device's rows, and all devices together form the set.

    Returns:
        `SigmaSolution` with sigma, the density reached, the number of passes over all pairs, and a status. sigma has
        exact derivatives of every order in x, y and density, by the implicit function theorem:
        d sigma / d D_ij = sigma A_ij / (2 sum_kl A_kl D_kl).

    Raises:
        TypeError: features that are not floating-point arrays; float64 without x64.
        ValueError: wrong shapes; density outside (0, 1); a density that cannot be reached because the diagonal alone
            exceeds it (always, also under jit), or because samples coincide; nan or inf; an empty mask. Under a
            trace, what only the values can tell gives sigma = nan and a status instead.
            (`jax.jit(checkify.checkify(f, errors=checkify.float_checks))` turns those nans into errors.)

    Example:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (200, 16))
        >>> solution = jaxalign.solve_sigma(x, density=0.05)
        >>> abs(float(jaxalign.mean_density(x, sigma=solution.sigma)) - 0.05) < 1e-6
        True
    """
    problem = check_problem(x, y, mask, mask_y, diagonal, shared=is_shared(mesh, axis_name))
    plan = make_plan(problem.x, problem.y, tile_size, mesh, axis_name)
    target = check_density(density, problem, bandwidth, plan)
    rtol = check_rtol(rtol, problem.x.dtype)
    solution = solve_checked(problem, target, bandwidth, rtol, plan)
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
    """`solve_sigma` on what was checked; a failure is told by the status alone."""
    x, y, mask, mask_y, diagonal = problem
    return _solve_sigma(x, y, density, mask, mask_y, diagonal, bandwidth, rtol, plan, precision)


@partial(jax.jit, static_argnames=("diagonal", "bandwidth", "rtol", "plan", "precision"))
def _solve_sigma(
    x: Array,
    y: Array | None,
    density: Array,
    mask: Array | None,
    mask_y: Array | None,
    diagonal: Diagonal,
    bandwidth: Bandwidth,
    rtol: float,
    plan: Plan,
    precision: lax.PrecisionLike,
) -> SigmaSolution:
    def local(x: Array, y: Array | None, mask: Array | None, mask_y: Array | None, density: Array) -> tuple[Array, ...]:
        frame = make_frame(x, y, mask, mask_y, plan.axis_name)
        found = solve_pairs(frame, density, diagonal, bandwidth, rtol, precision, plan)[0]
        return found.sigma, found.density, found.passes, found.status

    rows = NO_ROWS if bandwidth == "global" else ROWS_LAST
    where = (rows, rows, NO_ROWS, rows)
    return SigmaSolution(*on_mesh(local, plan, (x, y, mask, mask_y), (density,), (NO_ROWS,), where))


# --- checking what was handed in -----------------------------------------------------------------------------------


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


def check_problem(x: Any, y: Any, mask: Any, mask_y: Any, diagonal: Any, *, shared: bool = False) -> Problem:
    """Check everything but density and sigma; `shared`: other devices hold more rows of the set."""
    _checks.choice("diagonal", diagonal, ("include", "exclude"))
    x, y = _checks.feature_pair(x, y, min_rows=1 if shared else 2)
    if y is None and mask_y is not None:
        raise ValueError("mask_y is given without y; mask serves both sides when y is None.")
    if y is not None and diagonal != "include":
        raise ValueError(
            f"diagonal={_checks.shown(diagonal)} has no meaning with y: all n m pairs count. Leave diagonal out, "
            "or leave y out to compare x with itself."
        )
    mask = _checks.row_mask("mask", mask, x.shape[:-1])
    mask_y = None if y is None else _checks.row_mask("mask_y", mask_y, y.shape[:-1])
    least = 2 if y is None else 1
    for name, value, need in (("mask", mask, least), ("mask_y", mask_y, 1)):
        if value is not None and _checks.is_concrete(value) and not shared:
            counts = _checks.on_host(value).sum(-1)
            if (counts < need).any():
                raise ValueError(
                    f"{name} leaves {int(counts.min())} real sample(s), at least {need} needed: "
                    "True marks a sample that is real."
                )
    return Problem(x, y, mask, mask_y, diagonal)


def check_density(density: Any, problem: Problem, bandwidth: Any, plan: Plan = STORED) -> AnyArray:
    """The density as an array that broadcasts against sigma; raises where no sigma can reach it."""
    _checks.choice("bandwidth", bandwidth, ("global", "per_row"))
    target = _checks.parameter(
        "density", density, problem.x.dtype, problem.batch, "the batch dimensions of the features"
    )
    _checks.density_value(density)
    if problem.y is None and problem.diagonal == "include" and _checks.is_concrete(density):
        if problem.mask is None or plan.shared or not _checks.is_concrete(problem.mask):
            counts = plan.rows_of_all(problem.x.shape[-2])  # at most: what a mask leaves of them is not known here
        else:
            counts = _checks.on_host(problem.mask).sum(-1)
        floor = 1 / np.asarray(counts, np.float64)
        infeasible = np.broadcast_arrays(_checks.on_host(density) <= floor)[0]
        if infeasible.any():
            worst = np.broadcast_to(counts, infeasible.shape)[infeasible].min()
            asked = float(np.min(_checks.on_host(density)))
            raise ValueError(
                f"density = {asked} cannot be reached with n = {worst} samples: "
                "the ones on the "
                f"diagonal alone give 1/n = {1 / worst:.4g}. Ask for a density above that, leave the diagonal out of "
                f'the mean with diagonal="exclude", or give at least {math.floor(1 / asked) + 1} samples.'
            )
    return target if bandwidth == "global" else target[..., None]


def check_sigma(sigma: Any, problem: Problem) -> tuple[AnyArray, bool]:
    """A given sigma as an array (..., 1, 1) or, one a row, (..., n, 1); and whether it is one a row."""
    n, batch = problem.x.shape[-2], problem.batch
    shape = np.shape(sigma)
    by_row = len(shape) > 0 and shape[-1] == n and shape != batch
    meaning = f"the batch dimensions of the features, nor to {(*batch, n)}, one sigma a row of x"
    value = _checks.parameter("sigma", sigma, problem.x.dtype, (*batch, n) if by_row else batch, meaning)
    _checks.positive("sigma", sigma, problem.mask if by_row else None)
    if by_row and problem.mask is not None:  # a masked row may hold nan, which would reach the gradient of the others
        value = jnp.where(problem.mask, value, 1)
    return (value[..., None] if by_row else value[..., None, None]), by_row


def check_rtol(rtol: float | None, dtype: Any) -> float:
    """The relative tolerance of the density, as a Python float."""
    if rtol is None:
        return 1e-6 if dtype == jnp.float32 else 1e-13
    least = 4 * float(jnp.finfo(dtype).eps)
    if not least <= rtol < 1:
        raise ValueError(f"rtol must lie between {least:.2g} (rounding of {dtype}) and 1; got {rtol}.")
    return float(rtol)


def explain_failure(status: Array, problem: Problem) -> None:
    """Raise a ValueError for a failed status, naming the row where nan or inf is the cause; nothing under a trace."""
    if _checks.is_concrete(status) and _checks.on_host(status).any():
        _checks.finite_rows("x", problem.x, problem.mask, differences=True)
        if problem.y is not None:
            _checks.finite_rows("y", problem.y, problem.mask_y, differences=True)
        raise_if_failed(status)


# --- the solver ----------------------------------------------------------------------------------------------------


def rate_of(sigma: Array, frame: Frame, *, rooted: bool = False) -> Array:
    """1 / (2 sigma^2) in the units of a frame; sigma broadcasts against (..., n, 1). `rooted`: 1 / sigma."""
    # Far below any distance the kernel is 0 or 1; smaller yet, and sigma^2 underflows to a rate of inf: inf * 0 = nan.
    relative = jnp.maximum(sigma / frame.scale, math.sqrt(0.5 / LARGEST_RATE[sigma.dtype.name]))
    relative = jnp.where(is_bandwidth(sigma), relative, jnp.nan)  # what a trace kept from being refused
    # The derivative of 1 / relative^2, its cube, would overflow: in two factors reverse mode visits it in steps.
    inverse = 1 / relative
    return inverse if rooted else 0.5 * inverse * inverse


def sigma_of(rate: Array, scale: Array, *, rooted: bool = False) -> Array:
    """The sigma of a rate in the units of a frame of this scale: undoes `rate_of`."""
    return scale / rate if rooted else scale * jnp.sqrt(0.5 / rate)


def is_bandwidth(sigma: Array) -> Array:
    """Where sigma is finite and above 0."""
    return (sigma > 0) & jnp.isfinite(sigma)


def pairs_of(
    frame: Frame,
    distances: Array | None,
    diagonal: Diagonal,
    plan: Plan = STORED,
    precision: lax.PrecisionLike = None,
    *,
    rooted: bool = False,
    share: Array | None = None,
) -> Pairs:
    """The pairs of a frame's rows, with stored squared distances or none; `share` is `Pairs.density`."""
    stored = None
    if distances is not None:
        distances = attach_gradient(frame, distances)
        stored = (root(distances) if rooted else distances,)
    return Pairs(
        (frame,), stored, diagonal == "exclude", plan.tile_size, plan.axis_name, precision, rooted=rooted, density=share
    )


def solve_pairs(
    frame: Frame,
    density: Array,
    diagonal: Diagonal,
    bandwidth: Bandwidth,
    rtol: float,
    precision: lax.PrecisionLike = None,
    plan: Plan = STORED,
    *,
    rooted: bool = False,
    tolerant: bool = False,
) -> tuple[SigmaSolution, Pairs, Array]:
    """Solve for sigma; returns the pairs and the rate too, for an affinity on the same distances.

    The rate has shape (..., 1, 1) or (..., n, 1); it is nan where sigma is, but finite in masked rows. `rooted`: of the
    Laplacian kernel exp(-sqrt(D) / sigma), whose rate is 1 / sigma. `tolerant`: where coincident samples alone exceed
    the density, all samples count as alike, A = 1 whatever moves, and not as nan.
    """
    by_row = bandwidth == "per_row"
    fixed, wanted = lax.stop_gradient((frame, density))
    share = _against_pairs(wanted, by_row)
    distances = None
    if plan.stored:
        distances, found = _search_stored(fixed, wanted, diagonal, by_row, rtol, precision, rooted)
    else:
        pairs = replace(pairs_of(fixed, None, diagonal, plan, precision, rooted=rooted, share=share), fixed=True)
        found, _ = find_rate(lambda _: pairs, (), wanted, by_row=by_row, rtol=rtol)

    total = lax.stop_gradient(pairs_of(fixed, None, diagonal, plan).total(by_row=by_row))
    status = _status(found, frame.finite[..., None] if by_row else frame.finite, wanted, total)
    if tolerant:
        assert not by_row
        alike = (status == INFEASIBLE) | (status == NO_SAMPLES)
        status = jnp.where(alike, CONVERGED, status)
        frame = frame._replace(raw_x=jnp.where(alike[..., None, None], fixed.raw_x, frame.raw_x))
        found = found._replace(
            rate=jnp.where(alike, _RATE_OF_ALIKE[wanted.dtype.name], found.rate), slope=jnp.where(alike, 0, found.slope)
        )
    pairs = pairs_of(frame, distances, diagonal, plan, precision, rooted=rooted, share=share)

    def in_real_rows(value: Array, otherwise: float | int) -> Array:
        return jnp.where(frame.mask, value, otherwise) if by_row and frame.mask is not None else value

    status = in_real_rows(status, CONVERGED)
    rate = in_real_rows(jnp.where(status == CONVERGED, found.rate, jnp.nan), 1)
    slope = found.slope * wanted * total / rate  # sum of A D
    rate = _attach_rate(by_row, pairs, density, total, rate, slope)
    scale = frame.scale[..., 0] if by_row else frame.scale[..., 0, 0]
    sigma = in_real_rows(sigma_of(rate, scale, rooted=rooted), jnp.nan)
    reached = in_real_rows(found.density, jnp.nan)
    passes = jnp.broadcast_to(found.passes, frame.finite.shape)
    return SigmaSolution(sigma, reached, passes, status), pairs, _against_pairs(rate, by_row)


_Stored = tuple[Array, Array]  # distances, and whether they are explicit


def _search_stored(
    frame: Frame,
    density: Array,
    diagonal: Diagonal,
    by_row: bool,
    rtol: float,
    precision: lax.PrecisionLike,
    rooted: bool,
) -> tuple[Array, Root]:
    """The root, and distances that are accurate enough for it: explicit ones, where the fast ones are not."""
    share, norms = _against_pairs(density, by_row), norms_of(frame)

    def at(values: _Stored) -> Pairs:
        return pairs_of(frame, values[0], diagonal, rooted=rooted, share=share)

    def improve(finished: Array, rate: Array, values: _Stored) -> tuple[_Stored, Array]:
        rate = _against_pairs(rate, by_row)
        counted = at(values).counted("rows" if by_row else "all")

        def look(values: _Stored) -> _Stored:
            bad = inaccurate(frame, norms, rate, distances=values[0], counted=counted, rooted=rooted)
            return when_any(bad, lambda values: (explicit_distances(frame), ~values[1]), values)

        doubtful = finished & ~values[1] & suspicious(norms, rate, counted=counted, rooted=rooted)
        new = when_any(doubtful, look, values)
        return new, new[1] ^ values[1]

    fast = fast_distances(frame, precision)
    start = fast, varying_like(fast, jnp.zeros((), bool))
    found, (distances, _) = find_rate(at, start, density, by_row=by_row, rtol=rtol, improve=improve)
    return distances, found


def _against_pairs(rate: Array, by_row: bool) -> Array:
    return rate[..., None] if by_row else rate[..., None, None]


def _status(root: Root, finite: Array, density: Array, total: Array) -> Array:
    """The reason for a failure, the most basic one first."""
    status = jnp.where(root.converged, CONVERGED, jnp.where(root.infeasible, INFEASIBLE, NOT_CONVERGED))
    status = jnp.where(total > 0, status, NO_SAMPLES)
    status = jnp.where((density > 0) & (density < 1), status, BAD_DENSITY)
    return jnp.where(finite, status, NON_FINITE).astype(jnp.int32)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach_rate(by_row: bool, pairs: Pairs, density: Array, total: Array, rate: Array, slope: Array) -> Array:
    """`rate` as a function of the pairs and density: same value, derivatives by the implicit function theorem.

    sum w exp(-t D) = c sum w gives dt = (d sum w A - dc sum w) / (sum w A D), where d sum w A = - t sum w A dD is the
    change at a fixed rate: never a derivative of the iteration. The series that solved for t told `slope`, sum w A D.
    """
    return rate


@_attach_rate.defjvp
def _attach_rate_jvp(by_row: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    pairs, _, total, rate, slope = primals
    d_pairs, d_density, *_ = tangents
    rate = _attach_rate(by_row, *primals)
    _, shift = jax.jvp(lambda pairs: _sum_over(kernel_terms, pairs, rate, by_row), (pairs,), (d_pairs,))
    slope = _attach_slope(by_row, pairs, rate, slope)
    slope = jnp.where(slope > 0, slope, 1)  # 0 only where nothing counts: masked rows
    return rate, (shift - d_density * total) / slope


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach_slope(by_row: bool, pairs: Pairs, rate: Array, slope: Array) -> Array:
    """`slope` as a function of pairs and rate, for second derivatives: same value, sum w A D is differentiated."""
    return slope


@_attach_slope.defjvp
def _attach_slope_jvp(by_row: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    pairs, rate, _ = primals

    def total(pairs: Pairs, rate: Array) -> Array:
        return _sum_over(_slope_terms, pairs, rate, by_row)

    return _attach_slope(by_row, *primals), jax.jvp(total, (pairs, rate), tangents[:2])[1]


def _slope_terms(tile: Tile) -> Array:
    return kernel_terms(tile) * tile.distances[0]


def _sum_over(term: Callable[[Tile], Array], pairs: Pairs, rate: Array, by_row: bool) -> Array:
    """The sum of a term over all pairs, or over each row's; reverse mode differentiates it."""
    return sums_over(lambda tile: (term(tile),), pairs, rate, by_row, in_blocks=False)[0]
