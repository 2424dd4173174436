"""Centered features, and squared distances between their rows: the only place that turns features into distances.

Features are centered and divided by a power of two, so that neither an offset nor the unit costs digits. Distances
come from one matrix product (`fast_distances`), or, where that is too coarse for the kernel, from explicit differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._linalg import power_of_two, products, smallest, transposed
from jaxalign.core.devices import over_devices, varying_like

# The explicit sum takes this many channels per step, so that the n x m result is rarely read and written.
_CHANNELS_PER_STEP = 8

T = TypeVar("T")


class CenteredFeatures(NamedTuple):
    """Features of both sides and what centers and scales them; `x` and `y` are computed where they are used."""

    raw_x: Array  # (n, d) as given, invalid rows 0
    raw_y: Array | None  # (m, d); None compares rows with themselves
    mask: Array | None  # (n,) True marks valid samples
    mask_y: Array | None  # (m,)
    center: Array  # (1, d)
    scale: Array  # () a power of two near the largest entry
    inverse: Array  # () 1 / scale
    finite: Array  # () whether valid rows are finite, and their differences not too small for the dtype
    sample: Array | None = None  # (n,) sample indices, where x and y are parts of one representation
    sample_y: Array | None = None

    @property
    def is_self(self) -> bool:
        """Whether rows are compared with themselves."""
        return self.raw_y is None

    @property
    def x(self) -> Array:
        """Rows, centered and scaled."""
        return self._ready(self.raw_x, self.mask)

    @property
    def y(self) -> Array:
        """Rows on the other side of the pairs, centered and scaled."""
        return self._ready(self.raw_columns, self.column_mask)

    @property
    def raw_columns(self) -> Array:
        """Rows on the other side of the pairs, as given."""
        return self.raw_x if self.raw_y is None else self.raw_y

    @property
    def column_mask(self) -> Array | None:
        """The mask of the rows on the other side."""
        return self.mask if self.raw_y is None else self.mask_y

    @property
    def sides(self) -> tuple[Array, Array]:
        """Both sides, centered and scaled; the same array twice where rows are compared with themselves."""
        x = self.x
        return x, x if self.is_self else self.y

    def same_sample(self) -> Array | None:
        """Where a pair is a sample with itself, (n, m); None where there is no such pair."""
        if self.raw_y is None:
            return diagonal((self.raw_x.shape[0],) * 2)
        if self.sample is None or self.sample_y is None:
            return None
        return self.sample[:, None] == self.sample_y[None]

    def padded(self, width: int) -> CenteredFeatures:
        """The same with channels of zeros, up to this many."""

        def pad(a: Array) -> Array:
            return jnp.pad(a, [(0, 0), (0, width - a.shape[1])])

        raw_y = None if self.raw_y is None else pad(self.raw_y)
        return self._replace(raw_x=pad(self.raw_x), raw_y=raw_y, center=pad(self.center))

    def only_valid(self, pairs: Array) -> Array:
        """Of pairs that are marked, (n, m), those of valid, different samples."""
        same = self.same_sample()
        pairs = pairs if same is None else pairs & ~same
        pairs = pairs if self.mask is None else pairs & self.mask[:, None]
        return pairs if self.column_mask is None else pairs & self.column_mask[None]

    def _ready(self, rows: Array, mask: Array | None) -> Array:
        return valid_rows(rows - self.center, mask) * self.inverse


def center_features(
    x: Array,
    y: Array | None = None,
    mask: Array | None = None,
    mask_y: Array | None = None,
    axis_name: str | None = None,
) -> CenteredFeatures:
    """Center at the mean of valid rows and scale by a power of two, so that the largest entry is about 1.

    Neither changes a derivative: distances do not depend on the center, and the scale is put back. With `axis_name`
    the rows of all devices count.
    """
    x = valid_rows(x, mask)
    y = None if y is None else valid_rows(y, mask_y)
    sides = lax.stop_gradient([(x, mask)] if y is None else [(x, mask), (y, mask_y)])
    # The mean is taken of differences from a sample: a sum of features with a large offset would lose their digits.
    start = over_devices(lax.pmax, first_valid_row(*sides[0]), axis_name)
    start = start if mask is None else jnp.where(start > -jnp.inf, start, 0)
    count = _at_least_one(over_devices(lax.psum, sum(_count(*side) for side in sides), axis_name))
    differences = [valid_rows(rows - start, valid) for rows, valid in sides]
    # Divided before they are summed, so that the sum cannot overflow. The largest difference from `start` is between
    # half of and twice that from the mean, so one pass over the features gives both.
    means = [jnp.sum(rows / count, 0, keepdims=True) for rows in differences]
    largest = [jnp.max(jnp.max(jnp.abs(rows), 0)) for rows in differences]
    mean, size = (means[0], largest[0]) if y is None else (means[0] + means[1], jnp.maximum(*largest))
    center = start + over_devices(lax.psum, mean, axis_name)
    subnormal = (size > 0) & (size < smallest(x.dtype))  # differences of subnormal numbers are rounded to 0
    bad = over_devices(lax.psum, (~jnp.isfinite(size) | subnormal).astype(jnp.int32), axis_name)
    scale, inverse = power_of_two(over_devices(lax.pmax, size, axis_name))
    return CenteredFeatures(x, y, mask, mask_y, center, scale, inverse, finite=bad == 0)


def valid_rows(rows: Array, mask: Array | None) -> Array:
    """Rows, with 0 in those that are masked out."""
    return rows if mask is None else jnp.where(mask[:, None], rows, 0)


def _count(rows: Array, mask: Array | None) -> Array | int:
    """The number of valid rows."""
    return rows.shape[0] if mask is None else jnp.sum(mask, dtype=rows.dtype)


def _at_least_one(count: Array | int) -> Array | int:
    return count if isinstance(count, int) else jnp.maximum(count, 1)


def first_valid_row(x: Array, mask: Array | None) -> Array:
    """The first valid row, (1, d); -inf where there is none."""
    return x[:1] if mask is None else jnp.where(mask.any(), x[jnp.argmax(mask)][None], -jnp.inf)


def centered_columns(x: Array, mask: Array | None) -> Array:
    """Mean-centered columns, scaled by about the largest entry; invalid rows and constants are 0."""
    return scaled_columns(x, mask)[0]


def scaled_columns(x: Array, mask: Array | None) -> tuple[Array, Array]:
    """`centered_columns`, and the power of two by which they are scaled, a constant: their product has x's unit."""
    features = center_features(x, None, mask)
    rows = features.x
    # Once more: the first mean was rounded, by as much as the features vary where their offset is large.
    rows = valid_rows(rows - jnp.sum(rows, 0, keepdims=True) / _at_least_one(_count(rows, mask)), mask)
    return rows, features.scale


