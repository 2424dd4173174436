"""Singular values and directions of features, with derivatives that stay finite where singular values are equal."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
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


def leading(x: Array, keep: Keep = ALL) -> Array:
    """U V' of the kept singular directions of x (..., n, d): x with all its singular values made 1, or 0.

    With all kept that is x (x'x)^(-1/2), the orthonormal columns closest to x.
    """
    return _leading(x, keep)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _leading(x: Array, keep: Keep) -> Array:
    return _decomposed(x, keep)[0]


def _decomposed(x: Array, keep: Keep) -> tuple[Array, Array, Array, Array, Array]:
    u, values, vt = jnp.linalg.svd(x, full_matrices=False)
    which = kept(values, x.shape[-2], keep)
    return matmul(u * which[..., None, :].astype(x.dtype), vt), u, values, vt, which


@_leading.defjvp
def _leading_jvp(keep: Keep, primals: Any, tangents: Any) -> tuple[Array, Array]:
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
    return value, tangent


def rank(x: Array, keep: Keep = ALL) -> Array:
    """How many singular directions are kept, (...)."""
    values = jnp.linalg.svd(lax.stop_gradient(x), compute_uv=False)
    return jnp.sum(kept(values, x.shape[-2], keep), -1)


def nuclear_norm(a: Array) -> Array:
    """The sum of the singular values of (..., n, m); its first derivative is U V'."""
    return jnp.sum(jnp.linalg.svd(a, compute_uv=False), -1)


def centred_columns(x: Array, mask: Array | None) -> Array:
    """Columns less their mean over real rows, with entries of about 1; masked rows, and columns of one value, are 0."""
    top = lax.stop_gradient(jnp.max(jnp.abs(x), (-2, -1), keepdims=True))
    x = x / jnp.where(jnp.isfinite(top) & (top > 0), top, 1)  # so that squares neither overflow nor vanish
    weight = jnp.ones((*x.shape[:-1], 1), x.dtype) if mask is None else mask[..., None].astype(x.dtype)
    count = jnp.maximum(jnp.sum(weight, -2, keepdims=True), 1)
    centred = (x - jnp.sum(x * weight, -2, keepdims=True) / count) * weight
    # Columns of one value: what is left is the rounding of their mean.
    size = lax.stop_gradient(jnp.max(jnp.abs(centred), -2, keepdims=True))
    noise = 4 * float(jnp.finfo(x.dtype).eps) * lax.stop_gradient(jnp.max(jnp.abs(x), -2, keepdims=True))
    centred = jnp.where(size > noise, centred, 0)
    top = lax.stop_gradient(jnp.max(jnp.abs(centred), (-2, -1), keepdims=True))
    return centred / jnp.where(top > 0, top, 1)
