"""Alignment losses: differentiable distances between the geometries of two representations of the same samples.

`alignment_loss` compares a batch of one network with the same batch of another. It does not depend on the width, unit
and offset of features, as bandwidths are scaled automatically, and gradients pass through the bandwidths. Values and
gradients are finite for all finite features:

- If duplicates alone exceed the density, there is no sigma. All samples of that representation then count as similar (A
  = 1 everywhere), "cka" is 1, and the gradient is 0.
- With fewer valid samples than a measure needs, the loss is 0.

The density is the mean over pairs of different samples, so it does not depend on the size of the batch. `FeatureQueue`
adds past samples to a batch.
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

from jaxalign import _arrays, _checks, _features
from jaxalign._linalg import unit
from jaxalign._problem import check_rtol
from jaxalign._repr import short_repr, shown
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
_MIN_SAMPLES = {"cka": 4, "affinity": 2, "kl": 3, "infonce": 4}
# Used as log 0: its exp is 0, and differences of two of them are finite.
_LOG_ZERO = -1e30


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
    """The distance of the geometry of x from that of y, to be minimized over the network that computes x.

    With A and B the kernel matrices of x and y, by default auto-scaled RBF affinities:

    - "cka": 1 - debiased CKA of A and B. 0 for equal geometry, 1 on average for unrelated representations.
    - "affinity": mean_ij (A_ij - B_ij)^2, affinity matching. 0 for equal affinities.
    - "kl": mean_i sum_j P_ij log(P_ij / Q_ij), with P and Q the rows of B and A over j != i, each divided by its sum
      (probabilistic knowledge transfer, Passalis & Tefas 2018, with this kernel). 0 for equal rows.
    - "infonce": the row of a sample's affinities to landmarks in one network is matched to its row in the other network
      among all samples: cross-entropy of row correlations / temperature, averaged over both directions (van den Oord et
      al. 2018). Not 0 at y = x, as rows of different samples are correlated.

    Args:
        x: features of the network in training, shape (..., n, d1).
        y: features of the same samples in the other network, shape (..., n, d2).
        measure: "cka", "affinity", "kl" or "infonce".
        kernel: "rbf" or a `jaxalign.kernels.RBF`, which also holds sigma or its target density; for "cka" any kernel,
            see `jaxalign.measures.hsic`.
        mask: shape (..., n), True marks valid samples. Padding the last batch avoids recompilation.
        queue: past samples that are added to the batch, without gradients. Not for leading batch dimensions.
        landmarks: for "infonce", the number of last samples that are landmarks. None: the samples in the queue, or half
            of the batch. With a mask, the same fraction of the valid samples. sigma is solved for on the landmarks.
        temperature: the temperature of "infonce".
        reduction: "mean" over samples, "sum", or "none" for one value per sample, (..., n), which is 0 for masked
            samples and for landmarks of "infonce". "cka" has only "mean", as it has no value per sample.
        stop_gradient_target: True treats y as a constant; False passes gradients to x and y.
        stop_gradient_sigma: True treats the bandwidths as constants in the gradient. The scale of x then has a
            gradient, although the loss does not depend on it.
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        The loss, shape (...), or (..., n) for "none". If no sigma exists (duplicates, or under a trace a mask with 1 /
            density or fewer valid samples), all samples count as similar and the gradient is 0.

    Raises:
        TypeError, ValueError: see `jaxalign.measures.hsic`; a reduction that the measure does not have; a batch too
            small for the density (the message names the smallest size).

    Examples:
        >>> import jax, jaxalign
        >>> teacher = jax.random.normal(jax.random.key(0), (64, 32))
        >>> student = teacher[:, :8]
        >>> loss, gradient = jax.value_and_grad(jaxalign.losses.alignment_loss)(student, teacher)
        >>> bool(loss > 0), gradient.shape
        (True, (64, 8))
        >>> round(float(jaxalign.losses.alignment_loss(3 * teacher + 1, teacher)), 4)
        0.0
    """
    _checks.choice("measure", measure, tuple(_MIN_SAMPLES))
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))
    if measure == "cka" and reduction != "mean":
        raise ValueError(
            f'reduction={shown(reduction)}: "cka" is one number for all samples: use "mean", or '
            'a measure with one value per sample, "affinity", "kl" or "infonce".'
        )
    if measure != "infonce" and landmarks is not None:
        got = shown(landmarks)
        raise ValueError(f'landmarks={got} is an option of measure="infonce": leave it out for {measure!r}.')
    if measure != "infonce" and temperature != _TEMPERATURE:
        got = shown(temperature)
        raise ValueError(f'temperature={got} is an option of measure="infonce": leave it out for {measure!r}.')
    kernel, function = _check_kernel(kernel, measure, stop_gradient_sigma)
    plan = check_plan(plan)
    named, label = (("x", x), ("y", y)), f'alignment_loss "{measure}"'
    # Samples in a queue are not centered, so the batch must not be either.
    center = queue is None
    (x, y), mask = check_representations(named, mask, "raise", _MIN_SAMPLES[measure], label, MASK_ADVICE, center=center)
    if stop_gradient_target:
        y = lax.stop_gradient(y)
    n = x.shape[-2]
    if queue is not None:
        x, y, mask = _with_queue(x, y, mask, queue)
    if measure == "infonce" and plan.mesh is not None:
        raise ValueError(
            'measure="infonce" does not support a mesh: call it inside jax.shard_map with Plan(axis_name=...).'
        )
    axis_name, plan = plan.axis_name, resolve_plan(plan, x, None, representations=2)
    if measure == "infonce":
        assert isinstance(kernel, RBF)
        devices = 1 if axis_name is None else plan.total_rows(1)
        min_landmarks = _min_landmarks(x, kernel) if kernel.solves else 0
        m = _landmarks(landmarks, n, queue, min_landmarks, devices)
        return _contrast(x, y, mask, kernel, function, n, m, min_landmarks, landmarks is None, temperature, reduction,
                         axis_name, devices, queue is not None)  # fmt: skip
    known = mask if queue is None else None  # a queue that is not full must not raise, with or without a trace
    sigmas, target = check_function(("x", "y"), (x, y), known, kernel, function, plan)
    in_batch = jnp.arange(x.shape[-2]) < n  # not in the queue
    valid = jnp.broadcast_to(in_batch, x.shape[:-1])
    valid = valid if mask is None else valid & mask
    return _pair_loss(x, y, mask, valid, sigmas, target, measure, reduction, function, n, plan)


def _check_kernel(kernel: Any, measure: Measure, constant_sigma: bool) -> tuple[Any, PairFunction]:
    """The kernel, and its pair function for batches, which may be all duplicates."""
    kernel = kernel_of(kernel)
    if measure != "cka" and not isinstance(kernel, RBF):
        raise ValueError(
            f'measure={measure!r} compares RBF affinities: kernel must be "rbf" or a jaxalign.kernels.RBF; got '
            f'{shown(kernel)}. measure="cka" supports any kernel.'
        )
    function = kernel_function(kernel)
    if constant_sigma and not function.solves:
        raise ValueError(
            f"stop_gradient_sigma=True has no effect with {kernel!r}, whose sigma is not solved for: leave it out."
        )
    # The other measures use the kernel itself: its logarithm, or its value at equal samples.
    minus_one = function.minus_one and measure == "cka"
    return kernel, replace(function, duplicates_allowed=True, constant_sigma=constant_sigma, minus_one=minus_one)


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


# --- batches with a queue ---------------------------------------------------------------------------------------------


def _with_queue(x: Array, y: Array, mask: Array | None, queue: FeatureQueue) -> tuple[Array, Array, Array]:
    if x.ndim != 2:
        raise ValueError(f"with a queue, x and y must be a single batch of shape (n, d); got {x.shape}.")
    for name, value, kept in (("x", x, queue.x), ("y", y, queue.y)):
        if value.shape[-1] != kept.shape[-1]:
            raise ValueError(f"{name} has {value.shape[-1]} features, but the queue has {kept.shape[-1]}.")
    mask = jnp.ones(x.shape[:-1], bool) if mask is None else mask
    x, y = (jnp.concatenate((a, lax.stop_gradient(kept).astype(a.dtype))) for a, kept in ((x, queue.x), (y, queue.y)))
    return x, y, jnp.concatenate((mask, queue.valid))


# --- pairwise losses --------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("measure", "reduction", "function", "n", "plan"))
def _pair_loss(
    x: Array,
    y: Array,
    mask: Array | None,
    valid: Array,
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
        return jnp.where(inner.num_samples >= _MIN_SAMPLES["cka"], loss, 0)
    of_rows = _affinity_rows if measure == "affinity" else _divergence_rows

    def local(
        x: Array, _y: None, mask: Array | None, _mask_y: None, y: Array, valid: Array, sigmas: Any, density: Any
    ) -> tuple[Array, Array]:
        prepared = prepare_representations((x, y), mask, sigmas, density, function, rtol, plan)
        rows = of_rows(prepared, function, plan)
        valid = valid if mask is None else valid & mask  # the mask also excludes padding rows of the mesh
        weights = valid.astype(rows.dtype)
        each = jnp.where(valid, rows, 0)
        both = prepared[0].is_defined(function) & prepared[1].is_defined(function)
        each = jnp.where(both, each, jnp.nan)
        total, count = (over_devices(lax.psum, jnp.sum(a), plan.axis_name) for a in (each, weights))
        return each, total if reduction == "sum" else total / jnp.maximum(count, 1)

    rows = (ROWS_SECOND_LAST, ROWS_LAST, NO_ROWS, NO_ROWS)
    each, total = on_mesh(local, plan, (x, None, mask, None), (y, valid, sigmas, density), rows, (ROWS_LAST, NO_ROWS))
    return each[..., :n] if reduction == "none" else total


def _affinity_rows(prepared: list[Representation], function: PairFunction, plan: Plan) -> Array:
    """mean_j (A_ij - B_ij)^2, (n,)."""
    count = prepared[0].pairs.total(per_row=True) + 1  # the pair of a sample with itself, whose difference is 0, counts
    return squared_differences(prepared, function)[:, 0] / count


class _LogSums(NamedTuple):
    """Sums of each row, (r,), with l the log affinities of the target and k those of x."""

    top: Array  # largest l
    total: Array  # sum exp(l - top)
    differences: Array  # sum exp(l - top) (l - k)
    other_top: Array  # largest k
    other_total: Array  # sum exp(k - other_top)


def _divergence_rows(prepared: list[Representation], function: PairFunction, plan: Plan) -> Array:
    """sum_j P_ij log(P_ij / Q_ij), (n,), from sums of exponentials relative to the largest, which cannot underflow."""
    del function  # the logarithm of the RBF kernel
    keep = Reduction(_logarithms, _log_sums, combine=_log_sums_of_both, init=_no_log_sums)
    sums = visit_pairs(keep, prepared)[1]
    has_pairs = (sums.total > 0) & (sums.other_total > 0)
    total, other = (jnp.where(has_pairs, a, 1) for a in (sums.total, sums.other_total))
    log_ratio = jnp.log(other) - jnp.log(total) + jnp.where(has_pairs, sums.other_top - sums.top, 0)
    return jnp.where(has_pairs, sums.differences / total + log_ratio, 0)


def _logarithms(tile: Tile) -> tuple[Array, Array]:
    """Log affinities of x and y; -inf for pairs that do not count."""
    counts = tile.apply_weights(jnp.ones_like(tile.distances[0])) > 0

    def log(k: int) -> Array:
        gamma = tile.gammas[k]
        assert gamma is not None
        return jnp.where(counts, log_kernel(tile.distances[k], gamma), -jnp.inf)

    return log(0), log(1)


def _log_sums(terms: tuple[Array, Array], tile: Tile) -> tuple[tuple[()], _LogSums]:
    del tile
    counts = jnp.isfinite(terms[0])
    student, target = (jnp.where(counts, logs, 0) for logs in terms)

    def relative(logs: Array) -> tuple[Array, Array]:
        top = lax.stop_gradient(jnp.max(jnp.where(counts, logs, _LOG_ZERO), 1))
        return top, jnp.where(counts, jnp.exp(logs - top[:, None]), 0)

    (top, p), (other_top, q) = relative(target), relative(student)
    total, differences, other = (jnp.sum(a, 1) for a in (p, p * (target - student), q))
    return (), _LogSums(top, total, differences, other_top, other)


def _log_sums_of_both(a: Any, b: Any) -> Any:
    if not isinstance(a, _LogSums):  # results that are not requested
        return a
    top, other_top = jnp.maximum(a.top, b.top), jnp.maximum(a.other_top, b.other_top)
    of_a, of_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    other = a.other_total * jnp.exp(a.other_top - other_top) + b.other_total * jnp.exp(b.other_top - other_top)
    total, differences = a.total * of_a + b.total * of_b, a.differences * of_a + b.differences * of_b
    return _LogSums(top, total, differences, other_top, other)


def _no_log_sums(like: Any) -> Any:
    if not isinstance(like, _LogSums):
        return like
    zero, lowest = jnp.zeros_like(like.total), jnp.full_like(like.top, _LOG_ZERO)
    return _LogSums(lowest, zero, zero, lowest, zero)


# --- InfoNCE over landmarks -------------------------------------------------------------------------------------------


def _min_landmarks(x: Array, kernel: RBF) -> int:
    """The smallest number of landmarks for which the ones on the diagonal alone are below the density."""
    density = kernel.density
    if kernel.diagonal == "exclude" or not _arrays.is_concrete(density):
        return 0
    _checks.parameter("density", density, x.dtype, x.shape[:-2], "the batch dimensions of the features")
    _checks.density_value(density)
    return math.floor(1 / float(np.min(_arrays.on_host(density)))) + 1


def _landmarks(landmarks: int | None, n: int, queue: FeatureQueue | None, minimum: int, devices: int) -> int:
    """The number of last rows (with the queue) that are landmarks, per device if several share the batch.

    By default those of the queue, or half of the batch, but at least the minimum for the density.
    """
    past = 0 if queue is None else queue.valid.shape[0]
    if landmarks is not None:
        most = n + past - 2
        return _checks.whole("landmarks", landmarks, 2, most, of=" of last samples", most_is="n - 2 = ")
    return min(max(past or n // 2, -(-minimum // devices)), n + past - _queries(devices))


def _queries(devices: int) -> int:
    """The smallest number of queries per device; there must be two in total."""
    return 2 if devices == 1 else 1


def _check_landmarks(density: Any, minimum: int, counts: Any, devices: int) -> None:
    """Raise if there are fewer landmarks than the density needs."""
    count = int(np.min(counts))
    if count >= minimum:
        return
    target = float(np.min(_arrays.on_host(density)))
    batch = devices * (-(-minimum // devices) + _queries(devices))
    raise ValueError(
        f'density = {target} cannot be reached with {count} landmarks, which measure="infonce" uses here: the ones on '
        f"the diagonal alone give 1/{count} = {1 / max(count, 1):.4g}. Leave them out of the mean with "
        f'RBF(diagonal="exclude"), the default, use a density above that, or use {minimum} landmarks: a batch of '
        f"{batch} valid samples without landmarks=, or a queue of {minimum}."
    )


def _contrast(
    x: Array,
    y: Array,
    mask: Array | None,
    kernel: RBF,
    function: PairFunction,
    n: int,
    m: int,
    min_landmarks: int,
    is_default: bool,
    temperature: float,
    reduction: str,
    axis_name: str | None,
    devices: int,
    has_queue: bool,
) -> Array:
    _checks.positive("temperature", temperature)
    rows = x.shape[-2]
    last, queries = jnp.arange(rows - m, rows), jnp.arange(min(n, rows - m))
    mask_last = None if mask is None else mask[..., last]
    if mask is not None and not has_queue:
        last, mask_last, queries = _last_valid(mask, m, min_landmarks if is_default else 0)

    def all_devices(a: Array, axis: int) -> Array:
        """The rows of all devices."""
        return a if axis_name is None else lax.all_gather(a, axis_name, axis=axis % a.ndim, tiled=True)

    def take(a: Array, which: Array) -> Array:
        which = jnp.broadcast_to(which, (*x.shape[:-2], which.shape[-1]))
        return jnp.take_along_axis(a, which[..., None], -2) if a.ndim == x.ndim else jnp.take_along_axis(a, which, -1)

    landmark_features = tuple(all_devices(take(a, last), -2) for a in (x, y))
    landmark_mask = None if mask_last is None else all_devices(mask_last, -1)
    known = None if has_queue else landmark_mask
    is_known = known is not None and _arrays.is_concrete(known)
    counts = _arrays.on_host(known).sum(-1) if is_known else landmark_features[0].shape[-2]
    _check_landmarks(kernel.density, min_landmarks, counts, devices)
    sigmas, target = check_function(("x", "y"), landmark_features, known, kernel, function, STORED)
    sample_mask = jnp.ones(x.shape[:-1], bool) if mask is None else mask
    valid = take(sample_mask, queries)
    relative, solved = [], jnp.ones(x.shape[:-2], bool)
    for k, (features, landmark_rows) in enumerate(zip((x, y), landmark_features, strict=True)):
        if sigmas is not None:
            width = sigmas[..., k]
        else:
            width, status = solve_bandwidth_jit(
                landmark_rows, landmark_mask, target, function, check_rtol(None, x.dtype), STORED
            )
            solved &= status == CONVERGED
        solved &= is_bandwidth(width)
        a = _affinity(take(features, queries), landmark_rows, width, valid, landmark_mask)
        relative.append(_unit_rows(a, landmark_mask))
    rows_x, rows_y = relative
    place = 0 if axis_name is None else lax.axis_index(axis_name) * valid.shape[-1]
    each = 0.5 * (
        _cross_entropy(rows_x, all_devices(rows_y, -2), all_devices(valid, -1), temperature, place)
        + _cross_entropy(rows_y, all_devices(rows_x, -2), all_devices(valid, -1), temperature, place)
    )
    finite = jnp.isfinite(x).all(-1) & jnp.isfinite(y).all(-1)
    non_finite = jnp.sum(sample_mask & ~finite, -1)
    each = jnp.where(valid, each, 0)
    is_defined = solved & (over_devices(lax.psum, non_finite, axis_name) == 0)
    each = jnp.where(is_defined[..., None], each, jnp.nan)
    if reduction == "none":
        zeros = jnp.zeros((*x.shape[:-2], n), each.dtype)
        return jnp.put_along_axis(zeros, jnp.broadcast_to(queries, each.shape), each, -1, inplace=False)
    total, count = (over_devices(lax.psum, jnp.sum(a, -1), axis_name) for a in (each, valid.astype(each.dtype)))
    return total if reduction == "sum" else total / jnp.maximum(count, 1)


def _last_valid(mask: Array, m: int, minimum: int) -> tuple[Array, Array, Array]:
    """Indices of landmarks (..., m), whether each counts, and indices of queries (..., n - m).

    Of r valid samples the last m r / n are landmarks, or `minimum` if that is more and leaves two queries: as many as
    in a batch of r samples without padding.
    """
    n = mask.shape[-1]
    order = jnp.argsort(mask, -1, stable=True).astype(jnp.int32)  # valid samples come last
    count = jnp.sum(mask, -1, keepdims=True, dtype=jnp.int32)
    share = m * count // n
    spare = m - jnp.where(count >= minimum + 2, jnp.maximum(share, minimum), share)
    place = jnp.arange(n, dtype=jnp.int32)
    queries = jnp.take_along_axis(order, spare + place[: n - m], -1)
    return order[..., n - m :], place[:m] >= spare, queries


@jax.jit
def _affinity(x: Array, y: Array, sigma: Array, mask: Array, mask_y: Array | None) -> Array:
    # Under jit a mask with too few valid samples does not raise: a queue may be empty.
    return rbf_affinity(x, y, sigma, mask=mask, mask_y=mask_y)


def _unit_rows(a: Array, mask: Array | None) -> Array:
    """Rows minus their mean over valid landmarks, scaled to unit norm; constant rows become 0."""
    weight = jnp.ones_like(a) if mask is None else jnp.broadcast_to(mask[..., None, :], a.shape).astype(a.dtype)
    mean = jnp.sum(a * weight, -1, keepdims=True) / jnp.maximum(jnp.sum(weight, -1, keepdims=True), 1)
    a = (a - mean) * weight
    varies = jnp.sum(a * a, -1, keepdims=True) > float(jnp.finfo(a.dtype).eps) ** 2
    return unit(jnp.where(varies, a, 0))


def _cross_entropy(queries: Array, candidates: Array, valid: Array, temperature: float, place: Array | int) -> Array:
    """-log softmax of the matching candidate, (..., n)."""
    logits = jnp.einsum("...im,...jm->...ij", queries, candidates, precision=lax.Precision.HIGHEST) / temperature
    logits = jnp.where(valid[..., None, :], logits, -jnp.inf)
    matching = lax.dynamic_slice_in_dim(candidates, place, queries.shape[-2], -2)
    target = jnp.sum(queries * matching, -1) / temperature
    top = lax.stop_gradient(jnp.maximum(jnp.max(logits, -1), _LOG_ZERO))
    return top + jnp.log(jnp.maximum(jnp.sum(jnp.exp(logits - top[..., None]), -1), 1e-30)) - target
