"""Relative features over shared landmarks, and their correspondence between networks.

The relative feature of a sample in a network is its row of affinities to m landmark samples. Landmarks are the same
samples in every network, so rows of different networks have the same columns and can be compared, stacked and clustered
together, without fitting a map between the networks. `align` computes relative features, `Alignment.transform` computes
them for new samples, and `correspondence` scores how often the nearest row in the other network is the same sample.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxalign import _arrays, _checks, _features
from jaxalign._channels import ChannelMap, Channels, column_spread, map_channels
from jaxalign._directions import less_row_mean
from jaxalign._linalg import power_of_two, products, scaled, unit
from jaxalign._repr import short_repr, shown
from jaxalign._typing import AnyArray, Data, Numbers
from jaxalign.affinity import rbf_affinity
from jaxalign.bandwidth import Bandwidth, Diagonal, solve_sigma
from jaxalign.core.features import centered_columns
from jaxalign.core.features import diagonal as on_diagonal
from jaxalign.distances import squared_distances

Metric = Literal["correlation", "cosine", "euclidean"]

# Thresholds of `_contains_landmarks`: the smallest number of columns, and the smallest correlation of mirror images.
_MIN_COLUMNS = 32
_MIN_SYMMETRY = 0.5

PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {"channels": None, "decorrelate": None, "density": 0.05, "standardize": True}
)
"""Options of `align` for the published method, `align(features, **PUBLISHED)`: plain auto-scaled rows, with
standardized columns so that scores are comparable."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("channels", "landmarks", "sigma", "density", "cholesky", "center", "scale", "shift"),
    meta_fields=(),
)
@dataclass(frozen=True)
class _Space:
    """The fitted parameters of a network, from which new samples are transformed; unused ones are None."""

    channels: ChannelMap
    landmarks: Array  # (m, d) after the map of the channels
    sigma: Array | None  # None for bandwidth="per_row", where sigma is solved for each row
    density: Array
    cholesky: Array | None = None  # (m, m) lower Cholesky factor of A_LL + lambda I
    center: Array | None = None  # (1, m) mean and standard deviation of the columns
    scale: Array | None = None
    shift: _features.Shift | None = None  # subtracted from the features before the map of the channels

    def affinity(self, x: Array) -> Array:
        """Affinity of samples to the landmarks; x has passed the map of the channels."""
        if self.sigma is None:
            return rbf_affinity(x, self.landmarks, density=self.density, bandwidth="per_row")
        return rbf_affinity(x, self.landmarks, self.sigma)

    def decorrelate(self, affinity: Array) -> Array:
        """Rows times (A_LL + lambda I)^-1, if fitted."""
        return affinity if self.cholesky is None else jax.scipy.linalg.cho_solve((self.cholesky, True), affinity.T).T

    def standardize(self, rows: Array) -> Array:
        """Columns minus their mean, divided by their standard deviation, if fitted."""
        return rows if self.center is None or self.scale is None else (rows - self.center) / self.scale


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("features", "sigma", "landmarks", "spaces"),
    meta_fields=(),
)
@dataclass(frozen=True, repr=False)
class Alignment:
    """Relative features of several networks over the same landmarks, the result of `align`.

    Attributes:
        features: relative features by name, shape (n, m): row i is sample i, column j is landmark j.
        sigma: bandwidth by name, in units of the features after the map of the channels: a scalar, or (n,) with
            bandwidth="per_row".
        landmarks: sample index of each landmark, shape (m,).
        spaces: fitted parameters for `transform` by name: a pytree whose fields are private and may change.
    """

    features: dict[str, Float[Array, "n m"]]
    sigma: dict[str, Float[Array, "..."]]
    landmarks: Int[Array, " m"]
    spaces: dict[str, _Space]

    def __repr__(self) -> str:
        return short_repr(self, omit=("spaces",))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the networks, in the order passed to `align`."""
        return tuple(self.features)

    @property
    def queries(self) -> Int[Array, " k"]:
        """Indices of the samples that are not landmarks, in order; use these for scores."""
        return _queries(self.landmarks, next(iter(self.features.values())).shape[0])

    @property
    def stacked(self) -> Float[Array, "rows m"]:
        """The relative features of all networks: the samples of the first network, then of the second, ..."""
        return jnp.concatenate(list(self.features.values()))

    def transform(self, name: str, x_new: Numbers[Data, "k d"]) -> Float[Array, "k m"]:
        """Relative features of new samples, with landmarks, sigma and statistics as fitted.

        Args:
            name: name of the network.
            x_new: features of the new samples in this network, shape (k, d).

        Returns:
            Relative features, shape (k, m), comparable with `features` of any network.

        Raises:
            KeyError: unknown name.
            ValueError, TypeError: x_new has another number of features; see also `rbf_affinity`.
        """
        space = self.spaces[self._checked(name)]
        x = _features.shifted_features("x_new", x_new, space.shift)
        if x.ndim != 2 or x.shape[-1] != space.landmarks.shape[-1]:
            raise ValueError(f"x_new must have shape (k, {space.landmarks.shape[-1]}) for {name!r}; got {x.shape}.")
        _features.finite_rows("x_new", x, way_out="Leave such samples out.")
        return space.standardize(space.decorrelate(space.affinity(space.channels(x))))

    def correspondence(
        self, a: str, b: str, *, metric: Metric = "correlation", csls: int | None = None
    ) -> Correspondence:
        """Score the correspondence between two networks on the samples that are not landmarks.

        Args:
            a: name of the network whose rows are the queries.
            b: name of the network whose rows are searched.
            metric: see `correspondence`.
            csls: see `correspondence`.

        Returns:
            A `Correspondence` over `queries`. Entry k of `index` and `rank` belongs to sample queries[k], and entries
            of `index` are positions in `queries`.

        Raises:
            KeyError: unknown name.
            ValueError: fewer than two samples are not landmarks. The affinity of a landmark to itself is 1 in every
                network, which reveals the match.
        """
        queries = self.queries
        if len(queries) < 2:
            raise ValueError(
                f"{len(queries)} sample(s) are not landmarks, at least 2 are needed: the affinity of a landmark to "
                "itself reveals its match. Fit with fewer landmarks, align(..., landmarks=number, key=key), or "
                "score new samples: correspondence(alignment.transform(a, x), alignment.transform(b, y))."
            )
        rows_a, rows_b = (self.features[self._checked(name)][queries] for name in (a, b))
        return _correspondence(*_check_rows(rows_a, rows_b, metric, csls))

    def _checked(self, name: str) -> str:
        if name not in self.features:
            raise KeyError(f"there is no network {name!r}; the names are {', '.join(map(repr, self.features))}.")
        return name


def align(
    features: Mapping[str, Numbers[Data, "n _"]],
    *,
    landmarks: int | Sequence[int] | Int[AnyArray, " m"] | None = None,
    key: Array | None = None,
    density: ArrayLike = 0.7,
    bandwidth: Bandwidth = "global",
    diagonal: Diagonal = "include",
    channels: Channels | None = "standardize",
    decorrelate: float | None = 0.1,
    standardize: bool = True,
) -> Alignment:
    """Relative features of several networks over shared landmark samples.

    The sigma of each network is solved on its landmark block, mean(A(x_L, x_L)) = density; the relative features are
    the rows of A(x, x_L), decorrelated and standardized. The defaults score best in the benchmarks of
    docs/pages/alignment.md; `**jaxalign.alignment.PUBLISHED` is the published method.

    Args:
        features: features by network name, shape (n, d_k): row i is the same sample in all networks.
        landmarks: None: all samples. A number m: m random samples. Indices, shape (m,): these samples, such as those
            of `farthest_points`.
        key: a `jax.random.key` for the random choice of landmarks. None: `jax.random.key(0)`.
        density: the target mean of the affinity, 0 < density < 1, see `solve_sigma`.
        bandwidth: "global": one sigma per network. "per_row": one sigma per row of A(x, x_L), so that the mean of every
            row is the density, which adapts to the local density of samples. Needs decorrelate=None.
        diagonal: whether the ones on the diagonal of the landmark block count in its mean (bandwidth="global").
        channels: "standardize" centers each channel and divides it by its standard deviation over all n samples;
            "whiten" centers the channels and multiplies by the inverse Cholesky factor of their covariance, regularized
            by adding its mean eigenvalue. Both undo anisotropic scaling, which a bandwidth alone cannot. None: neither.
        decorrelate: lambda > 0: multiply rows by (A_LL + lambda I)^-1, so that similar landmarks do not count twice.
            None: do not.
        standardize: subtract the mean of each column and divide by its standard deviation, both over the samples that
            are not landmarks (over all samples if all are landmarks).

    Returns:
        `Alignment` with `.features`, `.sigma`, `.landmarks`, `.transform` and `.correspondence`.

    Raises:
        TypeError, ValueError: no features, different n, bad landmarks (out of range, repeated),
            bandwidth="per_row" with decorrelate or with a density of at most 1/m; also the errors of `solve_sigma`,
            with the name of the network.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (200, 16))
        >>> rotated = 0.25 * x[:, ::-1] + 7.0
        >>> alignment = jaxalign.align({"a": x, "b": rotated}, landmarks=50)
        >>> alignment.features["a"].shape, float(alignment.correspondence("a", "b").top1)
        ((200, 50), 1.0)
    """
    if key is not None:
        _checks.random_key(key)
        if landmarks is None or not isinstance(landmarks, (int, np.integer)):
            raise ValueError("key has no effect unless landmarks is a number of random samples.")
    _checks.choice("channels", channels, (None, "standardize", "whiten"))
    _checks.choice("bandwidth", bandwidth, ("global", "per_row"))
    if decorrelate is not None:
        if bandwidth == "per_row":
            raise ValueError(
                'bandwidth="per_row" needs decorrelate=None: (A_LL + lambda I) must be symmetric, as with '
                'bandwidth="global".'
            )
        _checks.parameter("decorrelate", decorrelate, jnp.float32, (), "one number")
        _checks.positive("decorrelate", decorrelate)
    arrays, shifts = _check_features(features)
    n = next(iter(arrays.values())).shape[0]
    chosen = _choose_landmarks(landmarks, key, n)
    rows, sigma, spaces = {}, {}, {}
    for name, array in arrays.items():
        try:
            fitted_channels, x, block = map_channels(array, chosen, channels)
            if bandwidth == "global":
                sigma[name] = solve_sigma(block, density=density, diagonal=diagonal).sigma
            else:
                _check_density_per_row(density, block)
                sigma[name] = solve_sigma(x, block, density=density, bandwidth="per_row").sigma
            target = jnp.asarray(density, x.dtype)
            fitted_sigma = sigma[name] if bandwidth == "global" else None
            space = _Space(fitted_channels, block, fitted_sigma, target, shift=shifts[name])
            affinity = rbf_affinity(x, block, sigma[name], bandwidth=bandwidth)
        except (ValueError, TypeError) as error:
            raise type(error)(f"features[{name!r}]: {error}") from error
        ridge = None if decorrelate is None else jnp.asarray(decorrelate, x.dtype)
        spaces[name], rows[name] = _fit_rows(space, affinity, chosen, ridge, standardize)
    return Alignment(rows, sigma, chosen, spaces)


@partial(jax.jit, static_argnames="standardize")
def _fit_rows(
    space: _Space, affinity: Array, chosen: Array, ridge: Array | None, standardize: bool
) -> tuple[_Space, Array]:
    """The space with what is fitted on the affinity (n, m), and the relative features."""
    n, m = affinity.shape
    # The distance of a landmark to itself is 0, but is rounded when computed between two different arrays.
    affinity = affinity.at[chosen, jnp.arange(m)].set(1)
    if ridge is not None:
        space = replace(space, cholesky=jnp.linalg.cholesky(affinity[chosen] + ridge * jnp.eye(m, dtype=ridge.dtype)))
    relative = space.decorrelate(affinity)
    if standardize:
        scored = relative[_queries(chosen, n)] if m < n else relative
        spread = column_spread(scored, rounding=8 * float(jnp.finfo(scored.dtype).eps))
        space = replace(space, center=jnp.mean(scored, 0, keepdims=True), scale=spread)
    return space, space.standardize(relative)


def _check_density_per_row(density: Any, block: Array) -> None:
    """Raise if the affinity 1 of a landmark to itself alone gives its row a mean of at least the density."""
    _checks.parameter("density", density, block.dtype, (), "one number")
    _checks.density_value(density)
    m = block.shape[0]
    # Compare in the dtype of the computation: float32(0.05) is above 1/20, but not above float32(1/20).
    if _arrays.is_concrete(density) and _arrays.on_host(density).astype(block.dtype) <= np.asarray(1 / m, block.dtype):
        target = float(_arrays.on_host(density))
        least = math.floor((1 + float(jnp.finfo(block.dtype).eps)) / target) + 1
        raise ValueError(
            f'density = {target} cannot be reached with {m} landmarks and bandwidth="per_row": the affinity of a '
            f"landmark to itself alone gives its row 1/m = {1 / m:.4g}. Use a density above that, use at least "
            f'{least} landmarks, or bandwidth="global" with diagonal="exclude".'
        )


def _queries(landmarks: Array, n: int) -> Array:
    """Indices from 0 to n - 1 of the samples that are not landmarks, in order; works under a trace."""
    return jnp.nonzero(jnp.ones(n, bool).at[landmarks].set(False), size=n - len(landmarks))[0]


def _check_features(features: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    """The features (n, d_k) of every network for the same n samples, and the shift subtracted from each."""
    if not isinstance(features, Mapping):
        raise TypeError(f"features must be a mapping from names to arrays; got {type(features).__name__}.")
    if not features:
        raise ValueError("features is empty: pass the features of at least one network, {name: array}.")
    arrays, shifts = {}, {}
    for name, value in features.items():
        array, shifts[name] = _features.centered_features(f"features[{name!r}]", value, min_rows=2)
        if array.ndim != 2:
            raise ValueError(f"features[{name!r}] must have shape (n, d); got {array.shape}.")
        way_out = "Remove these samples from every network."
        _features.finite_rows(f"features[{name!r}]", array, way_out=way_out, differences=True)
        arrays[name] = array
    counts = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"all networks must have the same samples in the same order; got n = {shown(counts)}.")
    return arrays, shifts


@partial(jax.jit, static_argnums=(1, 2))
def draw_landmarks(key: Array, n: int, number: int) -> Array:
    """Random samples, as indices in order, shape (number,)."""
    return jnp.sort(jax.random.choice(key, n, (number,), replace=False))


def _choose_landmarks(landmarks: Any, key: Array | None, n: int) -> Array:
    """Indices of the landmarks, shape (m,)."""
    if landmarks is None:
        return jnp.arange(n)
    if isinstance(landmarks, (int, np.integer)) and not isinstance(landmarks, bool):
        number = _checks.whole("landmarks", landmarks, 1, n, most_is="n = ")
        key = jax.random.key(0) if key is None else key
        return draw_landmarks(key, n, number)
    # A new array: of one that it has seen with 64 bits, jax may return 64 bits with 32 bits too.
    return jnp.asarray(_checks.row_numbers("landmarks", landmarks, n).astype(np.int32))


def farthest_points(features: Mapping[str, Numbers[Data, "n _"]], number: int) -> Int[Array, " m"]:
    """Landmarks that cover the samples: each one is the sample farthest from the previous ones, over all networks.

    Distances are D = sum over networks of D_k / mean(D_k); the first landmark is the sample with the smallest mean D
    (Gonzalez, Clustering to minimize the maximum intercluster distance, Theoretical Computer Science 38, 1985).

    Args:
        features: features by network name, shape (n, d_k), see `align`.
        number: the number of landmarks, m.

    Returns:
        Sample indices, shape (m,), in the order of selection.

    Raises:
        TypeError, ValueError: see `align`.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (200, 16))
        >>> landmarks = jaxalign.alignment.farthest_points({"a": x, "b": -x}, 50)
        >>> jaxalign.align({"a": x, "b": -x}, landmarks=landmarks).features["b"].shape
        (200, 50)
    """
    arrays, _ = _check_features(features)
    number = _checks.whole("number", number, 1, next(iter(arrays.values())).shape[0], most_is="n = ")
    return _farthest_points(tuple(arrays.values()), number)


@partial(jax.jit, static_argnums=1)
def _farthest_points(arrays: tuple[Array, ...], number: int) -> Array:
    """See `farthest_points`: squared distances of concatenated features, each centered and scaled to mean D_k = 1."""
    parts = []
    for x in arrays:
        x = centered_columns(x, None)
        mean = 2 * jnp.mean(jnp.sum(x * x, -1))
        parts.append(x / jnp.sqrt(jnp.where(mean > 0, mean, 1)))
    joint = lax.stop_gradient(jnp.concatenate(parts, -1))

    def step(nearest: Array, _: None) -> tuple[Array, Array]:
        chosen = jnp.argmax(nearest)
        difference = joint - joint[chosen][None]
        nearest = jnp.minimum(nearest, jnp.sum(difference * difference, -1))
        return nearest.at[chosen].set(-1), chosen  # -1: never chosen again, even among duplicates

    # The first step selects the entry inf: the sample nearest to the mean has the smallest mean distance.
    first = jnp.argmin(jnp.sum(joint * joint, -1))
    start = jnp.where(jnp.arange(joint.shape[0]) == first, jnp.inf, jnp.finfo(joint.dtype).max)
    return lax.scan(step, start, None, length=number)[1]


def joint_affinity(
    alignment: Alignment | Sequence[Numbers[Data, "_ m"]],
    *,
    density: ArrayLike = 0.05,
    diagonal: Diagonal = "include",
    bandwidth: Bandwidth = "global",
) -> Float[Array, "k k"]:
    """Auto-scaled affinity between the relative features of all samples of all networks.

    Args:
        alignment: an `Alignment`, or relative features over the same landmarks, each of shape (n_k, m).
        density: the target mean of the joint affinity, see `rbf_affinity`.
        diagonal: see `rbf_affinity`.
        bandwidth: see `rbf_affinity`.

    Returns:
        Affinity of the stacked rows: for M networks with n samples, shape (M n, M n), blocks in the order of the names.

    Raises:
        ValueError: different numbers of landmarks; see also `rbf_affinity`.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (60, 8))
        >>> jaxalign.joint_affinity(jaxalign.align({"a": x, "b": -x})).shape
        (120, 120)
    """
    parts = list(alignment.features.values()) if isinstance(alignment, Alignment) else list(alignment)
    rows = [_features.features(f"alignment[{k}]", part) for k, part in enumerate(parts)]
    widths = {row.shape[-1] for row in rows}
    if len(widths) != 1 or any(row.ndim != 2 for row in rows):
        raise ValueError(
            f"alignment must hold arrays (n_k, m) over the same m landmarks; got {[row.shape for row in rows]}."
        )
    return rbf_affinity(jnp.concatenate(rows), density=density, diagonal=diagonal, bandwidth=bandwidth)


@partial(jax.tree_util.register_dataclass, data_fields=("index", "rank", "top1", "top5", "mrr"), meta_fields=())
@dataclass(frozen=True, repr=False)
class Correspondence:
    """How well rows match between two networks, the result of `correspondence`.

    Attributes:
        index: the most similar row of b for each row of a, shape (..., n).
        rank: number of wrong rows of b that are at least as similar as the true match, shape (..., n); 0 is best.
        top1: share of rows with rank 0, shape (...), 0 to 1, chance 1/n.
        top5: share of rows with rank below 5, chance 5/n.
        mrr: mean reciprocal rank, the mean of 1 / (rank + 1).

    If a or b holds nan or inf under a trace, shares are nan, ranks n and indices -1.
    """

    index: Int[Array, "*batch n"]
    rank: Int[Array, "*batch n"]
    top1: Float[Array, "*batch"]
    top5: Float[Array, "*batch"]
    mrr: Float[Array, "*batch"]

    def __repr__(self) -> str:
        return short_repr(self)


def correspondence(
    a: Numbers[Data, "*batch n m"],
    b: Numbers[Data, "*batch n m"],
    *,
    metric: Metric = "correlation",
    csls: int | None = None,
) -> Correspondence:
    """Retrieve each row of a among the rows of b; the true match is the row with the same index.

    Args:
        a: relative features of n samples in one network, shape (..., n, m), n >= 2.
        b: relative features of the same samples in another network, over the same landmarks.
        metric: similarity of two rows: "correlation" (Pearson), "cosine", or "euclidean" (minus the squared distance).
            A constant row (a zero row for cosine) has similarity 0 to all rows.
        csls: number of neighbors for the hubness correction CSLS (10 is usual): twice the similarity, minus the mean
            similarity of each of the two rows to its nearest neighbors (Conneau et al., Word translation without
            parallel data, ICLR 2018, eq. 3). None: no correction.

    Returns:
        `Correspondence`. Ties count against a row, so constant features score 0 and not 1.

    Raises:
        ValueError: different shapes; csls not in 1 .. n; landmarks among the rows: the affinity of a landmark to itself
            is 1 in both, which reveals the match (in one measurement top-1 rose from 0.44 to 0.61).
            `Alignment.correspondence` leaves landmarks out. Decorrelated and standardized rows of landmarks are
            recognized by their pattern, with a warning.

    Examples:
        >>> import jax, jaxalign
        >>> a = jax.random.normal(jax.random.key(0), (50, 20))
        >>> float(jaxalign.correspondence(a, 3 * a + 1).top1)
        1.0
    """
    a, b, metric, csls = _check_rows(a, b, metric, csls)
    if _arrays.is_concrete(a, b):
        ones, least, most = _arrays.read_on_host(_landmark_facts, a, b)
        positions = np.argwhere(ones)
        if len(positions) and least >= 0 and most == 1:
            row, column = (int(i) for i in positions[0][-2:])
            raise ValueError(
                f"row {row} is 1 in column {column} in both a and b: the affinity of a landmark to itself, "
                "which reveals the match. Score samples that are not landmarks, "
                "as alignment.correspondence(name_a, name_b) does."
            )
        if a.ndim == 2 and _MIN_COLUMNS <= a.shape[1] <= a.shape[0] and _arrays.read_on_host(_contains_landmarks, a, b):
            warnings.warn(
                f"the rows seem to include all {a.shape[1]} landmarks, whose entries for themselves reveal their "
                "matches. Score samples that are not landmarks, as alignment.correspondence(name_a, name_b) does.",
                stacklevel=2,
            )
    return _correspondence(a, b, metric, csls)


@jax.jit
def _landmark_facts(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Where both arrays are 1, and the smallest and the largest entry of a."""
    return (a == 1) & (b == 1), jnp.min(a), jnp.max(a)


