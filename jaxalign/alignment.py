"""Relative features over shared landmarks, and how well they correspond between networks.

A sample's relative feature in a network is its row of affinities to m landmark samples. Landmarks are the same samples
in every network, so rows of different networks have the same columns and can be compared, stacked and clustered
together, with no map fitted between the networks. `align` makes them, `Alignment.transform` makes them for new samples,
`correspondence` scores how often a sample's nearest row in the other network is itself.
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

from jaxalign import _checks
from jaxalign._directions import less_row_mean
from jaxalign._linalg import matmul, power_of_two, products, root, scaled, unit
from jaxalign._repr import short_repr
from jaxalign._typing import AnyArray, Data, Numbers
from jaxalign.affinity import rbf_affinity
from jaxalign.bandwidth import Bandwidth, Diagonal, solve_sigma
from jaxalign.core.features import center_features, centered_columns
from jaxalign.core.features import diagonal as on_diagonal
from jaxalign.distances import squared_distances

Channels = Literal["standardize", "whiten"]
Metric = Literal["correlation", "cosine", "euclidean"]

# Patterns of landmarks among the rows are looked for in so many columns at least; see `_of_landmarks`.
_LEAST_COLUMNS = 32
_SYMMETRIC = 0.5

PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {"channels": None, "decorrelate": None, "density": 0.05, "standardize": True}
)
"""Options of `align` for the published method, `align(features, **PUBLISHED)`: plain auto-scaled rows, with
standardized columns so that scores can be compared."""


@partial(jax.tree_util.register_dataclass, data_fields=("centre", "scale", "factor"), meta_fields=())
@dataclass(frozen=True)
class _Channels:
    """The affine map of one network's channels that was fitted; None for what is not used."""

    centre: Array | None = None  # (1, d)
    scale: Array | None = None  # (1, d) standard deviations; to whiten (1, 1), the unit of the covariance
    factor: Array | None = None  # (d, d) lower Cholesky factor of the shrunk covariance

    def __call__(self, x: Array) -> Array:
        if self.centre is not None:
            x = x - self.centre
        if self.scale is not None:
            x = x / self.scale
        if self.factor is not None:
            x = jax.scipy.linalg.solve_triangular(self.factor, x.T, lower=True).T
        return x


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("channels", "landmarks", "sigma", "density", "cholesky", "centre", "scale", "shift"),
    meta_fields=(),
)
@dataclass(frozen=True)
class _Space:
    """What was fitted in one network's space: enough to place new samples. None for what is not used."""

    channels: _Channels
    landmarks: Array  # (m, d) after the channels' map
    sigma: Array | None  # None with a bandwidth per row: every row has its own
    density: Array
    cholesky: Array | None = None  # (m, m) lower Cholesky factor of A_LL + lambda I
    centre: Array | None = None  # (1, m) mean and standard deviation of the columns
    scale: Array | None = None
    shift: _checks.Shift | None = None  # was subtracted from the features, ahead of the channels' map

    def affinity(self, x: Array) -> Array:
        """Affinity of samples, after the channels' map, to the landmarks."""
        if self.sigma is None:
            return rbf_affinity(x, self.landmarks, density=self.density, bandwidth="per_row")
        return rbf_affinity(x, self.landmarks, self.sigma)

    def decorrelate(self, affinity: Array) -> Array:
        """Rows times (A_LL + lambda I)^-1, if that was fitted."""
        return affinity if self.cholesky is None else jax.scipy.linalg.cho_solve((self.cholesky, True), affinity.T).T

    def standardize(self, rows: Array) -> Array:
        """Columns less their mean, over their standard deviation, if these were fitted."""
        return rows if self.centre is None or self.scale is None else (rows - self.centre) / self.scale


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("features", "sigma", "landmarks", "spaces"),
    meta_fields=(),
)
@dataclass(frozen=True, repr=False)
class Alignment:
    """Relative features of several networks over the same landmarks; made by `align`.

    Attributes:
        features: relative features by name, shape (n, m): row i is sample i, column j is landmark j.
        sigma: bandwidth by name, in units of the features after the channels' transformation: a scalar, or (n,) with
            bandwidth="per_row".
        landmarks: index of the sample that each column stands for, shape (m,).
        spaces: what `transform` needs, by name: a pytree whose fields are private and may change.
    """

    features: dict[str, Float[Array, "n m"]]
    sigma: dict[str, Float[Array, "..."]]
    landmarks: Int[Array, " m"]
    spaces: dict[str, _Space]

    def __repr__(self) -> str:
        return short_repr(self, omit=("spaces",))

    @property
    def names(self) -> tuple[str, ...]:
        """The networks' names, in the order in which they were given."""
        return tuple(self.features)

    @property
    def queries(self) -> Int[Array, " k"]:
        """Indices of the samples that are not landmarks, in order: the ones to score with."""
        return _others(self.landmarks, next(iter(self.features.values())).shape[0])

    def transform(self, name: str, x_new: Numbers[Data, "k d"]) -> Float[Array, "k m"]:
        """Relative features of new samples of one network, with everything as it was fitted.

        Args:
            name: which network.
            x_new: its features of the new samples, shape (k, d).

        Returns:
            Relative features, shape (k, m), comparable with `features` of any network.

        Raises:
            KeyError: unknown name.
            ValueError, TypeError: x_new of another width, see also `rbf_affinity`.
        """
        space = self.spaces[self._known(name)]
        x = _checks.shifted_features("x_new", x_new, space.shift)
        if x.ndim != 2 or x.shape[-1] != space.landmarks.shape[-1]:
            raise ValueError(f"x_new must have shape (k, {space.landmarks.shape[-1]}) for {name!r}; got {x.shape}.")
        return space.standardize(space.decorrelate(space.affinity(space.channels(x))))

    def correspondence(
        self, a: str, b: str, *, metric: Metric = "correlation", csls: int | None = None
    ) -> Correspondence:
        """Score the correspondence between two networks on the samples that are not landmarks.

        Args:
            a: name of the network whose samples are looked up.
            b: name of the network in which they are looked up.
            metric: see `correspondence`.
            csls: see `correspondence`.

        Returns:
            `Correspondence` over `queries`: entry k of `index` and `rank` is about sample queries[k], and index counts
            within the queries.

        Raises:
            KeyError: unknown name.
            ValueError: fewer than two samples that are not landmarks. A landmark's affinity with itself is 1 in every
                network, which would give the match away.
        """
        queries = self.queries
        if len(queries) < 2:
            raise ValueError(
                f"{len(queries)} sample(s) are not landmarks; a landmark's affinity with itself gives the match "
                "away, so they are not scored. Fit with fewer landmarks, align(..., landmarks=number, key=key), or "
                "score new samples: correspondence(alignment.transform(a, x), alignment.transform(b, y))."
            )
        rows_a, rows_b = (self.features[self._known(name)][queries] for name in (a, b))
        return _correspondence(*_check_rows(rows_a, rows_b, metric, csls))

    def _known(self, name: str) -> str:
        if name not in self.features:
            raise KeyError(f"{name!r} is not aligned here; there are {', '.join(map(repr, self.features))}.")
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

    Each network's sigma is solved on its landmark block, mean(A(x_L, x_L)) = density, and the relative features are
    the rows of A(x, x_L), decorrelated and standardized. The defaults find correspondences best (measured in
    docs/pages/alignment.md); `**jaxalign.alignment.PUBLISHED` is the published method.

    Args:
        features: by network name, shape (n, d_k): row i is the same sample in all of them.
        landmarks: None: all samples. A number m: drawn at random. Indices, shape (m,), such as those of
            `farthest_points`: these.
        key: a `jax.random.key` for the random choice of landmarks. None: `jax.random.key(0)`.
        density: the target mean of the affinity, 0 < density < 1, see `solve_sigma`.
        bandwidth: "global": one sigma per network. "per_row": one per row of A(x, x_L), whose mean is then the density;
            it follows changes in how densely the samples lie. Needs decorrelate=None.
        diagonal: whether the ones on the diagonal of the landmark block count in its mean (bandwidth="global").
        channels: "standardize": each channel is centered and divided by its standard deviation over all n samples;
            "whiten": multiplied by the inverse Cholesky factor of their covariance, shrunk by adding its mean
            eigenvalue. This undoes anisotropic scaling, which a bandwidth alone cannot. None: as they are.
        decorrelate: lambda > 0: rows are multiplied by (A_LL + lambda I)^-1, so that similar landmarks do not count
            twice. None: they are not.
        standardize: subtract the mean of each column and divide by its standard deviation, both over the samples that
            are not landmarks (over all samples if every one is a landmark).

    Returns:
        `Alignment` with `.features`, `.sigma`, `.landmarks`, `.transform` and `.correspondence`.

    Raises:
        TypeError, ValueError: no features, different n, bad landmarks (out of range, repeated), decorrelate with
            bandwidth="per_row", a density of at most 1/m with it, and what `solve_sigma` raises, with the network's
            name.

    Example:
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
            raise ValueError("key has no effect unless landmarks is a number, of samples drawn at random.")
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
    maps = {name: _fit_channels(x, channels) for name, x in arrays.items()}
    arrays = {name: maps[name](x) for name, x in arrays.items()}
    chosen = _choose_landmarks(landmarks, key, n)
    others = _others(chosen, n) if standardize else None
    rows, sigma, spaces = {}, {}, {}
    for name, x in arrays.items():
        try:
            block = x[chosen]
            if bandwidth == "global":
                sigma[name] = solve_sigma(block, density=density, diagonal=diagonal).sigma
            else:
                _check_own_share(density, block)
                sigma[name] = solve_sigma(x, block, density=density, bandwidth="per_row").sigma
            wanted = jnp.asarray(density, x.dtype)
            fitted_sigma = sigma[name] if bandwidth == "global" else None
            space = _Space(maps[name], block, fitted_sigma, wanted, shift=shifts[name])
            affinity = rbf_affinity(x, block, sigma[name], bandwidth=bandwidth)
            # A landmark's distance from itself is 0; as an entry between two different sets it carries rounding.
            affinity = affinity.at[chosen, jnp.arange(len(chosen))].set(1)
        except (ValueError, TypeError) as error:
            raise type(error)(f"features[{name!r}]: {error}") from error
        if decorrelate is not None:
            ridge = decorrelate * jnp.eye(len(chosen), dtype=x.dtype)
            space = replace(space, cholesky=jnp.linalg.cholesky(affinity[chosen] + ridge))
        relative = space.decorrelate(affinity)
        if others is not None:
            scored = relative[others] if len(others) else relative
            spread = _spread(scored, rounding=8 * float(jnp.finfo(scored.dtype).eps))
            space = replace(space, centre=jnp.mean(scored, 0, keepdims=True), scale=spread)
        rows[name] = space.standardize(relative)
        spaces[name] = space
    return Alignment(rows, sigma, chosen, spaces)


