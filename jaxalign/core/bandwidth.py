"""The bandwidth at which the mean of the kernel is a target density: root-finder and implicit derivative.

The root-finder works on gamma = 1 / (2 sigma^2). The density rho(gamma) is a mean of decaying exponentials, so it
falls strictly, and one pass over the pairs gives all of its derivatives: with m_k = mean(e^{-gamma D} (gamma D)^k),

    rho(gamma (1 + s)) = sum_k (-s)^k / k! m_k.

One pass therefore describes rho in a neighborhood of gamma and not only its slope: the root of the series is accepted
where its remainder is below the tolerance; otherwise another pass follows at the new gamma, guarded by a bracket. For
s > 0 the partial sums enclose the value, so the last term bounds the remainder.

Everything is elementwise: gamma has shape (), or (n,) for one per row, and vmap adds representations. The loop runs
until each search has converged or is stuck, for at most MAX_PASSES passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._status import Status
from jaxalign.core.devices import on_any_device, varying_like
from jaxalign.core.features import (
    CenteredFeatures,
    are_coarse,
    attach_derivative,
    explicit_distances,
    fast_distances,
    may_be_coarse,
    squared_norms,
    when_any,
)
from jaxalign.core.reduce import reduce_pairs
from jaxalign.core.tiles import Pairs, Reduction, Tile, kernel_terms, over_rows, stacked_over_all
from jaxalign.plan import STORED, Plan

# Status codes of a search, as plain integers: what jax makes of a member of an enumeration is no weak constant.
CONVERGED, NOT_CONVERGED, INFEASIBLE, NON_FINITE, BAD_DENSITY, NO_SAMPLES = map(int, Status)

MAX_PASSES = 64
# Representations of up to so many pairs share one search, mapped over them, on a CPU too. (CKA at n = 1000, 2 cores:
# 38 ms together, 25 ms one by one; the loss at n = 256: 2.5 ms either way.)
_PAIRS_SEARCHED_TOGETHER = 2**18
# Large problems start from a subsample of about this many rows and columns, refined for so many steps: few, where a
# pass over all pairs is as quick.
SUBSAMPLE = 512
_STEPS = {"stored": 2, "rows of tiles": 4, "tiles": 8}
_SUBSAMPLE_RTOL = 1e-3
# Moments m_k up to this k in one pass; the last one bounds the error of the series.
_ORDER = 6
# Largest |s| for which the series is used: beyond it a Newton step in log gamma does as well.
_SERIES_RADIUS = 0.5
# Largest Newton step in log gamma. Features are about 1, so a root is few such steps away.
_LONGEST_STEP = 4.0
# Squared distances below 1e-30 count as 0 in float32. exp(-z) is negligible beyond the largest exponent, while
# z^_ORDER must not overflow.
LARGEST_GAMMA = {"float32": 1e30, "float64": 1e75}
_LARGEST_EXPONENT = {"float32": 100.0, "float64": 700.0}
# Small enough that the kernel is 1 at all scaled distances, large enough that second derivatives of sigma are finite.
_GAMMA_OF_DUPLICATES = {"float32": 1e-10, "float64": 1e-20}


class Solution(NamedTuple):
    """Of one representation: each of shape (), or (n,) with one bandwidth per row; nan or 1 where there is none."""

    gamma: Array  # in scaled units, nan where sigma is; 1 in masked rows
    sigma: Array  # in units of the features
    density: Array  # reached
    passes: Array  # () over all pairs, of the search that ended last
    status: Array  # see above


class Search(NamedTuple):
    """The state of the root-finder: each of shape (), or (n,) with one gamma per row."""

    gamma: Array
    lower: Array  # gammas at which the density is above and below the target
    upper: Array
    density: Array  # in units of the target; a placeholder before the first pass
    slope: Array  # mean of A gamma D, likewise, where converged
    done: Array
    converged: Array
    passes: Array  # ()

    @property
    def infeasible(self) -> Array:
        """Whether the density is still above the target at the largest gamma."""
        return ~self.converged & (self.gamma >= _range(self.gamma)[1]) & (self.density > 1)


# --- the root-finder -------------------------------------------------------------------------------------------------


def find_gamma(pairs: Pairs, density: Array, *, per_row: bool, rtol: float) -> tuple[Pairs, Search]:
    """The gamma at which the weighted mean of the kernel over all pairs, or over each row's, equals the density.

    Also returns the pairs: where stored distances are too coarse for the kernel at that gamma, explicit ones replace
    them, and the search goes on with those.
    """
    total = pairs.total(per_row=per_row)
    idle = ~(total > 0)  # masked rows: nothing to find, and no 0 / 0 for checkify to trip over
    norm = jnp.where(idle, 1, total) * density

    def is_running(state: _State) -> Array:  # until all of them are done, on all devices
        return on_any_device(~state.search.done, pairs.axis_name) & (state.search.passes < MAX_PASSES)

    def step(state: _State) -> _State:
        sums = sums_over(moments, replace(pairs, distances=state.distances), state.search.gamma, per_row)
        state = state._replace(search=advance(state.search, sums / norm[None], rtol))
        return state if state.distances is None else _refine(pairs, state, idle)

    search = begin(initial_gamma(pairs, density, total, idle, per_row), idle)
    if pairs.axis_name is None:  # inside a caller's shard_map each device searches on its own: passes may differ
        search = search._replace(passes=varying_like(search.gamma, search.passes))
    not_explicit = varying_like(pairs.features[0].raw_x, jnp.zeros((), bool))
    state = lax.while_loop(is_running, step, _State(search, pairs.distances, not_explicit))
    return replace(pairs, distances=state.distances), state.search


class _State(NamedTuple):
    search: Search
    distances: tuple[Array, ...] | None  # stored ones
    explicit: Array  # () whether they come from explicit differences


def _refine(pairs: Pairs, state: _State, idle: Array) -> _State:
    """Once a search is done: where stored distances are too coarse for its gamma, explicit ones, and it goes on."""
    assert state.distances is not None
    (features,), (distances,), search = pairs.features, state.distances, state.search
    per_row = idle.ndim > 0
    gamma = search.gamma[:, None] if per_row else search.gamma
    norms, pairs_in_sum = squared_norms(features), pairs.pairs_in_sum("row" if per_row else "all")

    def improve(value: tuple[Array, Array], features: CenteredFeatures) -> tuple[Array, Array]:
        coarse = are_coarse(
            features, norms, gamma, distances=value[0], pairs_in_sum=pairs_in_sum, euclidean=pairs.euclidean
        )
        return when_any(coarse, lambda value, features: (explicit_distances(features), ~value[1]), value, features)

    suspect = may_be_coarse(norms, gamma, pairs_in_sum=pairs_in_sum, euclidean=pairs.euclidean)
    suspect &= search.done.all() & ~state.explicit
    distances, explicit = when_any(suspect, improve, (distances, state.explicit), features)
    restarted = begin(jnp.where(search.converged, search.gamma, 1), idle)
    search = jax.tree.map(partial(jnp.where, explicit & ~state.explicit), restarted, search)
    return state._replace(search=search, distances=(distances,), explicit=explicit)


def initial_gamma(pairs: Pairs, density: Array, total: Array, idle: Array, per_row: bool) -> Array:
    """A gamma from the first two moments of the distances; of many rows from a subsample, and improved on it."""
    # Not of a sample with itself, of which a subsample would hold too few; so not in the target density either.
    off_density, self_total = density, jnp.zeros_like(total)
    if pairs.is_self and not pairs.skip_self:
        self_total = pairs.self_total(per_row=per_row)
        off_density = (density * total - self_total) / jnp.where(total > self_total, total - self_total, 1)
    rows, columns = pairs.shape
    many = max(columns, 0 if per_row else rows) >= 2 * SUBSAMPLE
    if pairs.distances is not None and not many:
        return guess_from(pairs, off_density, idle, per_row, steps=0, self_total=self_total)
    steps = _STEPS["stored" if pairs.distances is not None else "rows of tiles" if per_row else "tiles"]
    sample = pairs.subset(SUBSAMPLE, all_rows=per_row)
    return guess_from(sample, off_density, idle, per_row, steps=steps if many else 0)


def guess_from(
    sample: Pairs,
    off_density: Array,
    idle: Array,
    per_row: bool,
    *,
    steps: int = _STEPS["tiles"],
    self_total: Array | int = 0,
) -> Array:
    """A gamma to start from, after so many steps on a sample of the pairs, which holds so many at distance 0."""
    count, first, second = sums_over(_plain_moments, sample, None, per_row)
    count = jnp.where(count > self_total, count - self_total, 1)
    start = _usable(_gamma_from_moments(first / count, second / count, off_density))
    if steps == 0:
        return start
    norm = count * off_density

    def step(_: Any, search: Search) -> Search:
        return advance(search, sums_over(moments, sample, search.gamma, per_row) / norm[None], _SUBSAMPLE_RTOL)

    # A fixed number of steps, not until it converged: the host of a GPU would have to look after each.
    guess = lax.fori_loop(0, steps, step, begin(start, idle))
    return _usable(jnp.where(guess.done & ~guess.converged, 1, guess.gamma))


def _gamma_from_moments(mean: Array, mean_square: Array, density: Array) -> Array:
    """The root if distances followed a gamma distribution with these moments, as those of normal features nearly do.

    Its mean of exp(-t D) is (1 + b t)^(-mean / b), b = variance / mean. As b goes to 0 the root goes to
    -log(density) / mean, which is never too large (Jensen); far from a gamma distribution not much more is
    trusted.
    """
    mean = jnp.where(mean > 0, mean, 1)  # 0 where nothing counts, or all samples are duplicates
    scale = jnp.maximum((mean_square - mean * mean) / mean, jnp.finfo(mean.dtype).eps * mean)
    lower = -jnp.log(density) / mean
    return jnp.minimum(jnp.expm1(jnp.minimum(lower * scale, 20.0)) / scale, 2 * lower)


def _usable(gamma: Array) -> Array:
    return jnp.clip(jnp.where(jnp.isfinite(gamma) & (gamma > 0), gamma, 1), *_range(gamma))


def _range(gamma: Array) -> tuple[float, float]:
    """The smallest and largest gamma searched; beyond them the kernel is 1 everywhere, or 0 except at distance 0."""
    largest = LARGEST_GAMMA[gamma.dtype.name]
    return 1 / largest, largest


def sums_over(
    terms: Callable[[Tile], tuple[Array, ...]],
    pairs: Pairs,
    gamma: Array | None,
    per_row: bool,
    *,
    in_blocks: bool = True,
) -> Array:
    """Sums of k terms over all pairs, (k,), or over each row's, (k, n); `in_blocks` as for `reduce_pairs`."""
    if not per_row:
        return reduce_pairs(Reduction(terms, stacked_over_all), pairs, gammas=(gamma,), in_blocks=in_blocks)[0]
    # Every row has its own gamma, so a term changes when its pair is transposed.
    reduction = Reduction(terms, over_rows, symmetric=False)
    return jnp.stack(reduce_pairs(reduction, pairs, gammas=(gamma,), gamma_per="row", in_blocks=in_blocks)[1])


