"""HSIC, CKA and distance correlation: inner products of centered kernel or distance matrices.

With K, L the n x n kernel matrices of the two representations, H = I - 11'/n and K~ = K with a zero diagonal:

    biased    tr(K H L H) / (n - 1)^2                                             Gretton et al. 2005, eq. 9
    debiased  [tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2 / (n-2) 1'K~L~1] / (n(n-3))   Song et al. 2012, eq. 5
    lange     2 / (n(n-3)) sum_{i<j} (H K H)_ij (H L H)_ij                         Lange et al. 2023

and CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the same estimator in all three (Kornblith et al. 2019). As all
estimators center K, the linear kernel can be computed as -D / 2. Distance correlation is the same ratio with K =
-sqrt(D).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign import _checks, _features
from jaxalign._linalg import arccos, bounded
from jaxalign._typing import AnyArray, Data, Mask, Numbers
from jaxalign.kernels import Kernel, kernel_of
from jaxalign.measures._centering import CENTERINGS
from jaxalign.measures._evaluate import Missing, PairMeasure, cached, check_representations, compute_products, evaluate
from jaxalign.measures._pair_sums import InnerProducts, PairFunction, correlation, kernel_function
from jaxalign.plan import AUTO, Plan, resolve_plan

Estimator = Literal["debiased", "biased", "lange"]

_MIN_SAMPLES = {"debiased": 4, "biased": 2, "lange": 4}


def hsic(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    kernel: Kernel = "rbf",
    *,
    estimator: Estimator = "debiased",
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
    plan: Plan | None = None,
) -> Float[Array, "*batch"]:
    """Hilbert-Schmidt independence criterion (Gretton et al. 2005): larger is more similar.

    The debiased estimator is 0 in expectation for independent representations.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        kernel: "rbf" exp(-D / (2 sigma^2)), "laplacian" exp(-sqrt(D) / sigma) or "linear" (of centered features), D the
            squared distances; an object of `jaxalign.kernels`, which also holds sigma or its target density; or a
            function that maps an array of squared distances elementwise to kernel values.
        estimator: "debiased" (Song et al. 2012), "biased" (Gretton et al. 2005) or "lange" (Lange et al. 2023).
        mask: shape (..., n), True marks valid samples.
        missing: what to do about nan and inf: "raise"; "omit" samples that are missing in either representation; or
            "propagate", which returns nan.
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        HSIC, shape (...), in squared units of the features for the linear kernel. Differentiable.

    Raises:
        TypeError, ValueError: x and y are not arrays of the same samples; fewer than 4 samples ("biased": 2); sigma is
            not above 0; a density that cannot be reached; nan or inf.

    Examples:
        >>> import jax, jaxalign
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 100, 8))
        >>> measures = jaxalign.measures
        >>> bool(abs(measures.hsic(x, y)) < 0.1 * measures.hsic(x, x))
        True
    """
    kernel = kernel_of(kernel)
    measure = hsic_measure(kernel_function(kernel), estimator)
    return evaluate(measure, x, y, kernel, mask=mask, missing=missing, plan=plan)


def cka(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    kernel: Kernel = "rbf",
    *,
    estimator: Estimator = "debiased",
    result: Literal["similarity", "angular"] = "similarity",
    sampled_channels: bool = False,
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
    plan: Plan | None = None,
) -> Float[Array, "*batch"]:
    """Centered kernel alignment (Kornblith et al. 2019): 1 for the same geometry, 0 on average if independent.

    For few samples the biased estimator is far from 0 even if x and y are independent: 0.996 at n = 32, d = 64 with the
    auto-scaled RBF kernel, whose matrix is then close to the identity. The debiased estimator is 0 on average.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        kernel: see `hsic`.
        estimator: the estimator of all three HSIC, see `hsic`.
        result: "similarity" returns CKA; "angular" returns arccos(CKA), from 0 to pi. With the biased estimator the
            angle is a metric, at most pi / 2 (Williams et al. 2021). It resolves about 1e-3 in float32.
        sampled_channels: True treats the channels of x and of y as independent random samples of more channels, such as
            recorded neurons or a random part of a layer, and estimates the CKA of all of them (Chun et al. 2025); few
            channels otherwise lower it. The estimate may exceed 1. Linear kernel and debiased estimator only. x and y
            must not share channels.
        mask: see `hsic`.
        missing: see `hsic`.
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        Shape (...). CKA is at most 1, and at least 0 for the biased estimator. It is 0 (an angle of pi / 2) if a
        representation does not vary, and nan if sampled channels are too few for an estimate. Differentiable; the
        derivative of the angle is set to 0 at angle 0.

    Raises:
        TypeError, ValueError: see `hsic`; sampled_channels=True with another kernel, estimator or result, or with
            one channel.

    Examples:
        >>> import jax, jaxalign
        >>> x, noise = jax.random.normal(jax.random.key(0), (2, 100, 8))
        >>> y = 3 * x[:, ::-1] + 7  # permuted, scaled, shifted: the same geometry
        >>> round(float(jaxalign.measures.cka(x, y)), 4)
        1.0
        >>> abs(float(jaxalign.measures.cka(x, noise))) < 0.05
        True
    """
    kernel = kernel_of(kernel)
    measure = cka_measure(kernel_function(kernel), estimator, result, sampled_channels)
    return evaluate(measure, x, y, kernel, mask=mask, missing=missing, plan=plan)


def minibatch_cka(
    batches: Iterable[tuple[AnyArray, AnyArray]],
    kernel: Kernel = "linear",
) -> Float[Array, ""]:
    """CKA from minibatches (Nguyen et al. 2021, eq. 2-3): the ratio of debiased HSIC averaged over batches.

    Args:
        batches: pairs (x, y) of features, shapes (n, d1) and (n, d2), n >= 4. n may differ between batches. Leave out a
            last batch with fewer samples.
        kernel: see `hsic`. Unless the kernel has a sigma, one is solved for in every batch: pass a sigma if batches are
            small.

    Returns:
        A scalar, from -1 to 1; 0 if a representation does not vary within any batch.

    Raises:
        TypeError, ValueError: see `hsic` (the message holds the index of the batch); no batches; batches of different
            widths.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (10, 16, 8))
        >>> round(float(jaxalign.measures.minibatch_cka(zip(x, 2 * x))), 4)
        1.0
    """
    kernel = kernel_of(kernel)
    measure = hsic_measure(kernel_function(kernel), "debiased")
    sums = units = None
    widths: tuple[int, ...] = ()
    for k, batch in enumerate(batches):
        x, y = _check_batch(k, batch, measure.min_samples, widths)
        widths = (x.shape[-1], y.shape[-1])
        names = (f"batch {k}: x", f"batch {k}: y")
        plan = resolve_plan(AUTO, x, None)
        part, unit = batch_products(x, y, None, kernel, plan, names)
        # Sums are in the unit of the largest batch so far, so that no square overflows.
        last_units = unit if units is None else units
        units = jnp.maximum(unit, last_units)
        ratios = (unit / units, last_units / units)
        factor, last_factor = (jnp.stack([u[0] * u[1], u[0] ** 2, u[1] ** 2]) for u in ratios)
        sums = part * factor if sums is None else part * factor + sums * last_factor
    if sums is None:
        raise ValueError("batches is empty: at least one pair (x, y) is needed.")
    return bounded(correlation(*sums), -1, 1)


def batch_products(
    x: Array, y: Array, mask: Array | None, kernel: Any, plan: Plan, names: tuple[str, str] = ("x", "y")
) -> tuple[Array, Array]:
    """Debiased HSIC of x with y, x with x and y with y of one batch (n, d), (3,), and the units of x and y, (2,)."""
    measure = hsic_measure(kernel_function(kernel), "debiased")
    inner = compute_products((x, y), 1, mask, kernel, measure, plan, names)
    n = inner.num_samples
    products = jnp.stack([inner.cross[0, 0], inner.self_x[0], inner.self_y[0]]) / (n * (n - 3))
    return jnp.where(inner.is_defined[0, 0], products, jnp.nan), jnp.stack([inner.unit_x[0], inner.unit_y[0]])


def _check_batch(k: int, batch: Any, min_samples: int, widths: tuple[int, ...]) -> tuple[Array, ...]:
    """The pair of features of a batch; messages name the batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"minibatch_cka: batch {k} must be a pair (x, y) of features; got {type(batch).__name__}.")
    features = [_features.features(f"batch {k}: {name}", a, center=True) for name, a in zip("xy", batch, strict=True)]
    for name, a, width in zip("xy", features, widths or (None, None), strict=True):
        if a.ndim != 2:
            raise ValueError(
                f"minibatch_cka: {name} of batch {k} must have shape (n, d); got {a.shape}. To use the positions of "
                f"a map as channels, pass {name}.reshape({a.shape[0]}, -1)."
            )
        if width not in (None, a.shape[1]):
            raise ValueError(
                f"minibatch_cka: {name} of batch {k} has {a.shape[1]} channels, that of batch {k - 1} {width}: all "
                "batches must come from the same two layers."
            )
    if features[0].shape[0] < min_samples:
        raise ValueError(
            f"minibatch_cka needs at least {min_samples} samples in every batch; batch {k} has {features[0].shape[0]}. "
            "Leave it out, with drop_last=True if it is from a torch DataLoader."
        )
    advice = "Leave such samples out of the batch, in both x and y."
    return check_representations(
        [(f"batch {k}: {name}", a) for name, a in zip("xy", features, strict=True)],
        None,
        "raise",
        min_samples,
        "minibatch_cka",
        advice,
    )[0]