def _check_own_share(density: Any, block: Array) -> None:
    """Raise where the 1 of a landmark with itself, alone, gives its row the density."""
    _checks.parameter("density", density, block.dtype, (), "one number")
    _checks.density_value(density)
    m = block.shape[0]
    # In the dtype in which it is solved: 0.05 in float32 is above 1/20, but not above 1/20 in float32.
    if _checks.is_concrete(density) and _checks.on_host(density).astype(block.dtype) <= np.asarray(1 / m, block.dtype):
        asked = float(_checks.on_host(density))
        least = math.floor((1 + float(jnp.finfo(block.dtype).eps)) / asked) + 1
        raise ValueError(
            f'density = {asked} cannot be reached with {m} landmarks and bandwidth="per_row": the affinity of a '
            f"landmark with itself alone gives its row 1/m = {1 / m:.4g}. Ask for a density above that, take at least "
            f'{least} landmarks, or bandwidth="global" with diagonal="exclude".'
        )


def _fit_channels(x: Array, channels: Channels | None) -> _Channels:
    if channels is None:
        return _Channels()
    features = center_features(x)
    if channels == "standardize":
        return _Channels(features.center, _spread(x, rounding=0.0))
    x = centered_columns(x, None)  # in scaled units
    covariance = matmul(x.T, x) / x.shape[0]
    shrinkage = jnp.trace(covariance) / x.shape[1]
    shrinkage = jnp.where(shrinkage > 0, shrinkage, 1)
    # Any root of the inverse gives the same distances; the Cholesky factor has derivatives also at equal eigenvalues.
    factor = jnp.linalg.cholesky(covariance + shrinkage * jnp.eye(x.shape[1], dtype=x.dtype))
    return _Channels(features.center, features.scale[None, None], factor)


