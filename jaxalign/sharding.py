"""Sharding of rows over devices: a mesh of all devices, and arrays whose rows are sharded over it.

These are shortcuts for `jax.make_mesh` and `jax.device_put`; any other mesh and sharded array work too.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from jaxalign import _arrays, _checks, _features
from jaxalign._typing import AnyArray
from jaxalign.plan import default_axis


def data_mesh(
    devices: Sequence[jax.Device] | int | None = None,  # pyright: ignore[reportUnknownParameterType]
    *,
    axis_name: str = "data",
) -> Mesh:
    """A mesh with one axis, over which rows are sharded.

    Args:
        devices: the devices, or their number; None: all devices of all processes.
        axis_name: the name of the axis.

    Raises:
        ValueError: devices is empty, or a number that is not an integer from 1 to the number of devices.

    Examples:
        >>> import jaxalign
        >>> mesh = jaxalign.sharding.data_mesh()
        >>> mesh.axis_names
        ('data',)
    """
    if devices is None or isinstance(devices, (int, float, str, np.number)):
        available = jax.devices()
        most = len(available)
        options = f", the number of {available[0].platform} devices, or a list of devices"
        count = most if devices is None else _checks.whole("devices", devices, 1, most, otherwise=options)
        devices = available[:count]
    if not len(devices):
        raise ValueError("devices is empty: a mesh needs at least one device.")
    return Mesh(np.asarray(devices), (axis_name,), axis_types=(AxisType.Auto,))


def shard_rows(
    x: Shaped[AnyArray, "*batch n d"], mesh: Mesh, *, axis_name: str | None = None
) -> Shaped[Array, "*batch rows d"]:
    """Shard the rows, axis -2, of an array over the devices of a mesh; jaxalign functions then need no mesh.

    With several processes (`jax.distributed`) each passes its own rows, the same number in every process. The result is
    the array of all rows, in the order of the processes.

    Args:
        x: the rows of this process; their number must be divisible by its number of devices (pass
            `jaxalign.Plan(mesh=...)` instead if it is not). Any real dtype; only float64 without x64 is converted.
        mesh: the mesh.
        axis_name: the axis of the mesh; None: the only axis, or "data" if there are several.

    Returns:
        The sharded array, shape (..., rows, d), with the rows of all processes.

    Raises:
        TypeError: x is not an array of numbers.
        ValueError: the mesh has no such axis; the number of rows is not divisible, or differs between processes.
    """
    array = _arrays.numbers("x", x)
    if array.ndim < 2:
        raise TypeError(f"x must be an array of shape (..., n, d); got shape {array.shape}.")
    # Only float64 without x64 is converted, and without a shift: the mean would differ between processes.
    x = _features.features("x", array) if array.dtype.itemsize > 4 and array.dtype.kind == "f" else array
    if jax.process_count() > 1:
        rows = np.asarray(multihost_utils.process_allgather(np.int32(x.shape[-2]))).ravel()
        if (rows != rows[0]).any():
            raise ValueError(
                f"x must have the same number of rows in every process; got {rows.tolist()}. Pad the rows, and mask "
                "the padding with mask=."
            )
    axis = default_axis(mesh) if axis_name is None else axis_name
    if axis not in mesh.axis_names:
        raise ValueError(f"mesh has no axis {axis!r}, its axes are {mesh.axis_names}. Pass one of them as axis_name=.")
    local_devices = mesh.shape[axis] // jax.process_count()
    if local_devices < 1 or x.shape[-2] % local_devices:
        raise ValueError(
            f"x has {x.shape[-2]} rows, not a multiple of the {local_devices} devices of this process along axis "
            f"{axis!r}. Pad the rows and mask the padding with mask=, or pass plan=jaxalign.Plan(mesh=...) instead."
        )
    sharding = NamedSharding(mesh, P(*[None] * (x.ndim - 2), axis, None))
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))
