"""Checks of what the user hands in, and their messages: every public function starts here.

Shapes, dtypes and static numbers are checked always, also under a trace. Values (nan, a density out of range)
are checked only where the array is concrete; under a trace they lead to nan and a status, never to a Python
exception.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

from jaxalign._linalg import smallest
from jaxalign._typing import AnyArray

HALF_DTYPES = (jnp.float16, jnp.bfloat16)

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


def features(name: str, value: Any, *, min_rows: int = 1) -> jax.Array:
    """`value` as a floating-point array of shape (..., n, d) in a dtype fit for accumulation."""
    array = _floating(name, value)
    if array.ndim < 2:
        ways_out = f" One sample of d features is {name}[None, :], n samples of one feature are {name}[:, None]."
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
    return array.astype(jnp.float32) if array.dtype in HALF_DTYPES else array


def feature_pair(x: Any, y: Any | None, *, min_rows: int = 1) -> tuple[jax.Array, jax.Array | None]:
    """Both feature arrays, of one width, one dtype and one batch shape; y may be None."""
    x = features("x", x, min_rows=min_rows if y is None else 1)
    if y is None:
        return x, None
    y = features("y", y)
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
    dtype = np.promote_types(x.dtype, y.dtype)
    return (
        jnp.broadcast_to(x, batch + x.shape[-2:]).astype(dtype),
        jnp.broadcast_to(y, batch + y.shape[-2:]).astype(dtype),
    )


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
    array = _array(name, value)
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


def refuse_foreign(name: str, value: Any, *, is_features: bool = False) -> None:
    """Raise for a torch tensor; of features the way out ends in a dtype that they may have."""
    if not _is_tensor(value):
        return
    if is_features and str(value.dtype) in _TO_NARROW and not _to_dense(value) and value.device.type != "meta":
        host = value.detach().cpu().numpy()
        raise TypeError(
            f"{name} is a torch tensor of {value.dtype}. Give {as_floats(f'{name}.detach().cpu().numpy()', host)}."
        )
    dense = name + _to_dense(value)
    host = f"{dense}.detach().cpu()" + (".float()" if str(value.dtype) == "torch.bfloat16" else "")
    raise TypeError(
        f"{name} is a torch tensor. Convert it with jaxalign.interop.from_torch({dense}), or give {host}.numpy()."
    )


# Tensors that are no features as they are.
_TO_NARROW = ("torch.float64", "torch.int64", "torch.int32", "torch.int16", "torch.int8", "torch.uint8", "torch.bool")


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


# Rows that are looked at to see what narrowing does to them, and how much it may, relative to their spread.
_LOOKED_AT, ALLOWED = 4096, 1e-4


def as_floats(code: str, value: Any) -> str:
    """Code for the numbers of `code`, whose value is `value`, in a floating point dtype that jax holds now; or ''.

    Where float32 would round away what tells samples apart (ids near 1e9, a large offset) it centers them first.
    """
    dtype = getattr(value, "dtype", None)
    wide = x64_enabled()
    if dtype is not None and (dtype in (np.float32, np.float16, jnp.bfloat16) or (wide and dtype == np.float64)):
        return code
    error = error_of_narrowing(value)
    if np.isnan(error):
        return ""
    is_array, to = isinstance(value, (np.ndarray, jax.Array)), "np.float64" if wide else "np.float32"
    if wide or error <= ALLOWED:
        return f"{code}.astype({to})" if is_array else f"np.asarray({code}, {to})"
    exact = code if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" else f"np.asarray({code}, np.float64)"
    if np.isinf(error):
        return f"({exact} / np.abs({exact}).max()).astype(np.float32)"
    mean = "mean(0)" if np.ndim(value) < 3 else "mean(-2, keepdims=True)"
    return f"({exact} - {exact}.{mean}).astype(np.float32)"


def _why(code: str) -> str:
    return " (float32 keeps 7 digits: centered, all of them are of what differs)" if ".mean(" in code else ""


def error_of_narrowing(value: Any) -> float:
    """The error of the first rows in float32 relative to their spread: inf beyond float32, nan of what is no number."""
    if not is_concrete(value):
        return 0.0
    try:
        array = on_host(value)
        rows = array.reshape(-1, array.shape[-1])[:_LOOKED_AT] if array.ndim > 1 else array.reshape(-1, 1)
        rows = rows.astype(np.longdouble if array.dtype == np.longdouble else np.float64)
    except (TypeError, ValueError):  # texts, objects, lists of different length
        return np.nan
    rows = rows[np.isfinite(rows).all(-1)]
    if not array.ndim or not rows.size:
        return 0.0 if array.ndim else np.nan
    with np.errstate(all="ignore"):
        error, spread = np.abs(rows.astype(np.float32) - rows).max(), np.abs(rows - rows.mean(0)).max()
        if not error or np.isinf(error):  # beyond float32
            return float(error)
        # Of rows that are all alike, or one alone, nothing is known but that whole numbers should stay whole.
        return float(error / spread) if spread else float(array.dtype.kind in "iu")


def _floating(name: str, value: Any) -> jax.Array:
    refuse_foreign(name, value, is_features=True)
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be a jax or numpy array; got {type(value).__name__}.{_other_way(name, value)}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost. Give {as_floats(f'{name}.data', value.data)}, and "
            f"mask=~np.ma.getmaskarray({name}).any(-1): True where a sample is real."
        )
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        parts = f"np.concatenate([{name}.real, {name}.imag], -1)"
        like = np.zeros((1, 1), np.float32 if value.dtype == np.complex64 else np.float64)
        raise TypeError(
            f"{name} is complex ({value.dtype}). Stack its parts as features: {as_floats(parts, like)} has the same "
            "distances."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        code = as_floats(name, value)
        may_be_ids = jnp.issubdtype(value.dtype, jnp.integer) and value.dtype.itemsize > 2
        ids = ", and ids or labels are no features" if may_be_ids else ""
        way_out = f" Write {code}{_why(code)}." if code else " Its entries are no numbers."
        raise TypeError(f"{name} must be floating point; got dtype {value.dtype}{ids}.{way_out}")
    if value.dtype.itemsize > (8 if x64_enabled() else 4):
        if x64_enabled():
            raise TypeError(f"{name} has dtype {value.dtype}, which jax does not hold. Write {as_floats(name, value)}.")
        code = as_floats(name, value)
        raise TypeError(
            f"{name} is {value.dtype}, but jax is set to 32 bits and would narrow it without a word. Either "
            f'jax.config.update("jax_enable_x64", True) at the start of the program, or {code}{_why(code)}.'
        )
    # Byte order is how a file was written, not what it says.
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    if isinstance(value, jax.Array):
        return value
    with jax.ensure_compile_time_eval():  # a numpy array is known inside a trace too
        return jnp.asarray(value)


def _other_way(name: str, value: Any) -> str:
    """What to do with features that are no array."""
    if isinstance(value, (str, Path)):
        return f" jaxalign.io.read_features({str(value)!r}) reads a file; compare_grid takes paths."
    if isinstance(value, Mapping):
        return " jaxalign.compare_grid takes several sets by name."
    for method in ("toarray", "todense"):  # sparse matrices of scipy, and of jax
        if hasattr(value, method):
            empty = np.zeros((1, 1), value.dtype)
            return f" It is sparse: write {as_floats(f'{name}.{method}()', empty)}."
    code = as_floats(name, value)
    return f" Write {code}{_why(code)}." if code else ""
