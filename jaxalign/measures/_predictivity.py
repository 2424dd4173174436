"""How well a linear map predicts one representation from another, on held-out samples."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxalign import _checks
from jaxalign._linalg import matmul, transposed
from jaxalign._repr import shown
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.core.features import centered_columns
from jaxalign.measures._evaluate import Context, Missing, SummaryMeasure, cached, evaluate
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
    """Cross-validated R^2: the share of the variance of y that ridge regression on x explains in held-out samples.

    The i-th valid sample is held out in fold i mod `folds`: shuffle the samples if neighbors are similar (frames of a
    video). Each fold uses the penalty with the smallest leave-one-out error on its training samples.

    Args:
        x: predictors, shape (..., n, d1).
        y: features of the same samples, to be predicted, shape (..., n, d2).
        folds: the number of folds, 2 <= folds <= n / 2.
        strengths: candidate penalties, > 0, in units of the mean squared singular value of the training x.
        mask: see `hsic`.
        missing: see `hsic`.

    Returns:
        Shape (...): 1 - (squared errors) / (squared deviations from the training mean), summed over held-out samples
        and features of y. At most 1; below 0 if the mean predicts better; 0 if y does not vary. Not symmetric in x and
        y. Differentiable at fixed strengths (once if d1 or d2 is above n).

    Raises:
        TypeError, ValueError: see `hsic`; fewer than 2 folds, or than 2 samples per fold; a strength not above 0.

    Examples:
        >>> import jax, jaxalign
        >>> x, a = jax.random.normal(jax.random.key(0), (100, 8)), jax.random.normal(jax.random.key(1), (8, 3))
        >>> float(jaxalign.measures.linear_predictivity(x, x @ a)) > 0.99
        True
    """
    return evaluate(linear_predictivity_measure(folds, strengths), x, y, mask=mask, missing=missing)


@cached
def linear_predictivity_measure(folds: Any, strengths: Any) -> SummaryMeasure:
    """The measure behind `linear_predictivity`."""
    folds = _checks.whole("folds", folds, 2)
    is_sequence = isinstance(strengths, (tuple, list)) and len(strengths) > 0
    if not is_sequence or not all(isinstance(s, (int, float, np.number)) and 0 < s < float("inf") for s in strengths):
        raise ValueError(f"strengths must be a tuple of finite numbers above 0; got {shown(strengths)}.")
    combine = partial(_r_squared, folds=folds, strengths=tuple(map(float, strengths)))
    name = f"linear_predictivity with folds = {folds}"
    return SummaryMeasure("linear_predictivity", _centered, combine, 2 * folds, long_name=name)


def _centered(x: Array, context: Context) -> tuple[Array, None]:
    # Neither R^2 nor the strengths depend on the offset, unit and rotation of features.
    return narrowed(centered_columns(x, context.mask)), None


def _r_squared(x: Array, y: Array, mask: Array | None, folds: int, strengths: tuple[float, ...]) -> Array:
    n = x.shape[-2]
    valid = jnp.ones(x.shape[:-1], x.dtype) if mask is None else mask.astype(x.dtype)

    number = jnp.broadcast_to(jnp.arange(n), valid.shape) if mask is None else jnp.cumsum(mask, -1) - 1

    def fold(k: Array) -> tuple[Array, Array]:
        held_out = (number % folds == k).astype(x.dtype)
        return _fold(x, y, valid * (1 - held_out), valid * held_out, strengths)

    errors, deviations = lax.map(fold, jnp.arange(folds))
    error, deviation = jnp.sum(errors, 0), jnp.sum(deviations, 0)
    return jnp.where(deviation > 0, 1 - error / jnp.where(deviation > 0, deviation, 1), 0)


def _fold(x: Array, y: Array, train: Array, test: Array, strengths: tuple[float, ...]) -> tuple[Array, Array]:
    """Squared errors and deviations of the held-out samples, (...); train and test are 0 or 1, (..., n)."""
    train, test = train[..., None], test[..., None]
    count = jnp.maximum(jnp.sum(train, -2, keepdims=True), 1)  # (..., 1, 1)

    def centered(a: Array) -> tuple[Array, Array]:
        difference = a - jnp.sum(a * train, -2, keepdims=True) / count
        return difference * train, difference * test

    (x_train, x_test), (y_train, y_test) = centered(x), centered(y)
    size = jnp.sum(x_train * x_train, (-2, -1))[..., None] / jnp.minimum(count[..., 0], x.shape[-1])  # (..., 1)
    size = jnp.where(size > 0, size, 1)
    fixed = _decompose(*lax.stop_gradient((x_train, y_train, train, count)))
    # Smaller penalties have no effect, and would underflow.
    candidates = jnp.maximum(jnp.asarray(strengths, x.dtype), float(jnp.finfo(x.dtype).eps) ** 4)
    errors = lax.map(lambda strength: fixed.left_out_error(strength * lax.stop_gradient(size)), candidates)
    penalty = candidates[jnp.argmin(errors, 0)] * size[..., 0]
    error = (y_test - matmul(x_test, _ridge(x_train, y_train, penalty[..., None, None], fixed))) * test
    return jnp.sum(error**2, (-2, -1)), jnp.sum(y_test**2, (-2, -1))


class _Decomposition(NamedTuple):
    """The SVD x = U S V' of the centered training samples; singular values at rounding level are set to 0.

    So is the part of y outside the span of U if U spans all centered samples: no rounding error is divided by a small
    penalty.
    """

    u: Array  # (..., n, r)
    values: Array  # (..., r)
    vt: Array  # (..., r, d)
    target: Array  # (..., r, d2): U' y
    residual: Array  # (..., n, d2): y - U U' y
    leverage_outside: Array  # (..., n, 1): 1 - 1 / count - sum_k U_ik^2
    train: Array  # (..., n, 1): 1 for a training sample

    def left_out_error(self, penalty: Array) -> Array:
        """The sum of squared leave-one-out errors of the training samples; penalty (..., 1)."""
        shrinkage = penalty / (self.values**2 + penalty)  # the share along each column of U that is not predicted
        residual = matmul(self.u * shrinkage[..., None, :], self.target) + self.residual
        one_minus_leverage = jnp.sum(self.u**2 * shrinkage[..., None, :], -1, keepdims=True) + self.leverage_outside
        error = residual / jnp.where(one_minus_leverage > 0, one_minus_leverage, 1)
        return jnp.sum((error * self.train) ** 2, (-2, -1))


def _decompose(x: Array, y: Array, train: Array, count: Array) -> _Decomposition:
    u, values, vt = jnp.linalg.svd(x, full_matrices=False)
    nonzero = kept(values, x.shape[-2], ALL)
    u, values = u * nonzero[..., None, :].astype(x.dtype), jnp.where(nonzero, values, 0)
    target = matmul(transposed(u), y)
    # With count - 1 directions U spans all centered samples, so the residual is 0.
    full = (jnp.sum(nonzero, -1, dtype=x.dtype)[..., None, None] >= count - 1) | (train == 0)
    residual = jnp.where(full, 0, y - matmul(u, target))
    leverage = jnp.where(full, 0, jnp.maximum(1 - 1 / count - jnp.sum(u * u, -1, keepdims=True), 0))
    return _Decomposition(u, values, vt, target, residual, leverage, train)


def _ridge(x: Array, y: Array, penalty: Array, fixed: _Decomposition) -> Array:
    """W = (x'x + penalty)^-1 x'y; penalty (..., 1, 1)."""

    def normal(w: Array) -> Array:
        return matmul(transposed(x), matmul(x, w)) + penalty * w

    def solve(_: Any, right: Array) -> Array:
        at = lax.stop_gradient(penalty)
        inside = matmul(fixed.vt, right)
        shrunk = inside / (fixed.values[..., :, None] ** 2 + at)
        return matmul(transposed(fixed.vt), shrunk) + (right - matmul(transposed(fixed.vt), inside)) / at

    # The value is computed from the SVD, as x'x loses small singular values. The derivatives are those of one Newton
    # step on the normal equations, which are linear, so that one step solves them.
    shrunk = fixed.values / (fixed.values**2 + lax.stop_gradient(penalty[..., 0]))
    value = matmul(transposed(fixed.vt), shrunk[..., :, None] * fixed.target)
    right = matmul(transposed(x), y - matmul(x, value)) - penalty * value
    step = lax.custom_linear_solve(normal, right, solve, symmetric=True)
    step = jnp.where(jnp.isfinite(step), step, 0)
    return value + (step - lax.stop_gradient(step))
