"""Maps of channels that are fitted before a kernel: standardizing and whitening."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxalign._linalg import matmul, root, scaled
from jaxalign.core.features import center_features, centered_columns

Channels = Literal["standardize", "whiten"]


@partial(jax.tree_util.register_dataclass, data_fields=("center", "scale", "factor"), meta_fields=())
@dataclass(frozen=True)
class ChannelMap:
    """The fitted affine map of the channels of a network; unused parts are None."""

    center: Array | None = None  # (1, d)
    scale: Array | None = None  # (1, d) standard deviations; for whitening (1, 1), the unit of the covariance
    factor: Array | None = None  # (d, d) lower Cholesky factor of the shrunk covariance

    def __call__(self, x: Array) -> Array:
        if self.center is not None:
            x = x - self.center
        if self.scale is not None:
            x = x / self.scale
        if self.factor is not None:
            x = jax.scipy.linalg.solve_triangular(self.factor, x.T, lower=True).T
        return x


@partial(jax.jit, static_argnames="channels")
def map_channels(x: Array, chosen: Array, channels: Channels | None) -> tuple[ChannelMap, Array, Array]:
    """The fitted map of the channels, the mapped features, and those of the chosen samples."""
    fitted = _fit_channels(x, channels)
    x = fitted(x)
    return fitted, x, x[chosen]


def _fit_channels(x: Array, channels: Channels | None) -> ChannelMap:
    """The map of the channels that makes x (n, d) centered with unit variances, or white."""
    if channels is None:
        return ChannelMap()
    features = center_features(x)
    if channels == "standardize":
        return ChannelMap(features.center, column_spread(x, rounding=0.0))
    x = centered_columns(x, None)  # in scaled units
    covariance = matmul(x.T, x) / x.shape[0]
    shrinkage = jnp.trace(covariance) / x.shape[1]
    shrinkage = jnp.where(shrinkage > 0, shrinkage, 1)
    # Any root of the inverse gives the same distances; the Cholesky factor is differentiable at equal eigenvalues too.
    factor = jnp.linalg.cholesky(covariance + shrinkage * jnp.eye(x.shape[1], dtype=x.dtype))
    return ChannelMap(features.center, features.scale[None, None], factor)


def column_spread(x: Array, rounding: float) -> Array:
    """Standard deviation of each column, shape (1, d); 1 where it is below `rounding` times the largest entry."""
    noise = rounding * jnp.max(jnp.abs(x), 0, keepdims=True)
    x, size = scaled(x - center_features(x).center, 0)
    std = root(jnp.mean((x - jnp.mean(x, 0, keepdims=True)) ** 2, 0, keepdims=True)) * size
    return jnp.where(std > noise, std, 1)
