"""Measures that are inner products of pair functions: HSIC, CKA, RSA, distance correlation, distances of affinities.

Each set of features gives every pair of samples a number f_ij, a function of their squared distance: a kernel, or a
dissimilarity. What is compared are those matrices, after some centring, and all that the centred inner products need
are a few sums over the pairs i != j, which `pair_sums` gathers for any number of sets in one visit:

    P_kl = sum f^k_ij f^l_ij       r^k_i = sum_j f^k_ij

Where the centring takes away what depends on one sample only, f_ij may be shifted by any a_i + a_j beforehand. The row
means over a subsample of columns do: the sums are then as accurate as those of centred matrices, without a pass for
the centring.
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

from jaxalign._directions import Rows, unit_frame
from jaxalign._linalg import bounded, root
from jaxalign._plan import NO_ROWS, ROWS_SECOND_LAST, Plan, on_mesh
from jaxalign.bandwidth import CONVERGED, Diagonal, is_bandwidth, rate_of, solve_pairs
from jaxalign.distances import (
    Frame,
    accurate_distances,
    attach_gradient,
    fast_distances,
    over_devices,
    resolved_distances,
)
from jaxalign.pairs import Pairs, Reduction, Tile, kernel, kernel_less_one, over_rows, reduce_pairs

Form = Literal["rbf", "laplacian", "one_minus_rbf", "squared", "root"]
Centring = Literal["debiased", "biased", "lange", "pearson", "none", "whitened_pearson", "difference"]

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
        wide: sigma may be far above all distances: the kernel less 1 is taken, which centring does not see.
    """

    form: Form | Callable[[Array], Array]
    rows: Rows | None = None
    solves: bool = False
    diagonal: Diagonal = "include"
    tolerant: bool = False
    fixed_sigma: bool = False
    wide: bool = False

    @property
    def rooted(self) -> bool:
        """Whether it is a function of distances that are not squared."""
        return self.form in ("laplacian", "root")

    @property
    def needs_sigma(self) -> bool:
        """Whether there is a bandwidth, given or found."""
        return self.form in ("rbf", "laplacian", "one_minus_rbf")

    def of(self, distances: Array, rate: Array | None, scale: Array) -> Array:
        """f_ij from distances and a rate in units of a frame."""
        if callable(self.form):
            return _smooth(self.form, distances * scale * scale)
        if not self.needs_sigma:
            return distances
        assert rate is not None
        if self.form == "one_minus_rbf":
            return -kernel_less_one(distances, rate)
        return kernel_less_one(distances, rate) if self.wide else kernel(distances, rate)

    def unit(self, scale: Array) -> Array:
        """What f_ij is measured in."""
        one = jnp.ones_like(scale)
        return scale * scale if self.form == "squared" else scale if self.form == "root" else one


def _smooth(kernel: Callable[[Array], Array], distances: Array) -> Array:
    """A kernel of squared distances; where it has no derivative at distance 0, as exp(-sqrt(D)), that is taken as 0."""
    zero = jnp.zeros((1,) * distances.ndim, distances.dtype)
    value, slope = jax.jvp(kernel, (zero,), (jnp.ones_like(zero),))
    cusp = (distances == 0) & ~jnp.isfinite(slope)
    return jnp.where(cusp, value, kernel(jnp.where(cusp, 1, distances)))


class Inner(NamedTuple):
    """Centred inner products between x-sets and y-sets, and of each with itself, over all pairs; f in its units."""

    cross: Array  # (..., L, M); of "difference": sum_ij (f_ij - g_ij)^2
    roots: Array  # (..., L, M): of "difference" sum_i sqrt(sum_j (f_ij - g_ij)^2)
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

    cross: Array  # (..., L, M)
    own: Array  # (..., L + M)
    rows: Array  # (..., n, L + M); of "difference" sum_j (f_ij - g_ij)^2, (..., n, L M)