def moments(tile: Tile) -> tuple[Array, ...]:
    """Terms of the moments m_0, m_1, ..."""
    (distances,), (gamma,) = tile.distances, tile.gammas
    assert gamma is not None
    z = jnp.minimum(gamma * distances, _LARGEST_EXPONENT[distances.dtype.name])
    terms = [kernel_terms(tile)]
    for _ in range(_ORDER):
        terms.append(terms[-1] * z)
    return tuple(terms)


def _plain_moments(tile: Tile) -> tuple[Array, ...]:
    (distances,) = tile.distances
    ones = tile.apply_weights(jnp.ones_like(distances))
    return ones, ones * distances, ones * distances * distances


def begin(start: Array, idle: Array) -> Search:
    """A search that starts at a gamma, except where there is nothing to find."""
    smallest, largest = _range(start)
    false = start != start  # False wherever start is a number, and of its shape and sharding
    lower, upper = jnp.full_like(start, 0.5 * smallest), jnp.full_like(start, 2 * largest)
    passes = jnp.zeros((), jnp.int32)
    return Search(start, lower, upper, density=start, slope=start, done=false | idle, converged=false, passes=passes)


def advance(search: Search, m: Array, rtol: float) -> Search:
    """One step, from the moments m at the search's gamma, in units of the target density: (_ORDER + 1, ...)."""
    smallest, largest = _range(search.gamma)
    gamma, density = search.gamma, m[0]
    excess = jnp.log(_positive(density))
    lower = jnp.where(excess > 0, jnp.maximum(search.lower, gamma), search.lower)
    upper = jnp.where(excess < 0, jnp.minimum(search.upper, gamma), search.upper)
    s, value, slope, bound = _series_root(m)
    # The truncated series may have no root near: then its Newton steps end anywhere, and following them may creep.
    closer = jnp.abs(value - 1) < 0.5 * jnp.abs(density - 1)
    near, by_series = jnp.abs(s) < _SERIES_RADIUS, gamma * (1 + s)
    converged = near & (bound < rtol) & (jnp.abs(value - 1) < rtol)
    newton = jnp.clip(excess * density / _positive(m[1]), -_LONGEST_STEP, _LONGEST_STEP)
    proposal = jnp.where(near & closer, by_series, jnp.clip(gamma * jnp.exp(newton), smallest, largest))
    bisected = jnp.sqrt(lower) * jnp.sqrt(upper)
    proposal = jnp.where((proposal > lower) & (proposal < upper), proposal, bisected)
    # Nothing more to learn: not a number, or at an end of the range.
    stuck = jnp.isnan(excess) | ((gamma >= largest) & (excess > 0)) | ((gamma <= smallest) & (excess < 0))
    proposal = jnp.where(converged, by_series, jnp.where(stuck, gamma, proposal))
    return Search(
        gamma=jnp.where(search.done, gamma, proposal),
        lower=lower,
        upper=upper,
        density=jnp.where(search.done, search.density, jnp.where(converged, value, density)),
        slope=jnp.where(search.done, search.slope, slope),
        done=search.done | converged | stuck,
        converged=search.converged | (converged & ~search.done),
        passes=search.passes + 1,
    )


