"""Matrix products in the full precision of the dtype, and norms whose squares neither overflow nor underflow.

All matrix products and unit vectors of the library come from this module.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

# Numbers of rows, and the smallest width, for which halving x x^T pays off on a GPU; more rows need too much memory.
_HALVED_ROWS, _HALVED_WIDTH = (8192, 32768), 256


def matmul(a: Array, b: Array) -> Array:
    """The product a b in the full precision of the dtype."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def products(x: Array, y: Array, precision: lax.PrecisionLike = None) -> Array:
    """Inner products x_i . y_j, shape (..., n, m)."""
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
    """Whether transposing one off-diagonal block is faster than computing it: on a GPU, where a copy is cheap.

    Not with several devices: rows may be sharded over them, and halves of the rows would move between devices.
    """
    n, d = x.shape[-2:]
    large = _HALVED_ROWS[0] <= n <= _HALVED_ROWS[1] and d >= _HALVED_WIDTH
    return large and jax.default_backend() == "gpu" and jax.device_count() == 1


def transposed(a: Array) -> Array:
    """The transpose of matrices (..., n, m)."""
    return jnp.swapaxes(a, -1, -2)


def root(squares: Array) -> Array:
    """Square root with derivative 0 at 0, which is right for the constant diagonal of distances."""
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def bounded(value: Array, low: float | int, high: float | int) -> Array:
    """A value clipped to its mathematical bounds, which rounding may exceed; derivatives are those of the value."""
    return lax.stop_gradient(jnp.clip(value, low, high)) + (value - lax.stop_gradient(value))


def arccos(cosine: Array) -> Array:
    """The arc cosine, with derivative 0 at 1 and -1, where the true derivative is infinite."""
    inside = jnp.abs(cosine) < 1
    return jnp.where(inside, jnp.arccos(jnp.where(inside, cosine, 0)), jnp.arccos(lax.stop_gradient(cosine)))


def unit(x: Array, axis: int | tuple[int, ...] = -1, *, fill: float = 0.0) -> Array:
    """Vectors along the axes divided by their norms; zero vectors are filled with `fill`, with derivative 0.

    The result for 2^k x equals the result for x, bit for bit.
    """
    x, _ = scaled(x, axis)
    squares = jnp.sum(x * x, axis, keepdims=True)
    empty = squares == 0  # not squares <= 0: nan stays nan
    return jnp.where(empty, fill, x / jnp.sqrt(jnp.where(empty, 1, squares)))


def scaled(x: Array, axis: int | tuple[int, ...] | None = None) -> tuple[Array, Array]:
    """An array divided by a power of two near its largest entry along the axes (None: all), and that constant unit."""
    size, inverse = power_of_two(lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True)))
    return x * inverse, size


def power_of_two(size: Array) -> tuple[Array, Array]:
    """The next power of two above `size`, and its inverse; both 1 where `size` is 0 or not finite."""
    info = jnp.finfo(size.dtype)
    integer = jnp.dtype(f"int{info.bits}")
    step = 1 << info.nmant  # adds 1 to the exponent, whose bits lie above the mantissa
    zero = (info.maxexp - 1) * step  # the exponent bits of 1.0
    limit = (info.maxexp - 3) * step  # keeps the power and its inverse normal
    bits = lax.bitcast_convert_type(size, integer)
    exponent = jnp.clip((bits & -step) + step, zero - limit, zero + limit)
    exponent = jnp.where(jnp.isfinite(size) & (size > 0), exponent, zero)
    # Without a barrier, XLA recomputes the powers for every feature that is multiplied by them.
    return lax.optimization_barrier(
        tuple(lax.bitcast_convert_type(e, size.dtype) for e in (exponent, 2 * zero - exponent))
    )


def smallest(dtype: DTypeLike) -> float:
    """The absolute value below which features lose digits to subnormal numbers."""
    return 2.0**10 * float(jnp.finfo(dtype).tiny)


def exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum a + b, and its rounding error (Knuth 1969)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def upper_half(a: Array) -> Array:
    """A number without the lower half of its mantissa, so that its square is exact."""
    integer, digits = (jnp.int32, 12) if a.dtype.itemsize == 4 else (jnp.int64, 27)
    bits = lax.bitcast_convert_type(a, integer)
    return lax.bitcast_convert_type((bits >> digits) << digits, a.dtype)
