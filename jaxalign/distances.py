"""Squared Euclidean distances between rows: the only place that turns features into distances.

`squared_distances` is the public function. The rest of the library works in a `Frame`: features centred and
scaled by a power of two, so that neither an offset nor the unit of the features costs digits, with distances that
are recomputed from explicit differences where the fast formula is not accurate enough for the kernel at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxalign import _checks
from jaxalign._linalg import exact_sum, power_of_two, products, upper_half
from jaxalign._plan import ROWS_SECOND_LAST, check_room, in_auto_mode
from jaxalign._typing import AnyArray

# Features a step of the explicit sum, so that the n x m result is read and written rarely; more than this gains
# nothing.
_FEATURES_PER_STEP = 8
# A distance that is this many times above the error of the fast formula is resolved.
_RESOLVED = 1e4
# Rows whose distances are resolved together: if one needs it, all of them are computed again.
_ROWS_PER_STEP = 64
# Whole numbers are recognized up to this many times their unit.
_STEPS = 2.0**15

T = TypeVar("T")


def squared_distances(
    x: Float[AnyArray, "*#batch n d"],
    y: Float[AnyArray, "*#batch m d"] | None = None,
    *,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "*batch n m"]:
    """Squared Euclidean distances D_ij = ||x_i - y_j||^2 between rows.

    Args:
        x: features, shape (..., n, d). float16 and bfloat16 are accumulated, and returned, in float32.
        y: features, shape (..., m, d); None stands for x.
        precision: of the matrix product, as in `jax.numpy.matmul`. None means HIGHEST: the default of JAX is
            TF32 on NVIDIA GPUs and bfloat16 on TPUs, which is too coarse for differences of products.

    Returns:
        Squared distances, shape (..., n, m), in squared units of the features, never negative. With y = None the
        matrix is symmetric and its diagonal exactly 0.

    The features are centered and scaled before |a|^2 + |b|^2 - 2 a.b is taken, so an offset costs no digits. Its
    absolute error is about eps max_i ||x_i - mean||^2: distances that are too small for that are computed again from
    explicit differences (unless `precision` is given), which takes longer where there are many.

    Raises:
        TypeError: not an array, integer or complex features, float64 without x64.
        ValueError: wrong rank, an empty array, x and y of different widths.
        MemoryError: n x m does not fit into the memory of the CPU.

    Example:
        >>> import jax.numpy as jnp, jaxalign
        >>> jaxalign.squared_distances(jnp.array([[0.0, 0.0], [3.0, 4.0]]))
        Array([[ 0., 25.],
               [25.,  0.]], dtype=float32)
    """
    x, y = _checks.feature_pair(x, y)
    check_stored("the distances", x, y)
    return _squared_distances(x, y, precision)


def check_stored(what: str, x: Array, y: Array | None) -> None:
    """Raise a MemoryError where values of all pairs cannot be stored."""
    shape = (*x.shape[:-1], (x if y is None else y).shape[-2])
    way_out = "Nothing of that size is stored by solve_sigma, affinity_operator, compare, compare_grid and streaming."
    check_room(what, shape, x, way_out)


@partial(jax.jit, static_argnames="precision")
def _squared_distances(x: Array, y: Array | None, precision: lax.PrecisionLike) -> Array:
    def compute(x: Array, y: Array | None) -> Array:
        frame = make_frame(x, y)
        distances = resolved_distances(frame) if precision is None else fast_distances(frame, precision)
        distances = attach_gradient(frame, distances)
        return distances * frame.scale * frame.scale  # twice: scale^2 alone may overflow where the product does not

    return in_auto_mode(compute, x, y, result_rows=ROWS_SECOND_LAST)


class Frame(NamedTuple):
    """Features and how they are made ready for distances; of one batch shape, y None compares rows with themselves.

    Nothing of the size of the features is stored beside them: `x` and `y` are computed where they are used.
    """

    raw_x: Array  # (..., n, d) as they came, masked rows 0
    raw_y: Array | None
    mask: Array | None  # (..., n) True = a real row
    mask_y: Array | None
    centre: Array  # (..., 1, d)
    scale: Array  # (..., 1, 1) a power of two
    inverse: Array  # (..., 1, 1) of the scale
    finite: Array  # (...,) whether every valid row is finite, and their differences not too small for the dtype
    sample: Array | None = None  # (n,) numbers of the samples, where x and y are parts of one set
    sample_y: Array | None = None

    @property
    def x(self) -> Array:
        """Rows centred, then divided by the scale; masked ones 0."""
        return self._ready(self.raw_x, self.mask)

    @property
    def y(self) -> Array | None:
        """The same of the other side, None where rows are compared with themselves."""
        return None if self.raw_y is None else self._ready(self.raw_y, self.mask_y)

    @property
    def raw_other(self) -> Array:
        """The rows on the other side of the pairs, as they came."""
        return self.raw_x if self.raw_y is None else self.raw_y

    @property
    def other(self) -> Array:
        """The rows on the other side of the pairs."""
        return self._ready(self.raw_other, self.other_mask)

    @property
    def other_mask(self) -> Array | None:
        """The mask of the rows on the other side."""
        return self.mask if self.raw_y is None else self.mask_y

    def same(self) -> Array | None:
        """Where a pair is a sample with itself, (n, m); None where there is no such pair."""
        if self.raw_y is None:
            return same_row((self.raw_x.shape[-2], self.raw_x.shape[-2]))
        if self.sample is None or self.sample_y is None:
            return None
        return self.sample[:, None] == self.sample_y[None, :]

    def _ready(self, rows: Array, mask: Array | None) -> Array:
        return _valid(rows - self.centre, mask) * self.inverse


def make_frame(
    x: Array,
    y: Array | None,
    mask: Array | None = None,
    mask_y: Array | None = None,
    axis_name: str | None = None,
) -> Frame:
    """Centre at the mean of the real rows and scale by a power of two, so that the largest entry is about 1.

    Neither changes what is differentiated: distances do not depend on the centre, and the scale is put back.
    Rows that are masked out become 0, whatever they held. With `axis_name` the rows of all devices count.
    """
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    if y is not None and mask_y is not None:
        y = jnp.where(mask_y[..., None], y, 0)
    sides = [(x, mask)] if y is None else [(x, mask), (y, mask_y)]
    plain = lax.stop_gradient([(side, m) for side, m in sides])
    # The mean is taken of differences from a sample: a sum of features with a large offset would lose their digits.
    start = over_devices(lax.pmax, _first_row(*plain[0]), axis_name)
    if mask is not None:
        start = jnp.where(start > -jnp.inf, start, 0)
    counts = [
        varying_like(side, jnp.full(side.shape[:-2], side.shape[-2], side.dtype))
        if m is None
        else jnp.sum(m, -1, dtype=side.dtype)
        for side, m in plain
    ]
    count = jnp.maximum(over_devices(lax.psum, sum(counts), axis_name), 1)[..., None, None]
    # Both in one pass over the features. Divided before they are summed up, so that the sum cannot overflow. In every
    # channel the largest difference from `start` is at least half of the largest from the mean, and at most twice that.
    rows = [_valid(side - start, m) for side, m in plain]
    means = [jnp.sum(part / count, -2, keepdims=True) for part in rows]
    tops = [jnp.max(jnp.max(jnp.abs(part), -2, keepdims=True), -1, keepdims=True) for part in rows]
    centre = start + over_devices(lax.psum, means[0] if y is None else means[0] + means[1], axis_name)
    top = tops[0] if y is None else jnp.maximum(*tops)
    small = (top > 0) & (top < _checks.smallest(x.dtype))  # differences of subnormal numbers are rounded to 0
    bad = over_devices(lax.psum, (~jnp.isfinite(top) | small)[..., 0, 0].astype(jnp.int32), axis_name)
    scale, inverse = power_of_two(over_devices(lax.pmax, top, axis_name))
    return Frame(x, y, mask, mask_y, centre, scale, inverse, finite=bad == 0)


def centered_columns(x: Array, mask: Array | None) -> Array:
    """Columns less their mean over valid rows, in a unit near the largest entry; masked rows and constants are 0."""
    rows = make_frame(x, None, mask).x
    count = rows.shape[-2] if mask is None else jnp.maximum(jnp.sum(mask, -1), 1).astype(x.dtype)[..., None, None]
    # Once more: the mean that was taken away was rounded, by as much as the features vary where their offset is large.
    rows = rows - jnp.sum(rows, -2, keepdims=True) / count
    return _valid(rows, mask)


def _valid(rows: Array, mask: Array | None) -> Array:
    """Rows, those that are masked out 0."""
    return rows if mask is None else jnp.where(mask[..., None], rows, 0)


def _first_row(x: Array, mask: Array | None) -> Array:
    """The first valid row, (..., 1, d); -inf where there is none."""
    if mask is None:
        return x[..., :1, :]
    first = jnp.argmax(mask, -1, keepdims=True)[..., None]
    return jnp.where(mask.any(-1)[..., None, None], jnp.take_along_axis(x, first, -2), -jnp.inf)


def over_devices(collective: Callable[..., T], value: T, axis_name: str | None) -> T:
    """A collective over a named axis, or the value itself without one."""
    return value if axis_name is None else collective(value, axis_name)


def varying_like(like: Any, value: Array) -> Array:
    """A value typed as varying over the devices over which `like` varies, as well as over those it varies over already.

    That is how loops inside `jax.shard_map` want their carries to be; elsewhere the value is returned as it is.
    """
    wanted, has = (
        getattr((jax.typeof(a) if isinstance(a, jax.Array) else a).manual_axis_type, "varying", frozenset())
        for a in (like, value)
    )
    return lax.pcast(value, tuple(wanted - has), to="varying") if wanted - has else value


def fast_distances(frame: Frame, precision: lax.PrecisionLike = None) -> Array:
    """|a|^2 + |b|^2 - 2 a.b in the frame, clamped at 0, with an exactly zero diagonal of self-distances."""
    frame = lax.stop_gradient(frame)
    x, other = _sides(frame)
    return _from_products(frame, squared_norms(x, other), products(x, other, precision))


def _sides(frame: Frame) -> tuple[Array, Array]:
    x = frame.x
    return x, x if frame.raw_y is None else frame.other


def squared_norms(x: Array, other: Array) -> tuple[Array, Array]:
    """|x_i|^2 as a column, (..., n, 1), and |y_j|^2 as a row, (..., 1, m)."""
    rows = jnp.sum(x * x, -1)
    columns = rows if other is x else jnp.sum(other * other, -1)
    return rows[..., :, None], columns[..., None, :]


def _from_products(frame: Frame, norms: tuple[Array, Array], values: Array) -> Array:
    distances = jnp.maximum(norms[0] + norms[1] - 2 * values, 0)
    same = frame.same()
    return distances if same is None else jnp.where(same, 0, distances)


def accurate_distances(
    frame: Frame, *rates: Array, counted: Array | float, precision: lax.PrecisionLike = None, rooted: bool = False
) -> Array:
    """Distances accurate enough for the kernel exp(-rate * D), rate = 1 / (2 sigma^2) in the frame, at all these rates.

    The fast formula errs by about eps (|x_i|^2 + |y_j|^2). That matters where it is a visible part of 1 / rate for
    a pair close enough not to vanish in the kernel: tight clusters far from each other, or duplicates. Then, and only
    then, explicit differences are taken. A rate broadcasts against the distances. `rooted`: the kernel is exp(-rate
    sqrt(D)); the distances returned are squared all the same. `counted`: about how many pairs bear a sum over the
    kernel, broadcasting against the distances. A rate of inf asks for explicit differences.
    """
    frame, rates = lax.stop_gradient((frame, rates))
    x, other = _sides(frame)
    norms = squared_norms(x, other)

    def look(state: tuple[Array, Array]) -> tuple[Array, Array]:
        fast = _from_products(frame, norms, state[0])
        bad = inaccurate(frame, norms, *rates, distances=fast, counted=counted, rooted=rooted)
        return when_any(bad, lambda state: (explicit_distances(frame), ~state[1]), state)

    # Products go through the loop, or explicit distances instead of them. So distances by the fast formula are computed
    # where they are used, and not stored.
    values = products(x, other, precision)
    exact = varying_like(values, jnp.zeros((), bool))
    doubtful = suspicious(norms, *rates, counted=counted, rooted=rooted)
    values, exact = when_any(doubtful, look, (values, exact))
    return jnp.where(exact, values, _from_products(frame, norms, values))


def suspicious(
    norms: tuple[Array, Array],
    *rates: Array,
    counted: Array | float,
    rooted: bool = False,
    axis_name: str | None = None,
) -> Array:
    """Whether `fast_distances` may be too coarse for the kernel at these rates, by the largest rows alone: a scalar."""
    largest = sum(jnp.max(each, (-2, -1), keepdims=True) for each in norms)
    largest = over_devices(lax.pmax, largest, axis_name)
    limit = _limit(counted, largest)
    return jnp.any(jnp.stack([jnp.any(rate * largest > limit) for rate in rates])) | rooted


def _limit(counted: Array | float, like: Array) -> Array:
    """Up to so many eps an exponent may err, if so many pairs bear the sum over the kernel.

    Errors are random from pair to pair, so a mean that many pairs bear stands 1000 eps (1e-4 in float32) for the worst
    of them and is right to 1e-6; with few, less is allowed.
    """
    counted = jnp.asarray(counted, like.dtype)
    counted = lax.stop_gradient(counted if counted.ndim else counted.reshape((1,) * like.ndim))
    return jnp.clip(5 * jnp.sqrt(counted), 8, 1000)


def inaccurate(
    frame: Frame,
    norms: tuple[Array, Array],
    *rates: Array,
    distances: Array,
    counted: Array | float,
    rooted: bool = False,
) -> Array:
    """Whether `distances`, by the fast formula, are too coarse for the kernel exp(-rate * D): a scalar for the batch.

    `rooted`: for exp(-rate sqrt(D)), where an error e of D moves the exponent by rate e / (2 sqrt(D)).
    """
    squares, limit = norms[0] + norms[1], _limit(counted, distances)
    eps = float(jnp.finfo(squares.dtype).eps)

    def at(rate: Array) -> Array:
        spread = rate * squares
        if rooted:
            distance = jnp.sqrt(distances)
            bad = (spread > 2 * limit * distance) & (rate * distance < -math.log(eps))
        else:
            near = rate * distances < 4 * eps * spread - math.log(eps)
            bad = (spread > limit) & near
        return jnp.any(_of_different(frame, bad)) | jnp.isinf(rate).any()

    return jnp.any(jnp.stack([at(rate) for rate in rates]))


def resolved_distances(frame: Frame, precision: lax.PrecisionLike = None) -> Array:
    """Distances of which each is right by itself, however small it is beside the others: to be returned or ranked.

    Those that the fast formula does not resolve, as of duplicates, are taken from explicit differences.
    """
    frame = lax.stop_gradient(frame)
    fast = fast_distances(frame, precision)
    bad = unresolved(frame, fast)
    others = frame._replace(raw_y=frame.raw_other, mask_y=frame.other_mask)

    def row(features: Array, fast: Array, bad: Array) -> Array:
        def explicit(fast: Array) -> Array:
            # Behind a barrier, or XLA computes what does not depend on `fast` ahead of the condition, for all rows.
            one, _ = lax.optimization_barrier((features[..., None, :], fast))
            return jnp.where(bad, explicit_distances(others._replace(raw_x=one, mask=None))[..., 0, :], fast)

        return when_any(bad.any(), explicit, fast)

    def rows(fast: Array) -> Array:
        each = tuple(jnp.moveaxis(a, -2, 0) for a in (frame.raw_x, fast, bad))
        return jnp.moveaxis(lax.map(lambda a: row(*a), each, batch_size=_ROWS_PER_STEP), 0, -2)

    return when_any(bad.any(), rows, fast)


def norms_of(frame: Frame) -> tuple[Array, Array]:
    """`squared_norms` of both sides."""
    return squared_norms(*_sides(frame))


def unresolved(frame: Frame, fast: Array) -> Array:
    """Where `fast_distances` may be off by more than 1e-4 of themselves, (..., n, m)."""
    error = float(jnp.finfo(fast.dtype).eps) * sum(norms_of(frame))
    return _of_different(frame, fast < error * _RESOLVED)


def has_ties(frame: Frame, axis_name: str | None = None) -> Array:
    """Whether features are whole numbers of some unit, as counts and one-hot vectors are, (..., 1, 1).

    Many distances are then equal, which the rounding of `fast_distances` would put in some order.
    """
    differences = _valid(frame.raw_x - _first_row(frame.raw_x, frame.mask), frame.mask)
    steps = lax.stop_gradient(differences * frame.inverse) * _STEPS
    whole = (steps == jnp.round(steps)).all((-2, -1), keepdims=True)
    return over_devices(lax.pmin, whole.astype(jnp.int32), axis_name) > 0


def _of_different(frame: Frame, pairs: Array) -> Array:
    """Those of some pairs (..., n, m) that are of valid, different samples."""
    same = frame.same()
    if same is not None:
        pairs = jnp.where(same, False, pairs)
    if frame.mask is not None:
        pairs &= frame.mask[..., :, None]
    if frame.other_mask is not None:
        pairs &= frame.other_mask[..., None, :]
    return pairs


def explicit_distances(frame: Frame) -> Array:
    """Sums of squared differences: exact to rounding of the result, d times the memory traffic of the fast way."""

    def add(total: Array, a: Array, b: Array) -> Array:
        difference = a - b
        return total + difference * difference

    return _over_features(frame, add, lambda zeros: zeros)


def exact_distances(frame: Frame) -> tuple[Array, Array]:
    """Sums of squared differences to about half as many digits again, high + low: for the order of nearly equal ones.

    What addition rounds away is known exactly (Knuth 1969), and so is a square of which each half is squared.
    """

    def add(total: tuple[Array, Array], a: Array, b: Array) -> tuple[Array, Array]:
        (high, low), (difference, lost) = total, exact_sum(a, -b)
        upper = upper_half(difference)
        lower = difference - upper
        high, carried = exact_sum(high, upper * upper)
        return high, low + (carried + (2 * upper * lower + (lower * lower + 2 * difference * lost)))

    return exact_sum(*_over_features(frame, add, lambda zeros: (zeros, zeros)))


def _over_features(frame: Frame, add: Callable[[T, Array, Array], T], start: Callable[[Array], T]) -> T:
    """A sum over features, `add(total, column (..., n, 1) of x, row (..., 1, m) of y)`, some at a time."""
    x, y = lax.stop_gradient((frame.raw_x * frame.inverse, frame.raw_other * frame.inverse))
    pad = -x.shape[-1] % _FEATURES_PER_STEP

    def in_steps(a: Array) -> Array:
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, pad)])
        return jnp.moveaxis(a.reshape(a.shape[:-1] + (-1, _FEATURES_PER_STEP)), -2, 0)

    def step(total: T, features: tuple[Array, Array]) -> tuple[T, None]:
        a, b = features
        for k in range(_FEATURES_PER_STEP):
            total = add(total, a[..., :, None, k], b[..., None, :, k])
        return total, None

    zeros = jnp.zeros(x.shape[:-1] + y.shape[-2:-1], x.dtype) + 0 * x[..., :1]
    return lax.scan(step, start(zeros), (in_steps(x), in_steps(y)))[0]


def attach_gradient(frame: Frame, distances: Array) -> Array:
    """`distances` as a function of the frame's features: same values, exact derivatives of every order.

    The derivative 2 (x_i - y_j).(dx_i - dy_j) is a polynomial of the features, so it is finite at zero distance
    and does not depend on how the values were computed (clamping, explicit differences). For stored distances: a rule
    of derivation costs nothing where none is taken.
    """
    distances = lax.stop_gradient(distances)
    return _attach_self(frame.x, distances) if frame.raw_y is None else _attach_pair(frame.x, frame.other, distances)


def attach_formula(frame: Frame, distances: Array, precision: lax.PrecisionLike = None) -> Array:
    """The same for a tile, by adding a difference that is 0: the product is the one that `fast_distances` took.

    (jax 0.10.2 loses rules of derivation in loops where one derivative is taken of another: forward over reverse.)
    """
    x, other = _sides(frame)
    formula = sum(squared_norms(x, other)) - 2 * products(x, other, precision)
    distances = lax.stop_gradient(distances) + (formula - lax.stop_gradient(formula))
    same = frame.same()
    return distances if same is None else jnp.where(same, 0, distances)


@jax.custom_jvp
def _attach_self(x: Array, distances: Array) -> Array:
    return distances


@_attach_self.defjvp
def _attach_self_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, distances), (dx, _) = primals, tangents
    half = jnp.sum(x * dx, -1)[..., :, None] - products(dx, x)
    tangent = 2 * (half + jnp.swapaxes(half, -1, -2))
    return _attach_self(x, distances), jnp.where(same_row(tangent.shape), 0, tangent)


@jax.custom_jvp
def _attach_pair(x: Array, y: Array, distances: Array) -> Array:
    return distances


@_attach_pair.defjvp
def _attach_pair_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    (x, y, distances), (dx, dy, _) = primals, tangents
    from_x = jnp.sum(x * dx, -1)[..., :, None] - products(dx, y)
    from_y = jnp.sum(y * dy, -1)[..., None, :] - products(x, dy)
    return _attach_pair(x, y, distances), 2 * (from_x + from_y)


def same_row(shape: tuple[int, ...]) -> Array:
    """True where the row index equals the column index, shape (n, m)."""
    return lax.broadcasted_iota(jnp.int32, shape[-2:], 0) == lax.broadcasted_iota(jnp.int32, shape[-2:], 1)


def when_any(condition: Array, fn: Callable[[T], T], value: T) -> T:
    """fn(value) if the scalar condition holds, else value; skipped at run time also under vmap.

    A loop of no or one step: unlike `lax.cond`, which vmap turns into running both branches, a loop whose
    condition is batched runs while any element wants it.
    """

    def once(carry: tuple[Array, T]) -> tuple[Array, T]:
        return jnp.zeros_like(carry[0]), fn(carry[1])

    return lax.while_loop(lambda carry: carry[0], once, (condition, value))[1]
