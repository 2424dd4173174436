"""Singular values and directions of features, with derivatives that stay finite where singular values are equal.

Of features wider than n samples everything here depends on the n x n Gram matrix alone, so `narrowed` comes first: a
product of two representations is then n x n, not d1 x d2.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign._linalg import matmul, transposed

# Which singular directions are kept: all that are not rounding, so many of them, or those of a share of the variance.
Keep = tuple[Literal["rank", "count", "share"], float | int]
ALL: Keep = ("rank", 0)


def kept(values: Array, rows: int, keep: Keep) -> Array:
    """Which singular values (..., r), largest first, are kept; never those below n eps times the largest."""
    eps = float(jnp.finfo(values.dtype).eps)
    size = max(rows, values.shape[-1])
    real = values > size * eps * values[..., :1]
    how, amount = keep
    if how == "count":
        real &= jnp.broadcast_to(jnp.arange(values.shape[-1]), values.shape) < amount
    if how == "share":
        squares = values * values
        before = jnp.cumsum(squares, -1) - squares
        real &= before < amount * jnp.sum(squares, -1, keepdims=True)
    return real


def leading(x: Array, keep: Keep = ALL) -> tuple[Array, Array]:
    """U V' of the kept singular directions of x (..., n, d), and how many they are (...).

    That is x with all its singular values made 1, or 0. With all kept it is x (x'x)^(-1/2), the orthonormal columns
    closest to x.
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
    # For f(X) = U f(S) V': divided differences of f on the symmetric and the antisymmetric part of U' dX V, and f(s) /
    # s on what lies outside of the two bases. f is 1 on what is kept, so nothing is divided by a difference of two
    # that are.
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
    return (value, rank), (tangent, np.zeros(rank.shape, jax.dtypes.float0))  # the rank does not vary


def nuclear_norm(a: Array) -> Array:
    """The sum of the singular values of (..., n, m); its first derivative is U V'."""
    return jnp.sum(jnp.linalg.svd(a, compute_uv=False), -1)


def narrowed(x: Array) -> Array:
    """Features x (..., n, d) turned into their row space, (..., n, min(n, d)): x Q, where x' = Q R.

    Products x x' stay, and with them the first derivative of whatever depends on them alone. Second derivatives are
    nan: they need those of Q, which has none where samples are linearly dependent, as centered ones always are.
    """
    return x if x.shape[-1] <= x.shape[-2] else _in_row_space(x)


@jax.custom_jvp
def _in_row_space(x: Array) -> Array:
    return transposed(jnp.linalg.qr(transposed(x), mode="r"))


@_in_row_space.defjvp
def _in_row_space_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    q, r = jnp.linalg.qr(transposed(x))
    return transposed(r), matmul(dx, _once(q))


@jax.custom_jvp
def _once(q: Array) -> Array:
    return q


@_once.defjvp
def _once_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return primals[0], jnp.nan * tangents[0]