def distance_correlation(
    x: Numbers[Data, "*#batch n d1"],
    y: Numbers[Data, "*#batch n d2"],
    *,
    estimator: Literal["debiased", "biased"] = "debiased",
    squared: bool = False,
    mask: Mask[Data, "*#batch n"] | None = None,
    missing: Missing = "raise",
    plan: Plan | None = None,
) -> Float[Array, "*batch"]:
    """Distance correlation: 1 for the same geometry, 0 in the limit only if x and y are independent.

    Args:
        x: features, shape (..., n, d1).
        y: features of the same samples, shape (..., n, d2).
        estimator: "biased": R_n of Székely, Rizzo & Bakirov 2007, never below 0, and far above 0 for few samples.
            "debiased": the bias-corrected R*_n of Székely & Rizzo 2013, 0 on average for independent x and y.
        squared: True returns the squared distance correlation, which the estimators are defined for; False returns its
            root, with the sign of the square.
        mask: see `hsic`.
        missing: see `hsic`.
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        Shape (...), at most 1; 0 if a representation does not vary. Differentiable, except for the root at 0.

    Raises:
        TypeError, ValueError: see `hsic`.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> round(float(jaxalign.measures.distance_correlation(x, -2 * x)), 4)
        1.0
    """
    measure = distance_correlation_measure(estimator, squared)
    return evaluate(measure, x, y, mask=mask, missing=missing, plan=plan)


