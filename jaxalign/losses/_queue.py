"""Past samples that are added to a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign import _checks, _features
from jaxalign._repr import short_repr
from jaxalign._typing import Data, Mask, Numbers


@partial(jax.tree_util.register_dataclass, data_fields=("x", "y", "valid", "cursor"), meta_fields=())
@dataclass(frozen=True, repr=False)
class FeatureQueue:
    """A queue of past features of both networks, as in MoCo (He et al. 2020): a pytree to carry between steps.

    Made by `FeatureQueue.empty`.

    Attributes:
        x: features of the first network, shape (capacity, d1).
        y: features of the same samples in the second network, shape (capacity, d2).
        valid: which slots hold a valid sample, shape (capacity,).
        cursor: index of the slot of the next sample, a scalar.
    """

    x: Any  # no array types: torch_losses uses queues of tensors
    y: Any
    valid: Any
    cursor: Any

    def __repr__(self) -> str:
        return short_repr(self)

    @staticmethod
    def empty(capacity: int, width_x: int, width_y: int, dtype: Any = jnp.float32) -> FeatureQueue:
        """A queue without samples.

        Args:
            capacity: the largest number of samples; the oldest are dropped first.
            width_x: the number of features of the first network.
            width_y: the number of features of the second network.
            dtype: dtype of the features.

        Raises:
            ValueError: a number below 1.

        Examples:
            >>> import jaxalign
            >>> jaxalign.losses.FeatureQueue.empty(256, 16, 32).x.shape
            (256, 16)
        """
        for name, value in (("capacity", capacity), ("width_x", width_x), ("width_y", width_y)):
            _checks.whole(name, value)
        return FeatureQueue(
            jnp.zeros((capacity, width_x), dtype),
            jnp.zeros((capacity, width_y), dtype),
            jnp.zeros(capacity, bool),
            jnp.zeros((), jnp.int32),
        )

    def push(
        self,
        x: Numbers[Data, "n d1"],
        y: Numbers[Data, "n d2"],
        mask: Mask[Data, " n"] | None = None,
    ) -> FeatureQueue:
        """Return a queue with a batch added, without gradients; this queue does not change.

        Args:
            x: features, shape (n, d1); if n exceeds the capacity, the last samples are kept.
            y: features of the same samples, shape (n, d2).
            mask: shape (n,), True marks valid samples. Other samples use a slot but do not count.

        Raises:
            ValueError: shapes that do not fit the queue.

        Examples:
            >>> import jax, jaxalign
            >>> x = jax.random.normal(jax.random.key(0), (32, 16))
            >>> queue = jaxalign.losses.FeatureQueue.empty(256, 16, 16).push(x, 2 * x)
            >>> int(queue.valid.sum())
            32
        """
        capacity = self.valid.shape[0]
        x, y = _features.features("x", x), _features.features("y", y)
        for name, value, kept in (("x", x, self.x), ("y", y, self.y)):
            if value.ndim != 2 or value.shape[1] != kept.shape[1]:
                raise ValueError(f"{name} must have shape (n, {kept.shape[1]}) to fit the queue; got {value.shape}.")
        n = x.shape[0]
        if y.shape[0] != n:
            raise ValueError(f"x and y must hold the same samples, row by row: {n} and {y.shape[0]} rows.")
        valid = _features.row_mask("mask", mask, (n,))
        valid = jnp.ones(n, bool) if valid is None else valid
        last = slice(max(0, n - capacity), n)
        number = n - last.start
        slots = (self.cursor + jnp.arange(number, dtype=jnp.int32)) % capacity
        x, y = (lax.stop_gradient(a[last]) for a in (x, y))
        return FeatureQueue(
            self.x.at[slots].set(jnp.where(valid[last, None], x, 0).astype(self.x.dtype)),
            self.y.at[slots].set(jnp.where(valid[last, None], y, 0).astype(self.y.dtype)),
            self.valid.at[slots].set(valid[last]),
            (self.cursor + number) % capacity,
        )


def with_queue(x: Array, y: Array, mask: Array | None, queue: FeatureQueue) -> tuple[Array, Array, Array]:
    """A batch and its mask, with the samples of a queue."""
    if x.ndim != 2:
        raise ValueError(f"with a queue, x and y must be a single batch of shape (n, d); got {x.shape}.")
    for name, value, kept in (("x", x, queue.x), ("y", y, queue.y)):
        if value.shape[-1] != kept.shape[-1]:
            raise ValueError(f"{name} has {value.shape[-1]} features, but the queue has {kept.shape[-1]}.")
    mask = jnp.ones(x.shape[:-1], bool) if mask is None else mask
    x, y = (jnp.concatenate((a, lax.stop_gradient(kept).astype(a.dtype))) for a, kept in ((x, queue.x), (y, queue.y)))
    return x, y, jnp.concatenate((mask, queue.valid))
