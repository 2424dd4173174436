"""Exact sums over all pairs of rows, for any function of their distances."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign import _arrays, _checks
from jaxalign._linalg import matmul
from jaxalign._problem import check_problem
from jaxalign._repr import shown
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.core import reduce
from jaxalign.core.bandwidth import pairs_of
from jaxalign.core.devices import NO_ROWS, ROWS_LAST, ROWS_SECOND_LAST, on_mesh
from jaxalign.core.features import accurate_distances, center_features, valid_rows
from jaxalign.core.tiles import Reduction, Tile, inverse_rms_distance, over_all, over_rows, smooth
from jaxalign.plan import Plan, check_plan, resolve_plan

# Distances are accurate individually, down to the mean distance divided by about this factor.
_RESOLVED_BELOW_MEAN = 1e3

PairFunction = Callable[[Array], Any]


def reduce_pairs(
    fn: PairFunction,
    x: Numbers[Data, "*#batch n d"],
    y: Numbers[Data, "*#batch m d"] | None = None,
    *,
    values: Numbers[Data, "*#batch m"] | Numbers[Data, "*#batch m k"] | None = None,
    per_row: bool = False,
    self_pairs: bool = True,
    mask: Mask[Data, "*#batch n"] | None = None,
    mask_y: Mask[Data, "*#batch m"] | None = None,
    plan: Plan | None = None,
) -> Any:
    """The sum of fn(||x_i - y_j||^2) over all pairs, or over each row, optionally weighted by a value per column.

    Exact, without storing n x m distances unless there are few: tiles are computed when they are visited, and again for
    a gradient. Rows may be sharded over devices.

    Args:
        fn: elementwise function of an array of squared distances. It returns an array of the same shape, or a pytree of
            such arrays, which are all summed in one visit. If fn has no derivative at distance 0, like a square root,
            0 is used. Define fn once: a new function object is compiled again.
        x: features, shape (..., n, d).
        y: features, shape (..., m, d); None compares x with itself.
        values: v, shape (..., m) or (..., m, k): return sum_j fn(D_ij) v_j for each row i.
        per_row: return the sum of each row instead of the sum over all pairs. Not with values.
        self_pairs: whether pairs of a sample with itself count. Only for y = None.
        mask: shape (..., n), True = a valid sample; other samples do not count, and their rows are 0.
        mask_y: the same for y, shape (..., m).
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        An array for each array that fn returns, of shape (...); with per_row (..., n); with values (..., n) or
        (..., n, k). nan if the features hold nan or inf. Differentiable in x, y, values and everything fn depends on.

    Raises:
        TypeError, ValueError: see `jaxalign.solve_sigma`; also if the length of values is not the number of columns,
            or fn is not elementwise.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxalign
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 1000, 3))
        >>> energy = jaxalign.reduce_pairs(jnp.sqrt, x, y + 1) / 1000**2  # the mean distance
        >>> cauchy = jaxalign.reduce_pairs(lambda d: 1 / (1 + d), x, y, values=jnp.ones(1000))
        >>> round(float(energy), 2), cauchy.shape
        (2.83, (1000,))
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of an array of squared distances; got {shown(fn)}.")
    if isinstance(fn, np.ufunc):
        raise TypeError(f"fn must be a function of JAX arrays: use the function {fn.__name__!r} of jax.numpy.")
    plan = check_plan(plan)
    problem = check_problem(x, y, mask, mask_y, "include", local_rows=plan.rows_are_local)
    x, y, mask, mask_y, _ = problem
    if y is not None and not self_pairs:
        raise ValueError("self_pairs=False has no meaning with y: row i and column i are different samples.")
    if values is not None and per_row:
        raise ValueError("per_row=True has no effect with values, which give one result per row anyway. Leave it out.")
    _check_elementwise(fn, x.dtype)
    plan = resolve_plan(plan, x, y)
    is_vector = False
    if values is not None:
        m = (x if y is None else y).shape[-2]
        values = _checks.parameter_array("values", values, x.dtype)
        is_vector = values.shape[-1] == m and values.shape[-2:-1] != (m,)
        values = values[..., None] if is_vector else values
        if values.shape[-2:-1] != (m,):
            raise ValueError(f"values has shape {values.shape}; expected (..., {m}) or (..., {m}, k) for {m} columns.")
        values = jnp.broadcast_to(values, (*x.shape[:-2], *values.shape[-2:]))
    options: dict[str, Any] = {"fn": fn, "per_row": per_row, "self_pairs": self_pairs, "plan": plan}
    if _arrays.is_concrete(x, y, mask, mask_y, values):
        sums = _reduce_jit(x, y, mask, mask_y, values, **options)
    else:  # fn may close over tracers, which must not enter the cache of compiled programs
        sums = jax.jit(partial(_reduce, **options))(x, y, mask, mask_y, values)
    return jax.tree.map(lambda a: a[..., 0], sums) if is_vector else sums


def _check_elementwise(fn: PairFunction, dtype: Any) -> None:
    for leaf in jax.tree.leaves(jax.eval_shape(fn, jax.ShapeDtypeStruct((2, 3), dtype))):
        if leaf.shape != (2, 3):
            raise ValueError(f"fn must be elementwise: for distances of shape (2, 3) it returned shape {leaf.shape}.")


def _reduce(
    x: Array,
    y: Array | None,
    mask: Array | None,
    mask_y: Array | None,
    values: Array | None,
    *,
    fn: PairFunction,
    per_row: bool,
    self_pairs: bool,
    plan: Plan,
) -> Any:
    def local(x: Array, y: Array | None, mask: Array | None, mask_y: Array | None, values: Array | None) -> Any:
        features = center_features(x, y, mask, mask_y, plan.axis_name)
        gamma = _RESOLVED_BELOW_MEAN * inverse_rms_distance(features, plan.axis_name) ** 2
        pairs = pairs_of(features, None, skip_self=not self_pairs, plan=plan)
        if plan.stored:
            pairs_in_sum = pairs.pairs_in_sum("all")
            distances = accurate_distances(features, gamma, pairs_in_sum=pairs_in_sum)
            pairs = pairs_of(features, distances, skip_self=not self_pairs, plan=plan)

        def terms(tile: Tile) -> Any:
            distances = tile.distances[0] * features.scale * features.scale
            counts = tile.apply_weights(jnp.ones_like(distances))
            # fn must be finite for pairs that do not count, because 0 times inf is nan.
            safe = jnp.where(counts > 0, distances, features.scale * features.scale)
            return jax.tree.map(tile.apply_weights, smooth(fn, safe))

        def times_values(terms: Any, tile: Tile) -> tuple[Any, Any]:
            return (), jax.tree.map(lambda term: matmul(term, tile.column.column_values), terms)

        sums = times_values if values is not None else over_rows if per_row else over_all
        # Masked columns may hold nan, and 0 times nan is nan.
        column_values = () if values is None else valid_rows(values, features.column_mask)
        totals, row_sums = reduce.reduce_pairs(
            Reduction(terms, sums), pairs, gammas=(gamma,), column_values=column_values, in_blocks=False
        )
        result = totals if sums is over_all else row_sums
        return jax.tree.map(lambda a: jnp.where(features.finite, a, jnp.nan), result)

    rows = ROWS_SECOND_LAST if values is not None else ROWS_LAST if per_row else NO_ROWS
    return on_mesh(local, plan, (x, y, mask, mask_y), (values,), (ROWS_SECOND_LAST,), rows)


_reduce_jit = partial(jax.jit, static_argnames=("fn", "per_row", "self_pairs", "plan"))(_reduce)
