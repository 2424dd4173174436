"""Checks of what the user hands in, and their messages: every public function starts here.

Shapes, dtypes and static numbers are checked always, also under a trace. Values (nan, a density out of range)
are checked only where the array is concrete; under a trace they lead to nan and a status, never to a Python
exception.
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
    """Whether the values of all of these can be looked at now (none is a tracer)."""
    return not any(isinstance(value, Tracer) for value in values)


def on_host(value: Any) -> np.ndarray:
    """All values of what is concrete. Where they are spread over processes, each must call this, and gets them all."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    with jax.ensure_compile_time_eval():
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def looked_at(fn: Callable[..., Any], *values: Any) -> Any:
    """What `fn` tells of concrete values, on the host.

    Also inside a trace, which would otherwise take an operation on a concrete array for one of its own. Where values
    are spread over processes, each must call this.
    """
    with jax.ensure_compile_time_eval():
        return jax.tree.map(on_host, fn(*values))


def features(name: str, value: Any, *, min_rows: int = 1, center: bool = False, mask: Any = None) -> jax.Array:
    """`value` as a floating-point array of shape (..., n, d) in a dtype fit for accumulation.

    Args:
        name: of the argument, for messages.
        value: numbers in any form: see `numbers`.
        min_rows: the least n.
        center: whether rows may be shifted by a constant, as where their differences alone count. Wider numbers than
            jax holds are then centered before they are narrowed, and lose nothing; else they are refused if narrowing
            would round away what tells rows apart.
        mask: True marks valid rows, of which the mean is taken; checked elsewhere.
    """
    array = _shaped(name, value, min_rows)
    known = _known_mask(mask, array) if _is_wide(array) else None
    return _narrowed(name, array, _shift((array,), mask, known) if center else None, known)


class Shift(NamedTuple):
    """A row (1, d) that was subtracted from features, as the sum of two of them in the dtype of the computation."""

    high: jax.Array
    low: jax.Array


def centered_features(name: str, value: Any, *, min_rows: int = 1, mask: Any = None) -> tuple[jax.Array, Shift | None]:
    """Features as with `center`, and what was subtracted from them: of new samples the same is to be subtracted."""
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
    """Features of new samples, less what was subtracted from those before."""
    array = _shaped(name, value, 1)
    if shift is None or array.shape[-1] != shift.high.shape[-1]:  # another width is refused by the caller
        return _narrowed(name, array, None, None, refuse=False)  # those before were rounded too
    if isinstance(array, np.ndarray) and is_concrete(*shift):
        return _narrowed(name, array, on_host(shift.high).astype(np.float64) + on_host(shift.low), None)
    rows = _narrowed(name, array, None, None)
    lead = (1,) * (rows.ndim - 2)
    return (rows - shift.high.reshape(*lead, 1, -1)) - shift.low.reshape(*lead, 1, -1)


def feature_pair(
    x: Any, y: Any | None, *, min_rows: int = 1, mask: Any = None, mask_y: Any = None
) -> tuple[jax.Array, jax.Array | None]:
    """Both feature arrays, of one width, one dtype and one batch shape, for their distances; y may be None."""
    if y is None:
        return features("x", x, min_rows=min_rows, center=True, mask=mask), None
    x, y = _shaped("x", x, 1), _shaped("y", y, 1)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x and y must have the same number of features: x has shape {x.shape}, y has shape {y.shape}. "
            "Features of different networks live in different spaces: compare their affinities instead, "
            "rbf_affinity(x) with rbf_affinity(y)."
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
    # Next to an array of jax, whose offset stays, rows can only be rounded as those were.
    refuse = isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
    x, y = _narrowed("x", x, shift, known, refuse=refuse), _narrowed("y", y, shift, known_y, refuse=refuse)
    dtype = np.promote_types(x.dtype, y.dtype)
    return (
        jnp.broadcast_to(x, batch + x.shape[-2:]).astype(dtype),
        jnp.broadcast_to(y, batch + y.shape[-2:]).astype(dtype),
    )


