"""Conversion of tokens (n, tokens, d) and maps (n, h, w, d) to rows of features (n, d)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _arrays, _checks

Positions = Literal["samples", "channels", "mean"]


def rows_of(values: Any, positions: Positions) -> Any:
    """Features (n, d) from an array of 2 to 4 dimensions, channels last."""
    if values.ndim == 2:
        return values
    if positions == "samples":
        return values.reshape(-1, values.shape[-1])
    if positions == "channels":
        return values.reshape(values.shape[0], -1)
    axes, dtype = tuple(range(1, values.ndim - 1)), np.result_type(values.dtype, np.float32)
    if not isinstance(values, jax.Array):
        return values.mean(axes, dtype=np.float64).astype(dtype)
    # Average differences from the first position, divided before they are summed: no overflow, and no lost digits.
    values = values.astype(dtype)
    first = values[(slice(None), *(slice(1) for _ in axes))]
    return jnp.squeeze(first + jnp.sum((values - first) / (values.size // first.size), axes, keepdims=True), axes)


def check_positions(named: Mapping[str, Any], positions: Positions | None) -> dict[str, Any]:
    """Representations as rows (n, d); raises if `positions` is missing, or has no effect."""
    arrays = {name: _arrays.numbers(name, value) for name, value in named.items()}
    if positions is None:
        for name, value in arrays.items():
            if value.ndim != 2:
                raise ValueError(f"{name} must have shape (n, d); got {value.shape}.{_way_out(name, value)}")
        return arrays
    _checks.choice("positions", positions, ("samples", "channels", "mean"))
    for name, value in arrays.items():
        if not 2 <= value.ndim <= 4:
            raise ValueError(
                f"{name} must have shape (n, d), (n, tokens, d) or (n, h, w, d), channels last; got {value.shape}."
            )
    if all(value.ndim == 2 for value in arrays.values()):
        raise ValueError(f"positions={positions!r} has no effect on features of shape (n, d). Leave it out.")
    return {name: rows_of(value, positions) for name, value in arrays.items()}


def _way_out(name: str, value: Any) -> str:
    if value.ndim not in (3, 4):
        return ""
    layout = "" if value.ndim == 3 else f" (Channels come last: for torch maps use {name}.transpose(0, 2, 3, 1).)"
    return (
        ' For tokens (n, tokens, d) and maps (n, h, w, d), positions="samples" makes each position a sample, '
        f'"channels" concatenates the positions of a sample (Kornblith et al. 2019), "mean" averages them.'
        f"{layout} For a batch of representations use the function in jaxalign.measures, or jax.vmap."
    )
