"""Checks of user input, and their messages: every public function starts here.

Shapes, dtypes and static numbers are always checked, also under a trace. Values (nan, a density out of range) are
checked only in concrete arrays; under a trace, bad values give nan and a status instead of a Python exception.
"""

from __future__ import annotations

import contextlib
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

from jaxalign import _numbers
from jaxalign._linalg import smallest
from jaxalign._typing import AnyArray

P = ParamSpec("P")
T = TypeVar("T")


def is_concrete(*values: Any) -> bool:
    """Whether all values can be read now: none is a tracer."""
    return not any(isinstance(value, Tracer) for value in values)


def on_host(value: Any) -> np.ndarray:
    """A concrete array as a NumPy array. If it is sharded over processes, all must call this; each gets every value."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    with jax.ensure_compile_time_eval():
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def read_on_host(fn: Callable[..., Any], *values: Any) -> Any:
    """The result of `fn` for concrete values, as NumPy arrays.

    Works inside a trace too, which would otherwise stage operations on concrete arrays. If values are sharded over
    processes, all must call this.
    """
    with jax.ensure_compile_time_eval():
        return jax.tree.map(on_host, fn(*values))


def features(name: str, value: Any, *, min_rows: int = 1, center: bool = False, mask: Any = None) -> jax.Array:
    """`value` as a floating-point array of shape (..., n, d) in a dtype fit for accumulation.

    Args:
        name: name of the argument, for messages.
        value: numbers in any form, see `numbers`.
        min_rows: the smallest valid n.
        center: whether rows may be shifted by a constant, because only their differences matter. Numbers wider than
            JAX holds are then centered before they are narrowed, which loses nothing; otherwise they are rejected if
            narrowing would round away the differences between rows.
        mask: True marks valid rows, whose mean is the shift; the caller checks it.
    """
    array = _shaped(name, value, min_rows)
    known = _known_mask(mask, array) if _is_wide(array) else None
    return _narrowed(name, array, _shift((array,), mask, known) if center else None, known)


class Shift(NamedTuple):
    """A row (1, d) that was subtracted from features, as the sum of two of them in the dtype of the computation."""

    high: jax.Array
    low: jax.Array


def centered_features(name: str, value: Any, *, min_rows: int = 1, mask: Any = None) -> tuple[jax.Array, Shift | None]:
    """`features` with `center=True`, and the shift, which must also be subtracted from new samples."""
    array = _shaped(name, value, min_rows)
    known = _known_mask(mask, array) if _is_wide(array) else None
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
    if isinstance(array, np.ndarray) and is_concrete(*shift):
        return _narrowed(name, array, on_host(shift.high).astype(np.float64) + on_host(shift.low), None)
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
    if _is_wide(x) or _is_wide(y):
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


def _shaped(name: str, value: Any, min_rows: int) -> jax.Array | np.ndarray:
    """The numbers of `value`; raises unless their shape is (..., n, d)."""
    array = numbers(name, value)
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


def _is_wide(array: jax.Array | np.ndarray) -> bool:
    """Whether the dtype is wider than the dtype of the computation."""
    return not _numbers.holds_exactly(_numbers.computing_dtype(array.dtype), array.dtype)


def _known_mask(mask: Any, array: jax.Array | np.ndarray) -> np.ndarray | None:
    """The mask as a NumPy array in the shape of the features, (..., n); None if either cannot be read on the host."""
    if mask is None or isinstance(array, jax.Array) or not is_concrete(mask):
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


def _shift(arrays: Sequence[jax.Array | np.ndarray], mask: Any, known: np.ndarray | None) -> np.ndarray | None:
    """The row that is subtracted from all arrays before they are narrowed: the mean of the first array.

    None if nothing is narrowed, or if the arrays cannot all get the same shift because one is traced or on a device.
    None also for a traced mask: the valid rows are then unknown, and masked rows may hold anything.
    """
    if any(isinstance(array, jax.Array) for array in arrays) or (mask is not None and known is None):
        return None
    if not any(map(_is_wide, arrays)):
        return None
    assert isinstance(arrays[0], np.ndarray)
    return _numbers.mean_row(arrays[0], known)


def _narrowed(
    name: str,
    array: jax.Array | np.ndarray,
    shift: np.ndarray | None,
    mask: np.ndarray | None,
    *,
    reject: bool = True,
) -> jax.Array:
    """Features minus the shift, in the dtype of the computation; `reject`: raise if rounding would merge rows."""
    dtype = _numbers.computing_dtype(array.dtype)
    if isinstance(array, jax.Array):
        if _is_wide(array) and is_concrete(array):  # integers that are sharded over devices
            most = float(read_on_host(lambda a: jnp.max(jnp.abs(a.astype(dtype))), array))
            if most > 2.0 ** (jnp.finfo(dtype).nmant + 1):
                raise ValueError(
                    f"{name} is {array.dtype} and reaches {most:.3g}, where {dtype} rounds integers. Subtract one row "
                    "from all rows first: distances stay the same."
                )
        return array.astype(dtype)
    narrowed = _numbers.narrow(array, dtype, shift)
    if _is_wide(array) or shift is not None:
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


def numbers(name: str, value: Any) -> jax.Array | np.ndarray:
    """Real numbers as an array, with their dtype: a JAX array stays as it is, everything else becomes a NumPy array.

    Accepts NumPy and JAX arrays, nested lists, and objects that NumPy converts to numbers, such as a DataFrame.
    """
    refuse_foreign(name, value)
    if not isinstance(value, (jax.Array, np.ndarray)):
        array = _converted(name, value)
    elif isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost. Pass {name}.data, and "
            f"mask=~np.ma.getmaskarray({name}).any(-1): True marks a valid sample."
        )
    else:
        array = value
    kind = getattr(array.dtype, "kind", "")  # jax.random keys have none
    if kind == "c":
        raise TypeError(
            f"{name} is complex ({array.dtype}). Concatenate its parts as features: np.concatenate([{name}.real, "
            f"{name}.imag], -1) has the same distances."
        )
    # bfloat16 and similar dtypes have kind V, like records.
    if kind not in tuple("fiub") and not any(jnp.issubdtype(array.dtype, t) for t in (jnp.floating, jnp.integer)):
        advice = _dtype_advice(name, value, array)
        raise TypeError(f"{name} must hold real numbers; got {_dtypes(value, array)}.{advice}")
    if isinstance(array, jax.Array) and is_concrete(array) and _is_wide(array):
        on_one_device = array.is_fully_addressable and len(array.sharding.device_set) == 1
        return np.asarray(array) if on_one_device else array
    return array


def _converted(name: str, value: Any) -> jax.Array | np.ndarray:
    """Lists, tables and other array-likes as an array."""
    kind = type(value)
    is_sparse = hasattr(value, "toarray") or hasattr(value, "todense")
    is_numbers = isinstance(value, (list, tuple, int, float)) or hasattr(kind, "__array__")
    if is_sparse or not (is_numbers or hasattr(kind, "__array_interface__") or hasattr(kind, "__dlpack__")):
        raise TypeError(f"{name} must be an array of numbers; got {kind.__name__}.{_array_advice(name, value)}")
    first = value
    while isinstance(first, (list, tuple)) and len(first):
        first = first[0]
    if _is_tensor(first):
        raise TypeError(f"{name} holds torch tensors. Stack them first: pass torch.stack({name}).numpy().")
    try:
        if hasattr(kind, "__dlpack__") and not hasattr(kind, "__array__"):
            return jnp.from_dlpack(value)
        array = np.asarray(value)
        if array.dtype == object and _odd_columns(value) == []:  # bool beside float, or nullable columns
            with contextlib.suppress(TypeError, ValueError):  # nullable columns with missing values
                return array.astype(np.float64)
        return array
    except jax.errors.TracerArrayConversionError:
        return jnp.asarray(value)
    except ValueError:
        raise TypeError(f"{name} must hold rows of one length; got {shown(value)}.") from None


def _dtypes(value: Any, array: Any) -> str:
    """The dtype of a non-numeric array; for a table, its non-numeric columns."""
    odd = _odd_columns(value)
    if odd is None:
        return f"dtype {array.dtype}"
    more = f", and {len(odd) - _FEW} more" if len(odd) > _FEW else ""
    return f"column {', '.join(odd[:_FEW])}{more}" if odd else "missing values"


def _odd_columns(value: Any) -> list[str] | None:
    """The non-numeric columns of a table; None if `value` is not a table."""
    columns, dtypes = getattr(value, "columns", None), getattr(value, "dtypes", None)
    if columns is None or dtypes is None:
        return None
    named = zip(columns, dtypes, strict=False)
    return [f"{column!r} of {dtype}" for column, dtype in named if not _NUMERIC.match(str(dtype))]


_NUMERIC = re.compile(r"u?int|float|bool", re.IGNORECASE)  # dtype names of pandas and polars


def _dtype_advice(name: str, value: Any, array: Any) -> str:
    """Advice for an array with a non-numeric dtype."""
    odd = _odd_columns(value)
    if odd is not None:
        return " Drop it." if odd else f" {name}.to_numpy(np.float64, na_value=np.nan) turns them into nan."
    try:
        np.asarray(array).astype(np.float64)
    except (TypeError, ValueError):
        return " Its entries are not numbers."
    return f" Write np.asarray({name}).astype(np.float64)."


def _array(name: str, value: Any) -> jax.Array | np.ndarray:
    """An argument other than features as an array; its dtype is not checked."""
    refuse_foreign(name, value)
    try:
        return value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError:  # ragged lists
        raise TypeError(f"{name} must be a number or an array; got {shown(value)}.") from None


def parameter(name: str, value: Any, dtype: Any, shape: Sequence[int], meaning: str) -> AnyArray:
    """A real number or array, broadcast to `shape`, which `meaning` explains in messages.

    A value on the host stays there: an operation outside a compiled program costs more than it saves.
    """
    array = _array(name, value)
    if array.dtype == bool or not (
        jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    ):
        raise TypeError(f"{name} must be a real number or a real array; got {shown(value)} of dtype {array.dtype}.")
    try:
        np.broadcast_shapes(array.shape, tuple(shape))
        fits = np.broadcast_shapes(array.shape, tuple(shape)) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} of shape {array.shape} does not broadcast to {tuple(shape)}, {meaning}.")
    if isinstance(array, np.ndarray):
        with np.errstate(over="ignore", under="ignore"):
            ready = array.astype(dtype)
        if ((np.isinf(ready) & np.isfinite(array)) | ((ready == 0) & (array != 0))).any():
            raise ValueError(
                f"{name} = {shown(value)} is beyond the range of {ready.dtype}, the dtype of the features."
            )
        return np.broadcast_to(ready, tuple(shape))
    return jnp.broadcast_to(array.astype(dtype), tuple(shape))


def parameter_array(name: str, value: Any, dtype: Any) -> jax.Array:
    """A real vector or matrix, as a JAX array."""
    array = _array(name, value)
    if array.ndim == 0 or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be a real vector or matrix; got shape {array.shape}, dtype {array.dtype}.")
    return jnp.asarray(array).astype(dtype)


def row_mask(name: str, value: Any | None, shape: tuple[int, ...]) -> jax.Array | None:
    """A boolean mask over rows, True = a valid sample, broadcast to `shape` = (..., n)."""
    if value is None:
        return None
    array = _as_bool(_array(name, value))
    if array.dtype != bool:
        raise TypeError(
            f"{name} must be boolean, True for valid samples; got dtype {array.dtype}. "
            f"Write {name}.astype(bool) if nonzero means valid."
        )
    if array.ndim == 0 or array.shape[-1] != shape[-1] or array.ndim > len(shape):
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}: one entry per sample.")
    try:
        return jnp.broadcast_to(jnp.asarray(array), shape)
    except ValueError:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}: one entry per sample.") from None


def _as_bool(mask: Any) -> Any:
    """Convert an object array of bools, such as a nullable column, to a boolean mask; return other arrays unchanged."""
    is_bool = mask.dtype == object and all(isinstance(entry, (bool, np.bool_)) for entry in mask.ravel())
    return mask.astype(bool) if is_bool else mask


def choice(name: str, value: Any, valid: Sequence[Any], hint: str = "") -> None:
    """Raise unless `value` is one of `valid`; the message ends with `hint`."""
    if not any(value is option or (isinstance(value, str) and value == option) for option in valid):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}; got {shown(value)}.{hint}")


def cached(fn: Callable[P, T]) -> Callable[P, T]:
    """`fn` with its results cached by options; unhashable options go straight to `fn`, which rejects them."""
    remembered = lru_cache(typed=True)(fn)  # 1 and 1.0 may differ

    @wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            hash((args, tuple(kwargs.values())))
        except TypeError:
            return fn(*args, **kwargs)
        return remembered(*args, **kwargs)  # type: ignore[arg-type]

    return call


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
    if not is_concrete(value):
        raise TypeError(
            f"{name} must not be traced, because their number is a shape: pass a NumPy array, or one made outside the "
            "compiled function."
        )
    indices = np.asarray(_array(name, value))
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


def density_value(density: Any) -> None:
    """Raise if a concrete density is outside (0, 1)."""
    if not is_concrete(density):
        return
    values = on_host(density)
    bad = ~((values > 0) & (values < 1))
    if bad.any():
        raise ValueError(
            f"density must lie strictly between 0 and 1, as the mean of the affinity; got {_first_bad(values, bad)}."
        )


def positive(name: str, value: Any, keep: Any | None = None) -> None:
    """Raise if a concrete value is not finite and above 0; with `keep`, only where it is True."""
    if not is_concrete(value, keep):
        return
    values = on_host(value)
    bad = ~(np.isfinite(values) & (values > 0))
    if keep is not None:
        bad = bad & on_host(keep)
    if bad.any():
        raise ValueError(f"{name} must be finite and above 0; got {_first_bad(values, bad)}.")


def _first_bad(values: np.ndarray, bad: Any) -> str:
    """The first bad value and its index."""
    if values.ndim == 0:
        return repr(values.item())
    index = tuple(int(i) for i in np.argwhere(np.broadcast_to(bad, values.shape))[0])
    return f"{values[index].item()!r} at index {index[0] if len(index) == 1 else index}"


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
    if not is_concrete(value, mask):
        return
    # Computed on the device, so that one byte per row travels to the host and the other processes: all raise, or none.
    rows = read_on_host(_row_facts, value)
    if mask is not None:
        rows = np.where(on_host(mask), rows, 0)
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


_FEW = 6  # entries shown in a message


class _Short(reprlib.Repr):
    """A short repr; arrays with more than a few entries show their dtype and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = _FEW

    def repr1(self, x: Any, level: int) -> str:
        shape = getattr(x, "shape", None)
        if not isinstance(shape, tuple) or isinstance(x, np.generic):
            return super().repr1(x, level)
        if not isinstance(x, (np.ndarray, jax.Array)):  # an array of another library, whose repr may be long
            return f"{type(x).__name__} of shape {tuple(shape)}"
        if x.size > _FEW or not is_concrete(x) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return f"{x.dtype} array of shape {shape}"
        return repr(x.item()) if isinstance(x, np.ndarray) and x.ndim == 0 else super().repr1(x, level)


