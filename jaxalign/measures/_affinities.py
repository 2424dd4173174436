"""How far two auto-scaled affinities are from each other, entry by entry."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jaxalign import _checks
from jaxalign._linalg import root
from jaxalign._plan import TileSize
from jaxalign._problem import Diagonal
from jaxalign._typing import AnyArray
from jaxalign.measures._evaluate import Missing, PairMeasure, evaluate
from jaxalign.measures._pair_sums import InnerProducts, PairFunction


def affinity_distance(
    x: Float[AnyArray, "*#batch n d1"],
    y: Float[AnyArray, "*#batch n d2"],
    *,
    sigma: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    density: ArrayLike = 0.05,
    diagonal: Diagonal = "include",
    result: Literal["frobenius", "rows"] = "frobenius",
    mask: Bool[AnyArray, "*#batch n"] | None = None,
    missing: Missing = "raise",
    tile_size: TileSize = "auto",
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*batch"]:
    """Distance between the RBF affinities A of x and B of y, nothing centred: a metric on auto-scaled geometries.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        sigma: see `hsic`.
        density: see `hsic`.
        diagonal: see `hsic`.
        result: "frobenius": ||A - B||_F / n, the root mean square difference; "rows": the mean over samples of
            ||A_i - B_i|| / sqrt(n), which a few samples that differ much move less.
        mask: see `hsic`.
        missing: see `hsic`.
        tile_size: see `jaxalign.solve_sigma`.
        mesh: see `jaxalign.solve_sigma`.
        axis_name: see `jaxalign.solve_sigma`.

    Returns:
        Shape (...), from 0 (equal) to 1. Differentiable; the derivative at equal affinities is 0.

    Raises:
        TypeError, ValueError: see `hsic`.

    Example:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> float(jaxalign.measures.affinity_distance(x, 5 * x)) < 1e-6
        True
    """
    return evaluate(
        affinity_distance_measure(sigma is None, diagonal, result),
        x,
        y,
        sigma=sigma,
        density=density,
        mask=mask,
        missing=missing,
        tile_size=tile_size,
        mesh=mesh,
        axis_name=axis_name,
    )


@_checks.cached
def affinity_distance_measure(solves: bool, diagonal: Any, result: Any) -> PairMeasure:
    """The measure behind `affinity_distance`."""
    _checks.choice("diagonal", diagonal, ("include", "exclude"))
    _checks.choice("result", result, ("frobenius", "rows"))
    function = PairFunction("rbf", solves=solves, diagonal=diagonal)
    finish = _frobenius if result == "frobenius" else _rows
    return PairMeasure("affinity_distance", function, None, finish, 2)


def _frobenius(inner: InnerProducts) -> Array:
    return root(inner.cross) / inner.num_samples[..., None, None]


def _rows(inner: InnerProducts) -> Array:
    return inner.row_norms / (inner.num_samples * jnp.sqrt(inner.num_samples))[..., None, None]
