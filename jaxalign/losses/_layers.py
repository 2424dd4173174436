"""The loss of several layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxalign._repr import shown
from jaxalign.losses._alignment import alignment_loss


def multi_layer_loss(
    x: Mapping[str, Any],  # JAX arrays, or torch tensors with a loss for tensors
    y: Mapping[str, Any],
    *,
    loss: Callable[[Any, Any], Any] = alignment_loss,
    weights: Mapping[str, float] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The weighted mean of the losses of several layers, and the loss of each layer.

    Args:
        x: features of layers of the network in training, by name.
        y: features to align each layer with, by the same names.
        loss: a function of two representations: `alignment_loss`, `functools.partial(alignment_loss, measure="kl")` and
            so on.
        weights: weights of the layers, by name; None: equal weights. A layer without a weight is not computed.

    Returns:
        sum_l w_l loss_l / sum_l w_l, and the losses by name.

    Raises:
        ValueError: names that differ, no layers, a negative weight, or only weights of 0.

    Examples:
        >>> import jax, jaxalign
        >>> a, b = jax.random.normal(jax.random.key(0), (2, 64, 8))
        >>> total, each = jaxalign.losses.multi_layer_loss({"early": a, "late": a}, {"early": a, "late": b})
        >>> bool(each["early"] < 1e-5), bool(each["late"] > 0.5), bool(abs(total - each["late"] / 2) < 1e-5)
        (True, True, True)
    """
    for name, layers in (("x", x), ("y", y)):
        if not isinstance(layers, Mapping):
            raise TypeError(f"{name} must be features by name, {{'layer': array}}; got {type(layers).__name__}.")
    missing = sorted(set(x) ^ set(y))
    if missing or not x:
        raise ValueError(f"x and y must name the same layers, at least one; not in both: {shown(missing)}.")
    weights = dict.fromkeys(x, 1.0) if weights is None else weights
    unknown = sorted(set(weights) - set(x))
    if unknown:
        layers = shown(sorted(x))
        raise ValueError(f"weights has layers that x does not have: {shown(unknown)}. x has {layers}.")
    if any(w < 0 for w in weights.values()) or not sum(weights.values()) > 0:
        raise ValueError(f"weights must be at least 0, and not all 0; got {shown(dict(weights))}.")
    each = {name: loss(x[name], y[name]) for name in x if weights.get(name, 0.0) > 0}
    total = sum(weights[name] * value for name, value in each.items())
    return total / sum(weights.values()), each
