"""Distances between shapes: the difference that remains after the best rotation.

Columns are centered. With s the sum of the singular values of x'y, the smallest ||x - y Q||_F over rotations Q is
sqrt(||x||^2 + ||y||^2 - 2 s) (Schönemann 1966). For representations of unit Frobenius norm that is sqrt(2 - 2 s), and
the angle is arccos(s) (Williams et al. 2021).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxalign import _checks
from jaxalign._linalg import bounded, matmul, root, transposed, unit
from jaxalign._repr import shown
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.core.features import scaled_columns
from jaxalign.measures._evaluate import Context, Missing, SummaryMeasure, cached, evaluate
from jaxalign.measures._spectra import leading, narrowed, nuclear_norm

Result = Literal["distance", "angular", "similarity"]


def procrustes(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    *,
    normalize: bool = True,
    result: Result = "distance",
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
) -> Float[Array, "*batch"]:
    """Procrustes distance: the distance of two centered representations after the best rotation or reflection.

    With s the sum of the singular values of x'y, min_Q ||x - y Q||_F = sqrt(||x||^2 + ||y||^2 - 2 s) (Schönemann 1966,
    Williams et al. 2021, eq. 5). The distance is not squared and not divided by n.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2); the narrower representation is padded with zeros.
        normalize: True scales each centered representation to unit Frobenius norm, so that the distance has no unit.
            False keeps their norms: the distance is in units of the features and grows with sqrt(n).
        result: "distance" sqrt(2 - 2 s), from 0 to sqrt(2); "angular" arccos(s), from 0 to pi / 2; "similarity" s. With
            normalize=False only "distance", from 0 to sqrt(||x||^2 + ||y||^2).
        mask: see `hsic`.
        missing: see `hsic`.

    Returns:
        Shape (...). Distance and angle are metrics. s is 0 if a representation does not vary. Once differentiable; the
        derivatives of distance and angle are set to 0 at 0.

    Raises:
        TypeError, ValueError: see `hsic`; fewer than 2 samples; "angular" or "similarity" with normalize=False.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> float(jaxalign.measures.procrustes(x, 3 * x[:, ::-1] + 1)) < 1e-3
        True
        >>> x -= x.mean(0, keepdims=True)
        >>> distance = jaxalign.measures.procrustes(x, 3 * x[:, ::-1] + 1, normalize=False)
        >>> bool(abs(distance - 2 * jax.numpy.linalg.norm(x)) < 1e-3)
        True
    """
    return evaluate(procrustes_measure(normalize, result), x, y, mask=mask, missing=missing)


def shape_distance(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    *,
    alpha: float | int = 1.0,
    normalize: bool = True,
    result: Result = "angular",
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
) -> Float[Array, "*batch"]:
    """Generalized shape metrics (Williams et al. 2021), from Procrustes (alpha = 1) to CCA (alpha = 0).

    Each representation, centered and scaled to unit Frobenius norm, is multiplied by alpha I + (1 - alpha)
    (x'x)^(-1/2), scaled to unit norm again, and compared as in `procrustes`. The first scaling makes the result
    independent of the unit of the features.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        alpha: 1 compares geometry up to rotation; 0 up to any invertible linear map; between, partly whitened.
        normalize: False skips the first scaling, and scales the whitened features to the norm of the centered features,
            so that the distance is in units of the features. For 0 < alpha < 1 the amount of whitening depends on that
            unit.
        result: "angular" arccos(s), "distance" sqrt(2 - 2 s) or "similarity" s. With normalize=False only "distance".
        mask: see `hsic`.
        missing: see `hsic`.

    Returns:
        Shape (...). Angle and distance are metrics. Once differentiable, see `procrustes`.

    Raises:
        TypeError, ValueError: see `procrustes`; alpha outside [0, 1].

    Examples:
        >>> import jax, jaxalign
        >>> x, a = jax.random.normal(jax.random.key(0), (100, 8)), jax.random.normal(jax.random.key(1), (8, 8))
        >>> float(jaxalign.measures.shape_distance(x, x @ a, alpha=0.0)) < 1e-2
        True
    """
    return evaluate(shape_distance_measure(alpha, normalize, result), x, y, mask=mask, missing=missing)


@cached
def procrustes_measure(normalize: Any, result: Any) -> SummaryMeasure:
    """The measure behind `procrustes`."""
    return _measure("procrustes", 1.0, normalize, result)


@cached
def shape_distance_measure(alpha: Any, normalize: Any, result: Any) -> SummaryMeasure:
    """The measure behind `shape_distance`."""
    if not (isinstance(alpha, (int, float, np.number)) and 0 <= alpha <= 1):
        raise ValueError(f"alpha must be a number from 0 (CCA) to 1 (Procrustes); got {shown(alpha)}.")
    return _measure("shape_distance", float(alpha), normalize, result)


def _measure(name: str, alpha: float, normalize: Any, result: Any) -> SummaryMeasure:
    _checks.choice("normalize", normalize, (True, False))
    _checks.choice("result", result, ("distance", "angular", "similarity"))
    if not normalize and result != "distance":
        raise ValueError(
            f"result={result!r} is defined for representations of unit norm: with normalize=False pass "
            'result="distance", or leave normalize=False out.'
        )
    shape = partial(_shape, alpha=alpha, normalize=normalize)
    return SummaryMeasure(name, shape, partial(_compare, normalize=normalize, result=result), 2)


class _Shape(NamedTuple):
    features: Array  # (n, min(n, d)), centered, partly whitened
    scale: Array | None  # (), a power of two: the unit of the features; None if their norm is 1


def _shape(x: Array, context: Context, alpha: float, normalize: bool) -> tuple[_Shape, None]:
    matrix = (-2, -1)
    x, scale = scaled_columns(x, context.mask)
    x = narrowed(x)
    if normalize:
        x = unit(x, matrix)
        return _Shape(x if alpha == 1 else unit(alpha * x + (1 - alpha) * leading(x)[0], matrix), None), None
    if alpha != 1:
        # In the unit of the features, alpha scale x + (1 - alpha) x (x'x)^(-1/2), up to a factor.
        whitened = jnp.maximum(alpha * scale, 1 - alpha)
        mixed = (alpha * scale / whitened) * x + ((1 - alpha) / whitened) * leading(x)[0]
        x = unit(mixed, matrix) * root(jnp.sum(x * x, matrix))
    return _Shape(x, scale), None


def _compare(first: _Shape, second: _Shape, mask: Array | None, normalize: bool, result: Result) -> Array:
    del mask
    x, y, scale = first.features, second.features, None
    if first.scale is not None and second.scale is not None:
        scale = jnp.maximum(first.scale, second.scale)
        x, y = (first.scale / scale) * x, (second.scale / scale) * y
    product = matmul(transposed(x), y)
    similarity = nuclear_norm(product)
    if normalize:
        similarity = bounded(similarity, 0, 1)
    if result == "similarity":
        return similarity
    squares = jnp.full_like(similarity, 2) if normalize else jnp.sum(x * x) + jnp.sum(y * y)
    # |x|^2 + |y|^2 - 2 s loses half the digits of a small distance, so the value is ||x - y Q||^2, and the formula
    # supplies the derivatives.
    formula = squares - 2 * similarity
    exact = _squared_distance(*lax.stop_gradient((x, y, product)))
    exact = lax.stop_gradient(jnp.where(_any_is_zero(x, y), squares, exact))
    rounding = (8 * float(jnp.finfo(exact.dtype).eps)) ** 2 * lax.stop_gradient(squares) / 2
    equal = exact <= rounding  # the derivative is not defined
    distance = root(exact + jnp.where(equal, 0, formula - lax.stop_gradient(formula)))
    if scale is not None:
        return scale * distance
    distance = bounded(distance, 0, 2**0.5)
    return distance if result == "distance" else 2 * jnp.arcsin(distance / 2)  # between unit vectors


def _any_is_zero(x: Array, y: Array) -> Array:
    """Whether a representation does not vary, and so has no shape."""
    return jnp.all(x == 0) | jnp.all(y == 0)


def _squared_distance(x: Array, y: Array, product: Array) -> Array:
    """||x - y Q||^2 with the best rotation Q, the narrower representation padded with zeros."""
    u, _, vt = jnp.linalg.svd(product, full_matrices=False)
    x_turned, y_turned = matmul(x, u), matmul(y, transposed(vt))
    squares = jnp.sum((x_turned - y_turned) ** 2, (-2, -1))
    for rows, turned, back in ((x, x_turned, transposed(u)), (y, y_turned, vt)):
        if rows.shape[-1] > turned.shape[-1]:
            squares += jnp.sum((rows - matmul(turned, back)) ** 2, (-2, -1))
    return squares
