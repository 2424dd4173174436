"""How far affinities and CKA are from float64, for features as they come and for such as are hard to subtract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxalign

from . import rivals
from .timing import Result

DENSITY = 0.05


def exact(x: np.ndarray, sigma: float) -> np.ndarray:
    """The affinity in float64 by explicit differences."""
    x = x.astype(np.float64)
    d2 = np.stack([np.sum((row - x) ** 2, 1) for row in x])
    return np.exp(-d2 / (2 * sigma * sigma))


def run(n: int, d: int) -> Iterator[Result]:
    """The largest error of an affinity's entries, ours and others', at one sigma."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(n, d))
    tight = rng.normal(size=(8, d))[rng.integers(8, size=n)] * 30 + 1e-2 * plain
    kinds = {
        "normal features": plain,
        "the same 100 away from 0": plain + 100,
        "the same 1000 away from 0": plain + 1000,
        "eight tight clusters": tight,
    }
    for kind, features in kinds.items():
        x = features.astype(np.float32)
        # Of the clusters one sigma within them: there distances are small differences of large numbers.
        sigma = 1e-2 * (2 * d) ** 0.5 if features is tight else float(jaxalign.solve_sigma(x, density=DENSITY).sigma)
        expected = exact(x, sigma)
        for name, affinity in implementations().items():
            error = float(np.max(np.abs(np.asarray(affinity(x, sigma), np.float64) - expected)))
            bound, target = ("<=", 1e-4) if name == "jaxalign" else (None, None)
            case = f"largest error of A, n = {n}, d = {d}, {kind}: {name}"
            yield Result(case, error, "", error, error, bound, target)


def implementations() -> dict[str, Callable[[np.ndarray, float], Any]]:
    """What is installed, each as its documentation calls it, in float32."""
    found: dict[str, Callable[[np.ndarray, float], Any]] = {
        "jaxalign": lambda x, s: jaxalign.rbf_affinity(jnp.asarray(x), sigma=s)
    }
    if find_spec("torch") is not None:
        import torch

        found["torch, by products"] = lambda x, s: rivals.careful(torch.from_numpy(x), s)
        found["torch, cdist"] = lambda x, s: rivals.simple(torch.from_numpy(x), s)
    if find_spec("sklearn") is not None:
        from sklearn.metrics.pairwise import rbf_kernel

        found["scikit-learn"] = lambda x, s: rbf_kernel(x, gamma=0.5 / s**2)
    if find_spec("ncut_pytorch") is not None:
        import torch
        from ncut_pytorch.utils.math import rbf_affinity

        found["ncut-pytorch"] = lambda x, s: rbf_affinity(torch.from_numpy(x), sigma=s)
    return found
