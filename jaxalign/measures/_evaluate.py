"""From user input to a value: checks, missing samples, and the two kinds of measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, ClassVar, Literal, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign import _arrays, _checks, _features
from jaxalign._memory import check_stored
from jaxalign._problem import check_density, check_problem, check_rtol, raise_if_failed
from jaxalign.core.bandwidth import CONVERGED, NON_FINITE, is_bandwidth
from jaxalign.core.devices import batched
from jaxalign.core.features import valid_rows
from jaxalign.kernels import RBF, Laplacian
from jaxalign.measures._centering import Centering
from jaxalign.measures._pair_sums import InnerProducts, PairFunction, pair_products_jit
from jaxalign.plan import Plan, check_plan, check_single_device, resolve_plan

P = ParamSpec("P")
T = TypeVar("T")
Missing = Literal["raise", "omit", "propagate"]
# The advice on missing samples in functions without the option `missing`.
MASK_ADVICE = "Leave such samples out with mask=."


@dataclass(frozen=True)
class PairMeasure:
    """A measure that is a function of centered inner products of pair functions.

    Attributes:
        name: the public name.
        function: the value of a pair.
        centering: of the matrices; None compares their differences instead of their products.
        finish: maps inner products to values (..., L, M).
        min_samples: the smallest number of samples.
    """

    name: str
    function: PairFunction
    centering: Centering | None
    finish: Callable[[InnerProducts], Array]
    min_samples: int

    @property
    def label(self) -> str:
        """The name in messages about `min_samples`."""
        return self.name

    @property
    def samples_channels(self) -> bool:
        """Whether channels are a sample of more channels, so that their number counts."""
        return self.centering is not None and self.centering.samples_channels


class Context(NamedTuple):
    """What a summary of a representation depends on, besides its features."""

    mask: Array | None  # (..., n)
    sigma: Array | None  # (...)
    density: Array | None  # (...)
    rtol: float
    plan: Plan


_ANY_FUNCTION = PairFunction("squared")  # no normalization, no sigma


@dataclass(frozen=True)
class SummaryMeasure:
    """A measure that summarizes each representation separately, and then compares two summaries.

    Attributes:
        name: the public name.
        summarize: (features (n, d), context) -> a pytree, and the status () of a solved sigma or None.
        compare: (summary of x, summary of y, mask) -> value ().
        min_samples: the smallest number of samples.
        function: the pair function, if any: defines how rows are normalized and whether there is a sigma.
        long_name: the name with the option that `min_samples` depends on.
        stores_pairs: whether it sorts, and so stores, the values of all pairs.
        num_neighbors: if the summary is the indices of nearest neighbors, their number.
    """

    name: str
    summarize: Callable[[Array, Context], tuple[Any, Array | None]]
    compare: Callable[[Any, Any, Array | None], Array]
    min_samples: int
    function: PairFunction = _ANY_FUNCTION
    long_name: str = ""
    stores_pairs: bool = False
    num_neighbors: int | None = None
    samples_channels: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The name in messages about `min_samples`."""
        return self.long_name or self.name


def cached(fn: Callable[P, T]) -> Callable[P, T]:
    """`fn` with its results cached by options; unhashable options go straight to `fn`, which rejects them."""
    remembered = lru_cache(typed=True)(fn)  # 1 and 1.0 may differ

    @wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            hash((args, tuple(kwargs.values())))
        except TypeError:
            return fn(*args, **kwargs)
        return remembered(*args, **kwargs)  # type: ignore[arg-type]

    return call


def depends_on_differences(measure: PairMeasure | SummaryMeasure) -> bool:
    """Whether a measure depends only on differences of rows, not on their directions from the origin."""
    return measure.function.normalization is None


