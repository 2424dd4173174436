"""Alignment as a loss: differentiable distances between the geometries of two sets of features of the same samples.

`alignment_loss` compares a batch of one network with the same batch of another, whatever the width, unit and offset of
their features: bandwidths are scaled automatically, and gradients pass through them. Values and gradients are finite
for any finite features:

- where coincident samples alone exceed the density there is no sigma: all samples of that set then count as alike,
  A = 1 everywhere, which says nothing. "cka" is 1 then; the gradient is 0;
- with fewer real samples than a measure needs the loss is 0: there is nothing to compare.

The density is the mean over pairs of different samples, so it means the same in small batches. `FeatureQueue` adds past
samples to a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxalign import _checks
from jaxalign._linalg import unit
from jaxalign._problem import check_rtol
from jaxalign._repr import short_repr
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.affinity import rbf_affinity
from jaxalign.core.bandwidth import CONVERGED, is_bandwidth
from jaxalign.core.devices import NO_ROWS, ROWS_LAST, ROWS_SECOND_LAST, on_mesh, over_devices
from jaxalign.core.tiles import Reduction, Tile, log_kernel
from jaxalign.kernels import RBF, Kernel, kernel_of
from jaxalign.measures._centering import CENTERINGS
from jaxalign.measures._evaluate import MASK_ADVICE, check_function, check_representations
from jaxalign.measures._pair_sums import (
    PairFunction,
    Representation,
    kernel_function,
    pair_products,
    prepare_representations,
    solve_bandwidth_jit,
    squared_differences,
    visit_pairs,
)
from jaxalign.plan import STORED, Plan, check_plan, resolve_plan

Measure = Literal["cka", "affinity", "kl", "infonce"]
ReductionOf = Literal["mean", "sum", "none"]

_TEMPERATURE = 0.1
_LEAST = {"cka": 4, "affinity": 2, "kl": 3, "infonce": 4}
# Stands for log 0: exp of it is 0, and differences of two of them are finite.
_LOG_NOTHING = -1e30


@partial(jax.tree_util.register_dataclass, data_fields=("x", "y", "valid", "cursor"), meta_fields=())
@dataclass(frozen=True, repr=False)
class FeatureQueue:
    """Features of past batches in both networks, as in MoCo (He et al. 2020): a pytree, carried from step to step.

    Made by `FeatureQueue.empty`.

    Attributes:
        x: features in one network, shape (capacity, d1).
        y: features of the same samples in the other, shape (capacity, d2).
        valid: which slots hold a valid sample, shape (capacity,).
        cursor: the slot of the next sample, a scalar.
    """

    x: Any  # not typed as arrays of jax: with tensors it serves torch
    y: Any
    valid: Any
    cursor: Any

    def __repr__(self) -> str:
        return short_repr(self)

    @staticmethod
    def empty(capacity: int, width_x: int, width_y: int, dtype: Any = jnp.float32) -> FeatureQueue:
        """A queue without samples.

        Args:
            capacity: the number of samples that it can hold; the oldest are dropped first.
            width_x: the number of features of a sample in one network.
            width_y: the number of features in the other.
            dtype: of the features.

        Raises:
            ValueError: a number below 1.

        Example:
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
        """The queue with a batch added, without gradients; this one does not change.

        Args:
            x: features, shape (n, d1); of more than the capacity the last ones.
            y: features of the same samples, shape (n, d2).
            mask: shape (n,), True marks valid samples. The others take a slot, but do not count.

        Raises:
            ValueError: shapes that do not fit the queue.

        Example:
            >>> import jax, jaxalign
            >>> x = jax.random.normal(jax.random.key(0), (32, 16))
            >>> queue = jaxalign.losses.FeatureQueue.empty(256, 16, 16).push(x, 2 * x)
            >>> int(queue.valid.sum())
            32
        """
        capacity = self.valid.shape[0]
        x, y = _checks.features("x", x), _checks.features("y", y)
        for name, value, kept in (("x", x, self.x), ("y", y, self.y)):
            if value.ndim != 2 or value.shape[1] != kept.shape[1]:
                raise ValueError(f"{name} must have shape (n, {kept.shape[1]}) to fit the queue; got {value.shape}.")
        n = x.shape[0]
        if y.shape[0] != n:
            raise ValueError(f"x and y must hold the same samples, row by row: {n} and {y.shape[0]} rows.")
        valid = _checks.row_mask("mask", mask, (n,))
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


