"""How well one set predicts the other by a linear map, on samples that were not used to fit it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxalign import _checks
from jaxalign._linalg import matmul, transposed
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.core.features import centered_columns
from jaxalign.measures._evaluate import Context, Missing, SummaryMeasure, evaluate
from jaxalign.measures._spectra import ALL, kept, narrowed

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)


def linear_predictivity(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    *,
    folds: int = 5,
    strengths: tuple[float, ...] = STRENGTHS,
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
) -> Float[Array, "*batch"]:
    """The share of the variance of y that ridge regression on x explains in samples held out: R^2, cross-validated.

    The i-th real sample is held out in fold i mod `folds`: shuffle samples that follow each other closely (frames of a
    film). In each fold the strength of the penalty is the one with the smallest leave-one-out error on the training
    samples.

    Args:
        x: features that predict, shape (..., n, d1).
        y: features of the same samples to be predicted, shape (..., n, d2).
        folds: how many folds, 2 <= folds <= n / 2.
        strengths: penalties to choose from, > 0, in units of the mean squared singular value of the training x.
        mask: see `hsic`.
        missing: see `hsic`.

    Returns:
        Shape (...): 1 - (squared errors) / (squared deviations from the training mean), summed over held-out samples
        and features of y. At most 1; below 0 where the mean predicts better. 0 where y does not vary. x and y
        do not play the same part. Differentiable at fixed strengths (once, where d1 or d2 is above n).

    Raises:
        TypeError, ValueError: see `hsic`; fewer than 2 folds or 2 samples a fold; a strength not above 0.

    Example:
        >>> import jax, jaxalign
        >>> x, a = jax.random.normal(jax.random.key(0), (100, 8)), jax.random.normal(jax.random.key(1), (8, 3))
        >>> float(jaxalign.measures.linear_predictivity(x, x @ a)) > 0.99
        True
    """
    return evaluate(linear_predictivity_measure(folds, strengths), x, y, mask=mask, missing=missing)


@_checks.cached
def linear_predictivity_measure(folds: Any, strengths: Any) -> SummaryMeasure:
    """The measure behind `linear_predictivity`."""
    folds = _checks.whole("folds", folds, 2)
    several = isinstance(strengths, (tuple, list)) and len(strengths) > 0
    if not several or not all(isinstance(s, (int, float, np.number)) and 0 < s < float("inf") for s in strengths):
        raise ValueError(f"strengths must be a tuple of finite numbers above 0; got {_checks.shown(strengths)}.")
    combine = partial(_predicted, folds=folds, strengths=tuple(map(float, strengths)))
    name = f"linear_predictivity with folds = {folds}"
    return SummaryMeasure("linear_predictivity", _centred, combine, 2 * folds, long_name=name)


def _centred(x: Array, context: Context) -> tuple[Array, None]:
    # Neither R^2 nor the strengths depend on offset, unit and rotation.
    return narrowed(centered_columns(x, context.mask)), None


def _predicted(x: Array, y: Array, mask: Array | None, folds: int, strengths: tuple[float, ...]) -> Array:
    n = x.shape[-2]
    real = jnp.ones(x.shape[:-1], x.dtype) if mask is None else mask.astype(x.dtype)

    number = jnp.broadcast_to(jnp.arange(n), real.shape) if mask is None else jnp.cumsum(mask, -1) - 1

    def fold(k: Array) -> tuple[Array, Array]:
        held_out = (number % folds == k).astype(x.dtype)
        return _fold(x, y, real * (1 - held_out), real * held_out, strengths)

    errors, deviations = lax.map(fold, jnp.arange(folds))
    error, deviation = jnp.sum(errors, 0), jnp.sum(deviations, 0)
    return jnp.where(deviation > 0, 1 - error / jnp.where(deviation > 0, deviation, 1), 0)


def _fold(x: Array, y: Array, train: Array, test: Array, strengths: tuple[float, ...]) -> tuple[Array, Array]:
    """Squared errors and deviations of the held-out samples, (...); train and test are weights 0 or 1, (..., n)."""
    train, test = train[..., None], test[..., None]
    count = jnp.maximum(jnp.sum(train, -2, keepdims=True), 1)  # (..., 1, 1)

    def centred(a: Array) -> tuple[Array, Array]:
        less_mean = a - jnp.sum(a * train, -2, keepdims=True) / count
        return less_mean * train, less_mean * test

    (x_train, x_test), (y_train, y_test) = centred(x), centred(y)
    size = jnp.sum(x_train * x_train, (-2, -1))[..., None] / jnp.minimum(count[..., 0], x.shape[-1])  # (..., 1)
    size = jnp.where(size > 0, size, 1)
    fixed = _decomposed(*lax.stop_gradient((x_train, y_train, train, count)))
    # Below this a penalty changes nothing, and would underflow.
    candidates = jnp.maximum(jnp.asarray(strengths, x.dtype), float(jnp.finfo(x.dtype).eps) ** 4)
    errors = lax.map(lambda strength: fixed.left_out_error(strength * lax.stop_gradient(size)), candidates)
    penalty = candidates[jnp.argmin(errors, 0)] * size[..., 0]
    error = (y_test - matmul(x_test, _ridge(x_train, y_train, penalty[..., None, None], fixed))) * test
    return jnp.sum(error**2, (-2, -1)), jnp.sum(y_test**2, (-2, -1))


class _Decomposed(NamedTuple):
    """x = U S V' of the training samples, their means taken away; what is rounding of S, and of what lies beside U, 0.

    No penalty, however small, then divides rounding: what it shrinks is in U, and what it leaves is beside U.
    """

    u: Array  # (..., n, r)
    values: Array  # (..., r)
    vt: Array  # (..., r, d)
    target: Array  # (..., r, d2): U' y
    beside: Array  # (..., n, d2): y - U U' y
    leverage_beside: Array  # (..., n, 1): 1 - 1 / count - sum_k U_ik^2
    train: Array  # (..., n, 1): 1 a training sample

    def left_out_error(self, penalty: Array) -> Array:
        """Squared error of each training sample predicted from the others, summed up; penalty (..., 1)."""
        left = penalty / (self.values**2 + penalty)  # of what lies in U, what is not predicted
        residual = matmul(self.u * left[..., None, :], self.target) + self.beside
        own = jnp.sum(self.u**2 * left[..., None, :], -1, keepdims=True) + self.leverage_beside
        return jnp.sum((residual / jnp.where(own > 0, own, 1) * self.train) ** 2, (-2, -1))


def _decomposed(x: Array, y: Array, train: Array, count: Array) -> _Decomposed:
    u, values, vt = jnp.linalg.svd(x, full_matrices=False)
    real = kept(values, x.shape[-2], ALL)
    u, values = u * real[..., None, :].astype(x.dtype), jnp.where(real, values, 0)
    target = matmul(transposed(u), y)
    # As many directions as samples less their mean: nothing lies beside them.
    full = (jnp.sum(real, -1, dtype=x.dtype)[..., None, None] >= count - 1) | (train == 0)
    beside = jnp.where(full, 0, y - matmul(u, target))
    leverage = jnp.where(full, 0, jnp.maximum(1 - 1 / count - jnp.sum(u * u, -1, keepdims=True), 0))
    return _Decomposed(u, values, vt, target, beside, leverage, train)


def _ridge(x: Array, y: Array, penalty: Array, fixed: _Decomposed) -> Array:
    """W = (x'x + penalty)^-1 x'y; penalty (..., 1, 1)."""

    def normal(w: Array) -> Array:
        return matmul(transposed(x), matmul(x, w)) + penalty * w

    def solve(_: Any, right: Array) -> Array:
        at = lax.stop_gradient(penalty)
        inside = matmul(fixed.vt, right)
        shrunk = inside / (fixed.values[..., :, None] ** 2 + at)
        return matmul(transposed(fixed.vt), shrunk) + (right - matmul(transposed(fixed.vt), inside)) / at

    # The value comes from the singular values, as x'y has lost the small ones; its derivatives from one Newton step on
    # the normal equations, which are linear: it ends at their solution, whatever it starts from.
    shrunk = fixed.values / (fixed.values**2 + lax.stop_gradient(penalty[..., 0]))
    value = matmul(transposed(fixed.vt), shrunk[..., :, None] * fixed.target)
    right = matmul(transposed(x), y - matmul(x, value)) - penalty * value
    step = lax.custom_linear_solve(normal, right, solve, symmetric=True)
    step = jnp.where(jnp.isfinite(step), step, 0)
    return value + (step - lax.stop_gradient(step))
