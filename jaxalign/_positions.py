"""What the positions of tokens (n, tokens, d) and maps (n, h, w, d) become, where features are rows (n, d)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _checks

Positions = Literal["samples", "channels", "mean"]


def rows_of(values: Any, positions: Positions) -> Any:
    """Features (n, d) of an array of 2 to 4 dimensions, channels last."""
    if values.ndim == 2:
        return values
    if positions == "samples":
        return values.reshape(-1, values.shape[-1])
    if positions == "channels":
        return values.reshape(values.shape[0], -1)
    axes, dtype = tuple(range(1, values.ndim - 1)), np.result_type(values.dtype, np.float32)
    if not isinstance(values, jax.Array):
        return values.mean(axes, dtype=np.float64).astype(dtype)
    # Of differences from one position, divided before they are summed, so that nothing overflows or loses its digits.
    values = values.astype(dtype)
    one = values[(slice(None), *(slice(1) for _ in axes))]
    return jnp.squeeze(one + jnp.sum((values - one) / (values.size // one.size), axes, keepdims=True), axes)


def check_positions(named: Mapping[str, Any], positions: Positions | None) -> dict[str, Any]:
    """Representations as rows (n, d); raises where `positions` is needed and not given, or given and not needed."""
    arrays = {name: _checks.numbers(name, value) for name, value in named.items()}
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
    first = "" if value.ndim == 3 else f" (Channels come last: of torch, take {name}.transpose(0, 2, 3, 1).)"
    return (
        ' Of tokens (n, tokens, d) and maps (n, h, w, d), positions="samples" makes each position a sample, "channels" '
        f'puts those of a sample side by side (Kornblith et al. 2019), and "mean" averages them.{first} For a batch of '
        "representations use the function in jaxalign.measures, or jax.vmap."
    )
