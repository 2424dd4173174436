"""Measures by columns where channels outnumber samples, against numpy on the same route through n x n factors."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from jaxalign import measures

from .timing import Result, compare


def centered(x: np.ndarray) -> np.ndarray:
    """Columns less their mean, turned into the row space: (n, n)."""
    return np.linalg.qr((x - x.mean(0)).T, mode="r").T


def procrustes(x: np.ndarray, y: np.ndarray) -> float:
    """Schönemann 1966: what the best rotation leaves."""
    x, y = (a / np.linalg.norm(a) for a in map(centered, (x, y)))
    u, _, vt = np.linalg.svd(x.T @ y)
    return float(np.linalg.norm(x @ u - y @ vt.T))


def cca(x: np.ndarray, y: np.ndarray) -> float:
    """Hotelling 1936: the mean canonical correlation."""

    def basis(a: np.ndarray) -> np.ndarray:
        u, s, _ = np.linalg.svd(centered(a))
        return u[:, s > s[0] * len(s) * np.finfo(a.dtype).eps]

    u, v = basis(x), basis(y)
    return float(np.linalg.svd(u.T @ v, compute_uv=False).sum() / min(u.shape[1], v.shape[1]))


def run(n: int, d: int, rounds: int) -> Iterator[Result | str]:
    """Results as they are measured."""
    x, y = np.random.default_rng(0).normal(size=(2, n, d)).astype(np.float32)
    on_device = jax.device_put(x), jax.device_put(y)
    for name, rival in (("procrustes", procrustes), ("cca", cca)):
        ours = getattr(measures, name)
        case = f"{name}, n = {n}, d = {d}: time of numpy's on the same route"
        own, other = (name, lambda ours=ours: ours(*on_device)), ("numpy", lambda rival=rival: rival(x, y))
        yield compare(case, own, other, rounds, bound="<=", target=1.5)
        yield f"{name}: difference from numpy {abs(float(ours(*on_device)) - rival(x, y)):.1e}"