def _spread(x: Array, rounding: float) -> Array:
    """Standard deviation of each column, 1 where it is below `rounding` times the largest entry: shape (1, d)."""
    noise = rounding * jnp.max(jnp.abs(x), 0, keepdims=True)
    x, size = scaled(x - center_features(x).center, 0)
    std = root(jnp.mean((x - jnp.mean(x, 0, keepdims=True)) ** 2, 0, keepdims=True)) * size
    return jnp.where(std > noise, std, 1)


def _others(chosen: Array, n: int) -> Array:
    """Indices of the samples from 0 to n - 1 that are not among the chosen ones, in order; also under a trace."""
    return jnp.nonzero(jnp.ones(n, bool).at[chosen].set(False), size=n - len(chosen))[0]


def _check_features(features: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    """The features (n, d_k) of every network, of the same n samples, and the shift that was subtracted from each."""
    if not isinstance(features, Mapping):
        raise TypeError(f"features must be a mapping from names to arrays; got {type(features).__name__}.")
    if not features:
        raise ValueError("features is empty: give at least one network's features, {name: array}.")
    arrays, shifts = {}, {}
    for name, value in features.items():
        array, shifts[name] = _checks.centered_features(f"features[{name!r}]", value, min_rows=2)
        if array.ndim != 2:
            raise ValueError(f"features[{name!r}] must have shape (n, d); got {array.shape}.")
        way_out = "Remove these samples from every network."
        _checks.finite_rows(f"features[{name!r}]", array, way_out=way_out, differences=True)
        arrays[name] = array
    counts = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"all networks must have the same samples in the same order; got n = {_checks.shown(counts)}.")
    return arrays, shifts


