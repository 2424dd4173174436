"""Arrays that users pass: conversion from any library, and reading on the host what is not traced."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

from jaxalign import _numbers
from jaxalign._repr import shown
from jaxalign._typing import AnyArray


def is_concrete(*values: Any) -> bool:
    """Whether all values can be read now: none is a tracer."""
    return not any(isinstance(value, Tracer) for value in values)


def pandas() -> Any:
    """The module, which only `to_pandas` methods need."""
    try:
        import pandas as pd
    except ImportError:
        raise ImportError("to_pandas() needs pandas: pip install pandas.") from None
    return pd


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


def numbers(name: str, value: Any) -> AnyArray:
    """Real numbers as an array, with their dtype: a JAX array stays as it is, everything else becomes a NumPy array.

    Accepts NumPy and JAX arrays, nested lists, and objects that NumPy converts to numbers, such as a DataFrame.
    """
    _refuse_tensor(name, value)
    if not isinstance(value, (jax.Array, np.ndarray)):
        array = _converted(name, value)
    elif isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost. Pass {name}.data, and "
            f"mask=~np.ma.getmaskarray({name}).any(-1): True marks a valid sample."
        )
    else:
        array = value
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} is complex ({array.dtype}). Concatenate its parts as features: np.concatenate([{name}.real, "
            f"{name}.imag], -1) has the same distances."
        )
    if array.dtype != bool and not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"{name} must hold real numbers; got {_not_numbers(name, value, array)}")
    if isinstance(array, jax.Array) and is_concrete(array) and _numbers.is_wide(array.dtype):
        on_one_device = array.is_fully_addressable and len(array.sharding.device_set) == 1
        return np.asarray(array) if on_one_device else array
    return array


def array(name: str, value: Any) -> AnyArray:
    """An argument other than features as an array; its dtype is not checked."""
    _refuse_tensor(name, value)
    try:
        return value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError:  # ragged lists
        raise TypeError(f"{name} must be a number or an array; got {shown(value)}.") from None


def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to another."""
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def _converted(name: str, value: Any) -> AnyArray:
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


def _not_numbers(name: str, value: Any, array: Any) -> str:
    """What a non-numeric array holds (of a table, its non-numeric columns), and what to do about it."""
    odd = _odd_columns(value)
    if odd:
        more = f", and {len(odd) - _FEW} more" if len(odd) > _FEW else ""
        return f"column {', '.join(odd[:_FEW])}{more}. Drop it."
    if odd is not None:
        return f"missing values. {name}.to_numpy(np.float64, na_value=np.nan) turns them into nan."
    try:
        np.asarray(array).astype(np.float64)
    except (TypeError, ValueError):
        return f"dtype {array.dtype}. Its entries are not numbers."
    return f"dtype {array.dtype}. Write np.asarray({name}).astype(np.float64)."


def _odd_columns(value: Any) -> list[str] | None:
    """The non-numeric columns of a table; None if `value` is not a table."""
    columns, dtypes = getattr(value, "columns", None), getattr(value, "dtypes", None)
    if columns is None or dtypes is None:
        return None
    named = zip(columns, dtypes, strict=False)
    return [f"{column!r} of {dtype}" for column, dtype in named if not _NUMERIC.match(str(dtype))]


_FEW = 6  # columns named in a message
_NUMERIC = re.compile(r"u?int|float|bool", re.IGNORECASE)  # dtype names of pandas and polars


def _refuse_tensor(name: str, value: Any) -> None:
    """Raise for a torch tensor."""
    if not _is_tensor(value):
        return
    dense = name + _to_dense(value)
    host = f"{dense}.detach().cpu()" + (".float()" if str(value.dtype) == "torch.bfloat16" else "") + ".numpy()"
    if str(value.dtype).removeprefix("torch.") in _CONVERTED_BY_NUMPY:
        raise TypeError(f"{name} is a torch tensor of {value.dtype}. Pass {host}.")
    raise TypeError(f"{name} is a torch tensor. Convert it with jaxalign.interop.from_torch({dense}), or pass {host}.")


# Dtypes of torch that JAX would narrow, or that are not floating point.
_CONVERTED_BY_NUMPY = ("float64", "int64", "int32", "int16", "int8", "uint8", "bool")


def _is_tensor(value: Any) -> bool:
    return any(cls.__module__.split(".")[0] == "torch" for cls in type(value).__mro__)


def _to_dense(tensor: Any) -> str:
    """Code that makes a quantized or sparse tensor dense, which NumPy and JAX need; '' for a dense tensor."""
    if getattr(tensor, "is_quantized", False):
        return ".dequantize()"
    return "" if str(getattr(tensor, "layout", "torch.strided")) == "torch.strided" else ".to_dense()"
