"""Types that stand in many signatures."""

from __future__ import annotations

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
