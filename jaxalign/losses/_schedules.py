"""When to weigh an alignment loss how much: schedules of its weight, and stopping by the agreement of gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign import _arrays, _checks
from jaxalign._repr import short_repr


def stop_schedule(weight: float, stop: int, *, decay: int = 0) -> Callable[[Any], Array]:
    """A weight that is constant, and 0 from a step on: a schedule as in optax, a function of the number of the step.

    Alignment helps early in the training of diffusion transformers and hinders later (HASTE, Wang et al. 2025), so it
    is stopped. For warm-up and other shapes use `optax.schedules`.

    Args:
        weight: the weight before `stop`.
        stop: the first step with a smaller weight.
        decay: the number of steps in which the weight falls linearly to 0.

    Returns:
        A function of a step, a whole number or an array, that may be traced; for torch use float(schedule(step)).

    Raises:
        ValueError: a stop or decay below 0.

    Examples:
        >>> import jaxalign
        >>> schedule = jaxalign.losses.stop_schedule(0.5, 1000, decay=100)
        >>> [round(float(schedule(step)), 3) for step in (0, 999, 1050, 5000)]
        [0.5, 0.5, 0.25, 0.0]
    """
    stop, decay = _checks.whole("stop", stop, 0), _checks.whole("decay", decay, 0)

    def schedule(step: Any) -> Array:
        past = (jnp.asarray(step, jnp.float32) - stop) / max(decay, 1)
        return weight * (1 - jnp.clip(past, 0, 1) if decay else (past < 0).astype(jnp.float32))

    return schedule


def gradient_cosine(first: Any, second: Any) -> Float[Array, ""]:
    """The cosine of the angle between two gradients, pytrees of the same structure.

    0 if one of them is 0; nan if an entry is not finite.

    Examples:
        >>> import jax.numpy as jnp, jaxalign
        >>> first, second = {"w": jnp.ones(3), "b": jnp.ones(1)}, {"w": jnp.ones(3), "b": -jnp.ones(1)}
        >>> float(jaxalign.losses.gradient_cosine(first, second))
        0.5
    """
    leaves, others = (_leaves(name, tree) for name, tree in (("first", first), ("second", second)))
    if [a.shape for a in leaves] != [a.shape for a in others]:
        raise ValueError("first and second must be gradients of the same parameters, with the same shapes.")
    a, b = _unit_scale(leaves), _unit_scale(others)

    def inner(a: list[Array], b: list[Array]) -> Array:
        return jnp.asarray(sum(jnp.vdot(u, v) for u, v in zip(a, b, strict=True)), jnp.float32)

    sizes = jnp.sqrt(inner(a, a)) * jnp.sqrt(inner(b, b))
    return jnp.where(sizes == 0, 0, inner(a, b) / jnp.where(sizes == 0, 1, sizes))


def _leaves(name: str, tree: Any) -> list[Array]:
    return [jnp.asarray(_arrays.numbers(name, leaf)).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]


def _unit_scale(leaves: list[Array]) -> list[Array]:
    """Divided by the largest entry, so that no square overflows or vanishes."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(a), initial=0) for a in leaves]))
    return [a / jnp.where(largest > 0, largest, 1) for a in leaves]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("cosine", "steps", "active"),
    meta_fields=("threshold", "decay", "warmup"),
)
@dataclass(frozen=True, repr=False)
class GradientAgreement:
    """Stops an alignment loss for good when its gradient no longer agrees with that of the main loss.

    A pytree to carry between steps; made by `GradientAgreement.start`. HASTE (Wang et al. 2025) measures how the angle
    between the two gradients grows during training, and stops alignment once. Here that happens when the running mean
    of their cosine falls below a threshold.

    Attributes:
        cosine: the running mean of the cosine, a scalar.
        steps: the number of updates, a scalar.
        active: whether alignment goes on, a scalar; once False, it stays so.
        threshold: the smallest cosine with which it does.
        decay: weight of the past in the running mean.
        warmup: the number of updates in which it is not stopped.
    """

    cosine: Array
    steps: Array
    active: Array
    threshold: float
    decay: float
    warmup: int

    def __repr__(self) -> str:
        return short_repr(self)

    @staticmethod
    def start(threshold: float = 0.0, *, decay: float = 0.99, warmup: int = 100) -> GradientAgreement:
        """The state before the first step.

        Args:
            threshold: alignment stops when the running mean of the cosine falls below it; from -1 to 1.
            decay: weight of the past in the running mean, from 0 to 1.
            warmup: the number of updates before it may stop.

        Raises:
            ValueError: values out of range.

        Examples:
            >>> import jax.numpy as jnp, jaxalign
            >>> state = jaxalign.losses.GradientAgreement.start(warmup=1)
            >>> main = {"w": jnp.ones(3)}
            >>> bool(state.update(main, {"w": jnp.ones(3)}).active)
            True
            >>> bool(state.update(main, {"w": -jnp.ones(3)}).active)
            False
        """
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold is a cosine, from -1 to 1; got {threshold}.")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1; got {decay}.")
        warmup = _checks.whole("warmup", warmup, 0)
        zero = jnp.zeros((), jnp.int32)
        return GradientAgreement(jnp.zeros(()), zero, jnp.ones((), bool), float(threshold), float(decay), warmup)

    def update(self, main: Any, alignment: Any) -> GradientAgreement:
        """The state after a step with two gradients, pytrees of the same structure.

        The running mean is that of Adam, without bias toward its start. The gradients need not be of all parameters:
        those of the layers below the aligned one, on a part of the batch and in every tenth step are enough. Gradients
        that are not finite, as in a step that mixed precision skips, do not count.
        """
        found = gradient_cosine(main, alignment)
        is_finite = jnp.isfinite(found)
        steps = self.steps + is_finite.astype(jnp.int32)
        # The sum of weights of the past, 1 - decay^t, divides the mean.
        share = (1 - self.decay) / (1 - self.decay ** jnp.maximum(steps, 1).astype(jnp.float32))
        cosine = jnp.where(is_finite, self.cosine + share * (found - self.cosine), self.cosine)
        stops = (steps >= self.warmup) & (cosine < self.threshold)
        return replace(self, cosine=cosine, steps=steps, active=self.active & ~stops)
