"""Where a function of a single representation runs: on one device, or on each device of a mesh with its own rows.

This is the one place that adds leading batch dimensions: `batched` maps a function over all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxalign.plan import Plan

# Which axis of a result or an argument holds the rows.
NO_ROWS = 0  # not None, which would be an empty pytree
ROWS_LAST = -1
ROWS_SECOND_LAST = -2

T = TypeVar("T")


def batched(fn: Callable[..., T], batch_dims: int) -> Callable[..., T]:
    """A function of a single representation, mapped over leading batch dimensions that all of its arrays have."""
    for _ in range(batch_dims):
        fn = jax.vmap(fn)
    return fn


def on_any_device(condition: Array, axis_name: str | None) -> Array:
    """Whether a condition holds anywhere, on any of the devices along a named axis: ()."""
    holds = jnp.any(condition)
    return holds if axis_name is None else lax.psum(holds.astype(jnp.int32), axis_name) > 0


def over_devices(collective: Callable[..., T], value: T, axis_name: str | None) -> T:
    """A collective over a named axis, or the value itself without one."""
    return value if axis_name is None else collective(value, axis_name)


def varying_like(like: Any, value: Array) -> Array:
    """A value typed as varying over the devices over which `like` varies, as well as over those it varies over already.

    That is how loops inside `jax.shard_map` want their carries to be; elsewhere the value is returned as it is.
    """
    wanted, has = (
        getattr((jax.typeof(a) if isinstance(a, jax.Array) else a).manual_axis_type, "varying", frozenset())
        for a in (like, value)
    )
    return lax.pcast(value, tuple(wanted - has), to="varying") if wanted - has else value


def on_mesh(
    local: Callable[..., T],
    plan: Plan,
    sides: tuple[Array, Array | None, Array | None, Array | None],
    others: Any = (),
    other_rows: Any = (),
    result_rows: Any = (),
) -> T:
    """local(x, y, mask, mask_y, *others) of each representation, on every device of the mesh with its own rows.

    Args:
        local: a function of a single representation; it finds the rows of other devices over `plan.axis_name`.
        plan: with the mesh, or without: then on one device.
        sides: x, y, mask, mask_y; all arrays have the batch dimensions of x.
        others: more arguments, a tuple of pytrees of arrays with the same batch dimensions.
        other_rows: for each of them the axis that holds rows of x or y: NO_ROWS, ROWS_LAST or ROWS_SECOND_LAST.
        result_rows: the same for the result, a prefix of its pytree; rows of x.
    """
    (x, y, mask, mask_y), others = jax.tree.map(jnp.asarray, (sides, others))  # without jit, numbers come as numpy's
    batch = x.ndim - 2
    local = batched(local, batch)
    if plan.mesh is None:
        if plan.axis_name is not None:
            return local(x, y, mask, mask_y, *others)
        return in_auto_mode(local, x, y, mask, mask_y, *others, result_rows=result_rows)
    assert plan.axis_name is not None
    n, layout = x.shape[-2], _Layout(plan.mesh, plan.axis_name, batch)
    x, mask = _padded(x, mask, layout.num_devices)
    y, mask_y = (None, None) if y is None else _padded(y, mask_y, layout.num_devices)
    sides, side_rows = (x, y, mask, mask_y), (ROWS_SECOND_LAST, ROWS_SECOND_LAST, ROWS_LAST, ROWS_LAST)
    side_specs = [None if a is None else layout.spec(rows) for a, rows in zip(sides, side_rows, strict=True)]
    x, y, mask, mask_y = (
        None if a is None else layout.place(a, rows) for a, rows in zip(sides, side_rows, strict=True)
    )
    others = tuple(
        jax.tree.map(lambda a, rows=rows: layout.place(a, rows), other)
        for other, rows in zip(others, other_rows, strict=True)
    )
    result = jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(*side_specs, *map(layout.spec, other_rows)),
        out_specs=jax.tree.map(layout.spec, result_rows),
        axis_names={plan.axis_name},
    )(x, y, mask, mask_y, *others)
    return jax.tree.map(lambda rows, part: jax.tree.map(lambda a: layout.crop(a, rows, n), part), result_rows, result)


class _Layout(NamedTuple):
    """Rows over one axis of a mesh, everything else on every device."""

    mesh: Mesh | AbstractMesh
    axis_name: str
    batch_dims: int

    @property
    def num_devices(self) -> int:
        """Devices along the axis."""
        return self.mesh.shape[self.axis_name]

    def spec(self, rows: int) -> P:
        """Of an array with its rows on that axis."""
        return P() if rows == NO_ROWS else P(*[None] * self.batch_dims, self.axis_name, *[None] * (-1 - rows))

    def place(self, a: Array, rows: int) -> Array:
        """An array with as many rows on each device."""
        missing = 0 if rows == NO_ROWS else -a.shape[rows] % self.num_devices
        if missing:
            width = [(0, 0)] * a.ndim
            width[rows] = (0, missing)
            a = jnp.pad(a, width, mode="edge")  # not 0: a sigma of a row that does not count
        return jax.sharding.reshard(a, NamedSharding(self.mesh, self.spec(rows))) if _is_explicit(self.mesh) else a

    def crop(self, a: Array, rows: int, n: int) -> Array:
        """The first n rows."""
        # Rows that are left out cannot be sliced off an axis that is typed as spread.
        whole = rows == NO_ROWS or n % self.num_devices == 0
        return a if whole else lax.slice_in_dim(gathered(a), 0, n, axis=rows)


def in_auto_mode(fn: Callable[..., Any], x: Array, *args: Any, result_rows: Any) -> Any:
    """fn(x, *args), whose arrays may be typed with explicit shardings: inside, the compiler chooses.

    Results are spread as x is; `result_rows` says which of their axes has the rows, as in `on_mesh`.
    """
    x, arrays = jax.tree.map(jnp.asarray, (x, args))  # without jit, numbers come as numpy's
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    if not _is_explicit(mesh):
        return fn(x, *arrays)

    def spread(rows: int) -> NamedSharding:
        batch, of_rows = sharding.spec[:-2], sharding.spec[-2:-1]
        return NamedSharding(mesh, P(*batch) if rows == NO_ROWS else P(*batch, *of_rows, *[None] * (-1 - rows)))

    out = jax.tree.map(spread, result_rows)
    return jax.sharding.auto_axes(fn, axes=mesh.explicit_axes, out_sharding=out)(x, *arrays)


def gathered(a: Array) -> Array:
    """The same array, on every device as a whole where it is typed as spread."""
    mesh = jax.typeof(a).sharding.mesh
    return jax.sharding.reshard(a, NamedSharding(mesh, P())) if _is_explicit(mesh) else a


def _is_explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _padded(a: Array, mask: Array | None, devices: int) -> tuple[Array, Array | None]:
    """Rows that divide among the devices; those added are masked out."""
    missing = -a.shape[-2] % devices
    if not missing:
        return a, mask
    if mask is None:
        mask = jnp.ones(a.shape[:-1], bool)
    return (
        jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, missing), (0, 0)]),
        jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)]),
    )