def shown(value: Any) -> str:
    """A value for a message: its repr, shortened if it is long."""
    return _Short().repr(value)


def refuse_foreign(name: str, value: Any) -> None:
    """Raise for a torch tensor."""
    if not _is_tensor(value):
        return
    dense = name + _to_dense(value)
    host = f"{dense}.detach().cpu()" + (".float()" if str(value.dtype) == "torch.bfloat16" else "") + ".numpy()"
    if str(value.dtype) in _CONVERTED_BY_NUMPY:  # from_torch would narrow it
        raise TypeError(f"{name} is a torch tensor of {value.dtype}. Pass {host}.")
    raise TypeError(f"{name} is a torch tensor. Convert it with jaxalign.interop.from_torch({dense}), or pass {host}.")


# Dtypes that JAX would narrow, or that are not floating point.
_CONVERTED_BY_NUMPY = (
    "torch.float64",
    "torch.int64",
    "torch.int32",
    "torch.int16",
    "torch.int8",
    "torch.uint8",
    "torch.bool",
)


def _is_tensor(value: Any) -> bool:
    return any(cls.__module__.split(".")[0] == "torch" for cls in type(value).__mro__)


def _to_dense(tensor: Any) -> str:
    """Code that makes a quantized or sparse tensor dense, which NumPy and JAX need; '' for a dense tensor."""
    if getattr(tensor, "is_quantized", False):
        return ".dequantize()"
    return "" if str(getattr(tensor, "layout", "torch.strided")) == "torch.strided" else ".to_dense()"


def x64_enabled() -> bool:
    """Whether 64-bit types are enabled in JAX."""
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def _array_advice(name: str, value: Any) -> str:
    """Advice for features that are not an array."""
    if isinstance(value, (str, Path)):
        return f" jaxalign.io.read_features({str(value)!r}) reads a file; compare_grid accepts paths."
    if isinstance(value, Mapping):
        return " jaxalign.compare_grid compares several representations by name."
    for method in ("toarray", "todense"):  # sparse matrices of SciPy and JAX
        if hasattr(value, method):
            return f" It is sparse: write {name}.{method}()."
    return ""
