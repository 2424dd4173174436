"""Measures that are inner products of pair functions: HSIC, CKA, RSA, distance correlation, distances of affinities.

Each set of features gives every pair of samples a number f_ij, a function of their squared distance: a kernel, or a
dissimilarity. What is compared are those matrices, after some centering, and all that the centered inner products need
are a few sums over the pairs i != j, which `pair_sums` gathers for any number of sets in one visit:

    P_kl = sum f^k_ij f^l_ij       r^k_i = sum_j f^k_ij

Where the centering removes what depends on one sample only, f_ij may be shifted by any a_i + a_j beforehand. The row
means over a subsample of columns do: the sums are then as accurate as those of centered matrices, without a pass for
the centering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._directions import Rows, unit_features
from jaxalign._linalg import bounded, root
from jaxalign._plan import Plan
from jaxalign._problem import Diagonal
from jaxalign.core.bandwidth import CONVERGED, gamma_of, is_bandwidth, solve_each
from jaxalign.core.devices import NO_ROWS, ROWS_SECOND_LAST, on_mesh, over_devices
from jaxalign.core.features import (
    CenteredFeatures,
    accurate_distances,
    attach_derivative,
    fast_distances,
    valid_rows,
)
from jaxalign.core.reduce import reduce_pairs
from jaxalign.core.resolved import resolved_distances
from jaxalign.core.tiles import (
    Pairs,
    Reduction,
    Tile,
    inverse_rms_distance,
    kernel,
    kernel_minus_one,
    over_rows,
    smooth,
)
from jaxalign.measures._centering import Centering, PairSums

Form = Literal["rbf", "laplacian", "one_minus_rbf", "squared", "root"]

# Distances this many times below the typical one are still right to 1e-4: for what depends on their order.
ORDER = 60.0
# Columns of which the row means are taken that f_ij is shifted by: they need not be exact.
_COLUMNS_OF_SHIFTS = 128
# Up to this many products of sets are summed one by one, more as a matrix product a row.
_FEW_PRODUCTS = 4


@dataclass(frozen=True)
class PairFunction:
    """What a set of features gives a pair of samples.

    Attributes:
        form: "rbf" exp(-D / (2 sigma^2)), "laplacian" exp(-sqrt(D) / sigma), "one_minus_rbf" its dissimilarity,
            "squared" D, "root" sqrt(D), or a function of an array of squared distances, in units of the features.
        rows: what is done to each sample first: None, "cosine" unit length, "correlation" mean 0 and unit length.
        solves: sigma is found from a density.
        diagonal: whether the ones on the diagonal count in that density.
        tolerant: where no sigma reaches the density because samples coincide, all count as alike.
        fixed_sigma: a sigma that is found counts as a constant when differentiated.
        wide: sigma may be far above all distances: the kernel less 1 is taken, which centering does not see.
    """

    form: Form | Callable[[Array], Array]
    rows: Rows | None = None
    solves: bool = False
    diagonal: Diagonal = "include"
    tolerant: bool = False
    fixed_sigma: bool = False
    wide: bool = False

    @property
    def euclidean(self) -> bool:
        """Whether it is a function of distances that are not squared."""
        return self.form in ("laplacian", "root")

    @property
    def needs_sigma(self) -> bool:
        """Whether there is a bandwidth, given or found."""
        return self.form in ("rbf", "laplacian", "one_minus_rbf")

    def of(self, distances: Array, gamma: Array | None, scale: Array) -> Array:
        """f_ij from distances and a gamma in scaled units."""
        if callable(self.form):
            return smooth(self.form, distances * scale * scale)
        if not self.needs_sigma:
            return distances
        assert gamma is not None
        if self.form == "one_minus_rbf":
            return -kernel_minus_one(distances, gamma)
        return kernel_minus_one(distances, gamma) if self.wide else kernel(distances, gamma)

    def unit(self, scale: Array) -> Array:
        """What f_ij is measured in."""
        one = jnp.ones_like(scale)
        return scale * scale if self.form == "squared" else scale if self.form == "root" else one


class Inner(NamedTuple):
    """Centered inner products between x-sets and y-sets, and of each with itself, over all pairs; f in its units."""

    cross: Array  # (..., L, M); of differences: sum_ij (f_ij - g_ij)^2
    roots: Array  # (..., L, M): of differences sum_i sqrt(sum_j (f_ij - g_ij)^2)
    own_x: Array  # (..., L)
    own_y: Array  # (..., M)
    unit_x: Array  # (..., L)
    unit_y: Array  # (..., M)
    samples: Array  # (...,): how many
    status: Array  # (..., L + M): of the sigmas
    sigma: Array  # (..., L + M), 0 where there is none
    usable: Array  # (..., L, M): both sets are finite and have a bandwidth, if they need one

    @classmethod
    def of(
        cls,
        cross: Array,
        own: tuple[Array, Array],
        units: tuple[Array, Array],
        samples: Array,
        roots: Array | None = None,
    ) -> Inner:
        """Inner products that were found in another way, of sets that are known to be usable."""
        roots = jnp.zeros_like(cross) if roots is None else roots
        converged = jnp.full((), CONVERGED, jnp.int32)
        return cls(cross, roots, *own, *units, samples, converged, jnp.zeros(()), jnp.ones(cross.shape, bool))

    def ratio(self, low: float = -1.0) -> Array:
        """Cross / sqrt(own_x own_y), (..., L, M), from `low` to 1: 0 where one of the sets does not vary."""
        return bounded(correlation(self.cross, self.own_x[..., :, None], self.own_y[..., None, :]), low, 1)


def correlation(cross: Array, own_x: Array, own_y: Array) -> Array:
    """Cross / sqrt(own_x own_y); 0 where one of the two does not vary."""
    size = jnp.sqrt(jnp.where(own_x > 0, own_x, 1)) * jnp.sqrt(jnp.where(own_y > 0, own_y, 1))
    return jnp.where((own_x > 0) & (own_y > 0), cross / size, 0)


class Sums(NamedTuple):
    """What one visit of the pairs gathers; f_ij is shifted by shift_i + shift_j."""

    cross: Array  # (L, M)
    own: Array  # (L + M,)
    rows: Array  # (n, L + M); of differences sum_j (f_ij - g_ij)^2, (n, L M)


def pair_products(
    sets: tuple[Array, ...],
    split: int,
    mask: Array | None,
    sigmas: Array | None,
    density: Array | None,
    function: PairFunction,
    centering: Centering | None,
    rtol: float,
    plan: Plan,
) -> Inner:
    """The inner products of sets[:split] with sets[split:]; the latter empty: with each other.

    Args:
        sets: features (..., n, d_k).
        split: how many of them are x-sets.
        mask: (..., n).
        sigmas: (..., L + M), in units of the features.
        density: (...).
        function: what a pair gives.
        centering: of the matrices; None: their differences are compared, not their products.
        rtol: of the density.
        plan: how pairs are visited.
    """

    def local(x: Array, _y: None, mask: Array | None, _mask_y: None, others: Any, sigmas: Any, density: Any) -> Inner:
        prepared = prepare_sets((x, *others), mask, sigmas, density, function, rtol, plan)
        shift = _shifts(prepared, function, centering)
        sums = _visit(prepared, shift, split, function, centering, plan)
        facts = facts_of(prepared, function, plan.axis_name)
        return centered_products(sums, shift, facts, split, centering, function, plan.axis_name)

    first, *others = sets
    return on_mesh(
        local,
        plan,
        (first, None, mask, None),
        (tuple(others), sigmas, density),
        (ROWS_SECOND_LAST, NO_ROWS, NO_ROWS),
        NO_ROWS,
    )


def bandwidth_of(
    x: Array, mask: Array | None, density: Array, function: PairFunction, rtol: float, plan: Plan
) -> tuple[Array, Array]:
    """The sigma of one set at a density, and its status, (...): what `pair_products` finds for itself, one by one."""

    def local(x: Array, _y: None, mask: Array | None, _mask_y: None, density: Array) -> tuple[Array, Array]:
        prepared = prepare(x, mask, None, density, function, rtol, plan)
        return prepared.sigma, prepared.status

    return on_mesh(local, plan, (x, None, mask, None), (density,), (NO_ROWS,), (NO_ROWS, NO_ROWS))


bandwidth_of_jit = partial(jax.jit, static_argnames=("function", "rtol", "plan"))(bandwidth_of)

pair_products_jit = partial(jax.jit, static_argnames=("split", "function", "centering", "rtol", "plan"))(pair_products)


class Prepared(NamedTuple):
    """A representation, ready to be visited."""

    pairs: Pairs  # of this representation alone
    gamma: Array | None  # ()
    sigma: Array  # ()
    status: Array  # ()

    @property
    def features(self) -> CenteredFeatures:
        """The representation itself."""
        return self.pairs.features[0]

    @property
    def distances(self) -> Array:
        """Stored distances, (n, n): Euclidean ones of a function of those, else squared."""
        assert self.pairs.distances is not None
        (squared,) = self.pairs.distances
        return root(squared) if self.pairs.euclidean else squared


def prepare(
    x: Array,
    mask: Array | None,
    sigma: Array | None,
    density: Array | None,
    function: PairFunction,
    rtol: float,
    plan: Plan,
    *,
    resolved: bool = False,
) -> Prepared:
    """`prepare_sets` of a single representation."""
    sigmas = None if sigma is None else sigma[None]
    return prepare_sets((x,), mask, sigmas, density, function, rtol, plan, resolved=resolved)[0]


def prepare_sets(
    sets: tuple[Array, ...],
    mask: Array | None,
    sigmas: Array | None,
    density: Array | None,
    function: PairFunction,
    rtol: float,
    plan: Plan,
    *,
    resolved: bool = False,
) -> list[Prepared]:
    """The pairs of rows (n, d) of each representation and a bandwidth: its own of (sets,), or from the density.

    Each stored distance is right by itself if `resolved`.
    """
    features = tuple(unit_features(valid_rows(x, mask), mask, function.rows, plan.axis_name) for x in sets)
    if not function.solves:
        each = sigmas if function.needs_sigma else [None] * len(features)
        assert each is not None
        return [_given(part, sigma, function, plan, resolved) for part, sigma in zip(features, each, strict=True)]
    assert density is not None
    solved = solve_each(
        features,
        density,
        rtol,
        skip_self=function.diagonal == "exclude",
        plan=plan,
        euclidean=function.euclidean,
        duplicates_allowed=function.tolerant,
    )
    prepared = []
    for solution, pairs in solved:
        gamma, sigma = solution.gamma, solution.sigma
        if function.fixed_sigma:
            gamma, sigma = lax.stop_gradient((gamma, sigma))
        # Pairs of a sample with itself are left out: those are known.
        prepared.append(Prepared(replace(pairs, skip_self=True), gamma, sigma, solution.status))
    return prepared


def _given(
    features: CenteredFeatures, sigma: Array | None, function: PairFunction, plan: Plan, resolved: bool
) -> Prepared:
    """With a given bandwidth, or none."""
    if function.needs_sigma:
        assert sigma is not None
        gamma = gamma_of(sigma, features.scale, euclidean=function.euclidean)
    else:
        gamma = inverse_rms_distance(features, plan.axis_name) if function.euclidean else None
        sigma = jnp.zeros((), features.raw_x.dtype)
    stored = _stored(features, gamma, function, resolved) if plan.stored else None
    pairs = Pairs((features,), stored, True, plan.tile_size, plan.axis_name, euclidean=function.euclidean)
    assert sigma is not None
    return Prepared(pairs, gamma, sigma, jnp.full((), CONVERGED, jnp.int32))


def _stored(
    features: CenteredFeatures, gamma: Array | None, function: PairFunction, resolved: bool
) -> tuple[Array, ...]:
    """Distances of all pairs, accurate enough for a gamma, or each by itself."""
    if resolved and not function.needs_sigma:
        distances = resolved_distances(features)
    elif gamma is None:
        distances = fast_distances(features)
    else:
        pairs_in_sum = Pairs((features,)).pairs_in_sum("all")
        distances = accurate_distances(features, gamma, pairs_in_sum=pairs_in_sum, euclidean=function.euclidean)
    return (attach_derivative(features, distances),)


def usable(prepared: Prepared, function: PairFunction) -> Array:
    """Whether a representation is finite and has a bandwidth, if it needs one: else what it gives is nan."""
    ready = prepared.features.finite & (prepared.status == CONVERGED)
    return ready & is_bandwidth(prepared.sigma) if function.needs_sigma else ready


def _squares(features: CenteredFeatures) -> Array:
    x = lax.stop_gradient(features.x)
    return jnp.sum(x * x, 1)


def row_weights(features: CenteredFeatures) -> Array:
    """1 for a valid sample, (n,)."""
    return Pairs((features,)).weights()[0]


def _shifts(prepared: list[Prepared], function: PairFunction, centering: Centering | None) -> Array:
    """a_i of every representation, (n, L + M): about the row means less half the mean, or half the mean alone."""
    shifts = []
    for part in prepared:
        weights = row_weights(part.features)
        if centering is None or not centering.may_shift:
            shifts.append(jnp.zeros_like(weights))
            continue
        sample = lax.stop_gradient(part.pairs.subset(_COLUMNS_OF_SHIFTS, all_rows=True))
        gamma, scale = lax.stop_gradient(part.gamma), part.features.scale

        def terms(tile: Tile, scale: Array = scale) -> tuple[Array, Array]:
            f = function.of(tile.distances[0], tile.gammas[0], scale)
            return tile.apply_weights(f), tile.apply_weights(jnp.ones_like(f))

        _, (total, count) = reduce_pairs(Reduction(terms, over_rows), sample, gammas=(gamma,))
        mean = total / jnp.maximum(count, 1) * weights
        number, overall = (over_devices(lax.psum, jnp.sum(a), part.pairs.axis_name) for a in (weights, mean))
        half = 0.5 * overall / jnp.maximum(number, 1)
        shifts.append(centering.shift(mean, half) * weights)
    return lax.stop_gradient(jnp.stack(shifts, 1))


def _visit(
    prepared: list[Prepared], shift: Array, split: int, function: PairFunction, centering: Centering | None, plan: Plan
) -> Sums:
    scales = tuple(part.features.scale for part in prepared)
    totals, rows = visit_pairs(sums_of(scales, split, function, centering), prepared, plan, shift)
    cross, own = totals or (rows, rows)  # no totals of differences
    return Sums(cross, own, rows)


def squared_differences(prepared: list[Prepared], function: PairFunction, plan: Plan) -> Array:
    """sum_j (f_ij - g_ij)^2 of two representations, (n, 1)."""
    return _visit(prepared, _shifts(prepared, function, None), 1, function, None, plan).rows


def visit_pairs(reduction: Reduction, prepared: list[Prepared], plan: Plan, values: Any = ()) -> tuple[Any, Any]:
    """Reduce over the pairs i != j of all representations together; `values` are what rows and columns bring along."""
    stored = tuple(part.pairs.distances[0] for part in prepared if part.pairs.distances is not None)
    pairs = replace(
        prepared[0].pairs,
        features=tuple(part.features for part in prepared),
        distances=stored or None,
        differentiable=plan.differentiable,
    )
    gammas = tuple(part.gamma for part in prepared)
    return reduce_pairs(reduction, pairs, gammas=gammas, row_values=values, column_values=values, in_blocks=False)


def sums_of(scales: tuple[Array, ...], split: int, function: PairFunction, centering: Centering | None) -> Reduction:
    """What is summed over the pairs: totals (cross, own) and rows of `Sums`; shifts come as values of the rows."""

    def terms(tile: Tile) -> tuple[Array, ...]:
        def term(k: int) -> Array:
            f = function.of(tile.distances[k], tile.gammas[k], scales[k])
            return tile.apply_weights(f - tile.row.row_values[:, k : k + 1] - tile.column.column_values[:, k][None])

        return tuple(term(k) for k in range(len(scales)))

    def sums(terms: tuple[Array, ...], tile: Tile) -> tuple[Any, Array]:
        del tile
        x, y = terms[:split], terms[split:] or terms
        if centering is None:
            return (), jnp.stack([jnp.sum((a - b) ** 2, 1) for a in x for b in y], 1)
        own = jnp.stack([_total(term * term) for term in terms])
        return (_products(x, y), own), jnp.stack([jnp.sum(term, 1) for term in terms], 1)

    return Reduction(terms, sums)


def _total(term: Array) -> Array:
    return jnp.sum(jnp.sum(term, 1))


def _products(x: tuple[Array, ...], y: tuple[Array, ...]) -> Array:
    if len(x) * len(y) <= _FEW_PRODUCTS:
        return jnp.stack([jnp.stack([_total(a * b) for b in y]) for a in x])
    # Row by row: the partial sums keep digits that one long sum would lose.
    per_row = jnp.einsum("rlc,rmc->rlm", jnp.stack(x, 1), jnp.stack(y, 1), precision=lax.Precision.HIGHEST)
    return jnp.sum(per_row, 0)


class Facts(NamedTuple):
    """What the finish needs to know of the representations, beside the sums."""

    weights: Array  # (n,): 1 for a valid sample
    scales: Array  # (L + M,)
    sizes: Array  # (L + M,): largest squared length of a row, in scaled units
    usable: Array  # (L + M,): see `usable`
    status: Array  # (L + M,)
    sigma: Array  # (L + M,)


def facts_of(prepared: list[Prepared], function: PairFunction, axis_name: str | None = None) -> Facts:
    return Facts(
        weights=row_weights(prepared[0].features),
        scales=jnp.stack([part.features.scale for part in prepared]),
        sizes=jnp.stack([over_devices(lax.pmax, largest_square(part.features), axis_name) for part in prepared]),
        usable=jnp.stack([usable(part, function) for part in prepared]),
        status=jnp.stack([part.status for part in prepared]),
        sigma=jnp.stack([part.sigma for part in prepared]),
    )


def largest_square(features: CenteredFeatures) -> Array:
    """The largest squared length of a row."""
    return jnp.max(_squares(features))


def centered_products(
    sums: Sums,
    shift: Array,
    facts: Facts,
    split: int,
    centering: Centering | None,
    function: PairFunction,
    axis_name: str | None = None,
) -> Inner:
    """The inner products of centered matrices, from the sums over their pairs off the diagonal."""
    number = facts.scales.shape[0]
    count = over_devices(lax.psum, jnp.sum(facts.weights), axis_name)
    sides = (slice(None, split), slice(split, None) if number > split else slice(None, split))
    if centering is None:
        shape = (split, number - split or split)
        squares = over_devices(lax.psum, jnp.sum(sums.rows, 0), axis_name).reshape(shape)
        roots = over_devices(lax.psum, jnp.sum(root(sums.rows), 0), axis_name).reshape(shape)
        return _inner_of(squares, roots, jnp.zeros(number, roots.dtype), function, count, facts, sides)

    ones = jnp.ones_like(facts.scales)
    f_ii = function.of(jnp.zeros_like(ones), ones, ones)
    diagonals = (f_ii[None] - 2 * shift) * facts.weights[:, None]

    def inner(products: Array, k: slice, m: slice) -> Array:
        pairs = PairSums(
            products,
            (sums.rows[:, k], sums.rows[:, m]),
            (diagonals[:, k], diagonals[:, m]),
            (shift[:, k], shift[:, m]),
            facts.weights[:, None],
            count,
            axis_name,
        )
        return centering.inner(pairs)

    own = [inner(sums.own[k, None, None], slice(k, k + 1), slice(k, k + 1))[0, 0] for k in range(number)]
    own = jnp.stack(own)
    varies = own > rounding(facts, shift, function, count, axis_name)
    both = varies[sides[0], None] & varies[None, sides[1]]
    cross = jnp.where(both, inner(sums.cross, *sides), 0)
    return _inner_of(cross, jnp.zeros_like(cross), jnp.where(varies, own, 0), function, count, facts, sides)


def rounding(facts: Facts, shift: Array, function: PairFunction, count: Array, axis_name: str | None = None) -> Array:
    """<F, F> that rounding alone gives a centered matrix, (L + M,): below it a representation does not vary.

    f_ij are all the same, for instance of equidistant samples.
    """
    one = jnp.ones_like(facts.scales)
    size = jnp.sqrt(facts.sizes) if function.euclidean else facts.sizes
    if function.needs_sigma:
        size = one
        if function.wide:  # at most 1 - exp of the largest distance, 4 times the largest square
            relative = facts.scales / facts.sigma
            largest = 2 * relative * jnp.sqrt(facts.sizes) if function.euclidean else 2 * relative**2 * facts.sizes
            size = lax.stop_gradient(-kernel_minus_one(largest, one))
    if callable(function.form):
        size = over_devices(lax.pmax, jnp.max(jnp.abs(lax.stop_gradient(shift)), 0), axis_name)
    return (8 * float(jnp.finfo(size.dtype).eps) * size * count) ** 2


def _inner_of(
    cross: Array,
    roots: Array,
    own: Array,
    function: PairFunction,
    count: Array,
    facts: Facts,
    sides: tuple[slice, slice],
) -> Inner:
    (x, y), units = sides, function.unit(facts.scales)
    both = facts.usable[x, None] & facts.usable[None, y]
    return Inner(
        cross, roots, own[x], own[y], units[x], units[y],
        samples=count, status=facts.status, sigma=facts.sigma, usable=both,
    )  # fmt: skip
