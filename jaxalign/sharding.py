"""Rows over devices: a mesh of all devices, and arrays whose rows are spread over it.

Everything here is a short form of `jax.make_mesh` and `jax.device_put`; any mesh and any array of your own will do.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from jaxalign import _checks
from jaxalign._typing import AnyArray
from jaxalign.plan import default_axis


def data_mesh(
    devices: Sequence[jax.Device] | int | None = None,  # pyright: ignore[reportUnknownParameterType]
    *,
    axis_name: str = "data",
) -> Mesh:
    """A mesh with one axis, of devices that share the rows.

    Args:
        devices: the devices, or how many of them; None: all, those of other processes included.
        axis_name: the name of the axis.

    Raises:
        ValueError: neither devices nor a whole number of them, from 1 to as many as there are.

    Example:
        >>> import jaxalign
        >>> mesh = jaxalign.sharding.data_mesh()
        >>> mesh.axis_names
        ('data',)
    """
    if devices is None or isinstance(devices, (int, float, str, np.number)):
        every = jax.devices()
        there = f", as many as there are ({every[0].platform}), or devices"
        count = len(every) if devices is None else _checks.whole("devices", devices, 1, len(every), otherwise=there)
        devices = every[:count]
    if not len(devices):
        raise ValueError("devices is empty: a mesh needs at least one.")
    return Mesh(np.asarray(devices), (axis_name,), axis_types=(AxisType.Auto,))


def shard_rows(
    x: Shaped[AnyArray, "*batch n d"], mesh: Mesh, *, axis_name: str | None = None
) -> Shaped[Array, "*batch rows d"]:
    """An array whose rows, axis -2, are spread over the devices of a mesh.

    With several processes (`jax.distributed`) each gives the rows it holds, the same number in each, and the result
    is the array of all rows, in the order of the processes. Functions of jaxalign then need no mesh.

    Args:
        x: this process's rows; their number must divide among its devices (with `jaxalign.Plan(mesh=...)` it need not).
            Of any real dtype, which stays, except for float64 if jax does not hold it.
        mesh: the mesh.
        axis_name: the axis of the mesh; None: the only one, or "data" where it has several.

    Raises:
        TypeError: x is no array of numbers. ValueError: the mesh has no such axis; rows that do not divide, or another
            number of them in another process.
    """
    array = _checks.numbers("x", x)
    if array.ndim < 2:
        raise TypeError(f"x must be an array of shape (..., n, d); got shape {array.shape}.")
    # Rows are spread as they are, but for float64 that jax does not hold. Each process has rows of its own, so they are
    # not shifted by a mean.
    x = _checks.features("x", array) if array.dtype.itemsize > 4 and array.dtype.kind == "f" else array
    if jax.process_count() > 1:
        rows = np.asarray(multihost_utils.process_allgather(np.int32(x.shape[-2]))).ravel()
        if (rows != rows[0]).any():
            raise ValueError(
                f"x must have the same number of rows in every process; it has {rows.tolist()}. Add rows and mask them "
                "out with mask=."
            )
    axis = default_axis(mesh) if axis_name is None else axis_name
    if axis not in mesh.axis_names:
        raise ValueError(f"mesh has no axis {axis!r}, its axes are {mesh.axis_names}. Name one with axis_name=.")
    here = mesh.shape[axis] // jax.process_count()
    if here < 1 or x.shape[-2] % here:
        raise ValueError(
            f"x has {x.shape[-2]} rows, which do not divide among the {here} devices of this process along axis "
            f"{axis!r}. Add rows and mask them out with mask=, or pass plan=jaxalign.Plan(mesh=...) instead."
        )
    sharding = NamedSharding(mesh, P(*[None] * (x.ndim - 2), axis, None))
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))
