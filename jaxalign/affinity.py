"""The RBF affinity between rows, with a fixed sigma or one solved from a mean density."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxalign._memory import check_stored
from jaxalign._problem import (
    Bandwidth,
    Diagonal,
    check_density,
    check_problem,
    check_rtol,
    check_sigma,
    check_unused,
    explain_failure,
)
from jaxalign._typing import AnyArray, Data, Mask, Numbers
from jaxalign.core.bandwidth import CONVERGED, NON_FINITE, gamma_of, pairs_of, solve_pairs
from jaxalign.core.devices import NO_ROWS, ROWS_LAST, ROWS_SECOND_LAST, batched, in_auto_mode
from jaxalign.core.features import accurate_distances, attach_derivative, center_features
from jaxalign.core.features import diagonal as on_diagonal
from jaxalign.core.tiles import kernel


def rbf_affinity(
    x: Numbers[Data, "*#batch n d"],
    y: Numbers[Data, "*#batch m d"] | None = None,
    sigma: ArrayLike | None = None,
    *,
    density: ArrayLike = 0.05,
    diagonal: Diagonal = "include",
    bandwidth: Bandwidth = "global",
    zero_diagonal: bool = False,
    mask: Mask[Data, "*#batch n"] | None = None,
    mask_y: Mask[Data, "*#batch m"] | None = None,
    precision: lax.PrecisionLike = None,
    throw: bool = True,
) -> Float[Array, "*batch n m"]:
    """RBF affinity A_ij = exp(-||x_i - y_j||^2 / (2 sigma^2)), by default scaled to a mean of 0.05.

    With sigma=None, sigma is solved such that mean(A) = density. This makes affinities of different networks comparable
    whatever the unit, offset, rotation or width of their features: the auto-scaling of relative features.

    Args:
        x: features, shape (..., n, d).
        y: features, shape (..., m, d), in the same space; None: x.
        sigma: bandwidth in units of the features, > 0: a scalar, or (...) for a batch; (..., n) with
            bandwidth="per_row". None solves for sigma, see `solve_sigma`.
        density: the target mean of A, 0 < density < 1, a number or an array over the batch. Not with sigma.
        diagonal: whether the ones on the diagonal count in the mean: "include" or "exclude". Only for y = None, and not
            with sigma.
        bandwidth: "global": one sigma per representation. "per_row": one sigma per row of x; the mean of every row is
            then the density, and A is not symmetric.
        zero_diagonal: set A_ii = 0 after sigma is solved. Only for y = None.
        mask: shape (..., n), True = a valid sample. Other samples have rows and columns of 0, and count in no mean.
        mask_y: the same for y, shape (..., m).
        precision: of the matrix product in the distances, see `squared_distances`.
        throw: whether to raise if no sigma reaches the density. False: do not read the status, so the call does not
            wait for the device; the affinity is nan if there is no sigma.

    Returns:
        The affinity, shape (..., n, m), entries in [0, 1]; float32 for half-precision features. Differentiable in x, y,
        density and sigma to every order, through the solved sigma too.

    Raises:
        TypeError, ValueError: see `solve_sigma`; also sigma not above 0. Under a trace, the affinity is nan if there is
            no sigma.
        MemoryError: n x m does not fit into the memory of the CPU.

    Examples:
        >>> import jax, jaxalign
        >>> key_a, key_b = jax.random.split(jax.random.key(0))
        >>> clip = jax.random.normal(key_a, (100, 768))
        >>> dino = 30 + 7 * jax.random.normal(key_b, (100, 1024))
        >>> a, b = jaxalign.rbf_affinity(clip), jaxalign.rbf_affinity(dino)
        >>> a.shape == b.shape, round(float(a.mean()), 5), round(float(b.mean()), 5)
        (True, 0.05, 0.05)
    """
    problem = check_problem(x, y, mask, mask_y, diagonal, throw=throw)
    if zero_diagonal and y is not None:
        raise ValueError("zero_diagonal=True has no meaning with y: row i and column i are different samples.")
    bandwidths = target = None
    if sigma is None:
        target = check_density(density, problem, bandwidth, throw=throw)
    else:
        check_unused(sigma, density, diagonal)
        bandwidths = check_sigma(sigma, problem, bandwidth, throw=throw)
    check_stored("the affinity", problem.x, problem.y)
    affinity, status = _rbf_affinity(
        problem.x,
        problem.y,
        bandwidths,
        target,
        problem.mask,
        problem.mask_y,
        diagonal,
        bandwidth == "per_row",
        zero_diagonal,
        precision,
        check_rtol(None, problem.x.dtype),
    )
    if throw:
        explain_failure(status, problem)
    return affinity


@partial(jax.jit, static_argnames=("diagonal", "per_row", "zero_diagonal", "precision", "rtol"))
def _rbf_affinity(
    x: Array,
    y: Array | None,
    sigma: AnyArray | None,
    density: AnyArray | None,
    mask: Array | None,
    mask_y: Array | None,
    diagonal: Diagonal,
    per_row: bool,
    zero_diagonal: bool,
    precision: lax.PrecisionLike,
    rtol: float,
) -> tuple[Array, Array]:
    """The affinity, and the status of every sigma."""

    def compute(
        x: Array,
        y: Array | None,
        sigma: Array | None,
        density: Array | None,
        mask: Array | None,
        mask_y: Array | None,
    ) -> tuple[Array, Array]:
        features = center_features(x, y, mask, mask_y)
        if density is not None:
            skip_self = diagonal == "exclude"
            ((solution, pairs),) = solve_pairs(
                (features,), density, rtol, skip_self=skip_self, per_row=per_row, precision=precision
            )
            assert pairs.distances is not None
            (distances,), gamma, status = pairs.distances, solution.gamma, solution.status
            gamma = gamma[:, None] if per_row else gamma
        else:
            assert sigma is not None
            gamma = gamma_of(sigma[:, None] if per_row else sigma, features.scale)
            pairs_in_sum = pairs_of(features, None, skip_self=False).pairs_in_sum("row" if per_row else "all")
            distances = accurate_distances(features, gamma, pairs_in_sum=pairs_in_sum, precision=precision)
            distances = attach_derivative(features, distances)
            status = jnp.where(features.finite, CONVERGED, NON_FINITE).astype(jnp.int32)
            gamma = jnp.where(features.finite, gamma, jnp.nan)
        affinity = kernel(distances, gamma)
        if features.mask is not None:
            affinity = jnp.where(features.mask[:, None], affinity, 0)
        if features.column_mask is not None:
            affinity = jnp.where(features.column_mask[None], affinity, 0)
        if zero_diagonal:
            affinity = jnp.where(on_diagonal(affinity.shape), 0, affinity)
        return affinity, status

    rows = (ROWS_SECOND_LAST, ROWS_LAST if sigma is None and per_row else NO_ROWS)
    compute = batched(compute, x.ndim - 2)
    return in_auto_mode(compute, x, y, sigma, density, mask, mask_y, result_rows=rows)