def diagonal(shape: tuple[int, ...]) -> Array:
    """True where the row index equals the column index."""
    return lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)


# --- distances -------------------------------------------------------------------------------------------------------


def fast_distances(features: CenteredFeatures, precision: lax.PrecisionLike = None) -> Array:
    """|a|^2 + |b|^2 - 2 a.b, not below 0, and exactly 0 between a sample and itself. Without a derivative."""
    features = lax.stop_gradient(features)
    return _from_products(features, squared_norms(features), products(*features.sides, precision))


def squared_norms(features: CenteredFeatures) -> tuple[Array, Array]:
    """|x_i|^2 as a column, (n, 1), and |y_j|^2 as a row, (1, m)."""
    x, y = features.sides
    rows = jnp.sum(x * x, 1)
    return rows[:, None], (rows if y is x else jnp.sum(y * y, 1))[None]


def _from_products(features: CenteredFeatures, norms: tuple[Array, Array], dots: Array) -> Array:
    distances = jnp.maximum(norms[0] + norms[1] - 2 * dots, 0)
    same = features.same_sample()
    return distances if same is None else jnp.where(same, 0, distances)


def accurate_distances(
    features: CenteredFeatures,
    *gammas: Array,
    pairs_in_sum: Array | float,
    precision: lax.PrecisionLike = None,
    euclidean: bool = False,
) -> Array:
    """Squared distances accurate enough for the kernel exp(-gamma D), at all these gammas. Without a derivative.

    `fast_distances` errs by about eps (|x_i|^2 + |y_j|^2). That matters where it is a visible part of 1 / gamma for a
    pair near enough not to vanish in the kernel: tight clusters far from each other, or duplicates. Then, and only
    then, explicit differences are taken.

    Args:
        features: of both sides.
        gammas: each broadcasts against (n, m); inf asks for explicit differences.
        pairs_in_sum: about how many pairs carry a sum over the kernel.
        precision: of the products.
        euclidean: the kernel is exp(-gamma sqrt(D)).
    """
    features, gammas = lax.stop_gradient((features, gammas))
    norms, dots = squared_norms(features), products(*features.sides, precision)

    # Products go through the loop, or explicit distances instead of them: distances by the fast formula are then
    # computed where they are used, and not stored.
    def improve(state: tuple[Array, Array], features: CenteredFeatures) -> tuple[Array, Array]:
        fast = _from_products(features, norms, state[0])
        coarse = are_coarse(features, norms, *gammas, distances=fast, pairs_in_sum=pairs_in_sum, euclidean=euclidean)
        return when_any(coarse, lambda state, features: (explicit_distances(features), ~state[1]), state, features)

    suspect = may_be_coarse(norms, *gammas, pairs_in_sum=pairs_in_sum, euclidean=euclidean)
    values, explicit = when_any(suspect, improve, (dots, varying_like(dots, jnp.zeros((), bool))), features)
    return jnp.where(explicit, values, _from_products(features, norms, values))


