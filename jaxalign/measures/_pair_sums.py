"""Inner products of pair functions, for HSIC, CKA, RSA, distance correlation and the distance of affinities.

Each representation gives every pair of samples a value f_ij, a function of their squared distance: a kernel or a
dissimilarity. A measure compares these matrices after centering. All centered inner products follow from a few sums
over the pairs i != j, which one pass over the pairs computes for any number of representations:

    P_kl = sum f^k_ij f^l_ij       r^k_i = sum_j f^k_ij

If the centering removes what depends on one sample only, f_ij may be shifted by any a_i + a_j beforehand. The shifts
are row means over a subsample of columns, so that the sums are as accurate as those of centered matrices, without a
second pass.
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
from jaxalign._problem import Diagonal
from jaxalign.core.bandwidth import CONVERGED, gamma_of, is_bandwidth, solve_pairs
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
from jaxalign.kernels import RBF, Laplacian, Linear
from jaxalign.measures._centering import Centering, PairSums
from jaxalign.plan import Plan

Form = Literal["rbf", "laplacian", "one_minus_rbf", "squared", "root"]

# Number of columns for the row means that shift f_ij, which need not be exact.
_SHIFT_COLUMNS = 128
# Up to this many products of representations are summed separately; beyond that, by one matrix product per row.
_MAX_SEPARATE_PRODUCTS = 4


@dataclass(frozen=True)
class PairFunction:
    """The value f_ij that a representation gives a pair of samples.

    Attributes:
        form: "rbf" exp(-D / (2 sigma^2)), "laplacian" exp(-sqrt(D) / sigma), "one_minus_rbf" its dissimilarity,
            "squared" D, "root" sqrt(D), or a function of an array of squared distances, in units of the features.
        normalization: of each sample: None, "cosine" unit norm, "correlation" mean 0 and unit norm.
        solves: sigma is solved for, from a density.
        diagonal: whether the ones on the diagonal count in that density.
        duplicates_allowed: if duplicates alone exceed the density, so that no sigma exists, all count as similar.
        constant_sigma: derivatives treat a solved sigma as a constant.
        minus_one: use the kernel minus 1: equal after centering, and accurate if sigma is far above all distances.
    """

    form: Form | Callable[[Array], Array]
    normalization: Rows | None = None
    solves: bool = False
    diagonal: Diagonal = "include"
    duplicates_allowed: bool = False
    constant_sigma: bool = False
    minus_one: bool = False

    @property
    def euclidean(self) -> bool:
        """Whether it is a function of Euclidean distances, not of squared ones."""
        return self.form in ("laplacian", "root")

    @property
    def needs_sigma(self) -> bool:
        """Whether there is a bandwidth, from the caller or from a density."""
        return self.form in ("rbf", "laplacian", "one_minus_rbf")

    def values(self, distances: Array, gamma: Array | None, scale: Array) -> Array:
        """f_ij from distances and a gamma in scaled units."""
        if callable(self.form):
            return smooth(self.form, distances * scale * scale)
        if not self.needs_sigma:
            return distances
        assert gamma is not None
        if self.form == "one_minus_rbf":
            return -kernel_minus_one(distances, gamma)
        return kernel_minus_one(distances, gamma) if self.minus_one else kernel(distances, gamma)

    def unit(self, scale: Array) -> Array:
        """The unit of f_ij."""
        if self.form == "squared":
            return scale * scale
        return scale if self.form == "root" else jnp.ones_like(scale)


def kernel_function(kernel: RBF | Laplacian | Linear | Callable[[Array], Array]) -> PairFunction:
    """The pair function of a kernel. That of the linear kernel is -2 times the kernel, after centering."""
    if isinstance(kernel, Linear):
        return PairFunction("squared")
    if isinstance(kernel, (RBF, Laplacian)):
        form: Form = "rbf" if isinstance(kernel, RBF) else "laplacian"
        return PairFunction(form, solves=kernel.solves, diagonal=kernel.diagonal, minus_one=not kernel.solves)
    return PairFunction(kernel)


class InnerProducts(NamedTuple):
    """Inner products of centered matrices, of L representations x with M representations y; each f in its unit."""

    cross: Array  # (..., L, M); for differences: sum_ij (f_ij - g_ij)^2
    row_norms: Array  # (..., L, M); for differences only: sum_i sqrt(sum_j (f_ij - g_ij)^2)
    self_x: Array  # (..., L): products of each x with itself
    self_y: Array  # (..., M)
    unit_x: Array  # (..., L)
    unit_y: Array  # (..., M)
    num_samples: Array  # (...): valid samples
    status: Array  # (..., L + M): of sigma
    sigma: Array  # (..., L + M), 0 for a function without sigma
    is_defined: Array  # (..., L, M): both representations are finite and have a bandwidth, if they need one

    @classmethod
    def of(
        cls,
        cross: Array,
        self_products: tuple[Array, Array],
        units: tuple[Array, Array],
        num_samples: Array,
        row_norms: Array | None = None,
    ) -> InnerProducts:
        """Inner products that are all defined."""
        row_norms = jnp.zeros_like(cross) if row_norms is None else row_norms
        status, sigma = jnp.full((), CONVERGED, jnp.int32), jnp.zeros(())
        is_defined = jnp.ones(cross.shape, bool)
        return cls(cross, row_norms, *self_products, *units, num_samples, status, sigma, is_defined)

    def ratio(self, low: float = -1.0, high: float = 1.0) -> Array:
        """Cross / sqrt(self_x self_y), (..., L, M), from `low` to `high`; 0 if one representation does not vary."""
        return bounded(correlation(self.cross, self.self_x[..., :, None], self.self_y[..., None, :]), low, high)


def correlation(cross: Array, self_x: Array, self_y: Array) -> Array:
    """Cross / sqrt(self_x self_y); 0 if one of the two does not vary."""
    size = jnp.sqrt(jnp.where(self_x > 0, self_x, 1)) * jnp.sqrt(jnp.where(self_y > 0, self_y, 1))
    return jnp.where((self_x > 0) & (self_y > 0), cross / size, 0)


class ShiftedSums(NamedTuple):
    """Sums of f_ij - shift_i - shift_j over pairs; for differences only `rows` is used."""

    cross: Array  # (L, M)
    self_products: Array  # (L + M,)
    rows: Array  # (n, L + M); for differences sum_j (f_ij - g_ij)^2, (n, L M)


def pair_products(
    features: tuple[Array, ...],
    split: int,
    mask: Array | None,
    sigmas: Array | None,
    density: Array | None,
    function: PairFunction,
    centering: Centering | None,
    rtol: float,
    plan: Plan,
    differentiable: bool = True,
) -> InnerProducts:
    """The inner products of features[:split] with features[split:], or with each other if the latter are empty.

    Args:
        features: one array (..., n, d_k) per representation.
        split: how many of them are x.
        mask: (..., n).
        sigmas: (..., L + M), in units of the features.
        density: (...).
        function: the value of a pair.
        centering: of the matrices; None compares their differences instead of their products.
        rtol: of the density.
        plan: how pairs are visited.
        differentiable: False if no derivative is needed, which saves a pass over each tile.
    """

    def local(
        x: Array, _y: None, mask: Array | None, _mask_y: None, rest: Any, sigmas: Any, density: Any
    ) -> InnerProducts:
        prepared = prepare_representations((x, *rest), mask, sigmas, density, function, rtol, plan)
        shift = _shifts(prepared, function, centering)
        sums = _sum_pairs(prepared, shift, split, function, centering, differentiable)
        properties = collect_properties(prepared, function, plan.axis_name)
        if centering is not None and centering.samples_channels:
            channels = tuple(of_single_channels(part, plan.axis_name) for part in prepared)
            properties = properties._replace(single_channels=channels)
        return centered_products(sums, shift, properties, split, centering, function, plan.axis_name)

    first, *rest = features
    return on_mesh(
        local,
        plan,
        (first, None, mask, None),
        (tuple(rest), sigmas, density),
        (ROWS_SECOND_LAST, NO_ROWS, NO_ROWS),
        NO_ROWS,
    )


def solve_bandwidth(
    x: Array, mask: Array | None, density: Array, function: PairFunction, rtol: float, plan: Plan
) -> tuple[Array, Array]:
    """The sigma of one representation at a density, and its status, (...), as in `pair_products`."""

    def local(x: Array, _y: None, mask: Array | None, _mask_y: None, density: Array) -> tuple[Array, Array]:
        (prepared,) = prepare_representations((x,), mask, None, density, function, rtol, plan)
        return prepared.sigma, prepared.status

    return on_mesh(local, plan, (x, None, mask, None), (density,), (NO_ROWS,), (NO_ROWS, NO_ROWS))


solve_bandwidth_jit = partial(jax.jit, static_argnames=("function", "rtol", "plan"))(solve_bandwidth)
pair_products_jit = partial(
    jax.jit, static_argnames=("split", "function", "centering", "rtol", "plan", "differentiable")
)(pair_products)


class Representation(NamedTuple):
    """The pairs and the bandwidth of a representation."""

    pairs: Pairs
    gamma: Array | None  # ()
    sigma: Array  # ()
    status: Array  # ()

    @property
    def features(self) -> CenteredFeatures:
        """The centered features."""
        return self.pairs.features[0]

    @property
    def distances(self) -> Array:
        """Stored distances, (n, n): Euclidean if the function is one of those, else squared."""
        assert self.pairs.distances is not None
        (squared,) = self.pairs.distances
        return root(squared) if self.pairs.euclidean else squared

    def is_defined(self, function: PairFunction) -> Array:
        """Whether features are finite and the bandwidth exists, if there is one; otherwise the measure is nan."""
        ready = self.features.finite & (self.status == CONVERGED)
        return ready & is_bandwidth(self.sigma) if function.needs_sigma else ready


def prepare_representations(
    features: tuple[Array, ...],
    mask: Array | None,
    sigmas: Array | None,
    density: Array | None,
    function: PairFunction,
    rtol: float,
    plan: Plan,
    *,
    resolved: bool = False,
) -> list[Representation]:
    """The pairs of each representation (n, d), and its bandwidth: from sigmas (L + M,) or from the density.

    With `resolved`, stored distances of a function without sigma have a small relative error each.
    """
    centered = tuple(unit_features(valid_rows(x, mask), mask, function.normalization, plan.axis_name) for x in features)
    if not function.solves:
        values = sigmas if function.needs_sigma else [None] * len(centered)
        assert values is not None
        return [
            _prepare_unsolved(part, sigma, function, plan, resolved)
            for part, sigma in zip(centered, values, strict=True)
        ]
    assert density is not None
    solved = solve_pairs(
        centered,
        density,
        rtol,
        skip_self=function.diagonal == "exclude",
        plan=plan,
        euclidean=function.euclidean,
        duplicates_allowed=function.duplicates_allowed,
    )
    prepared = []
    for solution, pairs in solved:
        gamma, sigma = solution.gamma, solution.sigma
        if function.constant_sigma:
            gamma, sigma = lax.stop_gradient((gamma, sigma))
        # Reductions skip the pairs of a sample with itself, whose values are known.
        prepared.append(Representation(replace(pairs, skip_self=True), gamma, sigma, solution.status))
    return prepared


def _prepare_unsolved(
    features: CenteredFeatures, sigma: Array | None, function: PairFunction, plan: Plan, resolved: bool
) -> Representation:
    """The pairs, with the sigma of the caller, if any."""
    if sigma is None:
        gamma = inverse_rms_distance(features, plan.axis_name) if function.euclidean else None
        sigma = jnp.zeros((), features.raw_x.dtype)
    else:
        gamma = gamma_of(sigma, features.scale, euclidean=function.euclidean)
    distances = _stored_distances(features, gamma, function, resolved) if plan.stored else None
    pairs = Pairs((features,), distances, True, plan.tile_rows, plan.axis_name, euclidean=function.euclidean)
    return Representation(pairs, gamma, sigma, jnp.full((), CONVERGED, jnp.int32))


def _stored_distances(
    features: CenteredFeatures, gamma: Array | None, function: PairFunction, resolved: bool
) -> tuple[Array, ...]:
    """Distances of all pairs, accurate for a gamma or, with `resolved`, relative to each distance."""
    if resolved and not function.needs_sigma:
        distances = resolved_distances(features)
    elif gamma is None:
        distances = fast_distances(features)
    else:
        pairs_in_sum = Pairs((features,)).pairs_in_sum("all")
        distances = accurate_distances(features, gamma, pairs_in_sum=pairs_in_sum, euclidean=function.euclidean)
    return (attach_derivative(features, distances),)


def _shifts(prepared: list[Representation], function: PairFunction, centering: Centering | None) -> Array:
    """The shift a_i of every representation, (n, L + M), from approximate row means."""
    shifts = []
    for part in prepared:
        weights = part.pairs.weights()[0]
        if centering is None or not centering.may_shift:
            shifts.append(jnp.zeros_like(weights))
            continue
        subset = lax.stop_gradient(part.pairs.subset(_SHIFT_COLUMNS, all_rows=True))
        gamma, scale = lax.stop_gradient(part.gamma), part.features.scale

        def terms(tile: Tile, scale: Array = scale) -> tuple[Array, Array]:
            f = function.values(tile.distances[0], tile.gammas[0], scale)
            return tile.apply_weights(f), tile.apply_weights(jnp.ones_like(f))

        _, (total, count) = reduce_pairs(Reduction(terms, over_rows), subset, gammas=(gamma,))
        mean = total / jnp.maximum(count, 1) * weights
        num_samples, overall = (over_devices(lax.psum, jnp.sum(a), part.pairs.axis_name) for a in (weights, mean))
        half = 0.5 * overall / jnp.maximum(num_samples, 1)
        shifts.append(centering.shift(mean, half) * weights)
    return lax.stop_gradient(jnp.stack(shifts, 1))


def _sum_pairs(
    prepared: list[Representation],
    shift: Array,
    split: int,
    function: PairFunction,
    centering: Centering | None,
    differentiable: bool = True,
) -> ShiftedSums:
    scales = tuple(part.features.scale for part in prepared)
    totals, rows = visit_pairs(
        make_reduction(scales, split, function, centering), prepared, shift, differentiable=differentiable
    )
    cross, self_products = totals or (rows, rows)  # placeholders: differences have no totals
    return ShiftedSums(cross, self_products, rows)


def squared_differences(prepared: list[Representation], function: PairFunction) -> Array:
    """sum_j (f_ij - g_ij)^2 of two representations, (n, 1)."""
    return _sum_pairs(prepared, _shifts(prepared, function, None), 1, function, None).rows


def visit_pairs(
    reduction: Reduction, prepared: list[Representation], values: Any = (), *, differentiable: bool = True
) -> tuple[Any, Any]:
    """Reduce over the pairs i != j of all representations together; `values` are row and column values."""
    stored = tuple(part.pairs.distances[0] for part in prepared if part.pairs.distances is not None)
    pairs = replace(
        prepared[0].pairs,
        features=tuple(part.features for part in prepared),
        distances=stored or None,
        differentiable=differentiable,
    )
    gammas = tuple(part.gamma for part in prepared)
    return reduce_pairs(reduction, pairs, gammas=gammas, row_values=values, column_values=values, in_blocks=False)


def make_reduction(
    scales: tuple[Array, ...], split: int, function: PairFunction, centering: Centering | None
) -> Reduction:
    """The reduction to the fields of `ShiftedSums`: totals (cross, self_products), and rows. Row values are shifts."""

    def terms(tile: Tile) -> tuple[Array, ...]:
        def term(k: int) -> Array:
            f = function.values(tile.distances[k], tile.gammas[k], scales[k])
            return tile.apply_weights(f - tile.row.row_values[:, k : k + 1] - tile.column.column_values[:, k][None])

        return tuple(term(k) for k in range(len(scales)))

    def sums(terms: tuple[Array, ...], tile: Tile) -> tuple[Any, Array]:
        del tile
        x, y = terms[:split], terms[split:] or terms
        if centering is None:
            return (), jnp.stack([jnp.sum((a - b) ** 2, 1) for a in x for b in y], 1)
        self_products = jnp.stack([_total(term * term) for term in terms])
        return (_products(x, y), self_products), jnp.stack([jnp.sum(term, 1) for term in terms], 1)

    return Reduction(terms, sums)


def _total(term: Array) -> Array:
    return jnp.sum(jnp.sum(term, 1))


def _products(x: tuple[Array, ...], y: tuple[Array, ...]) -> Array:
    if len(x) * len(y) <= _MAX_SEPARATE_PRODUCTS:
        return jnp.stack([jnp.stack([_total(a * b) for b in y]) for a in x])
    # Partial sums per row are more accurate than one long sum.
    per_row = jnp.einsum("rlc,rmc->rlm", jnp.stack(x, 1), jnp.stack(y, 1), precision=lax.Precision.HIGHEST)
    return jnp.sum(per_row, 0)


class Properties(NamedTuple):
    """The properties of the representations that inner products depend on, besides the sums."""

    weights: Array  # (n,): 1 for a valid sample
    scales: Array  # (L + M,)
    max_square_norms: Array  # (L + M,): of a row, in scaled units
    is_defined: Array  # (L + M,): see `Representation.is_defined`
    status: Array  # (L + M,)
    sigma: Array  # (L + M,)
    # Where channels are a sample: the number of channels and the sum of <k_q, k_q> over the kernels of single channels.
    single_channels: tuple[tuple[int, Array], ...] = ()


def collect_properties(
    prepared: list[Representation], function: PairFunction, axis_name: str | None = None
) -> Properties:
    return Properties(
        weights=prepared[0].pairs.weights()[0],
        scales=jnp.stack([part.features.scale for part in prepared]),
        max_square_norms=jnp.stack(
            [over_devices(lax.pmax, max_square_norm(part.features), axis_name) for part in prepared]
        ),
        is_defined=jnp.stack([part.is_defined(function) for part in prepared]),
        status=jnp.stack([part.status for part in prepared]),
        sigma=jnp.stack([part.sigma for part in prepared]),
    )


def of_single_channels(part: Representation, axis_name: str | None = None) -> tuple[int, Array]:
    """The number of channels, and the sum over channels q of the debiased <k_q, k_q>, for f = D = -2 K once centered.

    Of a centered channel z, k = z z' has off-diagonal row sums -z^2, so sums of z^2 and z^4 over samples suffice.
    """

    def total(a: Array) -> Array:
        return over_devices(lax.psum, jnp.sum(a, 0, keepdims=True), axis_name)

    weights = part.pairs.weights()[0][:, None]
    n, x = total(weights), part.features.x * weights
    square = (x - total(x) / n * weights) ** 2
    s2, s4 = total(square), total(square * square)
    products = s2 * s2 * (1 + 1 / ((n - 1) * (n - 2))) - s4 * n / (n - 2)
    return x.shape[1], 4 * jnp.sum(products)


def max_square_norm(features: CenteredFeatures) -> Array:
    """The largest squared norm of a row."""
    x = lax.stop_gradient(features.x)
    return jnp.max(jnp.sum(x * x, 1))


def centered_products(
    sums: ShiftedSums,
    shift: Array,
    properties: Properties,
    split: int,
    centering: Centering | None,
    function: PairFunction,
    axis_name: str | None = None,
) -> InnerProducts:
    """The inner products of centered matrices, from sums over the pairs off the diagonal."""
    number = properties.scales.shape[0]
    count = over_devices(lax.psum, jnp.sum(properties.weights), axis_name)
    sides = (slice(None, split), slice(split, None) if number > split else slice(None, split))
    if centering is None:
        shape = (split, number - split or split)
        squares = over_devices(lax.psum, jnp.sum(sums.rows, 0), axis_name).reshape(shape)
        row_norms = over_devices(lax.psum, jnp.sum(root(sums.rows), 0), axis_name).reshape(shape)
        no_products = jnp.zeros(number, row_norms.dtype)
        return _inner_products(squares, row_norms, no_products, function, count, properties, sides)

    ones = jnp.ones_like(properties.scales)
    f_ii = function.values(jnp.zeros_like(ones), ones, ones)
    diagonals = (f_ii[None] - 2 * shift) * properties.weights[:, None]

    def inner(products: Array, k: slice, m: slice) -> Array:
        pairs = PairSums(
            products,
            (sums.rows[:, k], sums.rows[:, m]),
            (diagonals[:, k], diagonals[:, m]),
            (shift[:, k], shift[:, m]),
            properties.weights[:, None],
            count,
            axis_name,
        )
        return centering.inner(pairs)

    parts = [slice(k, k + 1) for k in range(number)]
    products = jnp.stack([inner(sums.self_products[k, None, None], part, part)[0, 0] for k, part in enumerate(parts)])
    varies = products > rounding_level(properties, shift, function, count, axis_name)
    for k, (number, single) in enumerate(properties.single_channels):
        corrected = (products[k] - single) * (number / (number - 1))
        products = products.at[k].set(corrected)
        is_defined = properties.is_defined.at[k].set(properties.is_defined[k] & ((corrected > 0) | ~varies[k]))
        properties = properties._replace(is_defined=is_defined)
    both_vary = varies[sides[0], None] & varies[None, sides[1]]
    cross = jnp.where(both_vary, inner(sums.cross, *sides), 0)
    row_norms, products = jnp.zeros_like(cross), jnp.where(varies, products, 0)
    return _inner_products(cross, row_norms, products, function, count, properties, sides)


def rounding_level(
    properties: Properties, shift: Array, function: PairFunction, count: Array, axis_name: str | None = None
) -> Array:
    """The <F, F> of a centered matrix that rounding alone can cause, (L + M,).

    A representation below it does not vary: all f_ij are equal, for example if samples are equidistant.
    """
    unit, square_norms = jnp.ones_like(properties.scales), properties.max_square_norms
    size = jnp.sqrt(square_norms) if function.euclidean else square_norms
    if function.needs_sigma:
        size = unit
        if function.minus_one:  # at most 1 - exp of the largest distance, squared at most 4 times the largest norm
            ratio = properties.scales / properties.sigma
            largest = 2 * ratio * jnp.sqrt(square_norms) if function.euclidean else 2 * ratio**2 * square_norms
            size = lax.stop_gradient(-kernel_minus_one(largest, unit))
    if callable(function.form):
        size = over_devices(lax.pmax, jnp.max(jnp.abs(lax.stop_gradient(shift)), 0), axis_name)
    return (8 * float(jnp.finfo(size.dtype).eps) * size * count) ** 2


def _inner_products(
    cross: Array,
    row_norms: Array,
    products: Array,
    function: PairFunction,
    count: Array,
    properties: Properties,
    sides: tuple[slice, slice],
) -> InnerProducts:
    (x, y), units = sides, function.unit(properties.scales)
    is_defined = properties.is_defined[x, None] & properties.is_defined[None, y]
    return InnerProducts(
        cross, row_norms, products[x], products[y], units[x], units[y],
        num_samples=count, status=properties.status, sigma=properties.sigma, is_defined=is_defined,
    )  # fmt: skip