def check_representations(
    named: Sequence[tuple[str, Any]],
    mask: Any,
    missing: Any,
    min_samples: int,
    measure: str,
    advice: str = 'missing="omit" leaves out samples that are missing in any representation.',
    *,
    center: bool = False,
) -> tuple[tuple[Array, ...], Array | None]:
    """Features of the same samples in one dtype and batch shape, and the mask of the samples valid in all of them.

    `center`: each representation may be shifted, as the measure depends on differences of its rows alone.
    """
    _checks.choice("missing", missing, ("raise", "omit", "propagate"))
    features = [_features.features(name, value, center=center, mask=mask) for name, value in named]
    n = features[0].shape[-2]
    for (name, _), x in zip(named, features, strict=True):
        if x.shape[-2] != n:
            raise ValueError(
                f"{named[0][0]} and {name} must hold the same samples, row by row: {n} and {x.shape[-2]} rows."
            )
    try:
        batch = np.broadcast_shapes(*(x.shape[:-2] for x in features))
    except ValueError:
        shapes = ", ".join(f"{name} {x.shape}" for (name, _), x in zip(named, features, strict=True))
        raise ValueError(f"batch dimensions do not broadcast: {shapes}.") from None
    dtype = np.result_type(*(x.dtype for x in features))
    features = [jnp.broadcast_to(x, batch + x.shape[-2:]).astype(dtype) for x in features]
    mask = _features.row_mask("mask", mask, (*batch, n))
    if missing == "raise":
        for (name, _), x in zip(named, features, strict=True):
            _features.finite_rows(name, x, mask, way_out=advice, differences=True)
    if missing == "omit":
        for finite in [jnp.isfinite(x).all(-1) for x in features]:
            mask = finite if mask is None else mask & finite
    counts = np.asarray(n)
    if mask is not None and _arrays.is_concrete(mask):
        counts = _arrays.on_host(mask).sum(-1)
    if (counts < min_samples).any():
        reason = " were passed"
        if mask is not None:
            reason = " are left once missing samples are omitted" if missing == "omit" else " are left by the mask"
        raise ValueError(f"{measure} needs at least {min_samples} samples; {int(np.min(counts))}{reason}.")
    return tuple(features), mask


def evaluate(
    measure: PairMeasure | SummaryMeasure,
    x: Any,
    y: Any,
    kernel: Any = None,
    *,
    mask: Any = None,
    missing: Missing = "raise",
    plan: Plan | None = None,
) -> Array:
    """The value of a measure for a pair of representations, (...)."""
    plan = check_plan(plan)
    min_samples = 1 if plan.rows_are_local else measure.min_samples
    (x, y), mask = check_representations(
        (("x", x), ("y", y)), mask, missing, min_samples, measure.label, center=depends_on_differences(measure)
    )
    check_pairs_fit(measure, plan)
    plan = resolve_plan(plan, x, None, representations=2)
    if isinstance(measure, PairMeasure):
        return compute_values(compute_products((x, y), 1, mask, kernel, measure, plan), measure)[..., 0, 0]
    problem = check_function(("x", "y"), (x, y), mask, kernel, measure.function, plan)
    if measure.stores_pairs:
        check_stored("dissimilarities to be sorted", x, None)
    value, *statuses = _evaluate_summaries(x, y, mask, *problem, measure, plan)
    for name, status in zip(("x", "y"), statuses, strict=True):
        explain_status(name, status)
    return value


def check_pairs_fit(measure: PairMeasure | SummaryMeasure, plan: Plan) -> None:
    """Raise if a measure that sorts all pairs gets rows on several devices."""
    if isinstance(measure, SummaryMeasure) and measure.stores_pairs:
        advice = 'or use a comparison that is an inner product, such as "pearson"'
        check_single_device(plan, f"{measure.label} sorts the values of all pairs on a single device", advice)


def _check_channels(names: Sequence[str], features: tuple[Array, ...], measure: PairMeasure) -> None:
    """Raise if one channel is a sample of more: nothing tells how they differ."""
    for name, x in zip(names, features, strict=True):
        if measure.samples_channels and x.shape[-1] < 2:
            raise ValueError(f"sampled_channels=True needs at least 2 channels; {name} has {x.shape[-1]}.")


def check_function(
    names: Sequence[str],
    features: tuple[Array, ...],
    mask: Array | None,
    kernel: Any,
    function: PairFunction,
    plan: Plan,
) -> tuple[Array | None, Array | None]:
    """Check features for a pair function; return the kernel's sigmas (..., representations) or density (...)."""
    for name, x in zip(names, features, strict=True):
        check_directions(name, x, function.normalization, mask)
    if not isinstance(kernel, (RBF, Laplacian)):
        return None, None
    if not kernel.solves:
        return sigma_per_representation(kernel.sigma, len(features), features[0]), None
    if not function.solves:  # the measure depends only on the order of distances
        return None, None
    problem = check_problem(features[0], None, mask, None, function.diagonal, local_rows=plan.rows_are_local)
    return None, jnp.asarray(check_density(kernel.density, problem, "global", plan))


def compute_products(
    features: tuple[Array, ...],
    split: int,
    mask: Array | None,
    kernel: Any,
    measure: PairMeasure,
    plan: Plan,
    names: Sequence[str] = ("x", "y"),
    *,
    differentiable: bool = True,
) -> InnerProducts:
    """The inner products of checked features."""
    _check_channels(names, features, measure)
    sigmas, target = check_function(names, features, mask, kernel, measure.function, plan)
    rtol = check_rtol(None, features[0].dtype)
    inner = pair_products_jit(
        features, split, mask, sigmas, target, measure.function, measure.centering, rtol, plan, differentiable
    )
    for k, name in enumerate(names):
        explain_status(name, inner.status[..., k])
    return inner