def may_be_coarse(
    norms: tuple[Array, Array],
    *gammas: Array,
    pairs_in_sum: Array | float,
    euclidean: bool = False,
    axis_name: str | None = None,
) -> Array:
    """Whether `fast_distances` may be too coarse for the kernel at these gammas, judged by the longest rows: ().

    Always true of the Euclidean kernel, for which only `are_coarse` can tell.
    """
    if euclidean:
        return varying_like(norms[0], jnp.ones((), bool))
    largest = over_devices(lax.pmax, jnp.max(norms[0]) + jnp.max(norms[1]), axis_name)
    tolerated = _tolerated(pairs_in_sum, largest.dtype)
    return jnp.any(jnp.stack([jnp.any(gamma * largest > tolerated) for gamma in gammas]))


def _tolerated(pairs_in_sum: Array | float, dtype: jax.typing.DTypeLike) -> Array:
    """By how many eps an exponent may err where so many pairs carry the sum over the kernel.

    Errors are random from pair to pair: a mean that many pairs carry tolerates 1000 eps (1e-4 in float32) in the worst
    of them and is right to 1e-6; with few, less is allowed.
    """
    return jnp.clip(5 * jnp.sqrt(lax.stop_gradient(jnp.asarray(pairs_in_sum, dtype))), 8, 1000)


def are_coarse(
    features: CenteredFeatures,
    norms: tuple[Array, Array],
    *gammas: Array,
    distances: Array,
    pairs_in_sum: Array | float,
    euclidean: bool = False,
) -> Array:
    """Whether `distances`, by the fast formula, are too coarse for the kernel at one of these gammas: ().

    In the Euclidean kernel an error e of D moves the exponent by gamma e / (2 sqrt(D)).
    """
    squares, tolerated = norms[0] + norms[1], _tolerated(pairs_in_sum, distances.dtype)
    eps = float(jnp.finfo(squares.dtype).eps)

    def at(gamma: Array) -> Array:
        spread = gamma * squares
        if euclidean:
            distance = jnp.sqrt(distances)
            coarse = (spread > 2 * tolerated * distance) & (gamma * distance < -math.log(eps))
        else:
            coarse = (spread > tolerated) & (gamma * distances < 4 * eps * spread - math.log(eps))
        return jnp.any(features.only_valid(coarse)) | jnp.isinf(gamma).any()

    return jnp.any(jnp.stack([at(gamma) for gamma in gammas]))


