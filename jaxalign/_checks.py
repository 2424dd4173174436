"""Checks of what the user hands in, and their messages: every public function starts here.

Shapes, dtypes and static numbers are checked always, also under a trace. Values (nan, a density out of range)
are checked only where the array is concrete; under a trace they lead to nan and a status, never to a Python
exception.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

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
        raise ValueError(
            f"{name} must have shape (..., n, d): n samples of d features; got shape {array.shape}. "
            f"One sample of d features is {name}[None, :], n samples of one feature are {name}[:, None]."
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


def parameter(name: str, value: Any, dtype: Any, shape: Sequence[int], meaning: str) -> jax.Array:
    """A real number or array that broadcasts to `shape` (which `meaning` puts into words)."""
    refuse_foreign(name, value)
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.dtype == bool or not (
        jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    ):
        raise TypeError(f"{name} must be a real number or a real array; got {value!r} of dtype {array.dtype}.")
    try:
        np.broadcast_shapes(array.shape, tuple(shape))
        fits = np.broadcast_shapes(array.shape, tuple(shape)) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} of shape {array.shape} does not broadcast to {tuple(shape)}, {meaning}.")
    return jnp.asarray(array, dtype)


def parameter_array(name: str, value: Any, dtype: Any) -> jax.Array:
    """A real array of at least one dimension, as a vector or matrix to multiply with."""
    refuse_foreign(name, value)
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.ndim == 0 or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be a real vector or matrix; got shape {array.shape}, dtype {array.dtype}.")
    return jnp.asarray(array).astype(dtype)


def row_mask(name: str, value: Any | None, shape: tuple[int, ...]) -> jax.Array | None:
    """A boolean mask over rows, True = a real sample, broadcast to `shape` = (..., n)."""
    if value is None:
        return None
    refuse_foreign(name, value)
    array = value if isinstance(value, jax.Array) else np.asarray(value)
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
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}; got {value!r}.")


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
        raise ValueError(f"{name} must be a whole number{of}{limits}{otherwise}; got {value!r}.")
    return int(value)


def row_numbers(name: str, value: Any, n: int) -> np.ndarray:
    """Different numbers of rows, from 0 to n - 1."""
    if not is_concrete(value):
        raise TypeError(
            f"{name} must be known before anything is traced, as how many there are is a shape: give a numpy array, or "
            "one made outside of the function that is compiled."
        )
    indices = np.asarray(value)
    if indices.ndim != 1 or indices.size == 0 or not np.issubdtype(indices.dtype, np.integer):
        raise TypeError(
            f"{name} must be None, a number or a vector of indices; "
            f"got shape {indices.shape}, dtype {indices.dtype}."
            + (" For a mask write np.flatnonzero(mask)." if indices.dtype == bool else "")
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
    raw = isinstance(value, (jax.Array, np.ndarray)) and value.dtype == np.uint32 and value.ndim == 1
    if not typed and not raw:
        raise TypeError(f"key must be one key, as jax.random.key(0) makes it; got {value!r}.")


def density_value(density: Any) -> None:
    """Raise where a concrete density is outside (0, 1)."""
    if not is_concrete(density):
        return
    values = on_host(density)
    if not np.all((values > 0) & (values < 1)):
        raise ValueError(
            f"density must lie strictly between 0 and 1 (it is the mean of the affinity); got {_show(values)}."
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
        raise ValueError(f"{name} must be finite and above 0; got {_show(values)}.")


def finite_rows(
    name: str,
    value: Any,
    mask: Any | None = None,
    *,
    way_out: str = "Remove these samples, or exclude them with mask=.",
) -> None:
    """Raise on nan or inf in a concrete array, naming the first row that holds one."""
    if not is_concrete(value, mask):
        return
    # On the device, so that only one byte per row travels to the host, or to the other processes: all raise, or none.
    rows = looked_at(_row_facts, value)
    if mask is not None:
        rows = np.where(on_host(mask), rows, 0)
    if not (rows & _NORMAL).any() and (rows & _NONZERO).any():
        raise ValueError(
            f"{name} has no entry above {_smallest(value.dtype):.0e}: numbers that small, and their differences, are "
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
    least = jax.lax.bitcast_convert_type(jnp.asarray(_smallest(value.dtype), value.dtype), integer)
    facts = (~jnp.isfinite(value), size != 0, size >= least)
    bits = (_NOT_FINITE, _NONZERO, _NORMAL)
    return jnp.stack([fact.any(-1).astype(jnp.uint8) * bit for fact, bit in zip(facts, bits, strict=True)]).sum(0)


def _smallest(dtype: Any) -> float:
    """The size below which features lose digits as numbers become subnormal."""
    return 2.0**10 * float(jnp.finfo(dtype).tiny)


def _show(values: np.ndarray) -> str:
    if values.ndim == 0:
        return f"{values.item()!r}"
    return np.array2string(values, threshold=6, edgeitems=2)


def refuse_foreign(name: str, value: Any) -> None:
    """Raise for a torch tensor."""
    if any(cls.__module__.split(".")[0] == "torch" for cls in type(value).__mro__):
        raise TypeError(
            f"{name} is a torch tensor. Convert it with jaxalign.interop.from_torch({name}), "
            f"or give {name}.detach().cpu().numpy()."
        )


def _floating(name: str, value: Any) -> jax.Array:
    refuse_foreign(name, value)
    if not isinstance(value, (jax.Array, np.ndarray)):
        way_out = f"Write np.asarray({name}, np.float32)."
        if isinstance(value, (str, Path)):
            way_out = f"jaxalign.io.read_features({str(value)!r}) reads a file; compare_grid takes paths."
        elif isinstance(value, Mapping):
            way_out = "jaxalign.compare_grid takes several sets by name."
        raise TypeError(f"{name} must be a jax or numpy array; got {type(value).__name__}. {way_out}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost. Give {name}.data, and mask=~{name}.mask.any(-1): "
            "True where a sample is real."
        )
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} is complex ({value.dtype}). Stack its parts as features: "
            f"np.concatenate([{name}.real, {name}.imag], -1) has the same distances."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point; got dtype {value.dtype}. Write {name}.astype(np.float32).")
    if value.dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise TypeError(
            f"{name} is float64, but jax is set to 32 bits and would narrow it without a word. Either "
            'jax.config.update("jax_enable_x64", True) at the start of the program, or '
            f"{name}.astype(np.float32)."
        )
    if value.dtype.itemsize > 8:
        raise TypeError(f"{name} has dtype {value.dtype}, which jax does not hold. Write {name}.astype(np.float64).")
    # Byte order is how a file was written, not what it says.
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    if isinstance(value, jax.Array):
        return value
    with jax.ensure_compile_time_eval():  # a numpy array is known inside a trace too
        return jnp.asarray(value)