def alignment_loss(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    measure: Measure = "cka",
    *,
    kernel: Kernel = "rbf",
    mask: Mask[Data, "*#batch n"] | None = None,
    queue: FeatureQueue | None = None,
    landmarks: int | None = None,
    temperature: float = _TEMPERATURE,
    reduction: ReductionOf = "mean",
    stop_gradient_target: bool = True,
    stop_gradient_sigma: bool = False,
    plan: Plan | None = None,
) -> Float[Array, "..."]:
    """How far the geometry of x is from that of y, differentiable: to be minimised over the network that made x.

    With A and B the kernels of x and y, by default auto-scaled RBF affinities:

    - "cka": 1 - debiased CKA of A and B. 0 for equal geometry, 1 on average for unrelated sets.
    - "affinity": mean_ij (A_ij - B_ij)^2, affinity matching as published. 0 for equal affinities.
    - "kl": mean_i sum_j P_ij log(P_ij / Q_ij), P and Q the rows of B and A over j != i, each divided by its sum
      (probabilistic knowledge transfer, Passalis & Tefas 2018, with this kernel). 0 for equal rows.
    - "infonce": each sample's affinities to the landmarks in the one network have to find those of the same sample in
      the other among all samples: cross-entropy of their correlations / temperature, mean of both directions (van den
      Oord et al. 2018). Not 0 at y = x: the rows of different samples are correlated.

    Args:
        x: features of the network that is trained, shape (..., n, d1).
        y: features of the same samples in the other network, shape (..., n, d2).
        measure: "cka", "affinity", "kl" or "infonce".
        kernel: "rbf" or a `jaxalign.kernels.RBF`, which also holds sigma or its target density; "cka" takes any
            kernel, see `jaxalign.measures.hsic`.
        mask: shape (..., n), True marks valid samples: a padded last batch costs no recompilation.
        queue: past samples that count as samples of the batch, without gradients. Not with leading batch dimensions.
        landmarks: of "infonce": how many of the last samples are the landmarks. None: those in the queue, or half of
            the batch. With a mask, the same fraction of the valid samples. sigma is solved for on the landmarks.
        temperature: of "infonce".
        reduction: "mean" over samples, "sum", or "none": one value per sample, (..., n), 0 where masked and, of
            "infonce", for landmarks. "cka" has no value of a single sample: "mean" only.
        stop_gradient_target: True: y is a constant, and x follows. False: both move.
        stop_gradient_sigma: the bandwidths are constants in the gradient. The scale of x then gets a gradient,
            although the loss does not depend on it.
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        The loss, shape (...), or (..., n) for "none". Where no sigma can be found (samples that coincide, or a mask
            that leaves 1 / density or fewer under a trace) all samples count as alike and the gradient is 0.

    Raises:
        TypeError, ValueError: see `jaxalign.measures.hsic`; a reduction that the measure does not have; a batch too
            small for the density, which names the smallest.

    Example:
        >>> import jax, jaxalign
        >>> teacher = jax.random.normal(jax.random.key(0), (64, 32))
        >>> student = teacher[:, :8]
        >>> loss, gradient = jax.value_and_grad(jaxalign.losses.alignment_loss)(student, teacher)
        >>> bool(loss > 0), gradient.shape
        (True, (64, 8))
        >>> round(float(jaxalign.losses.alignment_loss(3 * teacher + 1, teacher)), 4)
        0.0
    """
    _checks.choice("measure", measure, tuple(_LEAST))
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))
    if measure == "cka" and reduction != "mean":
        raise ValueError(
            f'reduction={_checks.shown(reduction)}: "cka" is one number for all samples and has "mean" only. '
            'Measures with a value of each sample are "affinity", "kl" and "infonce".'
        )
    if measure != "infonce" and landmarks is not None:
        got = _checks.shown(landmarks)
        raise ValueError(f'landmarks={got} is for measure="infonce"; {measure!r} compares all with all.')
    if measure != "infonce" and temperature != _TEMPERATURE:
        raise ValueError(f'temperature={_checks.shown(temperature)} is for measure="infonce"; {measure!r} has none.')
    kernel, function = _check_kernel(kernel, measure, stop_gradient_sigma)
    plan = check_plan(plan)
    named, what = (("x", x), ("y", y)), f'alignment_loss "{measure}"'
    # Samples of a queue were not shifted, so these must not be either.
    center = queue is None
    (x, y), mask = check_representations(named, mask, "raise", _LEAST[measure], what, MASK_ADVICE, center=center)
    if stop_gradient_target:
        y = lax.stop_gradient(y)
    n = x.shape[-2]
    if queue is not None:
        x, y, mask = _with_queue(x, y, mask, queue)
    if measure == "infonce" and plan.mesh is not None:
        raise ValueError('measure="infonce" takes no mesh: call it inside jax.shard_map with Plan(axis_name=...).')
    axis_name, plan = plan.axis_name, resolve_plan(plan, x, None, representations=2)
    if measure == "infonce":
        assert isinstance(kernel, RBF)
        devices = 1 if axis_name is None else plan.total_rows(1)
        least = _least_landmarks(x, kernel) if kernel.solves else 0
        m = _landmarks(landmarks, n, queue, least, devices)
        return _contrast(x, y, mask, kernel, function, n, m, least, landmarks is None, temperature, reduction,
                         axis_name, devices, queue is not None)  # fmt: skip
    known = mask if queue is None else None  # how much of a queue is filled may be refused under no trace either
    sigmas, target = check_function(("x", "y"), (x, y), known, kernel, function, plan)
    counts = jnp.arange(x.shape[-2]) < n  # the batch, not the queue
    valid = jnp.broadcast_to(counts, x.shape[:-1])
    valid = valid if mask is None else valid & mask
    return _pair_loss(x, y, mask, valid, sigmas, target, measure, reduction, function, n, plan)