def pair_products(
    sets: tuple[Array, ...],
    split: int,
    mask: Array | None,
    sigmas: Array | None,
    density: Array | None,
    function: PairFunction,
    centring: Centring,
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
        centring: of the matrices.
        rtol: of the density.
        plan: how pairs are visited.
    """

    def local(x: Array, _y: None, mask: Array | None, _mask_y: None, others: Any, sigmas: Any, density: Any) -> Inner:
        prepared = prepare_sets((x, *others), mask, sigmas, density, function, rtol, plan)
        shift = _shifts(prepared, function, centring)
        sums = _visit(prepared, shift, split, function, centring, plan)
        facts = facts_of(prepared, function, plan.axis_name)
        return centred(sums, shift, facts, split, centring, function, plan.axis_name)

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
        one = prepare(x, mask, None, density, function, rtol, plan)
        return one.sigma, one.status

    return on_mesh(local, plan, (x, None, mask, None), (density,), (NO_ROWS,), (NO_ROWS, NO_ROWS))


bandwidth_of_jit = partial(jax.jit, static_argnames=("function", "rtol", "plan"))(bandwidth_of)

pair_products_jit = partial(jax.jit, static_argnames=("split", "function", "centring", "rtol", "plan"))(pair_products)


class Prepared(NamedTuple):
    """A set of features, ready to be visited."""

    pairs: Pairs  # of this set alone
    rate: Array | None  # (..., 1, 1)
    sigma: Array  # (...)
    status: Array  # (...)


def prepare(
    rows: Array,
    mask: Array | None,
    sigma: Array | None,
    density: Array | None,
    function: PairFunction,
    rtol: float,
    plan: Plan,
    *,
    resolved: bool = False,
) -> Prepared:
    """A set's pairs and its bandwidth, given or solved for. `resolved`: each stored distance is right by itself."""
    if mask is not None:
        rows = jnp.where(mask[..., None], rows, 0)
    frame = unit_frame(rows, mask, function.rows, plan.axis_name)
    batch, dtype = frame.finite.shape, rows.dtype
    converged = jnp.full(batch, CONVERGED, jnp.int32)
    if function.solves:
        assert density is not None
        solution, pairs, rate = solve_pairs(
            frame,
            density,
            function.diagonal,
            "global",
            rtol,
            plan=plan,
            rooted=function.rooted,
            tolerant=function.tolerant,
        )
        if function.fixed_sigma:
            solution, rate = replace(solution, sigma=lax.stop_gradient(solution.sigma)), lax.stop_gradient(rate)
        # Pairs of a sample with itself are left out: those are known.
        return Prepared(replace(pairs, skip_self=True), rate, solution.sigma, solution.status)
    if function.needs_sigma:
        assert sigma is not None
        sigmas = sigma[..., None, None]
        rate = rate_of(sigmas, frame, rooted=function.rooted)
        accuracy = rate
    else:
        rate, sigma = None, jnp.zeros(batch, dtype)
        accuracy = typical_rate(frame, plan.axis_name) if function.rooted else None
    distances = None
    if plan.stored:
        counted = Pairs((frame,)).counted("all")
        if resolved and not function.needs_sigma:
            distances = resolved_distances(frame)
        elif accuracy is None:
            distances = fast_distances(frame)
        else:
            distances = accurate_distances(frame, accuracy, counted=counted, rooted=function.rooted)
        distances = attach_gradient(frame, distances)
        distances = (root(distances) if function.rooted else distances,)
    pairs = Pairs((frame,), distances, True, plan.tile_size, plan.axis_name, rooted=function.rooted)
    return Prepared(pairs, accuracy, sigma, converged)


def prepare_sets(
    sets: tuple[Array, ...],
    mask: Array | None,
    sigmas: Array | None,
    density: Array | None,
    function: PairFunction,
    rtol: float,
    plan: Plan,
) -> list[Prepared]:
    """Each of several sets, with its own sigma of (..., sets) or a density for all."""
    return [
        prepare(rows, mask, None if sigmas is None else sigmas[..., k], density, function, rtol, plan)
        for k, rows in enumerate(sets)
    ]


def usable(one: Prepared, function: PairFunction) -> Array:
    """Whether a set is finite and has a bandwidth, if it needs one, (...): else what it gives is nan."""
    found = one.pairs.frames[0].finite & (one.status == CONVERGED)
    return found & is_bandwidth(one.sigma) if function.needs_sigma else found


def _squares(frame: Frame) -> Array:
    x = lax.stop_gradient(frame.x)
    return jnp.sum(x * x, -1)


def typical_rate(frame: Frame, axis_name: str | None) -> Array:
    """1 / the root mean square distance: distances are to be accurate in proportion to it. (..., 1, 1)."""
    total = over_devices(lax.psum, jnp.sum(_squares(frame), -1), axis_name)
    count = over_devices(lax.psum, jnp.sum(frame_weights(frame), -1), axis_name)
    mean = 2 * total / jnp.maximum(count, 1)
    return jnp.where(mean > 0, lax.rsqrt(jnp.where(mean > 0, mean, 1)), 1)[..., None, None]


def frame_weights(frame: Frame) -> Array:
    """1 for a real row, (..., n)."""
    return Pairs((frame,)).weights()[0]


def _shifts(prepared: list[Prepared], function: PairFunction, centring: Centring) -> Array:
    """a_i of every set, (..., n, L + M): about the row means less half the mean, or half the mean where that is all."""
    shifts = []
    for one in prepared:
        frame = one.pairs.frames[0]
        weights = frame_weights(frame)
        if centring in ("none", "difference"):
            shifts.append(jnp.zeros_like(weights))
            continue
        sample = lax.stop_gradient(one.pairs.subset(_COLUMNS_OF_SHIFTS, all_rows=True))
        rate = lax.stop_gradient(one.rate)
        scale = frame.scale

        def terms(tile: Tile, scale: Array = scale) -> tuple[Array, Array]:
            f = function.of(tile.distances[0], tile.rates[0], scale)
            return tile.weigh(f), tile.weigh(jnp.ones_like(f))

        _, (total, count) = reduce_pairs(Reduction(terms, over_rows), sample, rates=(rate,))
        mean = (total / jnp.maximum(count, 1))[..., 0] * weights
        number = over_devices(lax.psum, jnp.sum(weights, -1, keepdims=True), one.pairs.axis_name)
        overall = over_devices(lax.psum, jnp.sum(mean, -1, keepdims=True), one.pairs.axis_name)
        half = 0.5 * overall / jnp.maximum(number, 1)
        shifts.append(half * weights if centring == "pearson" else mean - half * weights)
    return lax.stop_gradient(jnp.stack(shifts, -1))


def _visit(
    prepared: list[Prepared], shift: Array, split: int, function: PairFunction, centring: Centring, plan: Plan
) -> Sums:
    frames = tuple(one.pairs.frames[0] for one in prepared)
    totals, rows = visit_pairs(sums_of(frames, split, function, centring), prepared, plan, shift)
    cross, own = totals or (rows, rows)  # no totals of "difference"
    return Sums(cross, own, rows)


def squared_differences(prepared: list[Prepared], function: PairFunction, plan: Plan) -> Array:
    """sum_j (f_ij - g_ij)^2 of two sets, (..., n, 1)."""
    return _visit(prepared, _shifts(prepared, function, "difference"), 1, function, "difference", plan).rows


def visit_pairs(reduction: Reduction, prepared: list[Prepared], plan: Plan, values: Any = ()) -> tuple[Any, Any]:
    """Reduce over the pairs i != j of all sets together; `values` are what rows and columns bring along."""
    stored = tuple(one.pairs.distances[0] for one in prepared if one.pairs.distances is not None)
    first = prepared[0].pairs
    frames = tuple(one.pairs.frames[0] for one in prepared)
    pairs = replace(first, frames=frames, distances=stored or None, fixed=plan.fixed)
    rates = tuple(one.rate for one in prepared)
    return reduce_pairs(reduction, pairs, rates=rates, as_row=values, as_column=values, in_blocks=False)


def sums_of(frames: tuple[Frame, ...], split: int, function: PairFunction, centring: Centring) -> Reduction:
    """What is summed up over the pairs: totals (cross, own) and rows of `Sums`; shifts come as values of the rows."""

    def terms(tile: Tile) -> tuple[Array, ...]:
        def one(k: int) -> Array:
            f = function.of(tile.distances[k], tile.rates[k], frames[k].scale)
            columns = jnp.swapaxes(tile.column.as_column[..., k : k + 1], -1, -2)
            return tile.weigh(f - tile.row.as_row[..., k : k + 1] - columns)

        return tuple(one(k) for k in range(len(frames)))

    def sums(terms: tuple[Array, ...], tile: Tile) -> tuple[Any, Array]:
        del tile
        x, y = terms[:split], terms[split:] or terms
        if centring == "difference":
            squares = [jnp.sum((a - b) ** 2, -1) for a in x for b in y]
            return (), jnp.stack(squares, -1)
        own = jnp.stack([_total(term * term) for term in terms], -1)
        rows = jnp.stack([jnp.sum(term, -1) for term in terms], -1)
        return (_products(x, y), own), rows

    return Reduction(terms, sums)


def _total(term: Array) -> Array:
    return jnp.sum(jnp.sum(term, -1), -1)


def _products(x: tuple[Array, ...], y: tuple[Array, ...]) -> Array:
    if len(x) * len(y) <= _FEW_PRODUCTS:
        return jnp.stack([jnp.stack([_total(a * b) for b in y], -1) for a in x], -2)
    # Row by row: the partial sums keep digits that one long sum would lose.
    by_row = jnp.einsum("...rlc,...rmc->...rlm", jnp.stack(x, -2), jnp.stack(y, -2), precision=lax.Precision.HIGHEST)
    return jnp.sum(by_row, -3)


class Facts(NamedTuple):
    """What the finish needs to know of the sets, beside the sums."""

    weights: Array  # (..., n): 1 a real row
    scales: Array  # (..., L + M), of the frames
    sizes: Array  # (..., L + M): largest squared length of a row, in units of the frame
    usable: Array  # (..., L + M): see `usable`
    status: Array  # (..., L + M)
    sigma: Array  # (..., L + M)


def facts_of(prepared: list[Prepared], function: PairFunction, axis_name: str | None = None) -> Facts:
    frames = [one.pairs.frames[0] for one in prepared]
    return Facts(
        weights=frame_weights(frames[0]),
        scales=jnp.stack([frame.scale[..., 0, 0] for frame in frames], -1),
        sizes=jnp.stack([over_devices(lax.pmax, largest_square(frame), axis_name) for frame in frames], -1),
        usable=jnp.stack([usable(one, function) for one in prepared], -1),
        status=jnp.stack([one.status for one in prepared], -1),
        sigma=jnp.stack([one.sigma for one in prepared], -1),
    )


def largest_square(frame: Frame) -> Array:
    """The largest squared length of a row, (...)."""
    return jnp.max(_squares(frame), -1)


def centred(
    sums: Sums,
    shift: Array,
    facts: Facts,
    split: int,
    centring: Centring,
    function: PairFunction,
    axis_name: str | None = None,
) -> Inner:
    """The inner products of centred matrices, from the sums over their pairs off the diagonal."""
    number = facts.scales.shape[-1]
    count = over_devices(lax.psum, jnp.sum(facts.weights, -1), axis_name)
    units = function.unit(facts.scales)
    shape = (*count.shape, split, number - split or split)
    sides = (slice(None, split), slice(split, None) if number > split else slice(None, split))
    if centring == "difference":
        squares = over_devices(lax.psum, jnp.sum(sums.rows, -2), axis_name).reshape(shape)
        roots = over_devices(lax.psum, jnp.sum(root(sums.rows), -2), axis_name).reshape(shape)
        nothing = jnp.zeros((*count.shape, number), roots.dtype)
        return _inner_of(squares, roots, nothing, units, count, facts, sides)

    one = jnp.ones_like(facts.scales)
    itself = function.of(jnp.zeros_like(one), one, one)  # f_ii
    on_diagonal = (itself[..., None, :] - 2 * shift) * facts.weights[..., None]

    def inner(products: Array, k: Any, m: Any) -> Array:
        return _inner(
            products,
            (sums.rows[..., k], sums.rows[..., m]),
            (on_diagonal[..., k], on_diagonal[..., m]),
            (shift[..., k], shift[..., m]),
            facts.weights[..., None],
            count[..., None, None],
            centring,
            axis_name,
        )

    each = [slice(k, k + 1) for k in range(number)]
    own = jnp.stack([inner(sums.own[..., k, None], k, k)[..., 0, 0] for k in each], -1)
    varies = own > rounding(facts, shift, function, count, axis_name)
    own = jnp.where(varies, own, 0)
    both = varies[..., sides[0], None] & varies[..., None, sides[1]]
    cross = jnp.where(both, inner(sums.cross, *sides), 0)
    return _inner_of(cross, jnp.zeros_like(cross), own, units, count, facts, sides)


def rounding(facts: Facts, shift: Array, function: PairFunction, count: Array, axis_name: str | None = None) -> Array:
    """<F, F> that rounding alone gives a centered matrix, (..., L + M): below it a representation does not vary.

    f_ij are all the same, for instance of equidistant samples.
    """
    one = jnp.ones_like(facts.scales)
    size = jnp.sqrt(facts.sizes) if function.rooted else facts.sizes
    if function.needs_sigma:
        size = one
        if function.wide:  # at most 1 - exp of the largest distance, 4 times the largest square
            relative = facts.scales / facts.sigma
            largest = 2 * relative * jnp.sqrt(facts.sizes) if function.rooted else 2 * relative**2 * facts.sizes
            size = lax.stop_gradient(-kernel_less_one(largest, one))
    if callable(function.form):
        size = over_devices(lax.pmax, jnp.max(jnp.abs(lax.stop_gradient(shift)), -2), axis_name)
    return (8 * float(jnp.finfo(size.dtype).eps) * size * count[..., None]) ** 2


def _inner_of(
    cross: Array, roots: Array, own: Array, units: Array, count: Array, facts: Facts, sides: tuple[slice, slice]
) -> Inner:
    x, y = sides
    both = facts.usable[..., x, None] & facts.usable[..., None, y]
    return Inner(
        cross, roots, own[..., x], own[..., y], units[..., x], units[..., y],
        samples=count, status=facts.status, sigma=facts.sigma, usable=both,
    )  # fmt: skip


def _inner(
    products: Array,
    rows: tuple[Array, Array],
    on_diagonal: tuple[Array, Array],
    shifts: tuple[Array, Array],
    weights: Array,
    n: Array,
    centring: Centring,
    axis_name: str | None,
) -> Array:
    """One inner product for each entry of `products` (..., L, M), from rows and diagonals (..., n, L), (..., n, M)."""

    def dot(a: Array, b: Array) -> Array:
        product = jnp.einsum("...nl,...nm->...lm", a, b, precision=lax.Precision.HIGHEST)
        return over_devices(lax.psum, product, axis_name)

    def total(a: Array) -> Array:
        return over_devices(lax.psum, jnp.sum(a, -2), axis_name)

    def outer(a: Array, b: Array) -> Array:
        return a[..., :, None] * b[..., None, :]

    r, s = rows
    if centring == "none":
        return products
    if centring == "pearson":
        return products - outer(total(r), total(s)) / (n * (n - 1))
    if centring == "debiased":  # Song et al. 2012, eq. 5, without its 1 / (n (n - 3))
        return products + outer(total(r), total(s)) / ((n - 1) * (n - 2)) - 2 / (n - 2) * dot(r, s)
    d, e = on_diagonal
    r, s = r + d, s + e
    full = products + dot(d, e) - 2 / n * dot(r, s) + outer(total(r), total(s)) / n**2  # tr(H K H L)
    if centring == "lange":  # without the diagonals of H K H and H L H
        ours = (d - 2 / n * r + total(r)[..., None, :] / n**2) * weights
        theirs = (e - 2 / n * s + total(s)[..., None, :] / n**2) * weights
        full = full - dot(ours, theirs)
    if centring == "whitened_pearson":  # the matrix less its mean off the diagonal, H (D - m (1 1' - I)) H
        a, b = shifts
        pairs = n[..., 0] * (n[..., 0] - 1)
        mean = (total(rows[0]) + 2 * (n[..., 0] - 1) * total(a)) / pairs
        mean_y = (total(rows[1]) + 2 * (n[..., 0] - 1) * total(b)) / pairs
        full = full - (n - 1) * outer(mean, mean_y)
    return full


def centred_matrix(f: Array, centring: Centring) -> Array:
    """A matrix f (n, n) so centred that its inner products with others are those of `_inner`; not of "difference"."""
    assert centring != "difference"
    n = f.shape[-1]
    off = ~jnp.eye(n, dtype=bool)
    if centring == "none":
        return jnp.where(off, f, 0)
    if centring in ("pearson", "whitened_pearson"):
        f = jnp.where(off, f - jnp.sum(jnp.where(off, f, 0)) / (n * (n - 1)), 0)
        if centring == "pearson":
            return f
    if centring == "debiased":  # Székely & Rizzo 2014, eq. 2.2
        f = f - jnp.mean(f)  # only for the digits
        f = jnp.where(off, f, 0)
        rows = jnp.sum(f, -1, keepdims=True) / (n - 2)
        f = f - rows - rows.T + jnp.sum(rows) / (n - 1)
        return jnp.where(off, f, 0)
    rows = jnp.mean(f, -1, keepdims=True)
    f = f - rows - rows.T + jnp.mean(rows)
    return jnp.where(off, f, 0) if centring == "lange" else f