def _shaped(name: str, value: Any, min_rows: int) -> jax.Array | np.ndarray:
    """Numbers of shape (..., n, d)."""
    array = numbers(name, value)
    if array.ndim < 2:
        ways_out = f" One sample of d features is {name}[None, :], n samples of one feature are {name}[:, None]."
        if not isinstance(value, (jax.Array, np.ndarray)):  # a list or a table has no such indices
            ways_out = f" Make it an array first: np.asarray({name})[:, None] are n samples of one feature."
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
    """Whether features are in a dtype wider than the one in which they are computed."""
    return not _numbers.holds_exactly(_numbers.computing_dtype(array.dtype), array.dtype)


def _known_mask(mask: Any, array: jax.Array | np.ndarray) -> np.ndarray | None:
    """A mask of rows on the host, in the shape of the features (..., n), if both can be read."""
    if mask is None or isinstance(array, jax.Array) or not is_concrete(mask):
        return None
    if isinstance(mask, jax.Array) and not mask.is_fully_addressable:
        return None
    known = _as_bool(np.asarray(mask))
    if known.dtype != bool:  # which is refused where masks are checked
        return None
    while known.ndim > array.ndim - 1:  # of a batch that shares its features: valid in any of its elements
        known = known.any(0)
    try:
        return np.broadcast_to(known, array.shape[:-1])
    except ValueError:  # likewise
        return None


