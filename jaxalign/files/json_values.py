"""Options and results as JSON holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def json_option(value: Any) -> Any:
    """An option of a measure; a function by its name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [json_option(part) for part in value]
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)  # not repr, which holds an address
        return f"{named.__module__}.{named.__qualname__}"
    return np.asarray(value).tolist()


def json_result(value: Any) -> Any:
    """Results; nan and inf as None."""
    if isinstance(value, Mapping):
        return {str(name): json_result(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_result(part) for part in value]
    if isinstance(value, (np.ndarray, jax.Array, np.generic)):
        return json_result(np.asarray(value).tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value
