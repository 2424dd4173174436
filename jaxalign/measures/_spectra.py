"""Singular values and directions of features, with derivatives that are finite at equal singular values.

If there are more features than samples, all results depend on the n x n Gram matrix alone. `narrowed` is called first,
so that a product of two representations is n x n, not d1 x d2.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign._linalg import matmul, transposed

# Which singular directions are kept: all above rounding, a number of them, or those of a share of the variance.
Keep = tuple[Literal["rank", "count", "share"], float | int]
ALL: Keep = ("rank", 0)


def kept(values: Array, rows: int, keep: Keep) -> Array:
    """Which singular values (..., r), largest first, are kept; never those below n eps times the largest."""
    eps = float(jnp.finfo(values.dtype).eps)
    size = max(rows, values.shape[-1])
    mask = values > size * eps * values[..., :1]
    how, amount = keep
    if how == "count":
        mask &= jnp.broadcast_to(jnp.arange(values.shape[-1]), values.shape) < amount
    if how == "share":
        squares = values * values
        before = jnp.cumsum(squares, -1) - squares
        mask &= before < amount * jnp.sum(squares, -1, keepdims=True)
    return mask


def leading(x: Array, keep: Keep = ALL) -> tuple[Array, Array]:
    """U V' of the kept singular directions of x (..., n, d), and their number (...).

    That is x with its singular values replaced by 1, or by 0. If all are kept, it is x (x'x)^(-1/2), the orthonormal
    columns closest to x.
    """
    return _leading(x, keep)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _leading(x: Array, keep: Keep) -> tuple[Array, Array]:
    value, *_, which = _decomposed(x, keep)
    return value, jnp.sum(which, -1)


def _decomposed(x: Array, keep: Keep) -> tuple[Array, Array, Array, Array, Array]:
    u, values, vt = jnp.linalg.svd(x, full_matrices=False)
    which = kept(values, x.shape[-2], keep)
    return matmul(u * which[..., None, :].astype(x.dtype), vt), u, values, vt, which


@_leading.defjvp
def _leading_jvp(keep: Keep, primals: Any, tangents: Any) -> tuple[Any, Any]:
    # For f(X) = U f(S) V': divided differences of f for the symmetric and antisymmetric parts of U' dX V, and f(s) /
    # s outside the two bases. As f is 1 for all kept singular values, no term is divided by a difference of two of
    # them.
    (x,), (dx,) = primals, tangents
    value, u, values, vt, which = _decomposed(x, keep)
    f = which.astype(x.dtype)
    inside = matmul(matmul(transposed(u), dx), transposed(vt))
    turned = transposed(inside)
    sums = values[..., :, None] + values[..., None, :]
    differ = which[..., :, None] != which[..., None, :]
    gaps = jnp.where(differ, values[..., :, None] - values[..., None, :], 1)
    steps = jnp.where(differ, (f[..., :, None] - f[..., None, :]) / jnp.where(gaps == 0, jnp.nan, gaps), 0)
    total = (f[..., :, None] + f[..., None, :]) / jnp.where(sums > 0, sums, 1)
    within = steps * (inside + turned) / 2 + total * (inside - turned) / 2
    slope = jnp.where(which, 1 / jnp.where(which, values, 1), 0)
    tangent = matmul(matmul(u, within), vt)
    outside_u = dx - matmul(u, matmul(transposed(u), dx))
    outside_v = dx - matmul(matmul(dx, transposed(vt)), vt)
    tangent += matmul(matmul(outside_u, transposed(vt)) * slope[..., None, :], vt)
    tangent += matmul(u, slope[..., :, None] * matmul(transposed(u), outside_v))
    rank = jnp.sum(which, -1)
    return (value, rank), (tangent, np.zeros(rank.shape, jax.dtypes.float0))  # the rank is an integer


def nuclear_norm(a: Array) -> Array:
    """The sum of the singular values of (..., n, m); its first derivative is U V'."""
    return jnp.sum(jnp.linalg.svd(a, compute_uv=False), -1)


def narrowed(x: Array) -> Array:
    """Features x (..., n, d) rotated into their row space, (..., n, min(n, d)): x Q, where x' = Q R.

    The Gram matrix x x' does not change, and neither do first derivatives of functions of it. Second derivatives are
    nan: they need derivatives of Q, which do not exist for linearly dependent samples, as centered samples are.
    """
    return x if x.shape[-1] <= x.shape[-2] else _in_row_space(x)


@jax.custom_jvp
def _in_row_space(x: Array) -> Array:
    return transposed(jnp.linalg.qr(transposed(x), mode="r"))


@_in_row_space.defjvp
def _in_row_space_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    q, r = jnp.linalg.qr(transposed(x))
    return transposed(r), matmul(dx, _differentiable_once(q))


@jax.custom_jvp
def _differentiable_once(q: Array) -> Array:
    return q


@_differentiable_once.defjvp
def _differentiable_once_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return primals[0], jnp.nan * tangents[0]
