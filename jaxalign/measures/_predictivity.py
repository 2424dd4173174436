"""How well one set predicts the other by a linear map, on samples that were not used to fit it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxalign import _checks
from jaxalign._linalg import matmul, transposed
from jaxalign._typing import AnyArray
from jaxalign.measures._evaluate import Missing, SetMeasure, Setting, evaluate

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)


def linear_predictivity(
    x: Float[AnyArray, "*#batch n d1"],
    y: Float[AnyArray, "*#batch n d2"],
    *,
    folds: int = 5,
    strengths: tuple[float, ...] = STRENGTHS,
    mask: Bool[AnyArray, "*#batch n"] | None = None,
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
        do not play the same part. Differentiable at fixed strengths.

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
def linear_predictivity_measure(folds: Any, strengths: Any) -> SetMeasure:
    """The measure behind `linear_predictivity`."""
    folds = _checks.whole("folds", folds, 2)
    several = isinstance(strengths, (tuple, list)) and len(strengths) > 0
    if not several or not all(isinstance(s, (int, float, np.number)) and 0 < s < float("inf") for s in strengths):
        raise ValueError(f"strengths must be a tuple of finite numbers above 0; got {_checks.shown(strengths)}.")
    combine = partial(_predicted, folds=folds, strengths=tuple(map(float, strengths)))
    name = f"linear_predictivity with folds = {folds}"
    return SetMeasure("linear_predictivity", _as_it_is, combine, 2 * folds, label=name)


def _as_it_is(x: Array, setting: Setting) -> tuple[Array, None]:
    del setting
    top = lax.stop_gradient(jnp.max(jnp.abs(x), (-2, -1), keepdims=True))
    return x / jnp.where(jnp.isfinite(top) & (top > 0), top, 1), None  # neither R^2 nor the strengths have a unit


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
    u, values, vt = jnp.linalg.svd(lax.stop_gradient(x_train), full_matrices=False)
    squares = values**2
    bound = jnp.minimum(count[..., 0], x.shape[-1])
    size = jnp.sum(x_train * x_train, (-2, -1))[..., None] / bound  # (..., 1)
    size = jnp.where(size > 0, size, 1)
    fixed_size = lax.stop_gradient(size)
    target = lax.stop_gradient(y_train)
    on_basis = matmul(transposed(u), target)

    def left_out(strength: Array) -> Array:
        """Squared error of each training sample predicted from the others, summed up."""
        shrunk = squares / (squares + strength * fixed_size)
        residual = (target - matmul(u * shrunk[..., None, :], on_basis)) * train
        leverage = 1 / count + jnp.sum(u * u * shrunk[..., None, :], -1, keepdims=True)
        own = jnp.maximum(1 - leverage, float(jnp.finfo(x.dtype).eps))
        return jnp.sum((residual / own) ** 2, (-2, -1))

    candidates = jnp.asarray(strengths, x.dtype)
    best = jnp.argmin(lax.map(left_out, candidates), 0)
    penalty = (candidates[best] * size[..., 0])[..., None, None]

    def normal(b: Array) -> Array:
        return matmul(transposed(x_train), matmul(x_train, b)) + penalty * b

    def solve(_: Any, right: Array) -> Array:
        inside = matmul(vt, right)
        fixed = lax.stop_gradient(penalty)
        shrunk = inside / (squares[..., :, None] + fixed)
        return matmul(transposed(vt), shrunk) + (right - matmul(transposed(vt), inside)) / fixed

    map_to_y = lax.custom_linear_solve(normal, matmul(transposed(x_train), y_train), solve, symmetric=True)
    error = (y_test - matmul(x_test, map_to_y)) * test
    return jnp.sum(error**2, (-2, -1)), jnp.sum(y_test**2, (-2, -1))
