"""Products to the full precision of the dtype, and lengths whose squares neither overflow nor vanish.

Nothing here knows what the arrays mean; the rest of the library takes its matrix products and its unit vectors from
here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

# Products of so many rows of such a width with themselves are worth halving on a GPU; of more rows, they need too much
# memory.
_HALVED_ROWS, _HALVED_WIDTH = (8192, 32768), 256


def matmul(a: Array, b: Array) -> Array:
    """A b, to the full precision of the dtype."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def products(x: Array, y: Array, precision: lax.PrecisionLike = None) -> Array:
    """x_i . y_j, shape (..., n, m)."""
    if y is x and _worth_halving(x):
        half = x.shape[-2] // 2
        above, below = x[..., :half, :], x[..., half:, :]
        cross = products(above, below, precision)
        rows = ((products(above, above, precision), cross), (transposed(cross), products(below, below, precision)))
        return jnp.concatenate([jnp.concatenate(row, -1) for row in rows], -2)
    batch = tuple(range(x.ndim - 2))
    last = ((x.ndim - 1,), (y.ndim - 1,))
    return lax.dot_general(x, y, (last, (batch, batch)), lax.Precision.HIGHEST if precision is None else precision)


def _worth_halving(x: Array) -> bool:
    """Whether turning half of the products round is faster than computing them: on a GPU, where a copy costs little.

    Not where there are several devices: rows may be spread over them, and halves of those would travel.
    """
    n, d = x.shape[-2:]
    large = _HALVED_ROWS[0] <= n <= _HALVED_ROWS[1] and d >= _HALVED_WIDTH
    return large and jax.default_backend() == "gpu" and jax.device_count() == 1


def transposed(a: Array) -> Array:
    """The transpose of matrices (..., n, m)."""
    return jnp.swapaxes(a, -1, -2)


def root(squares: Array) -> Array:
    """Lengths from squared ones; the derivative at 0 is 0, as for the diagonal of distances, which does not move."""
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def bounded(value: Array, low: float | int, high: float | int) -> Array:
    """A value clipped to the bounds that mathematics gives it, which rounding may overstep; its derivatives stay."""
    return lax.stop_gradient(jnp.clip(value, low, high)) + (value - lax.stop_gradient(value))


def arccos(cosine: Array) -> Array:
    """The angle of a cosine; its derivative at 1 and -1, where it is infinite, is taken as 0."""
    inside = jnp.abs(cosine) < 1
    return jnp.where(inside, jnp.arccos(jnp.where(inside, cosine, 0)), jnp.arccos(lax.stop_gradient(cosine)))


def unit(x: Array, axis: int | tuple[int, ...] = -1, *, nothing: float = 0.0) -> Array:
    """Vectors along the axes, of length 1; `nothing` everywhere in one of zeros, where the derivative is 0.

    2^k x gives what x gives, bit for bit.
    """
    x, _ = scaled(x, axis)
    squares = jnp.sum(x * x, axis, keepdims=True)
    empty = squares == 0  # not squares <= 0: nan stays nan
    return jnp.where(empty, nothing, x / jnp.sqrt(jnp.where(empty, 1, squares)))


def scaled(x: Array, axis: int | tuple[int, ...] | None = None) -> tuple[Array, Array]:
    """An array in units of a power of two near its largest entry along the axes (None: all); that unit, a constant."""
    size, inverse = power_of_two(lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True)))
    return x * inverse, size


def power_of_two(size: Array) -> tuple[Array, Array]:
    """The power of two next above a size, and its inverse; 1 where the size is 0 or not finite."""
    info = jnp.finfo(size.dtype)
    integer = jnp.dtype(f"int{info.bits}")
    one = 1 << info.nmant  # of the exponent, whose bits lie above those of the digits
    zero = (info.maxexp - 1) * one  # the exponent of 1
    limit = (info.maxexp - 3) * one  # so that neither of the two is subnormal
    bits = lax.bitcast_convert_type(size, integer)
    exponent = jnp.clip((bits & -one) + one, zero - limit, zero + limit)
    exponent = jnp.where(jnp.isfinite(size) & (size > 0), exponent, zero)
    # Behind a barrier, or XLA computes the powers again for every feature that is multiplied with them.
    return lax.optimization_barrier(
        tuple(lax.bitcast_convert_type(e, size.dtype) for e in (exponent, 2 * zero - exponent))
    )


def smallest(dtype: DTypeLike) -> float:
    """The size below which features lose digits as numbers become subnormal."""
    return 2.0**10 * float(jnp.finfo(dtype).tiny)


def exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum a + b, and what rounding took away from it (Knuth 1969)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def upper_half(a: Array) -> Array:
    """A number without the lower half of its digits, so that its square is exact."""
    integer, digits = (jnp.int32, 12) if a.dtype.itemsize == 4 else (jnp.int64, 27)
    bits = lax.bitcast_convert_type(a, integer)
    return lax.bitcast_convert_type((bits >> digits) << digits, a.dtype)
