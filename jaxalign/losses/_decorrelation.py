"""A loss of one representation that keeps its channels apart."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign import _arrays, _checks, _features
from jaxalign._linalg import matmul, root, transposed
from jaxalign._typing import Data, Mask, Numbers


def decorrelation_loss(
    x: Numbers[Data, "*#batch n d"],
    *,
    std: float = 1.0,
    variance_weight: float = 1.0,
    covariance_weight: float = 0.04,
    mask: Mask[Data, "*#batch n"] | None = None,
) -> Float[Array, "*batch"]:
    """A penalty for channels that vary too little or are correlated, against collapse (VICReg, Bardes et al. 2022).

    With C the covariance of the channels, (n - 1) C = sum_i (x_i - mean)(x_i - mean)',

        variance_weight mean_k max(0, std - sqrt(C_kk)) + covariance_weight sum_(k != l) C_kl^2 / d.

    Args:
        x: features of the network in training, shape (..., n, d).
        std: the standard deviation that each channel should have, in units of the features.
        variance_weight: weight of the first term.
        covariance_weight: weight of the second term; 1 / 25 of the first one, as published.
        mask: shape (..., n), True marks valid samples.

    Returns:
        Shape (...), at least 0. A channel that does not vary has no gradient of the first term.

    Raises:
        TypeError, ValueError: x that is not features; fewer than 2 samples; a std that is not above 0, or a weight
            below 0.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (4000, 8))
        >>> bool(jaxalign.losses.decorrelation_loss(x) < 0.02)
        True
        >>> round(float(jaxalign.losses.decorrelation_loss(0 * x)), 2)
        1.0
    """
    x = _features.features("x", x)
    _checks.positive("std", std)
    for name, weight in (("variance_weight", variance_weight), ("covariance_weight", covariance_weight)):
        if _arrays.is_concrete(weight) and not weight >= 0:
            raise ValueError(f"{name} must be at least 0; got {weight}.")
    if x.ndim < 2 or x.shape[-2] < 2:
        raise ValueError(f"decorrelation_loss needs features (..., n, d) of at least 2 samples; got shape {x.shape}.")
    valid = _features.row_mask("mask", mask, x.shape[:-1])
    weights = jnp.ones_like(x[..., :1]) if valid is None else valid[..., None].astype(x.dtype)
    count = jnp.sum(weights, -2, keepdims=True)
    x = jnp.where(weights > 0, x, 0)
    _features.finite_rows("x", x, way_out="Leave out such samples with mask=.")
    centered = (x - jnp.sum(x, -2, keepdims=True) / jnp.maximum(count, 1)) * weights
    covariance = matmul(transposed(centered), centered) / jnp.maximum(count - 1, 1)
    variances = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    spread = jnp.mean(jnp.maximum(std - root(variances), 0), -1)
    shared = (jnp.sum(covariance**2, (-2, -1)) - jnp.sum(variances**2, -1)) / x.shape[-1]
    return variance_weight * spread + covariance_weight * shared