def _choose_landmarks(landmarks: Any, key: Array | None, n: int) -> Array:
    """Indices of the landmarks, shape (m,)."""
    if landmarks is None:
        return jnp.arange(n)
    if isinstance(landmarks, (int, np.integer)) and not isinstance(landmarks, bool):
        number = _checks.whole("landmarks", landmarks, 1, n, most_is="n = ")
        key = jax.random.key(0) if key is None else key
        return jnp.sort(jax.random.choice(key, n, (number,), replace=False))
    return jnp.asarray(_checks.row_numbers("landmarks", landmarks, n))


def farthest_points(features: Mapping[str, Numbers[Data, "n _"]], number: int) -> Int[Array, " m"]:
    """Landmarks that cover the samples: each next one is farthest from those before it, over all networks together.

    Distances are D = sum over networks of D_k / mean(D_k), and the first landmark is the sample of the smallest mean D
    (Gonzalez, Clustering to minimize the maximum intercluster distance, Theoretical Computer Science 38, 1985).

    Args:
        features: by network name, shape (n, d_k), see `align`.
        number: of landmarks, m.

    Returns:
        Row numbers, shape (m,), in the order in which they were chosen.

    Raises:
        TypeError, ValueError: see `align`.

    Example:
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
    """See `farthest_points`; squared distances are those of the centered features side by side, each in its unit."""
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
        return nearest.at[chosen].set(-1), chosen  # -1: never again, not even among duplicates

    # The first step takes the entry that is inf: the sample nearest to the mean has the smallest mean distance.
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
    """Auto-scaled affinity between all samples of all networks, on their relative features.

    Args:
        alignment: an `Alignment`, or relative features over the same landmarks, each of shape (n_k, m).
        density: the wanted mean of the joint affinity, see `rbf_affinity`.
        diagonal: see `rbf_affinity`.
        bandwidth: see `rbf_affinity`.

    Returns:
        Affinity of the stacked rows: for M networks of n samples shape (M n, M n), blocks in the order of the names.

    Raises:
        ValueError: rows of different width; see also `rbf_affinity`.

    Example:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (60, 8))
        >>> jaxalign.joint_affinity(jaxalign.align({"a": x, "b": -x})).shape
        (120, 120)
    """
    parts = list(alignment.features.values()) if isinstance(alignment, Alignment) else list(alignment)
    rows = [_checks.features(f"alignment[{k}]", part) for k, part in enumerate(parts)]
    widths = {row.shape[-1] for row in rows}
    if len(widths) != 1 or any(row.ndim != 2 for row in rows):
        raise ValueError(
            f"rows must be (n, m) with the same m, over the same landmarks; got {[row.shape for row in rows]}."
        )
    return rbf_affinity(jnp.concatenate(rows), density=density, diagonal=diagonal, bandwidth=bandwidth)


@partial(jax.tree_util.register_dataclass, data_fields=("index", "rank", "top1", "top5", "mrr"), meta_fields=())
@dataclass(frozen=True, repr=False)
class Correspondence:
    """How well rows find their partners; made by `correspondence`.

    Attributes:
        index: for each row of a, the most similar row of b, shape (..., n).
        rank: how many wrong rows of b are at least as similar as the true partner, shape (..., n), 0 is best.
        top1: share of rows whose rank is 0, shape (...), 0 to 1, chance 1/n.
        top5: share of rows whose rank is below 5, chance 5/n.
        mrr: mean of 1 / (rank + 1).

    Under a trace, where a or b holds nan or inf: shares nan, ranks n, indices -1.
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
    """Look up every row of a among the rows of b; its true partner is the row of the same index.

    Args:
        a: relative features of n samples in one network, shape (..., n, m), n >= 2.
        b: those of the same samples in another, over the same landmarks.
        metric: similarity of two rows: "correlation" (Pearson), "cosine", or "euclidean" (minus the squared distance).
            A constant row (a zero row for cosine) has similarity 0 with every other.
        csls: correct for hubs, rows that are near to everything, with this many neighbours (10 is usual): from twice
            the similarity take each row's mean similarity to its nearest (Conneau et al., Word translation without
            parallel data, ICLR 2018, eq. 3). None: no correction.

    Returns:
        `Correspondence`. Ties count against a row, so constant features score 0 and not 1.

    Raises:
        ValueError: different shapes; csls not in 1 .. n; rows of landmarks among the samples: entries equal to 1 at the
            same place in both, a landmark's affinity with itself, which gives the match away (measured top-1 0.61
            instead of 0.44). `Alignment.correspondence` leaves them out. Decorrelated and standardised rows of
            landmarks are told by their pattern, with a warning.

    Example:
        >>> import jax, jaxalign
        >>> a = jax.random.normal(jax.random.key(0), (50, 20))
        >>> float(jaxalign.correspondence(a, 3 * a + 1).top1)
        1.0
    """
    a, b, metric, csls = _check_rows(a, b, metric, csls)
    if _checks.is_concrete(a, b):
        ones, least, most = _checks.looked_at(_landmark_facts, a, b)
        own = np.argwhere(ones)
        if len(own) and least >= 0 and most == 1:
            row, column = (int(i) for i in own[0][-2:])
            raise ValueError(
                f"row {row} is 1 in column {column} in both a and b: the affinity of a landmark with itself, "
                "which gives the match away. Score samples that are not landmarks, "
                "as alignment.correspondence(name_a, name_b) does."
            )
        if a.ndim == 2 and _LEAST_COLUMNS <= a.shape[1] <= a.shape[0] and _checks.looked_at(_of_landmarks, a, b):
            warnings.warn(
                f"the rows seem to hold those of all {a.shape[1]} landmarks, whose entries for themselves give their "
                "matches away. Score samples that are not landmarks, as alignment.correspondence(name_a, name_b) does.",
                stacklevel=2,
            )
    return _correspondence(a, b, metric, csls)