def _positive(a: Array) -> Array:
    return jnp.maximum(a, jnp.finfo(a.dtype).tiny)


def _series_root(m: Array) -> tuple[Array, Array, Array, Array]:
    """Solve sum_k (-s)^k / k! m_k = 1.

    Returns s, the value of the sum there, the mean of A gamma D at the gamma (1 + s), and a bound on the error of the
    value.
    """
    coefficients = [m[k] * (-1) ** k / math.factorial(k) for k in range(_ORDER + 1)]

    def evaluate(s: Array) -> tuple[Array, Array]:  # by Horner: a chain of numbers, which a GPU runs as one kernel
        value, slope = coefficients[-1], jnp.zeros_like(s)
        for coefficient in coefficients[-2::-1]:
            value, slope = value * s + coefficient, slope * s + value
        return value, slope

    def newton(_: Any, s: Array) -> Array:
        value, slope = evaluate(s)
        return jnp.clip(s - (value - 1) / jnp.where(slope == 0, 1, slope), -0.9, 0.9)

    s = jnp.expm1(jnp.clip(jnp.log(_positive(m[0])) * m[0] / _positive(m[1]), -0.6, 0.6))
    s = lax.fori_loop(0, 4, newton, s, unroll=True)
    value, slope = evaluate(s)
    # s > 0: the terms alternate and enclose the sum. s < 0: they add up, the rest grows like a gamma distribution's.
    last = jnp.abs(coefficients[-1] * s**_ORDER)
    bound = last * jnp.where(s < 0, (1 - jnp.abs(s)) ** -(_ORDER + 1), 1)
    return s, value, -(1 + s) * slope, bound


