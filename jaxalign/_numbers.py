"""Conversion of NumPy arrays to the dtype of the computation, with as little rounding as possible.

JAX holds float32 unless x64 is enabled, while NumPy, lists and tables hold float64. Rounding to float32 keeps 7
digits. Distances, and whatever else depends only on differences of rows, stay accurate if the rows are centered in
float64 first, even if they share a large offset, like time stamps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# How many rows `error_of_narrowing` examines, and the largest error allowed, relative to the spread of the rows.
_EXAMINED, ALLOWED = 4096, 1e-4


def computing_dtype(dtype: Any) -> np.dtype:
    """The dtype of the computation for features of `dtype`: float32, or float64 if wider and x64 is enabled."""
    dtype = np.dtype(dtype)
    is_floating = dtype.kind == "f" or jnp.issubdtype(dtype, jnp.floating)  # bfloat16 has kind V
    if is_floating and dtype.itemsize <= 4:
        return np.dtype(np.float32)
    return np.dtype(jax.dtypes.canonicalize_dtype(np.float64))


def holds_exactly(target: Any, dtype: Any) -> bool:
    """Whether a floating-point dtype holds every value of another dtype."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return True
    if dtype.kind in "iu":
        return 8 * dtype.itemsize <= jnp.finfo(target).nmant + 1
    return dtype.itemsize <= np.dtype(target).itemsize


def is_wide(dtype: Any) -> bool:
    """Whether a dtype is wider than the dtype of the computation."""
    return not holds_exactly(computing_dtype(dtype), dtype)


def mean_row(rows: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The mean over the finite valid rows of (..., n, d), shape (..., 1, d), in float64 or wider; 0 without such rows.

    Values in masked rows have no effect (some files hold 1e20 for "missing").
    """
    valid: Any = True if mask is None else mask[..., None]
    mean = _mean(rows, valid)
    return mean if np.isfinite(mean).all() else _mean(rows, np.isfinite(rows).all(-1, keepdims=True) & valid)


def _mean(rows: np.ndarray, valid: Any) -> np.ndarray:
    wide = np.result_type(rows.dtype, np.float64)
    with np.errstate(all="ignore"):
        total = np.sum(rows, -2, keepdims=True, dtype=wide, where=valid)
        count = np.sum(np.broadcast_to(valid, (*rows.shape[:-1], 1)), -2, keepdims=True)
        return total / np.maximum(count, 1)


def narrow(rows: np.ndarray, dtype: Any, shift: np.ndarray | None = None) -> np.ndarray:
    """Rows minus the shift, converted to `dtype` after the subtraction; numbers out of range become inf."""
    with np.errstate(all="ignore"):
        if shift is None:
            return rows.astype(dtype, copy=False)
        # NumPy computes this in blocks that stay in cache, without a float64 copy.
        out = np.empty(np.broadcast_shapes(rows.shape, shift.shape), dtype)
        return np.subtract(rows, shift, out=out, casting="same_kind")


def is_in_range(narrowed: np.ndarray) -> bool:
    """Whether all numbers are finite and at least one is normal: the usual case, checked without a copy."""
    with np.errstate(all="ignore"):
        least, most = narrowed.min(), narrowed.max()
    return bool(np.isfinite(least) and np.isfinite(most) and max(-least, most) >= jnp.finfo(narrowed.dtype).tiny)


def overflows(rows: np.ndarray, narrowed: np.ndarray, mask: np.ndarray | None = None) -> bool:
    """Whether narrowing turned a finite number in a valid row into inf."""
    infinite = np.isinf(narrowed)
    if not infinite.any():
        return False
    lost = (infinite & np.isfinite(rows)).any(-1)
    return bool((lost if mask is None else lost & mask).any())


def vanishes(rows: np.ndarray, narrowed: np.ndarray) -> bool:
    """Whether narrowing left only subnormal numbers although rows differ: their unit is too large."""
    if rows.dtype.kind != "f" or (np.abs(narrowed) >= jnp.finfo(narrowed.dtype).tiny).any():
        return False
    finite = np.isfinite(rows).all(-1, keepdims=True)
    least, most = np.min(rows, -2, where=finite, initial=np.inf), np.max(rows, -2, where=finite, initial=-np.inf)
    return bool((most > least).any())


def largest(rows: np.ndarray) -> float:
    """The largest finite absolute value."""
    finite = rows[np.isfinite(rows)]
    return float(np.abs(finite).max()) if finite.size else 0.0


def error_of_narrowing(array: np.ndarray) -> float:
    """The error of rounding the first rows to float32, relative to their spread; inf beyond the range of float32."""
    rows = array.reshape(-1, array.shape[-1])[:_EXAMINED] if array.ndim > 1 else array.reshape(-1, 1)
    rows = rows.astype(np.longdouble if array.dtype == np.longdouble else np.float64)
    rows = rows[np.isfinite(rows).all(-1)]
    if not rows.size:
        return 0.0
    with np.errstate(all="ignore"):
        error, spread = np.abs(rows.astype(np.float32) - rows).max(), np.abs(rows - rows.mean(0)).max()
        if not error or np.isinf(error):  # beyond float32
            return float(error)
        # Identical rows, or a single row, have no spread to compare with: only integers must then stay exact.
        return float(error / spread) if spread else float(array.dtype.kind in "iu")
