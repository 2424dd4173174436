"""Features and masks that users pass: checks, and conversion to the dtype of the computation.

Shapes and dtypes are always checked, also under a trace. Values (nan) are checked only in concrete arrays; under a
trace, bad values give nan and a status instead of a Python exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _arrays, _numbers
from jaxalign._linalg import smallest
from jaxalign._typing import AnyArray


def features(name: str, value: Any, *, min_rows: int = 1, center: bool = False, mask: Any = None) -> jax.Array:
    """`value` as a floating-point array of shape (..., n, d) in a dtype fit for accumulation.

    Args:
        name: name of the argument, for messages.
        value: numbers in any form, see `_arrays.numbers`.
        min_rows: the smallest valid n.
        center: whether rows may be shifted by a constant, because only their differences matter. Numbers wider than
            JAX holds are then centered before they are narrowed, which loses nothing; otherwise they are rejected if
            narrowing would round away the differences between rows.
        mask: True marks valid rows, whose mean is the shift; the caller checks it.
    """
    array = _shaped(name, value, min_rows)
    known = _known_mask(mask, array) if _numbers.is_wide(array.dtype) else None
    return _narrowed(name, array, _shift((array,), mask, known) if center else None, known)


class Shift(NamedTuple):
    """A row (1, d) that was subtracted from features, as the sum of two of them in the dtype of the computation."""

    high: jax.Array
    low: jax.Array


def centered_features(name: str, value: Any, *, min_rows: int = 1, mask: Any = None) -> tuple[jax.Array, Shift | None]:
    """`features` with `center=True`, and the shift, which must also be subtracted from new samples."""
    array = _shaped(name, value, min_rows)
    known = _known_mask(mask, array) if _numbers.is_wide(array.dtype) else None
    row = _shift((array,), mask, known)
    centered = _narrowed(name, array, row, known)
    if row is None:
        return centered, None
    high = row.astype(centered.dtype)
    with jax.ensure_compile_time_eval():
        return centered, Shift(jnp.asarray(high), jnp.asarray((row - high).astype(high.dtype)))


def shifted_features(name: str, value: Any, shift: Shift | None) -> jax.Array:
    """Features of new samples, minus the shift of `centered_features`."""
    array = _shaped(name, value, 1)
    if shift is None or array.shape[-1] != shift.high.shape[-1]:  # the caller rejects another width
        return _narrowed(name, array, None, None, reject=False)  # the earlier samples were rounded too
    if isinstance(array, np.ndarray) and _arrays.is_concrete(*shift):
        return _narrowed(name, array, _arrays.on_host(shift.high).astype(np.float64) + _arrays.on_host(shift.low), None)
    rows = _narrowed(name, array, None, None)
    lead = (1,) * (rows.ndim - 2)
    return (rows - shift.high.reshape(*lead, 1, -1)) - shift.low.reshape(*lead, 1, -1)


def feature_pair(
    x: Any, y: Any | None, *, min_rows: int = 1, mask: Any = None, mask_y: Any = None
) -> tuple[jax.Array, jax.Array | None]:
    """Both feature arrays with the same width, dtype and batch shape, ready for distances; y may be None."""
    if y is None:
        return features("x", x, min_rows=min_rows, center=True, mask=mask), None
    x, y = _shaped("x", x, 1), _shaped("y", y, 1)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x and y must have the same number of features: x has shape {x.shape}, y has shape {y.shape}. "
            "Features of different networks live in different spaces: compare their affinities instead, "
            "rbf_affinity(x) and rbf_affinity(y)."
        )
    try:
        batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except ValueError:
        raise ValueError(
            f"the batch dimensions of x, {x.shape[:-2]}, and of y, {y.shape[:-2]}, do not broadcast."
        ) from None
    known = known_y = None
    if _numbers.is_wide(x.dtype) or _numbers.is_wide(y.dtype):
        known, known_y = _known_mask(mask, x), _known_mask(mask_y, y)
    shift = _shift((x, y), mask, known)
    # A JAX array keeps its offset and its rounding, so rows compared with it may be rounded in the same way.
    reject = isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
    x, y = _narrowed("x", x, shift, known, reject=reject), _narrowed("y", y, shift, known_y, reject=reject)
    dtype = np.promote_types(x.dtype, y.dtype)
    return (
        jnp.broadcast_to(x, batch + x.shape[-2:]).astype(dtype),
        jnp.broadcast_to(y, batch + y.shape[-2:]).astype(dtype),
    )


def _shaped(name: str, value: Any, min_rows: int) -> AnyArray:
    """The numbers of `value`; raises unless their shape is (..., n, d)."""
    array = _arrays.numbers(name, value)
    if array.ndim < 2:
        ways_out = f" For one sample of d features pass {name}[None, :], for n samples of one feature {name}[:, None]."
        if not isinstance(value, (jax.Array, np.ndarray)):  # a list or a table has no such indices
            ways_out = f" Make it an array first: np.asarray({name})[:, None] has n samples of one feature."
        ways_out = ways_out if array.ndim else ""
        raise ValueError(
            f"{name} must have shape (..., n, d): n samples of d features; got shape {array.shape}.{ways_out}"
        )
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: shape {array.shape}; every axis of (..., n, d) must be at least 1.")
    if array.shape[-2] < min_rows:
        raise ValueError(
            f"{name} has n = {array.shape[-2]} sample(s) in shape {array.shape}; at least {min_rows} are needed."
        )
    return array


def _known_mask(mask: Any, array: AnyArray) -> np.ndarray | None:
    """The mask as a NumPy array in the shape of the features, (..., n); None if either cannot be read on the host."""
    if mask is None or isinstance(array, jax.Array) or not _arrays.is_concrete(mask):
        return None
    if isinstance(mask, jax.Array) and not mask.is_fully_addressable:
        return None
    known = _as_bool(np.asarray(mask))
    if known.dtype != bool:  # rejected later by `row_mask`
        return None
    while known.ndim > array.ndim - 1:  # a batch shares these features: a row is valid if any element uses it
        known = known.any(0)
    try:
        return np.broadcast_to(known, array.shape[:-1])
    except ValueError:  # rejected later by `row_mask`
        return None


def _shift(arrays: Sequence[AnyArray], mask: Any, known: np.ndarray | None) -> np.ndarray | None:
    """The row that is subtracted from all arrays before they are narrowed: the mean of the first array.

    None if nothing is narrowed, or if the arrays cannot all get the same shift because one is traced or on a device.
    None also for a traced mask: the valid rows are then unknown, and masked rows may hold anything.
    """
    if any(isinstance(array, jax.Array) for array in arrays) or (mask is not None and known is None):
        return None
    if not any(_numbers.is_wide(array.dtype) for array in arrays):
        return None
    assert isinstance(arrays[0], np.ndarray)
    return _numbers.mean_row(arrays[0], known)


def _narrowed(
    name: str, array: AnyArray, shift: np.ndarray | None, mask: np.ndarray | None, *, reject: bool = True
) -> jax.Array:
    """Features minus the shift, in the dtype of the computation; `reject`: raise if rounding would merge rows."""
    dtype = _numbers.computing_dtype(array.dtype)
    if isinstance(array, jax.Array):
        if _numbers.is_wide(array.dtype) and _arrays.is_concrete(array):  # integers that are sharded over devices
            most = float(_arrays.read_on_host(lambda a: jnp.max(jnp.abs(a.astype(dtype))), array))
            if most > 2.0 ** (jnp.finfo(dtype).nmant + 1):
                raise ValueError(
                    f"{name} is {array.dtype} and reaches {most:.3g}, where {dtype} rounds integers. Subtract one row "
                    "from all rows first: distances stay the same."
                )
        return array.astype(dtype)
    narrowed = _numbers.narrow(array, dtype, shift)
    if _numbers.is_wide(array.dtype) or shift is not None:
        if not _numbers.is_in_range(narrowed) and (
            _numbers.overflows(array, narrowed, mask) or _numbers.vanishes(array, narrowed)
        ):
            code = f"np.asarray({name})"  # for lists and tables too
            raise ValueError(
                f"{name} holds numbers up to {_numbers.largest(array):.3g}, beyond the range of {dtype}. Use another "
                f"unit: {code} / np.abs({code}).max()."
            )
        if shift is None and reject:
            refuse_rounding(name, array)
    with jax.ensure_compile_time_eval():  # stays concrete inside a trace too
        return jnp.asarray(narrowed)


def refuse_rounding(name: str, array: np.ndarray) -> None:
    """Raise if narrowing without a shift would round away the differences between rows."""
    if _numbers.error_of_narrowing(array) > _numbers.ALLOWED:
        raise ValueError(
            f"{name} is {array.dtype} and far from 0: float32 would round away the differences between its rows. If "
            f"the origin has no meaning, subtract the mean: {name} - np.mean({name}, -2, keepdims=True). Or compute "
            'in float64: jax.config.update("jax_enable_x64", True) at the start of the program.'
        )


def row_mask(name: str, value: Any | None, shape: tuple[int, ...]) -> jax.Array | None:
    """A boolean mask over rows, True = a valid sample, broadcast to `shape` = (..., n)."""
    if value is None:
        return None
    array = _as_bool(_arrays.array(name, value))
    if array.dtype != bool:
        raise TypeError(
            f"{name} must be boolean, True for valid samples; got dtype {array.dtype}. "
            f"Write {name}.astype(bool) if nonzero means valid."
        )
    if array.shape[-1:] != shape[-1:] or not _arrays.fits(array.shape, shape):
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}: one entry per sample.")
    return jnp.broadcast_to(jnp.asarray(array), shape)


def _as_bool(mask: Any) -> Any:
    """Convert an object array of bools, such as a nullable column, to a boolean mask; return other arrays unchanged."""
    is_bool = mask.dtype == object and all(isinstance(entry, (bool, np.bool_)) for entry in mask.ravel())
    return mask.astype(bool) if is_bool else mask


def finite_rows(
    name: str,
    value: Any,
    mask: Any | None = None,
    *,
    way_out: str = "Remove these samples, or exclude them with mask=.",
    differences: bool = False,
) -> None:
    """Raise on nan or inf in a concrete array, naming the first bad row.

    With `differences`, also if all numbers are so small that differences of rows are rounded to 0.
    """
    if not _arrays.is_concrete(value, mask):
        return
    # Computed on the device, so that one byte per row travels to the host and the other processes: all raise, or none.
    rows = _arrays.read_on_host(_row_facts, value)
    if mask is not None:
        rows = np.where(_arrays.on_host(mask), rows, 0)
    if differences and not (rows & _NORMAL).any() and (rows & _NONZERO).any():
        raise ValueError(
            f"{name} has no entry above {smallest(value.dtype):.0e}: numbers that small, and their differences, are "
            f"rounded to 0. Use another unit: np.asarray({name}) * 2.0**64."
        )
    bad = (rows & _NOT_FINITE) > 0
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        where = f"row {first[-1]}" + (f" of batch element {first[:-1]}" if len(first) > 1 else "")
        raise ValueError(f"{name} has nan or inf in {int(bad.sum())} row(s), the first is {where}. {way_out}")


# Bits that describe a row.
_NOT_FINITE, _NONZERO, _NORMAL = 1, 2, 4


@jax.jit
def _row_facts(value: jax.Array) -> jax.Array:
    # Compare bits: subnormal numbers compare as 0.
    integer = jnp.dtype(f"int{8 * value.dtype.itemsize}")
    size = jax.lax.bitcast_convert_type(jnp.abs(value), integer)
    least = jax.lax.bitcast_convert_type(jnp.asarray(smallest(value.dtype), value.dtype), integer)
    facts = (~jnp.isfinite(value), size != 0, size >= least)
    bits = (_NOT_FINITE, _NONZERO, _NORMAL)
    return jnp.stack([fact.any(-1).astype(jnp.uint8) * bit for fact, bit in zip(facts, bits, strict=True)]).sum(0)