def _shift(arrays: Sequence[jax.Array | np.ndarray], mask: Any, known: np.ndarray | None) -> np.ndarray | None:
    """The row that is subtracted from all of these before they are narrowed: the mean of the first.

    None where nothing is narrowed, or where they cannot all be shifted alike: where some are on a device already, or
    are traced. With a mask that is traced nothing is known of which rows count, and others may hold anything.
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
    refuse: bool = True,
) -> jax.Array:
    """Features in the dtype in which they are computed, less a row; `refuse`: unless that rounds away what differs."""
    dtype = _numbers.computing_dtype(array.dtype)
    if isinstance(array, jax.Array):
        if _is_wide(array) and is_concrete(array):  # whole numbers that are spread over devices
            most = float(looked_at(lambda a: jnp.max(jnp.abs(a.astype(dtype))), array))
            if most > 2.0 ** (jnp.finfo(dtype).nmant + 1):
                raise ValueError(
                    f"{name} is {array.dtype} and reaches {most:.3g}, where {dtype} rounds whole numbers. Subtract one "
                    "of its rows from all of them first: distances stay the same."
                )
        return array.astype(dtype)
    narrowed = _numbers.narrow(array, dtype, shift)
    if _is_wide(array) or shift is not None:
        if not _numbers.is_in_range(narrowed) and (
            _numbers.overflows(array, narrowed, mask) or _numbers.vanishes(array, narrowed)
        ):
            code = f"np.asarray({name})"  # it may be a list, or a table
            raise ValueError(
                f"{name} holds numbers up to {_numbers.largest(array):.3g}, which are beyond the range of {dtype}. Use "
                f"another unit: {code} / np.abs({code}).max()."
            )
        if shift is None and refuse:
            refuse_rounding(name, array)
    with jax.ensure_compile_time_eval():  # a numpy array is known inside a trace too
        return jnp.asarray(narrowed)


def refuse_rounding(name: str, array: np.ndarray) -> None:
    """Raise where narrowing, without a shift, would round away what tells rows apart."""
    if _numbers.error_of_narrowing(array) > _numbers.ALLOWED:
        raise ValueError(
            f"{name} is {array.dtype} and far from 0: float32 would round away what tells its rows apart. Subtract "
            f"what they share, {name} - np.mean({name}, -2, keepdims=True), if the origin means nothing, or compute "
            'in float64: jax.config.update("jax_enable_x64", True) at the start of the program.'
        )


def numbers(name: str, value: Any) -> jax.Array | np.ndarray:
    """Real numbers as an array: those of jax stay there, all others are on the host, in the dtype that they have.

    Takes arrays of numpy and jax, (nested) lists, and whatever numpy makes an array of numbers of, as a DataFrame.
    """
    refuse_foreign(name, value)
    if not isinstance(value, (jax.Array, np.ndarray)):
        array = _converted(name, value)
    elif isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost. Give {name}.data, and "
            f"mask=~np.ma.getmaskarray({name}).any(-1): True where a sample is real."
        )
    else:
        array = value
    kind = getattr(array.dtype, "kind", "")  # keys of jax.random have none
    if kind == "c":
        raise TypeError(
            f"{name} is complex ({array.dtype}). Stack its parts as features: np.concatenate([{name}.real, "
            f"{name}.imag], -1) has the same distances."
        )
    # The kind of bfloat16 and the like is V, as that of a record.
    if kind not in tuple("fiub") and not any(jnp.issubdtype(array.dtype, t) for t in (jnp.floating, jnp.integer)):
        raise TypeError(f"{name} must hold real numbers; got {_dtypes(value, array)}.{_as_numbers(name, value, array)}")
    if isinstance(array, jax.Array) and is_concrete(array) and _is_wide(array):
        is_here = array.is_fully_addressable and len(array.sharding.device_set) == 1
        return np.asarray(array) if is_here else array
    return array


def _converted(name: str, value: Any) -> jax.Array | np.ndarray:
    """What is no array yet, as one."""
    kind = type(value)
    is_sparse = hasattr(value, "toarray") or hasattr(value, "todense")
    is_numbers = isinstance(value, (list, tuple, int, float)) or hasattr(kind, "__array__")
    if is_sparse or not (is_numbers or hasattr(kind, "__array_interface__") or hasattr(kind, "__dlpack__")):
        raise TypeError(f"{name} must be an array of numbers; got {kind.__name__}.{_other_way(name, value)}")
    first = value
    while isinstance(first, (list, tuple)) and len(first):
        first = first[0]
    if _is_tensor(first):
        raise TypeError(f"{name} holds torch tensors. Stack them first, and give torch.stack({name}).numpy().")
    try:
        if hasattr(kind, "__dlpack__") and not hasattr(kind, "__array__"):
            return jnp.from_dlpack(value)
        array = np.asarray(value)
        if array.dtype == object and _odd_columns(value) == []:  # bool beside float, or columns that may miss values
            with contextlib.suppress(TypeError, ValueError):  # and do
                return array.astype(np.float64)
        return array
    except jax.errors.TracerArrayConversionError:
        return jnp.asarray(value)
    except ValueError:
        raise TypeError(f"{name} must hold rows of one length; got {shown(value)}.") from None


def _dtypes(value: Any, array: Any) -> str:
    """The dtype of what is no array of numbers; of a table those columns that are none."""
    odd = _odd_columns(value)
    if odd is None:
        return f"dtype {array.dtype}"
    more = f", and {len(odd) - _FEW} more" if len(odd) > _FEW else ""
    return f"column {', '.join(odd[:_FEW])}{more}" if odd else "missing values"


def _odd_columns(value: Any) -> list[str] | None:
    """The columns of a table whose dtype is not that of numbers; None of what is no table."""
    columns, dtypes = getattr(value, "columns", None), getattr(value, "dtypes", None)
    if columns is None or dtypes is None:
        return None
    named = zip(columns, dtypes, strict=False)
    return [f"{column!r} of {dtype}" for column, dtype in named if not _NUMERIC.match(str(dtype))]


_NUMERIC = re.compile(r"u?int|float|bool", re.IGNORECASE)  # as pandas and polars call them


def _as_numbers(name: str, value: Any, array: Any) -> str:
    """What to do with what has a dtype of no numbers."""
    odd = _odd_columns(value)
    if odd is not None:
        return " Leave it out." if odd else f" {name}.to_numpy(np.float64, na_value=np.nan) makes nan of them."
    try:
        np.asarray(array).astype(np.float64)
    except (TypeError, ValueError):
        return " Its entries are no numbers."
    return f" Write np.asarray({name}).astype(np.float64)."


def _array(name: str, value: Any) -> jax.Array | np.ndarray:
    """What is no features, as an array; its dtype is still to be checked."""
    refuse_foreign(name, value)
    try:
        return value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError:  # lists of different length
        raise TypeError(f"{name} must be a number or an array; got {shown(value)}.") from None


def parameter(name: str, value: Any, dtype: Any, shape: Sequence[int], meaning: str) -> AnyArray:
    """A real number or array, broadcast to `shape` (which `meaning` puts into words).

    Left on the host if it is there: an operation outside of a program costs more than the number is worth.
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
    """A real array of at least one dimension, as a vector or matrix to multiply with."""
    array = _array(name, value)
    if array.ndim == 0 or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be a real vector or matrix; got shape {array.shape}, dtype {array.dtype}.")
    return jnp.asarray(array).astype(dtype)