@jax.jit
def _landmark_facts(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Where both are 1, and the least and the largest entry of a."""
    return (a == 1) & (b == 1), jnp.min(a), jnp.max(a)


@jax.jit
def _of_landmarks(a: Array, b: Array) -> Array:
    """Whether rows look as if those of their landmarks were among them, decorrelated and standardised or not.

    Nearly each column then has its largest entry in a row of its own, the same in both, and these rows, in the order of
    the columns, are symmetric but for the unit of a column. (Measured: correlations of entries with their mirror images
    from 0.7 to 0.98, and without landmarks either below 0.4 or rows that serve several columns.)
    """
    own = jnp.argmax(a, 0)
    rows = jnp.count_nonzero(jnp.bincount(own, length=a.shape[0]))
    alike = (jnp.mean(own == jnp.argmax(b, 0), dtype=a.dtype) > 0.9) & (rows >= round(0.99 * a.shape[1]))

    def mirrored(rows: Array) -> Array:
        square, itself = rows[own], jnp.eye(len(own), dtype=bool)
        mean = jnp.mean(square, where=~itself)
        off = jnp.where(itself, 0, square - mean)
        return jnp.sum(off * off.T) / jnp.sum(off * off)

    return alike & (mirrored(a) > _SYMMETRIC) & (mirrored(b) > _SYMMETRIC)


def _check_rows(a: Any, b: Any, metric: Metric, csls: int | None) -> tuple[Array, Array, Metric, int | None]:
    _checks.choice("metric", metric, ("correlation", "cosine", "euclidean"))
    a, b = _checks.features("a", a, min_rows=2), _checks.features("b", b, min_rows=2)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, row i of both is sample i; got {a.shape} and {b.shape}.")
    n = a.shape[-2]
    if csls is not None:
        csls = _checks.whole("csls", csls, 1, n, of=" of neighbours", most_is="n = ", otherwise=", or None")
    for name, rows in (("a", a), ("b", b)):
        _checks.finite_rows(name, rows, way_out="Remove these samples from both.")
    return a, b, metric, csls


@partial(jax.jit, static_argnames=("metric", "csls"))
def _correspondence(a: Array, b: Array, metric: Metric, csls: int | None) -> Correspondence:
    similarity = _similarity(a, b, metric)
    if csls is not None:
        hub_a = jnp.mean(lax.top_k(similarity, csls)[0], -1)
        hub_b = jnp.mean(lax.top_k(jnp.swapaxes(similarity, -1, -2), csls)[0], -1)
        # The sum first: 2 S is exact, so one rounding is left, and ties stay equal to the last digit however it is
        # fused.
        similarity = 2 * similarity - (hub_a[..., :, None] + hub_b[..., None, :])
    true = jnp.diagonal(similarity, axis1=-2, axis2=-1)
    rank = jnp.sum(jnp.where(on_diagonal(similarity.shape[-2:]), False, similarity >= true[..., None]), -1)
    # Of nan no comparison holds, so a rank of nan would be the best.
    finite = (jnp.isfinite(a) & jnp.isfinite(b)).all((-2, -1))
    rank = jnp.where(finite[..., None], rank, a.shape[-2])

    def share(of: Array) -> Array:
        return jnp.where(finite, jnp.mean(of, -1, dtype=similarity.dtype), jnp.nan)

    return Correspondence(
        index=jnp.where(finite[..., None], jnp.argmax(similarity, -1), -1),
        rank=rank,
        top1=share(rank == 0),
        top5=share(rank < 5),
        mrr=share(1 / (rank + 1).astype(similarity.dtype)),
    )


def _similarity(a: Array, b: Array, metric: Metric) -> Array:
    if metric == "euclidean":
        top = jnp.maximum(*(jnp.max(jnp.abs(rows), (-2, -1), keepdims=True) for rows in (a, b)))
        _, inverse = power_of_two(top)  # of both: distances in another unit have the same order
        return -squared_distances(a * inverse, b * inverse)
    if metric == "correlation":
        a, b = (_centred(scaled(rows, -1)[0]) for rows in (a, b))
    return products(unit(a), unit(b))


def _centred(rows: Array) -> Array:
    """Rows less their mean; 0 for a constant row, whatever the rounding of its mean."""
    constant = jnp.max(rows, -1, keepdims=True) == jnp.min(rows, -1, keepdims=True)
    return jnp.where(constant, 0, less_row_mean(rows))
