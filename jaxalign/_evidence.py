"""The evidence that two samples of different networks are the same: log-likelihood ratios from known pairs.

Kernel features phi (n, r) approximate the kernel of a network by inner products. Known pairs (i, j) with weights w
define the covariances C_a, C_b, C_ab of phi_a(i) and phi_b(j), regularized by lambda on the diagonal. Under a joint
Gaussian model, regularized kernel CCA (Bach and Jordan, A probabilistic interpretation of canonical correlation
analysis, 2005), the evidence for a pair (x, y) is the log-likelihood ratio of "same sample" to "unrelated samples",

    log p(x, y) / (p(x) p(y)) = x'Q y - c(x) - d(y).

Samples are divided into folds, with both samples of a known pair in the same one, and a row is scored by the model
without its own fold: a pair that an earlier round proposed never confirms itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._linalg import matmul, transposed

FOLDS = 16
# Canonical correlations are multiplied by this, or a sample with a duplicate would have infinite evidence.
_SHRINKAGE = 0.98
# Rows of the matrix of evidence that are computed at a time, at most.
TILE = 256


class Pairs(NamedTuple):
    """Known pairs of two networks, with weights in 0 .. 1; weight 0 is no pair. All of shape (..., n)."""

    partner: Array  # index in b of the partner of each sample of a
    weight: Array


class Model(NamedTuple):
    """The log-likelihood ratio phi_a Q phi_b' - c - d, with c and d as quadratic forms; all (..., r, r)."""

    cross: Array
    quadratic_a: Array
    quadratic_b: Array
    constant: Array

    @property
    def reversed(self) -> Model:
        """The same with the networks exchanged."""
        return Model(transposed(self.cross), self.quadratic_b, self.quadratic_a, self.constant)


def _inverse(a: Array) -> tuple[Array, Array]:
    """Inverse and log-determinant of a symmetric positive definite matrix."""
    factor = jnp.linalg.cholesky(a)
    inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(a.shape[0], dtype=a.dtype))
    return inverse, 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))


class _Moments(NamedTuple):
    """Weighted sums over known pairs: phi_a phi_a', phi_b phi_b', phi_a phi_b', and of the weights."""

    aa: Array
    bb: Array
    ab: Array
    weight: Array


def _moments(x: Array, y: Array, weight: Array) -> _Moments:
    wx, wy = x * weight[:, None], y * weight[:, None]
    return _Moments(matmul(wx.T, x), matmul(wy.T, y), matmul(wx.T, y), jnp.sum(weight))


def _fit(moments: _Moments, ridge: Array, related: Array) -> Model:
    """The model of the known pairs.

    With [[J_aa, J_ab], [J_ba, J_bb]] the inverse of the joint covariance, the log-likelihood ratio is
    -x'J_ab y - x'(J_aa - C_a^-1)x / 2 - y'(J_bb - C_b^-1)y / 2, times the number of pairs.
    """
    identity = ridge * jnp.eye(moments.aa.shape[0], dtype=moments.aa.dtype)
    a, b, cross = moments.aa + identity, moments.bb + identity, _SHRINKAGE * related * moments.ab
    (inverse_a, volume_a), (inverse_b, _) = _inverse(a), _inverse(b)
    onto_b = matmul(cross, inverse_b)  # regression of phi_a on phi_b
    precision_a, volume = _inverse(a - matmul(onto_b, cross.T))
    count = jnp.maximum(moments.weight, 1)
    return Model(
        cross=count * matmul(precision_a, onto_b),
        quadratic_a=count / 2 * (precision_a - inverse_a),
        quadratic_b=count / 2 * matmul(onto_b.T, matmul(precision_a, onto_b)),  # J_bb - C_b^-1, by Woodbury's identity
        constant=(volume_a - volume) / 2,
    )


