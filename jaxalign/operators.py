"""The affinity as a linear operator: products, sums and rows of A without ever storing n x m."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxalign import _checks
from jaxalign._linalg import matmul
from jaxalign._plan import NO_ROWS, ROWS_LAST, ROWS_SECOND_LAST, Plan, TileSize, gathered, is_shared, make_plan, on_mesh
from jaxalign._typing import AnyArray
from jaxalign.affinity import rbf_affinity
from jaxalign.bandwidth import (
    Bandwidth,
    Diagonal,
    check_density,
    check_problem,
    check_rtol,
    check_sigma,
    explain_failure,
    pairs_of,
    rate_of,
    solve_checked,
)
from jaxalign.distances import accurate_distances, make_frame, over_devices
from jaxalign.pairs import Reduction, Tile, kernel, kernel_terms, reduce_pairs, usual_count


def affinity_operator(
    x: Float[AnyArray, "*#batch n d"],
    y: Float[AnyArray, "*#batch m d"] | None = None,
    sigma: ArrayLike | None = None,
    *,
    density: ArrayLike = 0.05,
    diagonal: Diagonal = "include",
    bandwidth: Bandwidth = "global",
    zero_diagonal: bool = False,
    mask: Bool[AnyArray, "*#batch n"] | None = None,
    mask_y: Bool[AnyArray, "*#batch m"] | None = None,
    precision: lax.PrecisionLike = None,
    tile_size: TileSize = "auto",
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str | None = None,
) -> AffinityOperator:
    """The affinity of `rbf_affinity` as an operator: memory is a tile and a few times the features, never n x m.

    Args:
        x: features, shape (..., n, d).
        y: features, shape (..., m, d); None stands for x.
        sigma: bandwidth in units of the features: a scalar, (...) or (..., n). None solves for it, see `solve_sigma`.
        density: the wanted mean of A. Unused with a given sigma.
        diagonal: whether the ones on the diagonal count in that mean. Only for y = None.
        bandwidth: "global": one sigma. "per_row": one a row.
        zero_diagonal: the diagonal of the operator is 0. Only for y = None.
        mask: shape (..., n), True = a real sample; the others have rows and columns of 0.
        mask_y: the same for y, shape (..., m).
        precision: of the products in the distances, see `squared_distances`.
        tile_size: rows and columns of a tile at most, see `solve_sigma`.
        mesh: spreads rows over devices, see `solve_sigma`. Results are spread as the rows are.
        axis_name: see `solve_sigma`. Without a mesh, vectors and results are this device's rows.

    Returns:
        An `AffinityOperator`, differentiable in x, y, density and sigma.

    Raises:
        TypeError, ValueError: see `solve_sigma`; also sigma not above 0.

    Example:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (200, 16))
        >>> a = jaxalign.affinity_operator(x)
        >>> round(float(a.mean()), 5)
        0.05
        >>> (a @ jax.numpy.ones(200)).shape
        (200,)
    """
    problem = check_problem(x, y, mask, mask_y, diagonal, shared=is_shared(mesh, axis_name))
    if zero_diagonal and y is not None:
        raise ValueError("zero_diagonal=True has no meaning with y: row i and column i are different samples.")
    _checks.choice("bandwidth", bandwidth, ("global", "per_row"))
    plan = make_plan(problem.x, problem.y, tile_size, mesh, axis_name)
    if sigma is None:
        target = check_density(density, problem, bandwidth, plan)
        solution = solve_checked(problem, target, bandwidth, check_rtol(None, problem.x.dtype), plan, precision)
        explain_failure(solution.status, problem)
        by_row = bandwidth == "per_row"
        found = solution.sigma[..., None] if by_row else solution.sigma[..., None, None]
        if by_row and problem.mask is not None:  # nan there, which would reach the other rows
            found = jnp.where(problem.mask[..., None], found, 1)
    else:
        given, by_row = check_sigma(sigma, problem)
        found = jnp.asarray(given)
        _checks.finite_rows("x", problem.x, problem.mask, differences=True)
        if problem.y is not None:
            _checks.finite_rows("y", problem.y, problem.mask_y, differences=True)
    return AffinityOperator(
        *problem[:4],
        found,
        left=None,
        right=None,
        by_row=by_row,
        zero_diagonal=zero_diagonal,
        transposed=False,
        plan=plan,
        precision=precision,
    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("x", "y", "mask", "mask_y", "row_sigma", "left", "right"),
    meta_fields=("by_row", "zero_diagonal", "transposed", "plan", "precision"),
)
@dataclass(frozen=True)
class AffinityOperator:
    """diag(left) A diag(right), A the RBF affinity of rows of x with rows of y; made by `affinity_operator`.

    A pytree: it can be given to and returned from jitted, vmapped and differentiated functions. `a @ v` takes (m,),
    or (..., m, k) with the batch dimensions of x; `jax.scipy.sparse.linalg.cg(a, b)` and the like take it as it is.
    """

    x: Array
    y: Array | None
    mask: Array | None
    mask_y: Array | None
    row_sigma: Array  # (..., 1, 1) or (..., n, 1)
    left: Array | None  # (..., rows, 1)
    right: Array | None  # (..., columns, 1)
    by_row: bool  # whether every row of x has its own sigma
    zero_diagonal: bool
    transposed: bool
    plan: Plan
    precision: Any

    __array_ufunc__ = None  # numpy arrays leave `v @ a` to this class

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
        """Of the results."""
        return self.x.dtype

    @property
    def sigma(self) -> Array:
        """The bandwidth, in units of the features, shape (...) or, one a row of x, (..., n) with nan where masked."""
        if not self.by_row:
            return self.row_sigma[..., 0, 0]
        sigma = self.row_sigma[..., 0]
        return sigma if self.mask is None else jnp.where(self.mask, sigma, jnp.nan)

    @property
    def T(self) -> AffinityOperator:  # noqa: N802 (as in numpy)
        """The transpose."""
        return replace(self, transposed=not self.transposed, left=self.right, right=self.left)

    @property
    def mT(self) -> AffinityOperator:  # noqa: N802
        """The transpose; batch dimensions stay where they are."""
        return self.T

    def __matmul__(self, v: Any) -> Array:
        """A v for v of shape (m,) or (..., m, k)."""
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
        """V A for v of shape (n,) or (..., k, n)."""
        v = _checks.parameter_array("v", v, self.dtype)
        if v.ndim == 1:
            return self.T @ v
        return jnp.swapaxes(self.T @ jnp.swapaxes(v, -1, -2), -1, -2)

    def sum(self, axis: int | None = None) -> Array:
        """The sum of all entries, shape (...), or over an axis: -1 over each row, -2 over each column."""
        if axis is None:
            total = jnp.sum(self.sum(-1), -1)
            return over_devices(lax.psum, total, self.plan.axis_name if self.plan.shared else None)
        axis = axis - self.ndim if axis >= 0 else axis
        if axis not in (-1, -2):
            raise ValueError(f"axis must be None, -1 (over each row) or -2 (over each column) of {self.shape}.")
        side = self if axis == -1 else self.T
        return (side @ jnp.ones((side.shape[-1], 1), self.dtype))[..., 0]

    def mean(self, axis: int | None = None) -> Array:
        """The mean over pairs that count, of all or over an axis; masked ones and a zeroed diagonal do not count."""
        ones = replace(self, left=None, right=None)
        return self.sum(axis) / _counts(ones, axis)

    def rows(self, index: Int[AnyArray, " k"]) -> Float[Array, "*batch k m"]:
        """Selected rows of A, stored: k x m entries."""
        if self.plan.axis_name is not None:
            raise NotImplementedError(
                "rows of an operator whose rows are spread over devices: multiply with columns of the identity, "
                "(a.T @ e).T, instead."
            )
        given = index if isinstance(index, jax.Array) else np.asarray(index)
        if given.size == 0:
            return jnp.zeros((*self.shape[:-2], 0, self.shape[-1]), self.dtype)
        if given.ndim != 1 or not jnp.issubdtype(given.dtype, jnp.integer):
            raise TypeError(
                f"index must be a list of row numbers, shape (k,); got shape {given.shape} of {given.dtype}. "
                "Of a boolean mask write np.flatnonzero(mask)."
            )
        n = self.shape[-2]
        if _checks.is_concrete(given):
            seen = _checks.on_host(given)
            if not -n <= seen.min() <= seen.max() < n:
                raise ValueError(f"index reaches from {seen.min()} to {seen.max()}; there are {n} rows.")
        return _rows(self, jnp.asarray(given, jnp.int32) % n)

    def diagonal(self) -> Float[Array, "*batch n"]:
        """A_ii; only for an operator of x with itself."""
        if self.y is not None:
            raise ValueError("diagonal() of an operator with y: row i and column i are different samples.")
        ones = jnp.ones(self.x.shape[:-1], self.dtype) * (0 if self.zero_diagonal else 1)
        if self.mask is not None:
            ones = jnp.where(self.mask, ones, 0)
        for scale in (self.left, self.right):
            ones = ones if scale is None else ones * scale[..., 0]
        return ones

    def todense(self) -> Float[Array, "*batch n m"]:
        """A, stored."""
        if self.plan.shared:
            raise ValueError(
                "todense() inside shard_map: a device has its own rows only. Use a.T @ v, or rbf_affinity."
            )
        dense = rbf_affinity(
            self.x,
            self.y,
            self.sigma,
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
        """D^-1/2 A D^-1/2, D the row sums (left) and column sums (right): the operator of the normalised cut.

        Rows and columns without any affinity stay 0.
        """
        if self.left is not None or self.right is not None:
            raise ValueError("the operator is scaled already.")
        left = inverse_root(self.sum(-1))[..., None]
        right = left if self._symmetric else inverse_root(self.sum(-2))[..., None]
        return replace(self, left=left, right=right)

    @property
    def _symmetric(self) -> bool:
        return self.y is None and not self.by_row


def inverse_root(degrees: Array) -> Array:
    """degrees^-1/2, 0 where there is no degree."""
    positive = degrees > 0
    return jnp.where(positive, lax.rsqrt(jnp.where(positive, degrees, 1)), 0)


def _times_column_values(terms: Array, tile: Tile) -> tuple[tuple[()], Array]:
    return (), matmul(terms, tile.column.as_column)


@jax.jit
def _product(a: AffinityOperator, v: Array) -> Array:
    """A v, v (..., m, k)."""

    def local(x: Array, y: Array | None, mask: Any, mask_y: Any, sigma: Array, v: Array) -> Array:
        frame = make_frame(x, y, mask, mask_y, a.plan.axis_name)
        rate = rate_of(sigma, frame)
        pairs = pairs_of(frame, None, "exclude" if a.zero_diagonal else "include", a.plan, a.precision)
        reduction = Reduction(kernel_terms, _times_column_values, symmetric=not a.by_row)
        rates_of = "all" if not a.by_row else "columns" if a.transposed else "rows"
        _, product = reduce_pairs(reduction, pairs, rates=(rate,), rates_of=rates_of, as_column=v)
        return jnp.where(frame.finite[..., None, None], product, jnp.nan)

    v = v if a.right is None else v * a.right
    sides = (a.x, a.y, a.mask, a.mask_y)
    if a.transposed and a.y is not None:
        sides = (a.y, a.x, a.mask_y, a.mask)
    sigma_rows = ROWS_SECOND_LAST if a.by_row else NO_ROWS
    rows = (sigma_rows, ROWS_SECOND_LAST)
    product = on_mesh(local, a.plan, sides, (a.row_sigma, v), rows, ROWS_SECOND_LAST)
    return product if a.left is None else product * a.left


@jax.jit
def _rows(a: AffinityOperator, index: Array) -> Array:
    """Selected rows."""
    frame = make_frame(a.x, a.y, a.mask, a.mask_y)
    rate = rate_of(a.row_sigma, frame)
    number = jnp.arange(a.x.shape[-2], dtype=jnp.int32)
    few = frame._replace(raw_y=frame.raw_other, mask_y=frame.other_mask)
    if a.y is None:
        few = few._replace(sample=number, sample_y=number)
    if a.transposed and a.y is not None:
        few = few._replace(raw_x=few.raw_y, raw_y=few.raw_x, mask=few.mask_y, mask_y=few.mask)
    few = few._replace(
        raw_x=jnp.take(few.raw_x, index, -2),
        mask=None if few.mask is None else jnp.take(few.mask, index, -1),
        sample=None if few.sample is None else jnp.take(few.sample, index, -1),
    )
    if a.by_row:
        rate = jnp.swapaxes(rate, -1, -2) if a.transposed else jnp.take(rate, index, -2)
    counted = usual_count(frame.raw_other.shape[-2], frame.raw_x)
    pairs = pairs_of(few, accurate_distances(few, rate, counted=counted, precision=a.precision), "include")
    assert pairs.distances is not None
    rows = kernel(pairs.distances[0], rate)
    if few.mask is not None:
        rows = jnp.where(few.mask[..., :, None], rows, 0)
    if few.mask_y is not None:
        rows = jnp.where(few.mask_y[..., None, :], rows, 0)
    same = few.same()
    if a.zero_diagonal and same is not None:
        rows = jnp.where(same, 0, rows)
    rows = rows if a.left is None else rows * jnp.take(a.left, index, -2)
    return rows if a.right is None else rows * jnp.swapaxes(a.right, -1, -2)


@partial(jax.jit, static_argnames="axis")
def _counts(a: AffinityOperator, axis: int | None) -> Array:
    """Pairs that count, of all or over an axis, at least 1."""

    def local(x: Array, y: Array | None, mask: Any, mask_y: Any) -> Array:
        frame = make_frame(x, y, mask, mask_y, a.plan.axis_name)
        pairs = pairs_of(frame, None, "exclude" if a.zero_diagonal else "include", a.plan)
        return jnp.maximum(pairs.total(by_row=axis is not None), 1)

    sides = (a.x, a.y, a.mask, a.mask_y)
    over_columns = axis is not None and (axis - a.ndim if axis >= 0 else axis) == -2
    if (a.transposed != over_columns) and a.y is not None:
        sides = (a.y, a.x, a.mask_y, a.mask)
    return on_mesh(local, a.plan, sides, result_rows=NO_ROWS if axis is None else ROWS_LAST)
