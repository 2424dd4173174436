"""Squared Euclidean distances between rows."""

from __future__ import annotations

from functools import partial

import jax
from jax import lax
from jaxtyping import Array, Float

from jaxalign import _features
from jaxalign._memory import check_stored
from jaxalign._typing import Data, Numbers
from jaxalign.core.devices import ROWS_SECOND_LAST, batched, in_auto_mode
from jaxalign.core.features import attach_derivative, center_features, fast_distances
from jaxalign.core.resolved import resolved_distances


def squared_distances(
    x: Numbers[Data, "*#batch n d"],
    y: Numbers[Data, "*#batch m d"] | None = None,
    *,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "*batch n m"]:
    """Squared Euclidean distances D_ij = ||x_i - y_j||^2 between rows.

    Args:
        x: features, shape (..., n, d). float16 and bfloat16 are accumulated, and returned, in float32.
        y: features, shape (..., m, d); None: x.
        precision: of the matrix product, as in `jax.numpy.matmul`. None means HIGHEST: the default of JAX, TF32 on
            NVIDIA GPUs and bfloat16 on TPUs, is too coarse for differences of products.

    Returns:
        Squared distances, shape (..., n, m), in squared units of the features, never negative. With y = None the
        matrix is symmetric and its diagonal exactly 0.

    The features are centered and scaled before |a|^2 + |b|^2 - 2 a.b is computed, so an offset costs no digits. The
    absolute error of this formula is about eps max_i ||x_i - mean||^2. Distances too small for it are recomputed from
    explicit differences (unless `precision` is set), which takes longer if there are many.

    Raises:
        TypeError: features that are not real numbers (complex, strings, dates, objects), or are a torch tensor.
        ValueError: wrong number of dimensions, an empty array, or x and y with different numbers of features.
        MemoryError: n x m does not fit into the memory of the CPU.

    Examples:
        >>> import jax.numpy as jnp, jaxalign
        >>> jaxalign.squared_distances(jnp.array([[0.0, 0.0], [3.0, 4.0]]))
        Array([[ 0., 25.],
               [25.,  0.]], dtype=float32)
    """
    x, y = _features.feature_pair(x, y)
    check_stored("the distances", x, y)
    return _squared_distances(x, y, precision)


@partial(jax.jit, static_argnames="precision")
def _squared_distances(x: Array, y: Array | None, precision: lax.PrecisionLike) -> Array:
    def compute(x: Array, y: Array | None) -> Array:
        features = center_features(x, y)
        distances = fast_distances(features, precision) if precision is not None else resolved_distances(features)
        distances = attach_derivative(features, distances)
        return distances * features.scale * features.scale  # scale^2 alone may overflow although the product does not

    return in_auto_mode(batched(compute, x.ndim - 2), x, y, result_rows=ROWS_SECOND_LAST)
