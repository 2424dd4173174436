"""`alignment_loss`: the distance of the geometries of two representations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxalign import _checks
from jaxalign._problem import check_rtol
from jaxalign._repr import shown
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.core.devices import NO_ROWS, ROWS_LAST, ROWS_SECOND_LAST, on_mesh, over_devices
from jaxalign.core.features import valid_rows
from jaxalign.kernels import RBF, Kernel, kernel_of
from jaxalign.losses._contrast import contrast
from jaxalign.losses._queue import FeatureQueue, with_queue
from jaxalign.losses._rows import affinity_rows, angle_rows, distance_rows, divergence_rows, gram_rows
from jaxalign.measures._centering import CENTERINGS
from jaxalign.measures._evaluate import MASK_ADVICE, check_function, check_representations, summarize
from jaxalign.measures._pair_sums import PairFunction, kernel_function, pair_products, prepare_representations
from jaxalign.measures._shape import procrustes_measure
from jaxalign.plan import STORED, Plan, check_plan, resolve_plan

Measure = Literal["cka", "affinity", "kl", "infonce", "gram", "distances", "angles", "procrustes"]
ReductionOf = Literal["mean", "sum", "none"]

_TEMPERATURE = 0.1
MEASURES: tuple[Measure, ...] = get_args(Measure)
_MIN_SAMPLES = {
    "cka": 4, "affinity": 2, "kl": 3, "infonce": 4, "gram": 2, "distances": 3, "angles": 3, "procrustes": 3,
}  # fmt: skip
_WITHOUT_KERNEL = {
    "gram": PairFunction("squared", "cosine"),
    "distances": PairFunction("root"),
    "angles": PairFunction("squared"),
    "procrustes": PairFunction("squared"),
}
_ROWS = {
    "affinity": affinity_rows,
    "kl": divergence_rows,
    "gram": gram_rows,
    "distances": distance_rows,
    "angles": angle_rows,
}
# One number for all samples.
_WITHOUT_ROWS = ("cka", "procrustes")
# All samples must be on one device, and all at once.
_ON_ONE_DEVICE = ("angles", "procrustes")


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

    Without a kernel:

    - "gram": mean over i != j of (cos(x_i, x_j) - cos(y_i, y_j))^2, cosines of the features as they are (Gram
      anchoring, Siméoni et al. 2025). 0 for features equal up to rotation and the norm of each sample. Samples that are
      0 have no direction, and do not count.
    - "distances": mean Huber loss of differences of Euclidean distances, each divided by their mean (the distance term
      of relational knowledge distillation, Park et al. 2019). 0 for features equal up to rotation, shift and scale.
    - "angles": mean Huber loss of differences of the cosines of the angles of all triples of samples (the angle term).
      Equivalent at 0; n^3 operations.
    - "procrustes": 1 - s, half the squared Procrustes distance of centered features of unit norm, see
      `jaxalign.measures.procrustes`. 0 for features equal up to rotation, shift and scale. Once differentiable.

    Args:
        x: features of the network in training, shape (..., n, d1).
        y: features of the same samples in the other network, shape (..., n, d2).
        measure: one of the above.
        kernel: of the first four, "rbf" or a `jaxalign.kernels.RBF`, which also holds sigma or its target density; for
            "cka" any kernel, see `jaxalign.measures.hsic`.
        mask: shape (..., n), True marks valid samples. Padding the last batch avoids recompilation.
        queue: past samples that are added to the batch, without gradients. Not for leading batch dimensions.
        landmarks: for "infonce", the number of last samples that are landmarks. None: the samples in the queue, or half
            of the batch. With a mask, the same fraction of the valid samples. sigma is solved for on the landmarks.
        temperature: the temperature of "infonce".
        reduction: "mean" over samples, "sum", or "none" for one value per sample, (..., n), which is 0 for masked
            samples and for landmarks of "infonce". "cka" and "procrustes" have only "mean".
        stop_gradient_target: True treats y as a constant; False passes gradients to x and y.
        stop_gradient_sigma: True treats the bandwidths as constants in the gradient. The scale of x then has a
            gradient, although the loss does not depend on it.
        plan: how pairs are visited, see `jaxalign.Plan`; "angles" and "procrustes" need all samples on one device.

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
    plan = check_plan(plan)
    _check_options(measure, reduction, landmarks, temperature, plan)
    kernel, function = _check_kernel(kernel, measure, stop_gradient_sigma)
    named, label = (("x", x), ("y", y)), f'alignment_loss "{measure}"'
    # Samples in a queue are not centered, so the batch must not be either. Directions are those of the features.
    center = queue is None and function.normalization is None
    (x, y), mask = check_representations(named, mask, "raise", _MIN_SAMPLES[measure], label, MASK_ADVICE, center=center)
    if stop_gradient_target:
        y = lax.stop_gradient(y)
    n = x.shape[-2]
    if queue is not None:
        x, y, mask = with_queue(x, y, mask, queue)
    if measure == "gram":  # zeros have no direction
        has_direction = jnp.any(x != 0, -1) & jnp.any(y != 0, -1)
        mask = has_direction if mask is None else mask & has_direction
    plan = STORED if measure in _ON_ONE_DEVICE else resolve_plan(plan, x, None, representations=2)
    if measure == "infonce":
        assert isinstance(kernel, RBF)
        return contrast(x, y, mask, kernel, function, n, queue, landmarks, temperature, reduction, plan)
    known = mask if queue is None else None  # a queue that is not full must not raise, with or without a trace
    sigmas, target = None, None
    if kernel is not None:
        sigmas, target = check_function(("x", "y"), (x, y), known, kernel, function, plan)
    in_batch = jnp.arange(x.shape[-2]) < n  # not in the queue
    valid = jnp.broadcast_to(in_batch, x.shape[:-1])
    valid = valid if mask is None else valid & mask
    return _pair_loss(x, y, mask, valid, sigmas, target, measure, reduction, function, n, plan)


def _check_options(measure: Any, reduction: Any, landmarks: Any, temperature: Any, plan: Plan) -> None:
    """Raise on options that the measure does not have."""
    _checks.choice("measure", measure, MEASURES)
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))
    if measure in _WITHOUT_ROWS and reduction != "mean":
        raise ValueError(
            f'reduction={shown(reduction)}: {measure!r} is one number for all samples: use "mean", or a measure with '
            'one value per sample, such as "affinity" or "gram".'
        )
    for name, value, default in (("landmarks", landmarks, None), ("temperature", temperature, _TEMPERATURE)):
        if measure != "infonce" and value != default:
            raise ValueError(f'{name}={shown(value)} is an option of measure="infonce": leave it out for {measure!r}.')
    if measure in _ON_ONE_DEVICE and (plan.mesh is not None or plan.axis_name is not None):
        raise ValueError(
            f"measure={measure!r} does not support several devices: leave plan= out, and average over devices."
        )
    if measure == "infonce" and plan.mesh is not None:
        raise ValueError(
            'measure="infonce" does not support a mesh: call it inside jax.shard_map with Plan(axis_name=...).'
        )


def _check_kernel(kernel: Any, measure: Measure, constant_sigma: bool) -> tuple[Any, PairFunction]:
    """The kernel, if any, and its pair function for batches, which may be all duplicates."""
    if measure in _WITHOUT_KERNEL:
        for name, value, default in (("kernel", kernel, "rbf"), ("stop_gradient_sigma", constant_sigma, False)):
            if value != default:
                raise ValueError(
                    f"{name}={shown(value)} has no effect on {measure!r}, which has no kernel. Leave it out."
                )
        return None, _WITHOUT_KERNEL[measure]
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

    def local(
        x: Array, _y: None, mask: Array | None, _mask_y: None, y: Array, valid: Array, sigmas: Any, density: Any
    ) -> tuple[Array, Array]:
        if measure == "procrustes":
            loss = 1 - _similarity_of_shapes(x, y, mask)
            return jnp.zeros(x.shape[:1], x.dtype), loss
        prepared = prepare_representations((x, y), mask, sigmas, density, function, rtol, plan)
        rows = _ROWS[measure](prepared, function)
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


def _similarity_of_shapes(x: Array, y: Array, mask: Array | None) -> Array:
    """The Procrustes similarity, which is 1 if too few samples are valid."""
    measure = procrustes_measure(normalize=True, result="similarity")
    x, y = valid_rows(x, mask), valid_rows(y, mask)
    summaries = [summarize(a, mask, None, None, measure, STORED) for a in (x, y)]
    similarity = measure.compare(summaries[0].content, summaries[1].content, mask)
    enough = True if mask is None else jnp.sum(mask) >= _MIN_SAMPLES["procrustes"]
    finite = jnp.isfinite(x).all() & jnp.isfinite(y).all()
    return jnp.where(finite, jnp.where(enough, similarity, 1), jnp.nan)
