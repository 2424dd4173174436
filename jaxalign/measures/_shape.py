"""Distances between shapes: what is left of the difference after the best rotation.

Columns are centred and each set scaled to unit Frobenius norm; with s the sum of the singular values of x'y, the best
rotation leaves ||x - y Q||_F = sqrt(2 - 2 s), and the angle arccos(s) (Schönemann 1966; Williams et al. 2021).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxalign import _checks
from jaxalign._linalg import bounded, matmul, root, transposed, unit
from jaxalign._typing import AnyArray
from jaxalign.core.features import centered_columns
from jaxalign.measures._evaluate import Context, Missing, SummaryMeasure, evaluate
from jaxalign.measures._spectra import leading, narrowed, nuclear_norm

Result = Literal["distance", "angular", "similarity"]


def procrustes(
    x: Float[AnyArray, "*#batch n d1"],
    y: Float[AnyArray, "*#batch n d2"],
    *,
    result: Result = "distance",
    mask: Bool[AnyArray, "*#batch n"] | None = None,
    missing: Missing = "raise",
) -> Float[Array, "*batch"]:
    """Procrustes: how close two sets come by shifting, scaling to unit size, and the best rotation or reflection.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2); the narrower set counts as padded with zeros.
        result: "distance" sqrt(2 - 2 s), from 0 to sqrt(2); "angular" arccos(s), from 0 to pi/2; "similarity" s itself.
        mask: see `hsic`.
        missing: see `hsic`.

    Returns:
        Shape (...). Distance and angle are metrics. A set that does not vary has s = 0 with all. Once differentiable;
        the derivatives of distance and angle at 0 are taken as 0.

    Raises:
        TypeError, ValueError: see `hsic`; fewer than 2 samples.

    Example:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> float(jaxalign.measures.procrustes(x, 3 * x[:, ::-1] + 1)) < 1e-3
        True
    """
    return evaluate(procrustes_measure(result), x, y, mask=mask, missing=missing)


def shape_distance(
    x: Float[AnyArray, "*#batch n d1"],
    y: Float[AnyArray, "*#batch n d2"],
    *,
    alpha: float | int = 1.0,
    result: Result = "angular",
    mask: Bool[AnyArray, "*#batch n"] | None = None,
    missing: Missing = "raise",
) -> Float[Array, "*batch"]:
    """Generalised shape metrics (Williams et al. 2021): from Procrustes (alpha = 1) to CCA (alpha = 0).

    Each set, centred and scaled to unit Frobenius norm, is multiplied by alpha I + (1 - alpha) (x'x)^(-1/2), scaled to
    unit norm again, and compared as by `procrustes`. Scaling first makes the result independent of the unit of
    features.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        alpha: 1 compares geometry up to rotation; 0 up to any invertible linear map; between, partly whitened.
        result: "angular" arccos(s), "distance" sqrt(2 - 2 s) or "similarity" s.
        mask: see `hsic`.
        missing: see `hsic`.

    Returns:
        Shape (...). Angle and distance are metrics. Once differentiable, see `procrustes`.

    Raises:
        TypeError, ValueError: see `hsic`; alpha outside [0, 1].

    Example:
        >>> import jax, jaxalign
        >>> x, a = jax.random.normal(jax.random.key(0), (100, 8)), jax.random.normal(jax.random.key(1), (8, 8))
        >>> float(jaxalign.measures.shape_distance(x, x @ a, alpha=0.0)) < 1e-2
        True
    """
    return evaluate(shape_distance_measure(alpha, result), x, y, mask=mask, missing=missing)


@_checks.cached
def procrustes_measure(result: Any) -> SummaryMeasure:
    """The measure behind `procrustes`."""
    _checks.choice("result", result, ("distance", "angular", "similarity"))
    return SummaryMeasure("procrustes", partial(_shape, alpha=1.0), partial(_compared, result=result), 2)


@_checks.cached
def shape_distance_measure(alpha: Any, result: Any) -> SummaryMeasure:
    """The measure behind `shape_distance`."""
    _checks.choice("result", result, ("distance", "angular", "similarity"))
    if not (isinstance(alpha, (int, float, np.number)) and 0 <= alpha <= 1):
        raise ValueError(f"alpha must be a number from 0 (CCA) to 1 (Procrustes); got {_checks.shown(alpha)}.")
    return SummaryMeasure("shape_distance", partial(_shape, alpha=float(alpha)), partial(_compared, result=result), 2)


def _shape(x: Array, context: Context, alpha: float) -> tuple[Array, None]:
    matrix = (-2, -1)
    x = unit(narrowed(centered_columns(x, context.mask)), matrix)
    return (x if alpha == 1 else unit(alpha * x + (1 - alpha) * leading(x)[0], matrix)), None


def _compared(x: Array, y: Array, mask: Array | None, result: Result) -> Array:
    del mask
    product = matmul(transposed(x), y)
    similarity = bounded(nuclear_norm(product), 0, 1)
    if result == "similarity":
        return similarity
    # 2 - 2 s loses half the digits of a small distance; what the rotation leaves does not. Its derivatives are those
    # of the formula.
    formula = 2 - 2 * similarity
    exact = _left_over(*lax.stop_gradient((x, y, product)))
    equal = exact <= (8 * float(jnp.finfo(exact.dtype).eps)) ** 2  # to rounding: there is no direction to move in
    distance = bounded(root(exact + jnp.where(equal, 0, formula - lax.stop_gradient(formula))), 0, 2**0.5)
    return distance if result == "distance" else 2 * jnp.arcsin(distance / 2)  # between unit vectors


def _left_over(x: Array, y: Array, product: Array) -> Array:
    """||x - y Q||^2 after the best rotation Q, the narrower of the two padded with zeros."""
    u, _, vt = jnp.linalg.svd(product, full_matrices=False)
    x_turned, y_turned = matmul(x, u), matmul(y, transposed(vt))
    squares = jnp.sum((x_turned - y_turned) ** 2, (-2, -1))
    for rows, turned, back in ((x, x_turned, transposed(u)), (y, y_turned, vt)):
        if rows.shape[-1] > turned.shape[-1]:
            squares += jnp.sum((rows - matmul(turned, back)) ** 2, (-2, -1))
    no_shape = jnp.any(jnp.stack([jnp.all(rows == 0, (-2, -1)) for rows in (x, y)]), 0)
    return jnp.where(no_shape, 2, squares)