def padded_size(n: int) -> int:
    """The number of rows, with padding, of networks of at most n samples: whole tiles in every fold."""
    tiles = -(-n // (FOLDS * TILE))
    return FOLDS * 8 * tiles * -(-n // (FOLDS * 8 * tiles))


def order_by_fold(key: Array, pairs: Pairs) -> tuple[Array, Array]:
    """Random orders of the samples of two networks, in which the t-th are in fold t mod FOLDS.

    Known pairs come first, at the same places in both, so that folds are of equal size and have equally many.
    """
    n, dtype = pairs.partner.shape[0], pairs.partner.dtype
    known, places = pairs.weight > 0, jnp.arange(n, dtype=dtype)
    known_b = jnp.zeros(n, bool).at[jnp.where(known, pairs.partner, n)].set(True, mode="drop")

    def shuffled(key: Array, first: Array) -> Array:
        order = jax.random.permutation(key, places)
        return order[jnp.argsort(~first[order], stable=True)]

    order_a, order_b = map(shuffled, jax.random.split(key), (known, known_b))
    return order_a, jnp.where(places < jnp.sum(known, dtype=dtype), pairs.partner[order_a], order_b)


def by_fold(values: Array) -> Array:
    """Values (n, ...) in the order of `order_by_fold` as (FOLDS, n / FOLDS, ...)."""
    return jnp.swapaxes(values.reshape(-1, FOLDS, *values.shape[1:]), 0, 1)


def held_out_models(x: Array, y: Array, weight: Array, left_out: Array, ridge: Array, related: Array) -> Model:
    """The models of known pairs without those of each fold.

    Args:
        x: kernel features of network a, by fold (FOLDS, m, r).
        y: those of their partners.
        weight: weights of the pairs, (FOLDS, m).
        left_out: weights of those that are left out with their fold.
        ridge: lambda.
        related: 0 or 1; 0: there is no evidence.

    Returns:
        Models stacked along the first axis.
    """
    flat = [values.reshape(-1, *values.shape[2:]) for values in (x, y, weight)]
    parts = jax.vmap(_moments)(x, y, left_out)
    others = jax.tree.map(lambda total, part: total[None] - part, _moments(*flat), parts)
    return lax.map(lambda moments: _fit(moments, ridge, related), others)


def visit_evidence(visit: Callable[[Array, Array], Any], models: Model, x: Array, order: Array, y: Array) -> Any:
    """Visit the evidence of rows against all samples of another network, in tiles.

    Args:
        visit: called with evidence (t, n), by the model without the fold of the row, and indices of the rows (t,).
        models: of each fold.
        x: kernel features of all samples of the rows' network, (n, r).
        order: the rows by fold, (m,), m a multiple of FOLDS.
        y: kernel features of the other network, (n, r).

    Returns:
        What visits return, along the first axis, in the order of the tiles.
    """

    def quadratic(rows: Array, forms: Array) -> Array:
        return jnp.sum(matmul(rows, forms) * rows, -1)

    rows = by_fold(order)
    of_rows = x[rows]
    left = matmul(of_rows, models.cross)
    c = quadratic(of_rows, models.quadratic_a)
    d = lax.map(lambda form: quadratic(y, form), models.quadratic_b) - models.constant[:, None]
    tiles = -(-rows.shape[1] // TILE)
    left, c, rows = (values.reshape(FOLDS * tiles, -1, *values.shape[2:]) for values in (left, c, rows))

    def tile(number: Array) -> Any:
        evidence = matmul(left[number], y.T) - c[number][:, None] - d[number // tiles][None]
        return visit(evidence, rows[number])

    visited = lax.map(tile, jnp.arange(FOLDS * tiles))
    return jax.tree.map(lambda values: values.reshape(-1, *values.shape[2:]), visited)


@partial(jax.jit, static_argnames="rank")
def kernel_features(block: Array, rows: Array, rank: int) -> Array:
    """Features (n, rank) whose inner products approximate a centered kernel, by Nystrom's method.

    A wide kernel is nearly constant: it is centered before its eigenvectors are taken, or rounding would hide them.

    Args:
        block: kernel between m inducing samples, (m, m).
        rows: kernel between all samples and the inducing ones, (n, m).
        rank: number of leading eigenvectors, at most m.
    """
    mean = jnp.mean(block, 0, keepdims=True)
    rows = rows - jnp.mean(rows, 1, keepdims=True) - (mean - jnp.mean(mean))
    block = block - mean.T - (mean - jnp.mean(mean))
    values, vectors = jnp.linalg.eigh(block)
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    usable = values > block.shape[0] * jnp.finfo(block.dtype).eps * values[0]
    inverse_root = jnp.where(usable, 1 / jnp.sqrt(jnp.where(usable, values, 1)), 0)
    phi = matmul(rows, vectors * inverse_root[None])
    return phi - jnp.mean(phi, 0, keepdims=True)
