"""Canonical correlations: which linear combinations of features two representations share.

The canonical correlations are the singular values of P_x' P_y, where P = x (x'x)^(-1/2) and the columns of x are
centered (Hotelling 1936). There are as many as the smaller of the two ranks. With as many features as samples, every
correlation is 1, whatever the features: use more samples, `svcca`, or a measure that is not invariant to all invertible
linear maps.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxalign import _checks
from jaxalign._linalg import bounded, matmul, transposed
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.core.features import centered_columns
from jaxalign.measures._evaluate import Context, Missing, SummaryMeasure, cached, evaluate
from jaxalign.measures._spectra import ALL, Keep, leading, narrowed, nuclear_norm


def cca(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    *,
    result: Literal["mean", "mean_squared"] = "mean",
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
) -> Float[Array, "*batch"]:
    """Mean canonical correlation of two representations, or mean squared canonical correlation.

    Args:
        x: features, shape (..., n, d1), n well above d1 + d2.
        y: features of the same samples, shape (..., n, d2).
        result: "mean" of the canonical correlations, or "mean_squared" (R^2_CCA of Kornblith et al. 2019).
        mask: see `hsic`.
        missing: see `hsic`.

    Returns:
        Shape (...), from 0 to 1. For independent representations it is at least about min(d) / n, so far above 0
        unless n is large. 0 if a representation does not vary. Once differentiable.

    Raises:
        TypeError, ValueError: see `hsic`; fewer than 2 samples.

    Examples:
        >>> import jax, jaxalign
        >>> x, a = jax.random.normal(jax.random.key(0), (100, 8)), jax.random.normal(jax.random.key(1), (8, 8))
        >>> round(float(jaxalign.measures.cca(x, x @ a)), 3)
        1.0
    """
    return evaluate(cca_measure(result), x, y, mask=mask, missing=missing)


def pwcca(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    *,
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
) -> Float[Array, "*batch"]:
    """Projection-weighted CCA (Morcos et al. 2018): canonical correlations weighted by how much of x they explain.

    The weight of the canonical variate h_i of x is sum_j |<h_i, x_j>| over the columns x_j of x, so the measure is not
    symmetric in x and y. If some, but not all, canonical correlations are equal, their variates are not unique, and
    neither is the value.

    Args:
        x: features, shape (..., n, d1), from which the weights are computed.
        y: features of the same samples, shape (..., n, d2).
        mask: see `hsic`.
        missing: see `hsic`.

    Returns:
        Shape (...), from 0 to 1. Differentiable if all canonical correlations differ from each other. Otherwise
        derivatives are nan, as the variates are not defined.

    Raises:
        TypeError, ValueError: see `cca`.

    Examples:
        >>> import jax, jaxalign
        >>> x, noise = jax.random.normal(jax.random.key(0), (2, 500, 8))
        >>> float(jaxalign.measures.pwcca(x, x + 0.1 * noise)) > 0.9
        True
    """
    return evaluate(pwcca_measure(), x, y, mask=mask, missing=missing)


def svcca(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    *,
    num_components: float | int = 0.99,
    result: Literal["mean", "mean_squared"] = "mean",
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
) -> Float[Array, "*batch"]:
    """Singular vector CCA (Raghu et al. 2017): mean canonical correlation of the leading singular directions.

    The number of correlations is that of the directions of the representation with fewer directions.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        num_components: the number of singular directions of each representation; or a share of its variance,
            0 < share < 1, to keep the fewest directions that explain that share.
        result: see `cca`.
        mask: see `hsic`.
        missing: see `hsic`.

    Returns:
        Shape (...), from 0 to 1. Once differentiable where the number of directions does not change.

    Raises:
        TypeError, ValueError: see `cca`; num_components is neither a number of directions nor a share.

    Examples:
        >>> import jax, jaxalign
        >>> x, noise = jax.random.normal(jax.random.key(0), (2, 100, 8))
        >>> round(float(jaxalign.measures.svcca(x, 2 * x + 1, num_components=3)), 3)
        1.0
    """
    return evaluate(svcca_measure(num_components, result), x, y, mask=mask, missing=missing)


@cached
def cca_measure(result: Any) -> SummaryMeasure:
    """The measure behind `cca`."""
    _checks.choice("result", result, ("mean", "mean_squared"))
    return SummaryMeasure("cca", partial(_directions, keep=ALL), partial(_correlation, squared=result != "mean"), 2)


@cached
def pwcca_measure() -> SummaryMeasure:
    """The measure behind `pwcca`."""
    return SummaryMeasure("pwcca", partial(_directions, keep=ALL), _weighted, 2)


@cached
def svcca_measure(num_components: Any, result: Any) -> SummaryMeasure:
    """The measure behind `svcca`."""
    _checks.choice("result", result, ("mean", "mean_squared"))
    if isinstance(num_components, (float, np.floating)) and 0 < num_components < 1:
        keep: Keep = ("share", float(num_components))
    else:
        share = ", or a share of the variance strictly between 0 and 1"
        keep = ("count", _checks.whole("num_components", num_components, of=" of singular directions", otherwise=share))
    return SummaryMeasure("svcca", partial(_directions, keep=keep), partial(_correlation, squared=result != "mean"), 2)


class _Directions(NamedTuple):
    basis: Array  # (..., n, min(n, d)): P
    rank: Array  # (...)
    centered: Array  # (..., n, d)


def _directions(x: Array, context: Context, keep: Keep) -> tuple[_Directions, None]:
    x = centered_columns(x, context.mask)
    return _Directions(*leading(narrowed(x), keep), x), None


def _correlation(x: _Directions, y: _Directions, mask: Array | None, squared: bool) -> Array:
    del mask
    product = matmul(transposed(x.basis), y.basis)
    total = jnp.sum(product * product, (-2, -1)) if squared else nuclear_norm(product)
    return bounded(total / jnp.maximum(jnp.minimum(x.rank, y.rank), 1).astype(product.dtype), 0, 1)


def _weighted(x: _Directions, y: _Directions, mask: Array | None) -> Array:
    del mask
    left, correlations, _ = jnp.linalg.svd(matmul(transposed(x.basis), y.basis), full_matrices=False)
    variates = matmul(x.basis, left)
    weights = jnp.sum(jnp.abs(matmul(transposed(variates), x.centered)), -1)
    number = jnp.minimum(x.rank, y.rank)[..., None]
    counts = jnp.broadcast_to(jnp.arange(weights.shape[-1]), weights.shape) < number
    weights = jnp.where(counts, weights, 0)
    total = jnp.sum(weights, -1)
    return bounded(jnp.sum(weights * correlations, -1) / jnp.where(total > 0, total, 1), 0, 1)