def explicit_distances(features: CenteredFeatures) -> Array:
    """Sums of squared differences: right to rounding, at d times the memory traffic of the fast formula."""

    def add(total: Array, a: Array, b: Array) -> Array:
        difference = a - b
        return total + difference * difference

    return sum_over_channels(features, add, lambda zeros: zeros)


def sum_over_channels(features: CenteredFeatures, add: Callable[[T, Array, Array], T], init: Callable[[Array], T]) -> T:
    """A sum over channels of uncentered, scaled rows: `add(total, column (n, 1) of x, row (1, m) of y)`."""
    x, y = lax.stop_gradient((features.raw_x * features.inverse, features.raw_columns * features.inverse))

    def step(total: T, channel: tuple[Array, Array]) -> tuple[T, None]:
        return add(total, channel[0][:, None], channel[1][None, :]), None

    zeros = jnp.zeros((x.shape[0], y.shape[0]), x.dtype) + 0 * x[:, :1]
    return lax.scan(step, init(zeros), (x.T, y.T), unroll=_CHANNELS_PER_STEP)[0]


def when_any(condition: Array, fn: Callable[..., T], value: T, *operands: Any) -> T:
    """fn(value, *operands) if the scalar condition holds, else value; skipped at run time also under vmap.

    A loop of no or one step: unlike `lax.cond`, which vmap turns into running both branches, a loop whose condition
    is batched runs while any element wants it.
    """

    def step(carry: tuple[Array, T]) -> tuple[Array, T]:
        # Behind a barrier, or XLA computes what depends on the operands alone ahead of the loop anyway.
        ready = lax.optimization_barrier((carry[1], operands))
        return jnp.zeros_like(carry[0]), fn(ready[0], *ready[1])

    return lax.while_loop(lambda carry: carry[0], step, (condition, value))[1]


# --- derivatives -----------------------------------------------------------------------------------------------------


def attach_derivative(features: CenteredFeatures, distances: Array) -> Array:
    """`distances` as a function of the features: same values, exact derivatives of every order.

    The derivative 2 (x_i - y_j).(dx_i - dy_j) is a polynomial of the features, so it is finite at zero distance and
    does not depend on how the values were computed (clipping, explicit differences). For stored distances; costs
    nothing where no derivative is taken.
    """
    distances = lax.stop_gradient(distances)
    return _self_distances(features.x, distances) if features.is_self else _distances(*features.sides, distances)


@jax.custom_jvp
def _self_distances(x: Array, distances: Array) -> Array:
    return distances


@_self_distances.defjvp
def _self_distances_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, distances), (dx, _) = primals, tangents
    half = jnp.sum(x * dx, 1)[:, None] - products(dx, x)
    tangent = 2 * (half + transposed(half))
    return _self_distances(x, distances), jnp.where(diagonal((x.shape[0],) * 2), 0, tangent)


@jax.custom_jvp
def _distances(x: Array, y: Array, distances: Array) -> Array:
    return distances


@_distances.defjvp
def _distances_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    (x, y, distances), (dx, dy, _) = primals, tangents
    from_x = jnp.sum(x * dx, 1)[:, None] - products(dx, y)
    from_y = jnp.sum(y * dy, 1)[None] - products(x, dy)
    return _distances(x, y, distances), 2 * (from_x + from_y)


def attach_formula(features: CenteredFeatures, distances: Array, precision: lax.PrecisionLike = None) -> Array:
    """`attach_derivative` for a tile: adds formula - stop_gradient(formula), which is 0.

    The product is that of `fast_distances`, so XLA computes it once. (jax 0.10.2 loses a custom JVP inside loops under
    forward-over-reverse.)
    """
    norms = squared_norms(features)
    formula = norms[0] + norms[1] - 2 * products(*features.sides, precision)
    distances = lax.stop_gradient(distances) + (formula - lax.stop_gradient(formula))
    same = features.same_sample()
    return distances if same is None else jnp.where(same, 0, distances)