@jax.jit
def _contains_landmarks(a: Array, b: Array) -> Array:
    """Whether the rows seem to include all landmarks, decorrelated and standardized or not.

    Nearly every column then has its maximum in a different row, the same in both arrays, and these rows, in the order
    of the columns, form a symmetric matrix up to the scale of each column. (Measured: correlations of mirror images
    from 0.7 to 0.98; without landmarks below 0.4, or several columns had their maximum in the same row.)
    """
    top = jnp.argmax(a, 0)
    num_rows = jnp.count_nonzero(jnp.bincount(top, length=a.shape[0]))
    matching = (jnp.mean(top == jnp.argmax(b, 0), dtype=a.dtype) > 0.9) & (num_rows >= round(0.99 * a.shape[1]))

    def symmetry(rows: Array) -> Array:
        square, diagonal = rows[top], jnp.eye(len(top), dtype=bool)
        mean = jnp.mean(square, where=~diagonal)
        off = jnp.where(diagonal, 0, square - mean)
        return jnp.sum(off * off.T) / jnp.sum(off * off)

    return matching & (symmetry(a) > _MIN_SYMMETRY) & (symmetry(b) > _MIN_SYMMETRY)


def _check_rows(a: Any, b: Any, metric: Metric, csls: int | None) -> tuple[Array, Array, Metric, int | None]:
    _checks.choice("metric", metric, ("correlation", "cosine", "euclidean"))
    a, b = _features.features("a", a, min_rows=2), _features.features("b", b, min_rows=2)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, row i of both is sample i; got {a.shape} and {b.shape}.")
    n = a.shape[-2]
    if csls is not None:
        csls = _checks.whole("csls", csls, 1, n, of=" of neighbors", most_is="n = ", otherwise=", or None")
    for name, rows in (("a", a), ("b", b)):
        _features.finite_rows(name, rows, way_out="Remove these samples from both.")
    return a, b, metric, csls


