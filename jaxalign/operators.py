"""The affinity as a linear operator: products, sums and rows of A without storing n x m entries."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxalign import _arrays, _checks
from jaxalign._linalg import matmul
from jaxalign._problem import (
    Bandwidth,
    Diagonal,
    check_density,
    check_finite,
    check_problem,
    check_rtol,
    check_sigma,
    check_unused,
    explain_failure,
)
from jaxalign._repr import describe, short_repr
from jaxalign._typing import AnyArray, Data, Mask, Numbers
from jaxalign.affinity import rbf_affinity
from jaxalign.bandwidth import solve_checked
from jaxalign.core.bandwidth import gamma_of, pairs_of
from jaxalign.core.devices import NO_ROWS, ROWS_LAST, ROWS_SECOND_LAST, batched, gathered, on_mesh, over_devices
from jaxalign.core.features import accurate_distances, attach_derivative, center_features
from jaxalign.core.reduce import reduce_pairs
from jaxalign.core.tiles import Reduction, Tile, kernel, kernel_terms
from jaxalign.plan import Plan, check_plan, resolve_plan


def affinity_operator(
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
    plan: Plan | None = None,
    throw: bool = True,
) -> AffinityOperator:
    """The affinity of `rbf_affinity` as a linear operator; it needs memory for a tile and the features, not for n x m.

    Args:
        x: features, shape (..., n, d).
        y: features, shape (..., m, d); None: x.
        sigma: bandwidth in units of the features, see `rbf_affinity`. None solves for sigma, see `solve_sigma`.
        density: the target mean of A. Not with sigma.
        diagonal: whether the ones on the diagonal count in the mean: "include" or "exclude". Only for y = None, and not
            with sigma.
        bandwidth: "global": one sigma per representation. "per_row": one sigma per row of x.
        zero_diagonal: set the diagonal of the operator to 0. Only for y = None.
        mask: shape (..., n), True = a valid sample; other samples have rows and columns of 0.
        mask_y: the same for y, shape (..., m).
        precision: of the products in the distances, see `squared_distances`.
        plan: how pairs are visited, see `jaxalign.Plan`. With a mesh, results are sharded like the rows; with only an
            axis name, vectors and results are the rows of this device.
        throw: whether to raise if no sigma reaches the density. False: do not read the status, so the call does not
            wait for the device; products are nan if there is no sigma.

    Returns:
        An `AffinityOperator`, differentiable in x, y, density and sigma.

    Raises:
        TypeError, ValueError: see `solve_sigma`; also sigma not above 0.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (200, 16))
        >>> a = jaxalign.affinity_operator(x)
        >>> round(float(a.mean()), 5)
        0.05
        >>> (a @ jax.numpy.ones(200)).shape
        (200,)
    """
    plan = check_plan(plan)
    problem = check_problem(x, y, mask, mask_y, diagonal, local_rows=plan.rows_are_local, throw=throw)
    if zero_diagonal and y is not None:
        raise ValueError("zero_diagonal=True has no meaning with y: row i and column i are different samples.")
    plan = resolve_plan(plan, problem.x, problem.y)
    if sigma is None:
        target = check_density(density, problem, bandwidth, plan, throw=throw)
        solution = solve_checked(problem, target, bandwidth, check_rtol(None, problem.x.dtype), plan, precision)
        if throw:
            explain_failure(solution.status, problem)
        bandwidths = solution.sigma
        if bandwidth == "per_row" and problem.mask is not None:  # nan in masked rows would reach the valid rows
            bandwidths = jnp.where(problem.mask, bandwidths, 1)
    else:
        check_unused(sigma, density, diagonal)
        bandwidths = jnp.asarray(check_sigma(sigma, problem, bandwidth, throw=throw))
        if throw:
            check_finite(problem)
    return AffinityOperator(
        *problem[:4],
        bandwidths,
        left=None,
        right=None,
        per_row=bandwidth == "per_row",
        zero_diagonal=zero_diagonal,
        transposed=False,
        plan=plan,
        precision=precision,
    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("x", "y", "mask", "mask_y", "bandwidths", "left", "right"),
    meta_fields=("per_row", "zero_diagonal", "transposed", "plan", "precision"),
)
@dataclass(frozen=True, repr=False)
class AffinityOperator:
    """diag(left) A diag(right), where A is the RBF affinity of rows of x with rows of y; made by `affinity_operator`.

    A pytree: jitted, vmapped and differentiated functions can accept and return it. `a @ v` accepts v of shape (m,), or
    (..., m, k) with the batch dimensions of x; solvers such as `jax.scipy.sparse.linalg.cg(a, b)` accept the operator.
    """

    x: Array
    y: Array | None
    mask: Array | None
    mask_y: Array | None
    bandwidths: Array  # (...) or (..., n), 1 in masked rows
    left: Array | None  # (..., rows, 1)
    right: Array | None  # (..., columns, 1)
    per_row: bool  # whether every row of x has its own sigma
    zero_diagonal: bool
    transposed: bool
    plan: Plan
    precision: Any

    __array_ufunc__ = None  # makes NumPy arrays defer `v @ a` to this class

    def __repr__(self) -> str:
        shown = {"sigma": describe(self.bandwidths)}
        if hasattr(self.x, "shape"):  # JAX also puts other objects than arrays into pytrees
            shown = {"shape": str(self.shape), "dtype": str(self.dtype), **shown}
        flags = {"per_row": self.per_row, "zero_diagonal": self.zero_diagonal, "transposed": self.transposed}
        flags["scaled"] = self.left is not None or self.right is not None
        shown |= {name: "True" for name, flag in flags.items() if flag}
        return short_repr(self, omit=[field.name for field in fields(self)], **shown)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., n, m)."""
        n, m = self.x.shape[-2], (self.x if self.y is None else self.y).shape[-2]
        return self.x.shape[:-2] + ((m, n) if self.transposed else (n, m))

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of results."""
        return self.x.dtype

    @property
    def sigma(self) -> Array:
        """The bandwidth in units of the features, shape (...); or one per row of x, (..., n), nan in masked rows."""
        if not self.per_row or self.mask is None:
            return self.bandwidths
        return jnp.where(self.mask, self.bandwidths, jnp.nan)

    @property
    def T(self) -> AffinityOperator:  # noqa: N802 (NumPy's name)
        """The transpose."""
        return replace(self, transposed=not self.transposed, left=self.right, right=self.left)

    @property
    def mT(self) -> AffinityOperator:  # noqa: N802
        """The transpose of the last two dimensions, like `T`."""
        return self.T

    def __matmul__(self, v: Any) -> Array:
        """The product A v, for v of shape (m,) or (..., m, k)."""
        v = _checks.parameter_array("v", v, self.dtype)
        m = self.shape[-1]
        vector = v.ndim == 1
        if vector:
            v = v[:, None]
        if v.shape[-2] != m:
            raise ValueError(f"v has {v.shape[-2]} rows in shape {v.shape}, the operator {self.shape} has {m} columns.")
        batch = self.shape[:-2]
        v = jnp.broadcast_to(v, batch + v.shape[-2:])
        product = _product(self, v)
        return product[..., 0] if vector else product

    def __rmatmul__(self, v: Any) -> Array:
        """The product v A, for v of shape (n,) or (..., k, n)."""
        v = _checks.parameter_array("v", v, self.dtype)
        if v.ndim == 1:
            return self.T @ v
        return jnp.swapaxes(self.T @ jnp.swapaxes(v, -1, -2), -1, -2)

    def sum(self, axis: int | None = None) -> Array:
        """The sum of all entries, shape (...), or along an axis: -1 sums each row, -2 each column."""
        if axis is None:
            total = jnp.sum(self.sum(-1), -1)
            return over_devices(lax.psum, total, self.plan.axis_name if self.plan.rows_are_local else None)
        axis = axis - self.ndim if axis >= 0 else axis
        if axis not in (-1, -2):
            raise ValueError(f"axis must be None, -1 (each row) or -2 (each column) of {self.shape}.")
        side = self if axis == -1 else self.T
        return (side @ jnp.ones((side.shape[-1], 1), self.dtype))[..., 0]

    def mean(self, axis: int | None = None) -> Array:
        """The mean of all entries, or along an axis; masked entries and a zeroed diagonal do not count."""
        unscaled = replace(self, left=None, right=None)
        return self.sum(axis) / _counts(unscaled, axis)

    def rows(self, index: Int[AnyArray, " k"]) -> Float[Array, "*batch k m"]:
        """Selected rows of A as an array of k x m entries."""
        if self.plan.axis_name is not None:
            raise NotImplementedError(
                "rows() of an operator whose rows are sharded over devices: multiply with columns of the identity "
                "instead, (a.T @ e).T."
            )
        numbers = index if isinstance(index, jax.Array) else np.asarray(index)
        if numbers.size == 0:
            return jnp.zeros((*self.shape[:-2], 0, self.shape[-1]), self.dtype)
        if numbers.ndim != 1 or not jnp.issubdtype(numbers.dtype, jnp.integer):
            raise TypeError(
                f"index must be a list of row numbers, shape (k,); got shape {numbers.shape} of {numbers.dtype}. "
                "For a boolean mask write np.flatnonzero(mask)."
            )
        n = self.shape[-2]
        if _arrays.is_concrete(numbers):
            host = _arrays.on_host(numbers)
            if not -n <= host.min() <= host.max() < n:
                raise ValueError(f"index ranges from {host.min()} to {host.max()}, but there are {n} rows.")
        return _rows(self, jnp.asarray(numbers, jnp.int32) % n)

    def diagonal(self) -> Float[Array, "*batch n"]:
        """The diagonal entries A_ii; only for y = None."""
        if self.y is not None:
            raise ValueError("diagonal() has no meaning with y: row i and column i are different samples.")
        entries = jnp.ones(self.x.shape[:-1], self.dtype) * (0 if self.zero_diagonal else 1)
        if self.mask is not None:
            entries = jnp.where(self.mask, entries, 0)
        for scale in (self.left, self.right):
            entries = entries if scale is None else entries * scale[..., 0]
        return entries

    def todense(self) -> Float[Array, "*batch n m"]:
        """A as an array."""
        if self.plan.rows_are_local:
            raise ValueError(
                "todense() inside shard_map: a device holds only its own rows. Use a.T @ v, or rbf_affinity."
            )
        dense = rbf_affinity(
            self.x,
            self.y,
            self.sigma,
            bandwidth="per_row" if self.per_row else "global",
            zero_diagonal=self.zero_diagonal,
            mask=self.mask,
            mask_y=self.mask_y,
            precision=self.precision,
        )
        if self.transposed:
            dense = jnp.swapaxes(dense, -1, -2)
        dense = dense if self.left is None else self.left * dense
        return dense if self.right is None else dense * jnp.swapaxes(gathered(self.right), -1, -2)

    def degree_normalized(self) -> AffinityOperator:
        """D^-1/2 A D^-1/2, with the row sums D on the left and column sums on the right, as in the normalized cut.

        Rows and columns that sum to 0 stay 0.
        """
        if self.left is not None or self.right is not None:
            raise ValueError("the operator is already scaled.")
        left = inverse_root(self.sum(-1))[..., None]
        right = left if self._symmetric else inverse_root(self.sum(-2))[..., None]
        return replace(self, left=left, right=right)

    @property
    def _symmetric(self) -> bool:
        return self.y is None and not self.per_row


def inverse_root(degrees: Array) -> Array:
    """degrees^-1/2; 0 where the degree is 0."""
    positive = degrees > 0
    return jnp.where(positive, lax.rsqrt(jnp.where(positive, degrees, 1)), 0)


def _times_column_values(terms: Array, tile: Tile) -> tuple[tuple[()], Array]:
    return (), matmul(terms, tile.column.column_values)


@jax.jit
def _product(a: AffinityOperator, v: Array) -> Array:
    """The product A v, for v of shape (..., m, k)."""

    def local(x: Array, y: Array | None, mask: Any, mask_y: Any, sigma: Array, v: Array) -> Array:
        features = center_features(x, y, mask, mask_y, a.plan.axis_name)
        gamma = gamma_of(sigma, features.scale)
        pairs = pairs_of(features, None, skip_self=a.zero_diagonal, plan=a.plan, precision=a.precision)
        reduction = Reduction(kernel_terms, _times_column_values, symmetric=not a.per_row)
        gamma_per = "all" if not a.per_row else "column" if a.transposed else "row"
        _, product = reduce_pairs(reduction, pairs, gammas=(gamma,), gamma_per=gamma_per, column_values=v)
        return jnp.where(features.finite, product, jnp.nan)

    v = v if a.right is None else v * a.right
    sides = (a.x, a.y, a.mask, a.mask_y)
    if a.transposed and a.y is not None:
        sides = (a.y, a.x, a.mask_y, a.mask)
    rows = (ROWS_LAST if a.per_row else NO_ROWS, ROWS_SECOND_LAST)
    product = on_mesh(local, a.plan, sides, (a.bandwidths, v), rows, ROWS_SECOND_LAST)
    return product if a.left is None else product * a.left


@jax.jit
def _rows(a: AffinityOperator, index: Array) -> Array:
    """Selected rows of A."""

    def select(x: Array, y: Array | None, mask: Any, mask_y: Any, sigma: Array) -> Array:
        features = center_features(x, y, mask, mask_y)
        gamma = gamma_of(sigma, features.scale)
        part = features._replace(raw_y=features.raw_columns, mask_y=features.column_mask)
        if features.is_self:
            number = jnp.arange(x.shape[0], dtype=jnp.int32)
            part = part._replace(sample=number, sample_y=number)
        elif a.transposed:
            part = part._replace(raw_x=part.raw_y, raw_y=part.raw_x, mask=part.mask_y, mask_y=part.mask)
        part = part._replace(
            raw_x=part.raw_x[index],
            mask=None if part.mask is None else part.mask[index],
            sample=None if part.sample is None else part.sample[index],
        )
        if a.per_row:
            gamma = gamma[None] if a.transposed else gamma[index][:, None]
        pairs_in_sum = pairs_of(features, None, skip_self=False).pairs_in_sum("row")
        distances = accurate_distances(part, gamma, pairs_in_sum=pairs_in_sum, precision=a.precision)
        rows = kernel(attach_derivative(part, distances), gamma)
        rows = rows if part.mask is None else jnp.where(part.mask[:, None], rows, 0)
        rows = rows if part.mask_y is None else jnp.where(part.mask_y[None], rows, 0)
        same = part.same_sample()
        return jnp.where(same, 0, rows) if a.zero_diagonal and same is not None else rows

    rows = batched(select, a.x.ndim - 2)(a.x, a.y, a.mask, a.mask_y, a.bandwidths)
    rows = rows if a.left is None else rows * jnp.take(a.left, index, -2)
    return rows if a.right is None else rows * jnp.swapaxes(a.right, -1, -2)


@partial(jax.jit, static_argnames="axis")
def _counts(a: AffinityOperator, axis: int | None) -> Array:
    """The number of pairs that count, of all or along an axis; at least 1."""

    def local(x: Array, y: Array | None, mask: Any, mask_y: Any) -> Array:
        features = center_features(x, y, mask, mask_y, a.plan.axis_name)
        pairs = pairs_of(features, None, skip_self=a.zero_diagonal, plan=a.plan)
        return jnp.maximum(pairs.total(per_row=axis is not None), 1)

    sides = (a.x, a.y, a.mask, a.mask_y)
    over_columns = axis is not None and (axis - a.ndim if axis >= 0 else axis) == -2
    if (a.transposed != over_columns) and a.y is not None:
        sides = (a.y, a.x, a.mask_y, a.mask)
    return on_mesh(local, a.plan, sides, result_rows=NO_ROWS if axis is None else ROWS_LAST)