# --- sigma and gamma -------------------------------------------------------------------------------------------------


def gamma_of(sigma: Array, scale: Array, *, euclidean: bool = False) -> Array:
    """1 / (2 sigma^2) in scaled units; 1 / sigma for the Euclidean kernel."""
    # Far below any distance the kernel is 0 or 1; smaller yet, and sigma^2 underflows to a gamma of inf: inf * 0 = nan.
    relative = jnp.maximum(sigma / scale, math.sqrt(0.5 / LARGEST_GAMMA[sigma.dtype.name]))
    relative = jnp.where(is_bandwidth(sigma), relative, jnp.nan)  # a traced sigma cannot be refused
    # The derivative of 1 / relative^2, its cube, would overflow: in two factors reverse mode visits it in steps.
    inverse = 1 / relative
    return inverse if euclidean else 0.5 * inverse * inverse


def sigma_of(gamma: Array, scale: Array, *, euclidean: bool = False) -> Array:
    """Undoes `gamma_of`."""
    return scale / gamma if euclidean else scale * jnp.sqrt(0.5 / gamma)


def is_bandwidth(sigma: Array) -> Array:
    """Where sigma is finite and above 0."""
    # Compare bits: some devices flush subnormal numbers to 0.
    bits = lax.bitcast_convert_type(lax.stop_gradient(sigma), f"int{8 * sigma.dtype.itemsize}")
    return (bits > 0) & jnp.isfinite(sigma)


