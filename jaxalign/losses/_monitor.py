"""How similar two networks are during training, from the batches of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign import _arrays, _checks, _features
from jaxalign._repr import short_repr
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.kernels import Kernel, kernel_of
from jaxalign.measures import mutual_knn
from jaxalign.measures._hsic import batch_products
from jaxalign.plan import AUTO, resolve_plan


@dataclass(frozen=True, repr=False)
class MonitorCurve:
    """Similarity during training, one entry per window of batches, (windows,); made by `Monitor.curve`.

    Attributes:
        step: the mean step of the window.
        cka: debiased CKA, from the mean inner products of the window: minibatch CKA (Nguyen et al. 2021), which does
            not depend on the size of the batches.
        cka_error: its standard error, by the jackknife over batches; nan for a window of one batch.
        overlap: mean share of the k nearest neighbors within a batch that both networks have in common.
        overlap_error: its standard error over batches; nan for a window of one batch.
        chance: the overlap of unrelated networks, k / (n - 1) in batches of n samples.
    """

    step: np.ndarray
    cka: np.ndarray
    cka_error: np.ndarray
    overlap: np.ndarray
    overlap_error: np.ndarray
    chance: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)

    def to_pandas(self) -> Any:
        """Return one row per window as a pandas DataFrame (needs pandas)."""
        return _arrays.pandas().DataFrame(vars(self))


@dataclass(frozen=True, repr=False)
class Monitor:
    """The batches seen so far; made by `monitor`. `update` returns a monitor with one more batch.

    Values stay on the device until `curve` reads them, so an update does not wait for the batch.
    """

    k: int
    kernel: Any
    batches: tuple[tuple[float, Any], ...] = ()

    def __repr__(self) -> str:
        return f"Monitor({len(self.batches)} batches, k={self.k})"

    def update(
        self,
        step: float | int,
        x: Numbers[Data, "n d1"],
        y: Numbers[Data, "n d2"],
        mask: Mask[Data, " n"] | None = None,
    ) -> Monitor:
        """Return a monitor with a batch added.

        A batch of fewer than 4 valid samples does not count in CKA, nor one of at most k in the overlap.

        Args:
            step: the number of the training step.
            x: features of a batch in one network, shape (n, d1).
            y: features of the same samples in the other network, shape (n, d2). In another order, CKA is about 0 and
                the overlap about that of chance.
            mask: shape (n,), True marks valid samples.

        Raises:
            TypeError, ValueError: x and y that are not features of the same samples; a call under a trace.
        """
        x, y = _batch("x", x), _batch("y", y)
        if x.shape[0] != y.shape[0]:
            raise ValueError(f"x and y must hold the same samples, row by row: {x.shape[0]} and {y.shape[0]} rows.")
        mask = _features.row_mask("mask", mask, x.shape[:1])
        values = _values(x, y, mask, k=self.k, kernel=self.kernel)
        return replace(self, batches=(*self.batches, (float(step), values)))

    def curve(self, window: int = 10) -> MonitorCurve:
        """The similarity in windows of batches.

        Args:
            window: the number of batches per window; the last window has those that are left over as well.

        Raises:
            ValueError: no batches yet, or none of more than k samples; a window below 1.
        """
        window = _checks.whole("window", window)
        if not self.batches:
            raise ValueError("the monitor has no batches yet: call monitor = monitor.update(step, x, y) first.")
        steps = np.array([step for step, _ in self.batches])
        values = np.stack([_in_units(*jax.device_get(values)) for _, values in self.batches])
        if np.isnan(values[:, 3]).all():
            raise ValueError(f"no batch has more than k = {self.k} valid samples: use larger batches or a smaller k.")
        number = max(len(steps) // window, 1)
        bounds = np.append(np.arange(number) * window, len(steps))
        parts = [slice(*bounds[k : k + 2]) for k in range(number)]
        columns = [(steps[part].mean(), *_summary(values[part])) for part in parts]
        return MonitorCurve(*map(np.array, zip(*columns, strict=True)))


def monitor(k: int = 10, kernel: Kernel = "linear") -> Monitor:
    """Follow debiased CKA and the overlap of neighbors during training, from the batches of any training loop.

    Args:
        k: the number of nearest neighbors in a batch, by cosine.
        kernel: of CKA, see `jaxalign.measures.hsic`.

    Returns:
        A `Monitor` without batches.

    Raises:
        ValueError: a k below 1.

    Examples:
        >>> import jax, jaxalign
        >>> monitor = jaxalign.losses.monitor(k=5)
        >>> for step in range(40):
        ...     x, noise = jax.random.normal(jax.random.key(step), (2, 64, 8))
        ...     monitor = monitor.update(step, x, x + noise / (1 + step))
        >>> curve = monitor.curve(window=10)
        >>> bool(curve.cka[0] < curve.cka[-1]), bool(curve.overlap[-1] > 0.8)
        (True, True)
    """
    return Monitor(_checks.whole("k", k), kernel_of(kernel))


def _batch(name: str, value: Any) -> Array:
    x = _features.features(name, value)
    if x.ndim != 2:
        raise ValueError(
            f"{name} must be a batch of features, (n, d); got {x.shape}. Of tokens (b, t, c), pass {name}.mean(1), or "
            f"{name}.reshape(-1, c)."
        )
    if not _arrays.is_concrete(x):
        raise TypeError(f"{name} is traced: update the monitor outside of jit, with what the jitted step returns.")
    return x


@partial(jax.jit, static_argnames=("k", "kernel"))
def _values(x: Array, y: Array, mask: Array | None, *, k: int, kernel: Any) -> tuple[Array, Array, Array]:
    """`batch_products`, (3,) and (2,); the overlap of neighbors and that of chance, (2,); nan if too few."""
    n, dtype = x.shape[0], jnp.result_type(x, y)
    x, y = x.astype(dtype), y.astype(dtype)
    count = jnp.asarray(n if mask is None else jnp.sum(mask), dtype)
    products, units = batch_products(x, y, mask, kernel, resolve_plan(AUTO, x, None))
    overlap = jnp.nan if n <= k else mutual_knn(x, y, k, mask=mask).astype(dtype)
    overlaps = jnp.stack((jnp.asarray(overlap, dtype), k / jnp.maximum(count - 1, 1)))
    return jnp.where(count >= 4, products, jnp.nan), units, jnp.where(count > k, overlaps, jnp.nan)


def _in_units(products: np.ndarray, units: np.ndarray, overlaps: np.ndarray) -> np.ndarray:
    """The products in the units of the features, in float64, and the overlaps, (5,)."""
    x, y = units.astype(np.float64)
    return np.concatenate((products * np.array([x * y, x * x, y * y]), overlaps))


def _summary(values: np.ndarray) -> tuple[float, ...]:
    """CKA, its error, the overlap, its error, and the overlap of chance, of batches (m, 5)."""
    products, overlaps = (part[np.isfinite(part).all(1)] for part in (values[:, :3], values[:, 3:]))

    def cka(products: np.ndarray) -> Any:
        cross, self_x, self_y = np.moveaxis(products, -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return cross / np.sqrt(self_x * self_y)

    total, m = products.sum(0), len(products)
    error = np.sqrt((m - 1) * np.var(cka(total - products))) if m > 1 else np.nan
    overlap, chance = overlaps.mean(0) if len(overlaps) else (np.nan, np.nan)
    spread = overlaps[:, 0].std(ddof=1) / np.sqrt(len(overlaps)) if len(overlaps) > 1 else np.nan
    return float(cka(total)), error, overlap, spread, chance
