"""The distance between two auto-scaled affinities, entry by entry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign import _checks
from jaxalign._linalg import root
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.kernels import Kernel, kernel_of
from jaxalign.measures._evaluate import Missing, PairMeasure, cached, evaluate
from jaxalign.measures._pair_sums import InnerProducts, PairFunction, kernel_function
from jaxalign.plan import Plan


def affinity_distance(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    kernel: Kernel = "rbf",
    *,
    result: Literal["frobenius", "rows"] = "frobenius",
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
    plan: Plan | None = None,
) -> Float[Array, "*batch"]:
    """Distance between the RBF affinities A of x and B of y, without centering: a metric on auto-scaled geometries.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        kernel: "rbf", "laplacian", or an object of `jaxalign.kernels`; see `hsic`.
        result: "frobenius": ||A - B||_F / n, the root mean square difference. "rows": the mean over samples of
            ||A_i - B_i|| / sqrt(n), which is less sensitive to a few samples that differ much.
        mask: see `hsic`.
        missing: see `hsic`.
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        Shape (...), from 0 (equal) to 1. Differentiable; the derivative at equal affinities is 0.

    Raises:
        TypeError, ValueError: see `hsic`.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> float(jaxalign.measures.affinity_distance(x, 5 * x)) < 1e-6
        True
    """
    kernel = kernel_of(kernel)
    measure = affinity_distance_measure(kernel_function(kernel), result)
    return evaluate(measure, x, y, kernel, mask=mask, missing=missing, plan=plan)


@cached
def affinity_distance_measure(function: PairFunction, result: Any) -> PairMeasure:
    """The measure behind `affinity_distance`."""
    if not function.needs_sigma:
        raise ValueError('affinity_distance needs a kernel with values from 0 to 1: use kernel="rbf" or "laplacian".')
    _checks.choice("result", result, ("frobenius", "rows"))
    function = replace(function, minus_one=False)
    finish = _frobenius if result == "frobenius" else _rows
    return PairMeasure("affinity_distance", function, None, finish, 2)


def _frobenius(inner: InnerProducts) -> Array:
    return root(inner.cross) / inner.num_samples[..., None, None]


def _rows(inner: InnerProducts) -> Array:
    return inner.row_norms / (inner.num_samples * jnp.sqrt(inner.num_samples))[..., None, None]
