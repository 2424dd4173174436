"""Short reprs, never of a whole array: results, as class, shapes and main numbers; any value, for a message."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import IntEnum
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_WIDTH = 100
# Entries shown of a mapping or tuple.
_FEW = 4
# Larger arrays show only shape and dtype: reading their values could wait for a device.
_MOST_READ = 2**16


def short_repr(result: Any, *, omit: Sequence[str] = (), **texts: str) -> str:
    """The `repr` of a dataclass, without omitted and None fields.

    Each of `texts` replaces the field of the same name, or is added if there is no such field.
    """
    parts: list[str] = []
    names = [field.name for field in fields(result) if field.name not in omit]
    for name in dict.fromkeys([*names, *texts]):
        text = texts[name] if name in texts else describe(getattr(result, name))
        if text not in ("None", "()"):
            parts.append(f"{name}={text}")
    return _wrapped(type(result).__name__, parts)


def describe(value: Any) -> str:
    """A short text for a value: numbers with four digits, arrays as dtype, shape and range, the first few entries."""
    if isinstance(value, Mapping):
        first = [f"{name!r}: {describe(part)}" for name, part in islice(value.items(), _FEW)]
        return f"{{{_joined(first, len(value))}}}"
    if isinstance(value, (tuple, list)):
        text = _joined(list(map(describe, value[:_FEW])), len(value))
        return f"[{text}]" if isinstance(value, list) else f"({text},)" if len(value) == 1 else f"({text})"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _array(value)
    return reprlib.repr(value)


def describe_codes(value: Any, codes: type[IntEnum]) -> str:
    """A text for an array of codes: the name of a common code, or the count of each code."""
    host = _read(value)
    if host is None or not host.size:
        return describe(value)
    numbers, counts = np.unique(host, return_counts=True)
    names = [codes(int(number)).name for number in numbers]
    if len(names) == 1:
        return names[0]
    return " and ".join(f"{count} {name}" for name, count in zip(names, counts, strict=True))


def _array(value: Any) -> str:
    host = _read(value)
    if host is None:
        shape = ",".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    if host.ndim == 0:
        return f"{host.item():.4g}" if host.dtype.kind == "f" else str(host.item())
    label = f"{value.dtype}[{','.join(map(str, host.shape))}]"
    if host.dtype == bool:
        return f"{label} with {int(host.sum())} True"
    if host.dtype.kind not in "iuf" or not host.size:
        return label
    known = host[~np.isnan(host)] if host.dtype.kind == "f" else host
    missing = host.size - known.size
    if not known.size:
        return f"{label} all nan"
    least, most = (f"{number:.4g}" if host.dtype.kind == "f" else str(number) for number in (known.min(), known.max()))
    span = least if least == most else f"{least} to {most}"
    return f"{label} {span}" + (f", {missing} nan" if missing else "")


def _read(value: Any) -> np.ndarray | None:
    """A small array as a NumPy array; None if it is large, traced, deleted, or sharded and so would need gathering."""
    if isinstance(value, Tracer) or not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return None
    if isinstance(value, jax.Array) and (
        value.is_deleted()
        or not value.is_fully_addressable
        or len(value.sharding.device_set) > 1
        or jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    ):
        return None
    if value.size > _MOST_READ:
        return None
    host = np.asarray(value)
    # NumPy has no minimum for bfloat16 and similar dtypes.
    return host.astype(np.float32) if jnp.issubdtype(value.dtype, jnp.floating) and host.itemsize < 4 else host


def _joined(parts: list[str], number: int) -> str:
    return ", ".join(parts) + (f", ... {number} in all" if number > _FEW else "")


def _wrapped(name: str, parts: list[str]) -> str:
    line = f"{name}({', '.join(parts)})"
    if len(line) <= _WIDTH:
        return line
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) + 6 > _WIDTH:
            lines.append("")
        lines[-1] += f"{part}, "
    return f"{name}(\n" + "\n".join(f"    {text.rstrip()}" for text in lines) + "\n)"


def shown(value: Any) -> str:
    """A value for a message: its repr, shortened if it is long."""
    return _Short().repr(value)


class _Short(reprlib.Repr):
    """A short repr; arrays with more than a few entries show their dtype and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxdict = 3, 200, 200, self.maxlist

    def repr1(self, x: Any, level: int) -> str:
        shape = getattr(x, "shape", None)
        if not isinstance(shape, tuple) or isinstance(x, np.generic):
            return super().repr1(x, level)
        if not isinstance(x, (np.ndarray, jax.Array)):  # an array of another library, whose repr may be long
            return f"{type(x).__name__} of shape {tuple(shape)}"
        if x.size > self.maxlist or isinstance(x, Tracer) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return f"{x.dtype} array of shape {shape}"
        return repr(x.item()) if isinstance(x, np.ndarray) and x.ndim == 0 else super().repr1(x, level)