# --- specifications: hashable, as programs are compiled for them -----------------------------------------------------


@cached
def hsic_measure(function: PairFunction, estimator: Any) -> PairMeasure:
    """The measure behind `hsic`."""
    _checks.choice("estimator", estimator, tuple(_MIN_SAMPLES))
    factor = 0.25 if function.form == "squared" else 1.0  # -D / 2 and the linear kernel are equal once centered
    finish = partial(_covariance, estimator=estimator, factor=factor)
    return PairMeasure("hsic", function, CENTERINGS[estimator], finish, _MIN_SAMPLES[estimator])


@cached
def cka_measure(
    function: PairFunction, estimator: Any, result: Any = "similarity", sampled_channels: Any = False
) -> PairMeasure:
    """The measure behind `cka`."""
    _checks.choice("estimator", estimator, tuple(_MIN_SAMPLES))
    _checks.choice("result", result, ("similarity", "angular"))
    _checks.choice("sampled_channels", sampled_channels, (True, False))
    if sampled_channels:
        if function.form != "squared" or estimator != "debiased" or result != "similarity":
            raise ValueError(
                'sampled_channels=True needs kernel="linear", estimator="debiased" and result="similarity".'
            )
        finish = partial(_ratio, low=-float("inf"), high=float("inf"))
        return PairMeasure("cka", function, CENTERINGS["debiased_channels"], finish, _MIN_SAMPLES[estimator])
    # Kernels of this library are positive definite.
    low = 0.0 if estimator == "biased" and not callable(function.form) else -1.0
    finish = partial(_ratio, low=low, angular=result == "angular")
    return PairMeasure("cka", function, CENTERINGS[estimator], finish, _MIN_SAMPLES[estimator])


@cached
def distance_correlation_measure(estimator: Any, squared: bool) -> PairMeasure:
    """The measure behind `distance_correlation`."""
    _checks.choice("estimator", estimator, ("debiased", "biased"))
    finish = partial(_ratio if squared else _signed_root, low=0.0 if estimator == "biased" else -1.0)
    function, centering = PairFunction("root"), CENTERINGS[estimator]
    return PairMeasure("distance_correlation", function, centering, finish, _MIN_SAMPLES[estimator])


def _covariance(inner: InnerProducts, estimator: Estimator, factor: float) -> Array:
    n = inner.num_samples[..., None, None]
    norm = (n - 1) ** 2 if estimator == "biased" else n * (n - 3)
    return factor * inner.cross / norm * inner.unit_x[..., :, None] * inner.unit_y[..., None, :]


def _ratio(inner: InnerProducts, low: float, high: float = 1.0, angular: bool = False) -> Array:
    value = inner.ratio(low, high)
    return arccos(value) if angular else value


def _signed_root(inner: InnerProducts, low: float) -> Array:
    square = inner.ratio(low)
    size = jnp.where(square == 0, 1, jnp.abs(square))
    return jnp.where(square == 0, 0, jnp.sign(square) * jnp.sqrt(size))