def _check_kernel(kernel: Any, measure: Measure, constant_sigma: bool) -> tuple[Any, PairFunction]:
    """The kernel, and what it gives a pair of samples of a batch, which may be all duplicates."""
    kernel = kernel_of(kernel)
    if measure != "cka" and not isinstance(kernel, RBF):
        raise ValueError(
            f'measure={measure!r} compares RBF affinities: kernel must be "rbf" or a jaxalign.kernels.RBF; got '
            f'{_checks.shown(kernel)}. measure="cka" takes any kernel.'
        )
    function = kernel_function(kernel)
    if constant_sigma and not function.solves:
        raise ValueError(f"stop_gradient_sigma=True has no effect with {kernel!r}: no sigma is solved for.")
    # The logarithm of the kernel, and its value at equal samples, are those of the kernel itself.
    minus_one = function.minus_one and measure == "cka"
    return kernel, replace(function, duplicates_allowed=True, constant_sigma=constant_sigma, minus_one=minus_one)


def multi_layer_loss(
    x: Mapping[str, Any],  # arrays of jax or, with a loss of theirs, tensors of torch
    y: Mapping[str, Any],
    *,
    loss: Callable[[Any, Any], Any] = alignment_loss,
    weights: Mapping[str, float] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The weighted mean of the losses of several layers, and each of them.

    Args:
        x: features of the layers of the network that is trained, by name.
        y: what each is to be aligned with, by the same names.
        loss: of two sets of features: `alignment_loss`, or `functools.partial(alignment_loss, measure="kl")` and so on.
        weights: of the layers, by name; None: all alike. A layer that is not named has weight 0 and is not computed.

    Returns:
        sum w_l loss_l / sum w_l, and the losses by name.

    Raises:
        ValueError: names that differ, no layers, a weight below 0 or all of them 0.

    Example:
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
        raise ValueError(f"x and y must name the same layers, at least one; not in both: {_checks.shown(missing)}.")
    weights = dict.fromkeys(x, 1.0) if weights is None else weights
    unknown = sorted(set(weights) - set(x))
    if unknown:
        there = _checks.shown(sorted(x))
        raise ValueError(f"weights names layers that are not there: {_checks.shown(unknown)}. There are {there}.")
    if any(w < 0 for w in weights.values()) or not sum(weights.values()) > 0:
        raise ValueError(f"weights must be at least 0 and not all 0; got {_checks.shown(dict(weights))}.")
    each = {name: loss(x[name], y[name]) for name in x if weights.get(name, 0.0) > 0}
    total = sum(weights[name] * value for name, value in each.items())
    return total / sum(weights.values()), each


# --- batches with a queue ---------------------------------------------------------------------------------------------


def _with_queue(x: Array, y: Array, mask: Array | None, queue: FeatureQueue) -> tuple[Array, Array, Array]:
    if x.ndim != 2:
        raise ValueError(f"a queue goes with a single batch of shape (n, d); got {x.shape}.")
    for name, value, kept in (("x", x, queue.x), ("y", y, queue.y)):
        if value.shape[-1] != kept.shape[-1]:
            raise ValueError(f"{name} has {value.shape[-1]} features, the queue {kept.shape[-1]}.")
    mask = jnp.ones(x.shape[:-1], bool) if mask is None else mask
    x, y = (jnp.concatenate((a, lax.stop_gradient(kept).astype(a.dtype))) for a, kept in ((x, queue.x), (y, queue.y)))
    return x, y, jnp.concatenate((mask, queue.valid))


# --- losses by pairs --------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("measure", "reduction", "function", "n", "plan"))
def _pair_loss(
    x: Array,
    y: Array,
    mask: Array | None,
    real: Array,
    sigmas: Array | None,
    density: Array | None,
    measure: str,
    reduction: str,
    function: PairFunction,
    n: int,
    plan: Plan,
) -> Array:
    rtol = check_rtol(None, x.dtype)
    if measure == "cka":
        inner = pair_products((x, y), 1, mask, sigmas, density, function, CENTERINGS["debiased"], rtol, plan)
        loss = jnp.where(inner.is_defined, 1 - inner.ratio(), jnp.nan)[..., 0, 0]
        return jnp.where(inner.num_samples >= _LEAST["cka"], loss, 0)
    of_rows = _affinity_rows if measure == "affinity" else _divergence_rows

    def local(
        x: Array, _y: None, mask: Array | None, _mask_y: None, y: Array, real: Array, sigmas: Any, density: Any
    ) -> tuple[Array, Array]:
        prepared = prepare_representations((x, y), mask, sigmas, density, function, rtol, plan)
        rows = of_rows(prepared, function, plan)
        real = real if mask is None else real & mask  # rows that were added to make them divide are masked
        weights = real.astype(rows.dtype)
        each = jnp.where(real, rows, 0)
        both = prepared[0].is_defined(function) & prepared[1].is_defined(function)
        each = jnp.where(both, each, jnp.nan)
        total, count = (over_devices(lax.psum, jnp.sum(a), plan.axis_name) for a in (each, weights))
        return each, total if reduction == "sum" else total / jnp.maximum(count, 1)

    rows = (ROWS_SECOND_LAST, ROWS_LAST, NO_ROWS, NO_ROWS)
    each, total = on_mesh(local, plan, (x, None, mask, None), (y, real, sigmas, density), rows, (ROWS_LAST, NO_ROWS))
    return each[..., :n] if reduction == "none" else total


def _affinity_rows(prepared: list[Representation], function: PairFunction, plan: Plan) -> Array:
    """mean_j (A_ij - B_ij)^2, (n,)."""
    count = prepared[0].pairs.total(per_row=True) + 1  # the pair with itself, at which they agree, counts
    return squared_differences(prepared, function)[:, 0] / count


class _LogSums(NamedTuple):
    """Of each row, with l the log affinities of the target, k those of the other; (r,)."""

    top: Array  # largest l
    total: Array  # sum exp(l - top)
    differences: Array  # sum exp(l - top) (l - k)
    other_top: Array  # largest k
    other_total: Array  # sum exp(k - other_top)


def _divergence_rows(prepared: list[Representation], function: PairFunction, plan: Plan) -> Array:
    """sum_j P_ij log(P_ij / Q_ij), (n,); sums of exponentials relative to the largest, which never vanish."""
    del function  # the logarithm of the RBF kernel
    keep = Reduction(_logarithms, _log_sums, combine=_log_sums_of_both, init=_no_log_sums)
    found = visit_pairs(keep, prepared)[1]
    some = (found.total > 0) & (found.other_total > 0)
    total, other = (jnp.where(some, a, 1) for a in (found.total, found.other_total))
    log_ratio = jnp.log(other) - jnp.log(total) + jnp.where(some, found.other_top - found.top, 0)
    return jnp.where(some, found.differences / total + log_ratio, 0)


def _logarithms(tile: Tile) -> tuple[Array, Array]:
    """Of both affinities; -inf for pairs that do not count."""
    counts = tile.apply_weights(jnp.ones_like(tile.distances[0])) > 0

    def log(k: int) -> Array:
        gamma = tile.gammas[k]
        assert gamma is not None
        return jnp.where(counts, log_kernel(tile.distances[k], gamma), -jnp.inf)

    return log(0), log(1)


def _log_sums(terms: tuple[Array, Array], tile: Tile) -> tuple[tuple[()], _LogSums]:
    del tile
    counts = jnp.isfinite(terms[0])
    own, target = (jnp.where(counts, logs, 0) for logs in terms)

    def relative(logs: Array) -> tuple[Array, Array]:
        top = lax.stop_gradient(jnp.max(jnp.where(counts, logs, _LOG_NOTHING), 1))
        return top, jnp.where(counts, jnp.exp(logs - top[:, None]), 0)

    (top, p), (other_top, q) = relative(target), relative(own)
    total, differences, other = (jnp.sum(a, 1) for a in (p, p * (target - own), q))
    return (), _LogSums(top, total, differences, other_top, other)


def _log_sums_of_both(a: Any, b: Any) -> Any:
    if not isinstance(a, _LogSums):  # rows that are not asked for
        return a
    top, other_top = jnp.maximum(a.top, b.top), jnp.maximum(a.other_top, b.other_top)
    of_a, of_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    other = a.other_total * jnp.exp(a.other_top - other_top) + b.other_total * jnp.exp(b.other_top - other_top)
    total, differences = a.total * of_a + b.total * of_b, a.differences * of_a + b.differences * of_b
    return _LogSums(top, total, differences, other_top, other)


def _no_log_sums(like: Any) -> Any:
    if not isinstance(like, _LogSums):
        return like
    zero, least = jnp.zeros_like(like.total), jnp.full_like(like.top, _LOG_NOTHING)
    return _LogSums(least, zero, zero, least, zero)


# --- contrast over landmarks ------------------------------------------------------------------------------------------


def _least_landmarks(x: Array, kernel: RBF) -> int:
    """How many landmarks it takes that the ones on their diagonal alone do not reach the density."""
    density = kernel.density
    if kernel.diagonal == "exclude" or not _checks.is_concrete(density):
        return 0
    _checks.parameter("density", density, x.dtype, x.shape[:-2], "the batch dimensions of the features")
    _checks.density_value(density)
    return math.floor(1 / float(np.min(_checks.on_host(density)))) + 1


def _landmarks(landmarks: int | None, n: int, queue: FeatureQueue | None, least: int, devices: int) -> int:
    """How many of the last rows, the queue included, are landmarks; of each device where several share the batch.

    Those of the queue, or half of the batch, and more where the density needs more.
    """
    past = 0 if queue is None else queue.valid.shape[0]
    if landmarks is not None:
        most = n + past - 2
        return _checks.whole("landmarks", landmarks, 2, most, most_is="n - 2 = ", otherwise=", the last of the samples")
    return min(max(past or n // 2, -(-least // devices)), n + past - _queries(devices))


def _queries(devices: int) -> int:
    """How many samples of a device are looked up at least, two of all."""
    return 2 if devices == 1 else 1


def _check_landmarks(density: Any, least: int, counts: Any, devices: int) -> None:
    """Raise where there are fewer landmarks than the density needs."""
    found = int(np.min(counts))
    if found >= least:
        return
    asked = float(np.min(_checks.on_host(density)))
    batch = devices * (-(-least // devices) + _queries(devices))
    raise ValueError(
        f'density = {asked} cannot be reached with {found} landmarks, as measure="infonce" has them here: the ones on '
        f"the diagonal alone give 1/{found} = {1 / max(found, 1):.4g}. Leave them out of the mean with "
        f'RBF(diagonal="exclude"), the default, use a density above that, or {least} landmarks: a batch of {batch} '
        f"valid samples without landmarks=, or a queue of {least}."
    )


def _contrast(
    x: Array,
    y: Array,
    mask: Array | None,
    kernel: RBF,
    function: PairFunction,
    n: int,
    m: int,
    least: int,
    chosen: bool,
    temperature: float,
    reduction: str,
    axis_name: str | None,
    devices: int,
    has_queue: bool,
) -> Array:
    _checks.positive("temperature", temperature)
    rows = x.shape[-2]
    last, queries = jnp.arange(rows - m, rows), jnp.arange(min(n, rows - m))
    of_last = None if mask is None else mask[..., last]
    if mask is not None and not has_queue:
        last, of_last, queries = _last_real(mask, m, least if chosen else 0)

    def every(a: Array, axis: int) -> Array:
        """Of all devices."""
        return a if axis_name is None else lax.all_gather(a, axis_name, axis=axis % a.ndim, tiled=True)

    def some(a: Array, which: Array) -> Array:
        which = jnp.broadcast_to(which, (*x.shape[:-2], which.shape[-1]))
        return jnp.take_along_axis(a, which[..., None], -2) if a.ndim == x.ndim else jnp.take_along_axis(a, which, -1)

    of_landmarks = tuple(every(some(a, last), -2) for a in (x, y))
    landmark_mask = None if of_last is None else every(of_last, -1)
    known = None if has_queue else landmark_mask
    is_known = known is not None and _checks.is_concrete(known)
    counts = _checks.on_host(known).sum(-1) if is_known else of_landmarks[0].shape[-2]
    _check_landmarks(kernel.density, least, counts, devices)
    sigmas, target = check_function(("x", "y"), of_landmarks, known, kernel, function, STORED)
    of_samples = jnp.ones(x.shape[:-1], bool) if mask is None else mask
    real = some(of_samples, queries)
    relative, found = [], jnp.ones(x.shape[:-2], bool)
    for k, (rows_of, at) in enumerate(zip((x, y), of_landmarks, strict=True)):
        if sigmas is not None:
            width = sigmas[..., k]
        else:
            width, status = solve_bandwidth_jit(at, landmark_mask, target, function, check_rtol(None, x.dtype), STORED)
            found &= status == CONVERGED
        found &= is_bandwidth(width)
        a = _affinity(some(rows_of, queries), at, width, real, landmark_mask)
        relative.append(_unit_rows(a, landmark_mask))
    of_x, of_y = relative
    place = 0 if axis_name is None else lax.axis_index(axis_name) * real.shape[-1]
    each = 0.5 * (
        _cross_entropy(of_x, every(of_y, -2), every(real, -1), temperature, place)
        + _cross_entropy(of_y, every(of_x, -2), every(real, -1), temperature, place)
    )
    finite = jnp.isfinite(x).all(-1) & jnp.isfinite(y).all(-1)
    holes = jnp.sum(of_samples & ~finite, -1)
    each = jnp.where(real, each, 0)
    whole = found & (over_devices(lax.psum, holes, axis_name) == 0)
    each = jnp.where(whole[..., None], each, jnp.nan)
    if reduction == "none":
        nothing = jnp.zeros((*x.shape[:-2], n), each.dtype)
        return jnp.put_along_axis(nothing, jnp.broadcast_to(queries, each.shape), each, -1, inplace=False)
    total, count = (over_devices(lax.psum, jnp.sum(a, -1), axis_name) for a in (each, real.astype(each.dtype)))
    return total if reduction == "sum" else total / jnp.maximum(count, 1)


def _last_real(mask: Array, m: int, least: int) -> tuple[Array, Array, Array]:
    """Which samples are landmarks, (..., m), which of those count, and which are looked up, (..., n - m).

    Of r real samples the last m r / n are landmarks, or `least` if that is more and leaves two to be looked up: as many
    as in a batch of that size without padding.
    """
    n = mask.shape[-1]
    order = jnp.argsort(mask, -1, stable=True).astype(jnp.int32)  # the real ones come last
    real = jnp.sum(mask, -1, keepdims=True, dtype=jnp.int32)
    share = m * real // n
    spare = m - jnp.where(real >= least + 2, jnp.maximum(share, least), share)
    place = jnp.arange(n, dtype=jnp.int32)
    queries = jnp.take_along_axis(order, spare + place[: n - m], -1)
    return order[..., n - m :], place[:m] >= spare, queries


@jax.jit
def _affinity(x: Array, y: Array, sigma: Array, mask: Array, mask_y: Array | None) -> Array:
    # Compiled, so that what a mask leaves is no error here either: a queue may be empty.
    return rbf_affinity(x, y, sigma, mask=mask, mask_y=mask_y)


def _unit_rows(a: Array, mask: Array | None) -> Array:
    """Rows less their mean over the real landmarks, of unit length, or 0."""
    weight = jnp.ones_like(a) if mask is None else jnp.broadcast_to(mask[..., None, :], a.shape).astype(a.dtype)
    mean = jnp.sum(a * weight, -1, keepdims=True) / jnp.maximum(jnp.sum(weight, -1, keepdims=True), 1)
    a = (a - mean) * weight
    varies = jnp.sum(a * a, -1, keepdims=True) > float(jnp.finfo(a.dtype).eps) ** 2
    return unit(jnp.where(varies, a, 0))


def _cross_entropy(own: Array, others: Array, real: Array, temperature: float, place: Array | int) -> Array:
    """-log softmax of the right one, (..., n)."""
    logits = jnp.einsum("...im,...jm->...ij", own, others, precision=lax.Precision.HIGHEST) / temperature
    logits = jnp.where(real[..., None, :], logits, -jnp.inf)
    right = jnp.sum(own * lax.dynamic_slice_in_dim(others, place, own.shape[-2], -2), -1) / temperature
    top = lax.stop_gradient(jnp.maximum(jnp.max(logits, -1), _LOG_NOTHING))
    return top + jnp.log(jnp.maximum(jnp.sum(jnp.exp(logits - top[..., None]), -1), 1e-30)) - right
