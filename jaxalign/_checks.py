"""Checks of options that users pass: choices, numbers, parameters and keys.

Shapes, dtypes and static numbers are always checked, also under a trace. Values (a density out of range) are checked
only in concrete arrays; under a trace, bad values give nan and a status instead of a Python exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _arrays
from jaxalign._repr import shown
from jaxalign._typing import AnyArray


def choice(name: str, value: Any, valid: Sequence[Any], hint: str = "") -> None:
    """Raise unless `value` is one of `valid`; the message ends with `hint`."""
    if not any(value is option or (isinstance(value, str) and value == option) for option in valid):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}; got {shown(value)}.{hint}")


def whole(
    name: str,
    value: Any,
    least: int = 1,
    most: int | None = None,
    *,
    of: str = "",
    most_is: str = "",
    otherwise: str = "",
) -> int:
    """`value` as an int; raises unless it is an integer from `least` to `most`.

    The message says what is counted (`of`), what `most` is (`most_is`, such as "n = "), and which other values the
    argument accepts (`otherwise`).
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, np.integer))
        or value < least
        or (most is not None and value > most)
    ):
        limits = f", at least {least}" if most is None else f" from {least} to {most_is}{most}"
        raise ValueError(f"{name} must be a whole number{of}{limits}{otherwise}; got {shown(value)}.")
    return int(value)


def row_numbers(name: str, value: Any, n: int) -> np.ndarray:
    """Distinct row indices from 0 to n - 1."""
    if not _arrays.is_concrete(value):
        raise TypeError(
            f"{name} must not be traced, because their number is a shape: pass a NumPy array, or one made outside the "
            "compiled function."
        )
    indices = np.asarray(_arrays.array(name, value))
    if indices.ndim != 1 or indices.size == 0 or not np.issubdtype(indices.dtype, np.integer):
        raise TypeError(
            f"{name} must be None, a number or a vector of indices; "
            f"got shape {indices.shape}, dtype {indices.dtype}."
            + (f" For a mask write np.flatnonzero({name})." if indices.dtype == bool else "")
        )
    if indices.min() < 0 or indices.max() >= n:
        raise ValueError(f"{name} must be indices from 0 to {n - 1}; got {indices.min()} .. {indices.max()}.")
    values, counts = np.unique(indices, return_counts=True)
    if (counts > 1).any():
        sample, count = values[counts > 1][0], counts[counts > 1][0]
        raise ValueError(f"{name} must be distinct: sample {sample} occurs {count} times.")
    return indices


def random_key(value: Any) -> None:
    """Raise unless `value` is a single `jax.random` key."""
    typed = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and value.ndim == 0
    raw = isinstance(value, (jax.Array, np.ndarray)) and value.dtype == np.uint32 and value.shape in ((2,), (4,))
    if not typed and not raw:
        raise TypeError(f"key must be a single key, such as jax.random.key(0); got {shown(value)}.")


def parameter(name: str, value: Any, dtype: Any, shape: tuple[int, ...], meaning: str) -> AnyArray:
    """A real number or array, broadcast to `shape`, which `meaning` explains in messages.

    A value on the host stays there: an operation outside a compiled program costs more than it saves.
    """
    array = _arrays.array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be a real number or a real array; got {shown(value)} of dtype {array.dtype}.")
    if not _arrays.fits(array.shape, shape):
        raise ValueError(f"{name} of shape {array.shape} does not broadcast to {shape}, {meaning}.")
    if isinstance(array, np.ndarray):
        with np.errstate(over="ignore", under="ignore"):
            ready = array.astype(dtype)
        if ((np.isinf(ready) & np.isfinite(array)) | ((ready == 0) & (array != 0))).any():
            raise ValueError(
                f"{name} = {shown(value)} is beyond the range of {ready.dtype}, the dtype of the features."
            )
        return np.broadcast_to(ready, shape)
    return jnp.broadcast_to(array.astype(dtype), shape)


def parameter_array(name: str, value: Any, dtype: Any) -> jax.Array:
    """A real vector or matrix, as a JAX array."""
    array = _arrays.array(name, value)
    if array.ndim == 0 or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be a real vector or matrix; got shape {array.shape}, dtype {array.dtype}.")
    return jnp.asarray(array).astype(dtype)


def density_value(density: Any) -> None:
    """Raise if a concrete density is outside (0, 1)."""
    if _arrays.is_concrete(density):
        values = _arrays.on_host(density)
        valid = (values > 0) & (values < 1)
        _refuse_first("density must lie strictly between 0 and 1, as the mean of the affinity", values, valid)


def probability(name: str, value: Any) -> None:
    """Raise unless the value is a float strictly between 0 and 1."""
    if not isinstance(value, (float, np.floating)) or not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1; got {shown(value)}.")


def positive(name: str, value: Any, keep: Any | None = None) -> None:
    """Raise if a concrete value is not finite and above 0; with `keep`, only where it is True."""
    if _arrays.is_concrete(value, keep):
        values = _arrays.on_host(value)
        valid = np.isfinite(values) & (values > 0)
        valid = valid if keep is None else valid | ~_arrays.on_host(keep)
        _refuse_first(f"{name} must be finite and above 0", values, valid)


def _refuse_first(rule: str, values: np.ndarray, valid: Any) -> None:
    """Raise for the first value that is not valid, naming it and its index."""
    if not valid.all():
        index = tuple(int(i) for i in np.argwhere(~valid)[0])
        where = f" at index {index[0] if len(index) == 1 else index}" if index else ""
        raise ValueError(f"{rule}; got {np.broadcast_to(values, valid.shape)[index].item()!r}{where}.")