def explain_status(name: str, status: Array | None) -> None:
    """Raise if a sigma does not exist. Under a trace, and for nan features, the measure is nan instead."""
    if status is None or not _arrays.is_concrete(status):
        return
    try:
        raise_if_failed(jnp.where(status == NON_FINITE, CONVERGED, status))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@partial(jax.jit, static_argnames="measure")
def compute_values(inner: InnerProducts, measure: PairMeasure) -> Array:
    """The values (..., L, M) of a measure; nan if a representation holds nan, has no bandwidth or too few samples."""
    value = measure.finish(inner)
    is_defined = inner.is_defined & (inner.num_samples >= measure.min_samples)[..., None, None]
    return jnp.where(is_defined, value, jnp.nan)


@partial(jax.jit, static_argnames=("measure", "plan"))
def _evaluate_summaries(
    x: Array,
    y: Array,
    mask: Array | None,
    sigmas: Array | None,
    density: Array | None,
    measure: SummaryMeasure,
    plan: Plan,
) -> tuple[Array, Array | None, Array | None]:
    def evaluate_pair(
        x: Array, y: Array, mask: Array | None, sigmas: Array | None, density: Array | None
    ) -> tuple[Array, Array | None, Array | None]:
        first, second = (
            summarize(features, mask, None if sigmas is None else sigmas[k], density, measure, plan)
            for k, features in enumerate((x, y))
        )
        value = compare_summaries(first, second, mask, measure)
        return value.astype(x.dtype), first.status, second.status

    return batched(evaluate_pair, x.ndim - 2)(x, y, mask, sigmas, density)


class Summary(NamedTuple):
    """The summary of one representation, and whether it is defined."""

    content: Any
    status: Array | None  # () of a solved sigma
    is_defined: Array  # (): features are finite, there are enough samples, and sigma exists


def summarize(
    x: Array, mask: Array | None, sigma: Array | None, density: Array | None, measure: SummaryMeasure, plan: Plan
) -> Summary:
    """The summary of one representation, (n, d)."""
    x = valid_rows(x, mask)
    content, status = measure.summarize(x, Context(mask, sigma, density, check_rtol(None, x.dtype), plan))
    is_defined = jnp.isfinite(x).all()
    if mask is not None:
        is_defined &= jnp.sum(mask) >= measure.min_samples
    if status is not None:
        is_defined &= status == CONVERGED
    if sigma is not None:
        is_defined &= is_bandwidth(sigma)
    return Summary(content, status, is_defined)


def compare_summaries(x: Summary, y: Summary, mask: Array | None, measure: SummaryMeasure) -> Array:
    """The value of a measure, from two summaries."""
    return jnp.where(x.is_defined & y.is_defined, measure.compare(x.content, y.content, mask), jnp.nan)


def sigma_per_representation(sigma: Any, number: int, like: Array) -> Array:
    """Bandwidths (..., number) from one sigma, or from a tuple or list of one per representation."""
    sigmas = sigma if isinstance(sigma, (tuple, list)) else (sigma,) * number
    if len(sigmas) != number:
        raise ValueError(
            f"sigma must be one number, or a tuple of one for each of the {number} representations; got {len(sigmas)}."
        )
    values = []
    for value in sigmas:
        meaning = "the batch dimensions of the features (pass a tuple for one sigma per representation)"
        values.append(_checks.parameter("sigma", value, like.dtype, like.shape[:-2], meaning))
        _checks.positive("sigma", value)
    return jnp.stack(values, -1)


def check_directions(name: str, x: Array, normalization: str | None, mask: Array | None) -> None:
    """Raise if a sample has no direction, so that it cannot be normalized."""
    if normalization is None:
        return
    if normalization == "correlation" and x.shape[-1] < 2:
        raise ValueError(f"{name} has one feature: a correlation between samples needs at least 2.")
    if not _arrays.is_concrete(x, mask):
        return
    invalid = _arrays.read_on_host(lambda x: (x == (x[..., :1] if normalization == "correlation" else 0)).all(-1), x)
    invalid = invalid if mask is None else invalid & _arrays.on_host(mask)
    if invalid.any():
        row, count = int(np.argwhere(invalid)[0][-1]), int(invalid.sum())
        defect = "has the same value everywhere" if normalization == "correlation" else "is 0 everywhere"
        raise ValueError(
            f"{name}: row {row} {defect}, so its {normalization} with other rows is not defined ({count} such rows). "
            "Leave it out with mask=."
        )