@partial(jax.jit, static_argnames=("metric", "csls"))
def _correspondence(a: Array, b: Array, metric: Metric, csls: int | None) -> Correspondence:
    similarity = _similarity(a, b, metric)
    if csls is not None:
        hub_a = jnp.mean(lax.top_k(similarity, csls)[0], -1)
        hub_b = jnp.mean(lax.top_k(jnp.swapaxes(similarity, -1, -2), csls)[0], -1)
        # Add the hub terms first: 2 S is exact, so ties stay equal to the last digit, however XLA fuses this.
        similarity = 2 * similarity - (hub_a[..., :, None] + hub_b[..., None, :])
    matching = jnp.diagonal(similarity, axis1=-2, axis2=-1)
    rank = jnp.sum(jnp.where(on_diagonal(similarity.shape[-2:]), False, similarity >= matching[..., None]), -1)
    # Comparisons with nan are False, so the rank of a nan row would be 0, the best.
    finite = (jnp.isfinite(a) & jnp.isfinite(b)).all((-2, -1))
    rank = jnp.where(finite[..., None], rank, a.shape[-2])

    def mean(values: Array) -> Array:
        return jnp.where(finite, jnp.mean(values, -1, dtype=similarity.dtype), jnp.nan)

    return Correspondence(
        index=jnp.where(finite[..., None], jnp.argmax(similarity, -1), -1),
        rank=rank,
        top1=mean(rank == 0),
        top5=mean(rank < 5),
        mrr=mean(1 / (rank + 1).astype(similarity.dtype)),
    )


def _similarity(a: Array, b: Array, metric: Metric) -> Array:
    if metric == "euclidean":
        top = jnp.maximum(*(jnp.max(jnp.abs(rows), (-2, -1), keepdims=True) for rows in (a, b)))
        _, inverse = power_of_two(top)  # the same unit for both, which keeps the order of distances
        return -squared_distances(a * inverse, b * inverse)
    if metric == "correlation":
        a, b = (_centered(scaled(rows, -1)[0]) for rows in (a, b))
    return products(unit(a), unit(b))


def _centered(rows: Array) -> Array:
    """Rows minus their mean; exactly 0 for constant rows, whatever the rounding of the mean."""
    constant = jnp.max(rows, -1, keepdims=True) == jnp.min(rows, -1, keepdims=True)
    return jnp.where(constant, 0, less_row_mean(rows))