def row_mask(name: str, value: Any | None, shape: tuple[int, ...]) -> jax.Array | None:
    """A boolean mask over rows, True = a real sample, broadcast to `shape` = (..., n)."""
    if value is None:
        return None
    array = _as_bool(_array(name, value))
    if array.dtype != bool:
        raise TypeError(
            f"{name} must be boolean, True where a sample is real; got dtype {array.dtype}. "
            f"Write {name}.astype(bool) if nonzero means real."
        )
    if array.ndim == 0 or array.shape[-1] != shape[-1] or array.ndim > len(shape):
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}: one entry a sample.")
    try:
        return jnp.broadcast_to(jnp.asarray(array), shape)
    except ValueError:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}: one entry a sample.") from None


def _as_bool(mask: Any) -> Any:
    """A mask out of a column of a table that could hold missing values, but holds none; any other as it is."""
    is_bool = mask.dtype == object and all(isinstance(entry, (bool, np.bool_)) for entry in mask.ravel())
    return mask.astype(bool) if is_bool else mask


def choice(name: str, value: Any, valid: Sequence[Any]) -> None:
    """Raise unless `value` is one of the valid ones."""
    if not any(value is option or (isinstance(value, str) and value == option) for option in valid):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}; got {shown(value)}.")


def cached(fn: Callable[P, T]) -> Callable[P, T]:
    """`fn` of options, each set of them looked at once; what cannot be hashed goes to `fn`, which refuses it."""
    remembered = lru_cache(typed=True)(fn)  # 1 and 1.0 may not be the same

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
    """`value` as an int; raises unless it is a whole number (`of` what) from `least` to `most`.

    `most_is` tells what the most is, "n = "; `otherwise` what else the argument may be.
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
    """Different numbers of rows, from 0 to n - 1."""
    if not is_concrete(value):
        raise TypeError(
            f"{name} must be known before anything is traced, as how many there are is a shape: give a numpy array, or "
            "one made outside of the function that is compiled."
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
        raise ValueError(f"{name} repeat: sample {values[counts > 1][0]} stands there {counts[counts > 1][0]} times.")
    return indices


def random_key(value: Any) -> None:
    """Raise unless it is a key of `jax.random`."""
    typed = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and value.ndim == 0
    raw = isinstance(value, (jax.Array, np.ndarray)) and value.dtype == np.uint32 and value.shape in ((2,), (4,))
    if not typed and not raw:
        raise TypeError(f"key must be one key, as jax.random.key(0) makes it; got {shown(value)}.")


def density_value(density: Any) -> None:
    """Raise where a concrete density is outside (0, 1)."""
    if not is_concrete(density):
        return
    values = on_host(density)
    bad = ~((values > 0) & (values < 1))
    if bad.any():
        raise ValueError(
            f"density must lie strictly between 0 and 1 (it is the mean of the affinity); got {_first(values, bad)}."
        )


def positive(name: str, value: Any, keep: Any | None = None) -> None:
    """Raise where a concrete value is not finite and above 0 (only where `keep` is True, if given)."""
    if not is_concrete(value, keep):
        return
    values = on_host(value)
    bad = ~(np.isfinite(values) & (values > 0))
    if keep is not None:
        bad = bad & on_host(keep)
    if bad.any():
        raise ValueError(f"{name} must be finite and above 0; got {_first(values, bad)}.")


def _first(values: np.ndarray, bad: Any) -> str:
    """The first of the bad values, and where it is."""
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
    """Raise on nan or inf in a concrete array, naming the first row that holds one.

    With `differences`, also where numbers are so small that differences of rows are rounded to 0.
    """
    if not is_concrete(value, mask):
        return
    # On the device, so that only one byte per row travels to the host, or to the other processes: all raise, or none.
    rows = looked_at(_row_facts, value)
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


# What a row holds, in bits.
_NOT_FINITE, _NONZERO, _NORMAL = 1, 2, 4


@jax.jit
def _row_facts(value: jax.Array) -> jax.Array:
    # Bits are looked at, as subnormal numbers compare as 0.
    integer = jnp.dtype(f"int{8 * value.dtype.itemsize}")
    size = jax.lax.bitcast_convert_type(jnp.abs(value), integer)
    least = jax.lax.bitcast_convert_type(jnp.asarray(smallest(value.dtype), value.dtype), integer)
    facts = (~jnp.isfinite(value), size != 0, size >= least)
    bits = (_NOT_FINITE, _NONZERO, _NORMAL)
    return jnp.stack([fact.any(-1).astype(jnp.uint8) * bit for fact, bit in zip(facts, bits, strict=True)]).sum(0)


_FEW = 6  # entries that a message shows


class _Short(reprlib.Repr):
    """The repr of a value, shortened; of an array with more than a few entries its dtype and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = _FEW

    def repr1(self, x: Any, level: int) -> str:
        shape = getattr(x, "shape", None)
        if not isinstance(shape, tuple) or isinstance(x, np.generic):
            return super().repr1(x, level)
        if not isinstance(x, (np.ndarray, jax.Array)):  # of another library: its repr may be a page
            return f"{type(x).__name__} of shape {tuple(shape)}"
        if x.size > _FEW or not is_concrete(x) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return f"{x.dtype} array of shape {shape}"
        return repr(x.item()) if isinstance(x, np.ndarray) and x.ndim == 0 else super().repr1(x, level)


