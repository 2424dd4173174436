"""InfoNCE over landmarks."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxalign import _arrays, _checks
from jaxalign._linalg import unit
from jaxalign._problem import check_rtol
from jaxalign.affinity import rbf_affinity
from jaxalign.core.bandwidth import CONVERGED, is_bandwidth
from jaxalign.core.devices import over_devices
from jaxalign.kernels import RBF
from jaxalign.losses._queue import FeatureQueue
from jaxalign.losses._rows import LOG_ZERO
from jaxalign.measures._evaluate import check_function
from jaxalign.measures._pair_sums import PairFunction, solve_bandwidth_jit
from jaxalign.plan import STORED, Plan


def _min_landmarks(x: Array, kernel: RBF) -> int:
    """The smallest number of landmarks for which the ones on the diagonal alone are below the density."""
    density = kernel.density
    if kernel.diagonal == "exclude" or not _arrays.is_concrete(density):
        return 0
    _checks.parameter("density", density, x.dtype, x.shape[:-2], "the batch dimensions of the features")
    _checks.density_value(density)
    return math.floor(1 / float(np.min(_arrays.on_host(density)))) + 1


def _num_landmarks(landmarks: int | None, n: int, queue: FeatureQueue | None, minimum: int, devices: int) -> int:
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


def contrast(
    x: Array,
    y: Array,
    mask: Array | None,
    kernel: RBF,
    function: PairFunction,
    n: int,
    queue: FeatureQueue | None,
    landmarks: int | None,
    temperature: float,
    reduction: str,
    plan: Plan,
) -> Array:
    """The loss of a batch of n samples, which those of the queue follow."""
    _checks.positive("temperature", temperature)
    axis_name, has_queue = plan.axis_name, queue is not None
    devices = 1 if axis_name is None else plan.total_rows(1)
    minimum = _min_landmarks(x, kernel) if kernel.solves else 0
    m = _num_landmarks(landmarks, n, queue, minimum, devices)
    rows = x.shape[-2]
    last, queries = jnp.arange(rows - m, rows), jnp.arange(min(n, rows - m))
    mask_last = None if mask is None else mask[..., last]
    if mask is not None and not has_queue:
        last, mask_last, queries = _last_valid(mask, m, minimum if landmarks is None else 0)

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
    _check_landmarks(kernel.density, minimum, counts, devices)
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
    place = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), mask.shape)
    queries = jnp.take_along_axis(order, spare + place[..., : n - m], -1)
    return order[..., n - m :], place[..., :m] >= spare, queries


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
    top = lax.stop_gradient(jnp.maximum(jnp.max(logits, -1), LOG_ZERO))
    return top + jnp.log(jnp.maximum(jnp.sum(jnp.exp(logits - top[..., None]), -1), 1e-30)) - target