# --- the solver ------------------------------------------------------------------------------------------------------


def pairs_of(
    features: CenteredFeatures,
    distances: Array | None,
    *,
    skip_self: bool,
    plan: Plan = STORED,
    precision: lax.PrecisionLike = None,
    euclidean: bool = False,
    density: Array | None = None,
) -> Pairs:
    """The pairs of rows, with stored squared distances or none."""
    stored = None if distances is None else (attach_derivative(features, distances),)
    return Pairs(
        (features,), stored, skip_self, plan.tile_rows, plan.axis_name, precision, euclidean=euclidean, density=density
    )


def solve_pairs(
    features: tuple[CenteredFeatures, ...],
    density: Array,
    rtol: float,
    *,
    skip_self: bool = False,
    per_row: bool = False,
    plan: Plan = STORED,
    precision: lax.PrecisionLike = None,
    euclidean: bool = False,
    duplicates_allowed: bool = False,
) -> list[tuple[Solution, Pairs]]:
    """Solve for the sigma of each representation; also returns its pairs, for an affinity on the same distances.

    Args:
        features: of both sides, of each representation of the same samples.
        density: the target mean, () also with one sigma per row.
        rtol: relative error of the density.
        skip_self: leave pairs of a sample with itself out of the mean.
        per_row: one sigma per row.
        plan: how pairs are visited.
        precision: of the products.
        euclidean: of the Laplacian kernel exp(-sqrt(D) / sigma), whose gamma is 1 / sigma.
        duplicates_allowed: where duplicates alone exceed the density, or no pair is valid, treat all samples as
            duplicates (A = 1, no derivative) instead of returning nan.
    """
    pairs_with = partial(
        pairs_of,
        skip_self=skip_self,
        plan=plan,
        precision=precision,
        euclidean=euclidean,
        density=lax.stop_gradient(density),
    )

    def unsolved(features: CenteredFeatures) -> Pairs:
        features = lax.stop_gradient(features)
        distances = fast_distances(features, precision) if plan.stored else None
        return replace(pairs_with(features, distances), differentiable=False)

    searches = _find_gammas([unsolved(x) for x in features], per_row, rtol)
    attach = partial(_attach, density=density, per_row=per_row, duplicates_allowed=duplicates_allowed)
    return [attach(x, pairs_with, *search) for x, search in zip(features, searches, strict=True)]


def _find_gammas(representations: list[Pairs], per_row: bool, rtol: float) -> list[tuple[Array | None, Search]]:
    """Distances and gamma of each representation; of stored ones by one search, mapped over the representations."""

    def find(pairs: Pairs) -> tuple[Array | None, Search]:
        assert pairs.density is not None
        pairs, search = find_gamma(pairs, pairs.density, per_row=per_row, rtol=rtol)
        return None if pairs.distances is None else pairs.distances[0], search

    # On a CPU large ones are searched side by side: each search then keeps a core busy.
    first = representations[0]
    large = math.prod(first.shape) > _PAIRS_SEARCHED_TOGETHER and jax.default_backend() == "cpu"
    if len(representations) == 1 or first.distances is None or large:
        return [find(pairs) for pairs in representations]
    # Channels of zeros change no distance.
    width = max(pairs.features[0].raw_x.shape[1] for pairs in representations)
    padded = [replace(pairs, features=(pairs.features[0].padded(width),)) for pairs in representations]
    searches = jax.vmap(find)(jax.tree.map(lambda *arrays: jnp.stack(arrays), *padded))
    return [jax.tree.map(lambda a, k=k: a[k], searches) for k in range(len(representations))]