def shown(value: Any) -> str:
    """A value as a message shows it: its repr if that is short, else enough to recognize it."""
    return _Short().repr(value)


def refuse_foreign(name: str, value: Any) -> None:
    """Raise for a torch tensor."""
    if not _is_tensor(value):
        return
    dense = name + _to_dense(value)
    host = f"{dense}.detach().cpu()" + (".float()" if str(value.dtype) == "torch.bfloat16" else "") + ".numpy()"
    if str(value.dtype) in _TAKEN_BY_NUMPY:  # torch's own conversion would narrow it
        raise TypeError(f"{name} is a torch tensor of {value.dtype}. Give {host}.")
    raise TypeError(f"{name} is a torch tensor. Convert it with jaxalign.interop.from_torch({dense}), or give {host}.")


# Tensors whose numbers jax does not hold as they are, or that are no floats.
_TAKEN_BY_NUMPY = (
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
    """What makes a tensor one of plain numbers in one block, which numpy and jax take; '' where it is one."""
    if getattr(tensor, "is_quantized", False):
        return ".dequantize()"
    return "" if str(getattr(tensor, "layout", "torch.strided")) == "torch.strided" else ".to_dense()"


def x64_enabled() -> bool:
    """Whether jax holds float64."""
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def _other_way(name: str, value: Any) -> str:
    """What to do with features that are no array."""
    if isinstance(value, (str, Path)):
        return f" jaxalign.io.read_features({str(value)!r}) reads a file; compare_grid takes paths."
    if isinstance(value, Mapping):
        return " jaxalign.compare_grid takes several sets by name."
    for method in ("toarray", "todense"):  # sparse matrices of scipy, and of jax
        if hasattr(value, method):
            return f" It is sparse: write {name}.{method}()."
    return ""