def _attach(
    features: CenteredFeatures,
    pairs_with: Callable[[CenteredFeatures, Array | None], Pairs],
    distances: Array | None,
    search: Search,
    *,
    density: Array,
    per_row: bool,
    duplicates_allowed: bool,
) -> tuple[Solution, Pairs]:
    """The solution as a function of features and density, from what a search found without derivatives."""
    constant, target = lax.stop_gradient((features, density))
    total = pairs_with(constant, None).total(per_row=per_row)
    status = _status(search, features.finite, target, total)
    gamma, slope = search.gamma, search.slope
    if duplicates_allowed:
        assert not per_row
        duplicates = (status == INFEASIBLE) | (status == NO_SAMPLES)
        status = jnp.where(duplicates, CONVERGED, status)
        gamma = jnp.where(duplicates, _GAMMA_OF_DUPLICATES[gamma.dtype.name], gamma)
        slope = jnp.where(duplicates, 0, slope)
        # Nothing moves: neither with the features nor with the density.
        features = features._replace(raw_x=jnp.where(duplicates, constant.raw_x, features.raw_x))
        density = jnp.where(duplicates, target, density)
    pairs = pairs_with(features, distances)

    def in_valid_rows(value: Array, otherwise: float | int) -> Array:
        return jnp.where(features.mask, value, otherwise) if per_row and features.mask is not None else value

    status = in_valid_rows(status, CONVERGED)
    gamma = in_valid_rows(jnp.where(status == CONVERGED, gamma, jnp.nan), 1)
    gamma = _attach_gamma(per_row, pairs, density, total, gamma, slope * target * total / gamma)
    sigma = in_valid_rows(sigma_of(gamma, features.scale, euclidean=pairs.euclidean), jnp.nan)
    reached = jnp.where(total > 0, search.density * target, jnp.nan)
    return Solution(gamma, sigma, reached, search.passes, status), pairs


def _status(search: Search, finite: Array, density: Array, total: Array) -> Array:
    """The reason for a failure, the most basic one first."""
    status = jnp.where(search.converged, CONVERGED, jnp.where(search.infeasible, INFEASIBLE, NOT_CONVERGED))
    status = jnp.where(total > 0, status, NO_SAMPLES)
    status = jnp.where((density > 0) & (density < 1), status, BAD_DENSITY)
    return jnp.where(finite, status, NON_FINITE).astype(jnp.int32)


# --- the implicit derivative -----------------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach_gamma(per_row: bool, pairs: Pairs, density: Array, total: Array, gamma: Array, slope: Array) -> Array:
    """`gamma` as a function of the pairs and density: same value, derivatives by the implicit function theorem.

    sum w exp(-t D) = c sum w gives dt = (d sum w A - dc sum w) / (sum w A D), where d sum w A = - t sum w A dD is the
    change at a constant gamma: never a derivative of the iteration. `slope` is sum w A D, from the series at the root.
    """
    return gamma


@_attach_gamma.defjvp
def _attach_gamma_jvp(per_row: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    pairs, _, total, gamma, slope = primals
    d_pairs, d_density, *_ = tangents
    gamma = _attach_gamma(per_row, *primals)
    _, shift = jax.jvp(lambda pairs: _sum_over(kernel_terms, pairs, gamma, per_row), (pairs,), (d_pairs,))
    slope = _attach_slope(per_row, pairs, gamma, slope)
    slope = jnp.where(slope > 0, slope, 1)  # 0 only where nothing moves: masked rows, duplicates
    return gamma, (shift - d_density * total) / slope


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach_slope(per_row: bool, pairs: Pairs, gamma: Array, slope: Array) -> Array:
    """`slope` as a function of pairs and gamma, for second derivatives: same value, sum w A D is differentiated."""
    return slope


@_attach_slope.defjvp
def _attach_slope_jvp(per_row: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    pairs, gamma, _ = primals

    def total(pairs: Pairs, gamma: Array) -> Array:
        return _sum_over(lambda tile: kernel_terms(tile) * tile.distances[0], pairs, gamma, per_row)

    return _attach_slope(per_row, *primals), jax.jvp(total, (pairs, gamma), tangents[:2])[1]


def _sum_over(term: Callable[[Tile], Array], pairs: Pairs, gamma: Array, per_row: bool) -> Array:
    """The sum of a term over all pairs, or over each row's; reverse mode differentiates it."""
    return sums_over(lambda tile: (term(tile),), pairs, gamma, per_row, in_blocks=False)[0]
