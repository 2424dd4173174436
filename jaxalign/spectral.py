"""The normalized cut: leading eigenvectors of D^-1/2 A D^-1/2, exact, matrix-free or from landmarks.

One custom JVP serves all exact methods. It uses only products with the matrix, so it does not store n x n entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxalign import _arrays, _checks, _features
from jaxalign._linalg import matmul
from jaxalign._problem import check_unused
from jaxalign._repr import short_repr
from jaxalign._typing import AnyArray, Data, Mask, Numbers
from jaxalign.affinity import rbf_affinity
from jaxalign.alignment import Alignment
from jaxalign.bandwidth import Bandwidth, Diagonal, solve_sigma
from jaxalign.operators import AffinityOperator, affinity_operator, inverse_root
from jaxalign.plan import AUTO, Plan, check_plan, check_single_device

Method = Literal["auto", "dense", "lobpcg", "nystroem"]
Kind = Literal["auto", "features", "affinity"]
# Up to this n the matrix is decomposed, in 15 ms on two cores, which never misses an eigenvector.
_DENSE = 512
# Up to this n the matrix is stored (64 MB in float32), which is faster than recomputing it in every iteration.
_STORED = 4096
# Smallest number of columns of the affinity from which the iteration starts.
_START_COLUMNS = 128
# Columns of landmarks at a time, where n x m entries are not stored; up to this many (256 MB in float32) they are.
_COLUMNS = 64
_STORED_COLUMNS = 2**26
_STEPS = 200


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "eigenvectors",
        "eigenvalues",
        "degrees",
        "residual",
        "basis",
        "basis_mask",
        "sigma",
        "density",
        "projection",
        "weights",
        "shift",
    ),
    meta_fields=(),
)
@dataclass(frozen=True, repr=False)
class NormalizedCut:
    """Leading eigenpairs of D^-1/2 A D^-1/2, made by `normalized_cut`.

    Attributes:
        eigenvectors: shape (n, k), orthonormal columns. The first is proportional to D^1/2 1 if A is connected. The
            entry of largest absolute value in each column is positive. Rows of masked and isolated samples are 0, as
            are columns beyond the number of other samples.
        eigenvalues: shape (k,), largest first, at most 1.
        degrees: row sums of A, shape (n,).
        residual: |D^-1/2 A D^-1/2 v - lambda v| of each eigenpair, shape (k,); nan for "nystroem".
        basis: rows that `transform` compares new samples with; with basis_mask, sigma (one, or one per row), density,
            projection, weights and shift. None for a cut of an affinity.
    """

    eigenvectors: Float[Array, "n k"]
    eigenvalues: Float[Array, " k"]
    degrees: Float[Array, " n"]
    residual: Float[Array, " k"]
    basis: Float[Array, "m d"] | None = None
    basis_mask: Bool[Array, " m"] | None = None
    sigma: Float[Array, "..."] | None = None
    density: Float[Array, ""] | None = None
    projection: Float[Array, "m k"] | None = None
    weights: Float[Array, "m 1"] | None = None
    shift: _features.Shift | None = None

    def __repr__(self) -> str:
        return short_repr(self, omit=("basis", "basis_mask", "density", "projection", "weights", "shift"))

    @property
    def embedding(self) -> Float[Array, "n k"]:
        """D^-1/2 v: eigenvectors of the random walk D^-1 A, constant on each component of a disconnected graph."""
        root = inverse_root(self.degrees)
        length = jnp.sqrt(jnp.sum(self.degrees))
        return self.eigenvectors * (root * length)[:, None]

    def transform(self, x_new: Numbers[Data, "q d"]) -> Float[Array, "q k"]:
        """Rows of the eigenvectors for new samples (Nystroem extension); for samples of the cut, their rows.

        Args:
            x_new: features in the space of the features that were cut, shape (q, d).

        Returns:
            Shape (q, k); 0 for a sample without affinity to any sample. Columns with an eigenvalue below 1000 eps (1e-4
            in float32) are nan: rounding errors are divided by the eigenvalue, and would dominate.

        Raises:
            ValueError: a cut of an affinity, which has no features, or at sigmas that were passed, one per row; another
                number of features.
        """
        if self.basis is None or self.projection is None or self.weights is None:
            raise ValueError(
                "transform needs features, but this cut is of an affinity, or at given sigmas. Cut features, and leave "
                'out sigma with bandwidth="per_row".'
            )
        rows = _features.shifted_features("x_new", x_new, self.shift)
        if rows.ndim != 2 or rows.shape[-1] != self.basis.shape[-1]:
            raise ValueError(f"x_new must have shape (q, {self.basis.shape[-1]}); got {rows.shape}.")
        _features.finite_rows("x_new", rows, way_out="Leave such samples out.")
        dtype = np.promote_types(rows.dtype, self.basis.dtype)
        rows, basis, sigma = rows.astype(dtype), self.basis.astype(dtype), self.sigma
        if self.density is not None:
            sigma = solve_sigma(rows, basis, density=self.density, bandwidth="per_row", mask_y=self.basis_mask).sigma
        a = _symmetric(rows, basis, sigma, self.sigma, None, self.basis_mask)
        both = a @ jnp.concatenate((self.projection, self.weights), 1).astype(dtype)
        return both[:, :-1] * inverse_root(both[:, -1])[:, None]


def normalized_cut(
    x: Numbers[Data, "n d"] | AffinityOperator | Alignment,
    num_components: int = 20,
    *,
    kind: Kind = "auto",
    method: Method = "auto",
    sigma: ArrayLike | None = None,
    density: ArrayLike = 0.05,
    diagonal: Diagonal = "include",
    bandwidth: Bandwidth = "global",
    mask: Mask[Data, " n"] | None = None,
    landmarks: int | Int[AnyArray, " m"] | None = None,
    key: Array | None = None,
    rtol: float | None = None,
    repulsion: Float[AnyArray, "n n"] | None = None,
    plan: Plan | None = None,
) -> NormalizedCut:
    """The leading eigenvectors of the normalized cut of an affinity (Shi & Malik 2000), a spectral embedding.

    Args:
        x: features, shape (n, d), whose auto-scaled affinity is cut; or an affinity, shape (n, n), symmetric and
            nonnegative; or an `AffinityOperator` of samples with themselves, which is never stored; or an `Alignment`,
            whose networks are cut together: rows of the first network, then of the second, ...
        num_components: the number of eigenvectors, k.
        kind: whether a matrix is "features" or an "affinity". "auto" treats a square, symmetric and nonnegative matrix
            as an affinity, a matrix that is not square as features, and raises for any other matrix.
        method: "dense" decomposes the stored matrix. "lobpcg" iterates to the leading eigenvectors, exact to `rtol`,
            starting from landmarks; the affinity of features is stored up to n = 4096, beyond that memory is n x 4 k
            and a few tiles. "nystroem" approximates from landmarks (Fowlkes et al. 2004), for very large n. "auto" is
            "dense" up to n = 512, and "lobpcg" beyond.
        sigma: bandwidth of the affinity of features. None solves for it from the density (with "nystroem" on the
            landmarks without their diagonal, which estimates the density of all pairs).
        density: see `rbf_affinity`.
        diagonal: see `rbf_affinity`.
        bandwidth: "global" has one sigma. "per_row" has one sigma per row and cuts (A + A') / 2, so that no sample is
            isolated; with "nystroem", the mean affinity of each sample to the landmarks is the density.
        mask: shape (n,), True marks valid samples.
        landmarks: for "nystroem": the number of landmarks to draw at random (default 512, or n), or their rows.
        key: a `jax.random.key` for the random choices of "lobpcg" and "nystroem". None: `jax.random.key(0)`.
        rtol: for "lobpcg": residual |M v - lambda v| relative to 1 + lambda. Default 1e-5, in float64 1e-10.
        repulsion: how strongly two samples are kept apart, shape (n, n), symmetric and nonnegative like the affinity A
            that it comes with. Of both, D^-1/2 (A - R + D_R) D^-1/2 is cut, with D_R the row sums of R and D those of
            A + R (Yu & Shi, Understanding popout through repulsion, CVPR 2001); eigenvalues are at most 2.
        plan: how pairs are visited, see `jaxalign.Plan`; with a tile size "lobpcg" never stores the affinity. Only
            "lobpcg" and "nystroem" support a mesh.

    Returns:
        A `NormalizedCut`. With "dense" and "lobpcg" it is differentiable in x to every order where an eigenvalue is
        distinct. Rotations among eigenvectors of equal eigenvalues are left out of derivatives, which are right for
        functions that do not depend on such a rotation (a projection, for example), and finite for all others.

    Warns:
        UserWarning: "lobpcg" did not reach rtol; `residual` holds the residuals.

    Raises:
        ValueError: more components than samples (for "lobpcg" than n / 5); a matrix that may be features or an
            affinity; an affinity that is not symmetric or has negative or non-finite entries; options of features with
            an affinity; see also `solve_sigma`.
        TypeError: see `solve_sigma`.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxalign
        >>> keys = jax.random.split(jax.random.key(0))
        >>> blobs = jnp.repeat(9 * jax.random.normal(keys[0], (3, 5)), 30, 0) + jax.random.normal(keys[1], (90, 5))
        >>> cut = jaxalign.normalized_cut(blobs, 4, density=0.3)
        >>> cut.eigenvectors.shape, cut.eigenvalues.shape
        ((90, 4), (4,))
        >>> jaxalign.kway(cut, 3)[::10].tolist()
        [0, 0, 0, 1, 1, 1, 2, 2, 2]
    """
    _checks.choice("method", method, ("auto", "dense", "lobpcg", "nystroem"))
    _checks.choice("kind", kind, ("auto", "features", "affinity"))
    k = _checks.whole("num_components", num_components)
    start = jax.random.key(0) if key is None else key
    _checks.random_key(start)
    if isinstance(x, Alignment):
        x, kind = x.stacked, "features"
    shift = None
    if isinstance(x, AffinityOperator):
        n = x.shape[-1]
        if x.shape != (n, n) or x.y is not None or x.left is not None or x.right is not None:
            raise ValueError(
                f"the operator must be an affinity of n samples with themselves, without y and not scaled; got an "
                f"operator of shape {x.shape}."
            )
        is_features = False
    else:
        numbers = _arrays.numbers("x", x)
        # Only features may be shifted; a square matrix is an affinity unless kind="features".
        if kind == "features" or (kind == "auto" and numbers.ndim == 2 and numbers.shape[0] != numbers.shape[1]):
            x, shift = _features.centered_features("x", numbers, min_rows=2, mask=mask)
        else:
            x = _features.features("x", numbers, min_rows=2)
        if x.ndim != 2:
            raise ValueError(f"x must have shape (n, d) or (n, n); got {x.shape}. Use jax.vmap for a batch.")
        n = x.shape[0]
        is_features = _is_features(x, kind)
    plan = check_plan(plan, local_rows=False)
    if not is_features and (sigma is not None or mask is not None or bandwidth != "global" or plan.mesh is not None):
        raise ValueError("sigma, bandwidth, mask and a mesh are options of features: leave them out for an affinity.")
    if sigma is not None:
        check_unused(sigma, density, diagonal)
    repelled = None if repulsion is None else _check_repulsion(repulsion, n, is_features)
    mask = _features.row_mask("mask", mask, (n,))
    if k > n:
        raise ValueError(f"num_components = {k}, but there are only n = {n} samples.")
    if method == "nystroem":
        if diagonal != "include":
            raise ValueError('diagonal has no effect with method="nystroem": leave it out.')
        if isinstance(x, AffinityOperator) or not is_features:
            raise ValueError('method="nystroem" needs features: it computes affinities to landmarks only.')
        cut = _from_landmarks(x, k, sigma, density, bandwidth, mask, landmarks, start, plan)
        return replace(cut, shift=shift)
    if landmarks is not None:
        raise ValueError('landmarks are an option of method="nystroem".')
    if method == "auto":
        in_tiles = isinstance(x, AffinityOperator) or n > _DENSE or plan.mesh is not None
        method = "lobpcg" if in_tiles and 5 * k < n else "dense"
    if method == "lobpcg" and 5 * k >= n:
        raise ValueError(f'method="lobpcg" finds fewer than n / 5 components; got {k} with n = {n}. Use "dense".')
    if method == "dense":
        check_single_device(plan, 'method="dense" stores the whole matrix', 'or use "lobpcg" or "nystroem"')
    options: dict[str, Any] = {"density": density, "diagonal": diagonal, "bandwidth": bandwidth, "mask": mask}
    solved = is_features and sigma is None and bandwidth == "per_row"
    of_rows = _density_of_rows(density, diagonal, n, mask, x.dtype) if solved else None
    source: Source = x
    if isinstance(x, AffinityOperator):
        source = x.todense() if method == "dense" else x
    elif is_features and (method == "dense" or (n <= _STORED and plan == AUTO)):
        sigma = solve_sigma(x, plan=plan, **options).sigma if sigma is None else sigma
        if mask is not None and jnp.ndim(sigma):
            sigma = jnp.where(mask, sigma, 1)  # sigma of masked rows is nan
        source = rbf_affinity(x, None, sigma, bandwidth=bandwidth, mask=mask)
    elif is_features:
        if sigma is not None:  # density and diagonal have no effect
            options = {"bandwidth": bandwidth, "mask": mask}
        source = affinity_operator(x, None, sigma, plan=plan, **options)
        sigma = source.sigma
    if repelled is not None:
        source = _Signed((source + source.T) / 2 if isinstance(source, Array) else source, (repelled + repelled.T) / 2)
    cut = _cut(source, start, k, method, rtol)
    if isinstance(x, AffinityOperator) or sigma is None or (bandwidth == "per_row" and not solved):
        return cut
    return replace(_with_features(cut, x, mask, jnp.asarray(sigma), of_rows), shift=shift)


# --- features or affinity --------------------------------------------------------------------------------------------


def _is_features(x: Array, kind: Kind) -> bool:
    """Whether a matrix is features, not an affinity."""
    n = x.shape[0]
    square = x.shape == (n, n)
    if kind == "features" or (kind == "auto" and not square):
        return True
    if not square:
        raise ValueError(f"an affinity must be square; got shape {x.shape}.")
    if not _arrays.is_concrete(x):
        if kind == "auto":
            raise ValueError(
                f"a traced matrix of shape {x.shape} may be features or an affinity: "
                'pass kind="features" or "affinity".'
            )
        return False
    _features.finite_rows("x", x, way_out="An affinity has finite entries.")
    symmetric, negative = (bool(fact) for fact in _arrays.read_on_host(_facts, x))
    if symmetric and not negative:
        return False
    defect = "has negative entries" if negative else "is not symmetric"
    if kind == "affinity":
        raise ValueError(f"the affinity {defect}. For a directed affinity, cut (a + a.T) / 2.")
    raise ValueError(
        f"x of shape {x.shape} is square, but {defect}, so it is not an affinity. If it is features, pass "
        'kind="features"; for a directed affinity, cut (a + a.T) / 2.'
    )


def _check_repulsion(repulsion: Any, n: int, is_features: bool) -> Array:
    if is_features:
        raise ValueError('repulsion is an option of an affinity: cut rbf_affinity(x), with kind="affinity".')
    repelled = _features.features("repulsion", repulsion)
    if repelled.shape != (n, n):
        raise ValueError(f"repulsion must have the shape of the affinity, {(n, n)}; got {repelled.shape}.")
    _features.finite_rows("repulsion", repelled, way_out="A repulsion has finite entries.")
    if _arrays.is_concrete(repelled):
        symmetric, negative = (bool(fact) for fact in _arrays.read_on_host(_facts, repelled))
        if negative or not symmetric:
            defect = "has negative entries" if negative else "is not symmetric"
            raise ValueError(f"repulsion {defect}: pass how strongly samples are kept apart, 0 or more, both ways.")
    return repelled


@jax.jit
def _facts(x: Array) -> tuple[Array, Array]:
    """Whether a matrix is symmetric, up to rounding, and whether it has negative entries."""
    return jnp.max(jnp.abs(x - x.T)) <= 1e-4 * jnp.max(jnp.abs(x)), jnp.min(x) < 0


@partial(jax.tree_util.register_dataclass, data_fields=("rows", "columns"), meta_fields=())
@dataclass(frozen=True)
class _Symmetric:
    """(A(x, y) + A(y, x)') / 2, where A has one sigma per row of its first argument: symmetric for y = x."""

    rows: AffinityOperator
    columns: AffinityOperator

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    @property
    def dtype(self) -> Any:
        return self.rows.dtype

    @property
    def T(self) -> _Symmetric:  # noqa: N802 (NumPy's name)
        return _Symmetric(self.rows.T, self.columns.T)

    def __matmul__(self, v: Array) -> Array:
        return (self.rows @ v + self.columns @ v) / 2

    def todense(self) -> Array:
        return (self.rows.todense() + self.columns.todense()) / 2


@partial(jax.tree_util.register_dataclass, data_fields=("attraction", "repulsion"), meta_fields=())
@dataclass(frozen=True)
class _Signed:
    """A - R + D_R, whose degrees are the row sums of A + R."""

    attraction: Array | AffinityOperator
    repulsion: Array

    @property
    def dtype(self) -> Any:
        return self.repulsion.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.repulsion.shape

    def __matmul__(self, v: Array) -> Array:
        repelled = jnp.sum(self.repulsion, -1)[:, None] * v - matmul(self.repulsion, v)
        return _product(self.attraction, v) + repelled

    def todense(self) -> Array:
        attraction = self.attraction if isinstance(self.attraction, Array) else self.attraction.todense()
        return attraction - self.repulsion + jnp.diag(jnp.sum(self.repulsion, -1))


Source = Array | AffinityOperator | _Symmetric | _Signed


def _symmetric(
    x: Array,
    y: Array,
    sigma: Any,
    sigma_y: Any,
    mask: Array | None,
    mask_y: Array | None,
    plan: Plan | None = None,
) -> AffinityOperator | _Symmetric:
    """The affinity of x and y; with one sigma per row, the mean of both directions."""
    if jnp.ndim(sigma) == 0:
        return affinity_operator(x, y, sigma, mask=mask, mask_y=mask_y, plan=plan)
    sigma, sigma_y = (s if m is None else jnp.where(m, s, 1) for s, m in ((sigma, mask), (sigma_y, mask_y)))
    rows = affinity_operator(x, y, sigma, bandwidth="per_row", mask=mask, mask_y=mask_y, plan=plan)
    columns = affinity_operator(y, x, sigma_y, bandwidth="per_row", mask=mask_y, mask_y=mask, plan=plan)
    return _Symmetric(rows, columns.T)


def _product(source: Source, v: Array) -> Array:
    """A v, with the symmetric part of A."""
    if isinstance(source, Array):
        return matmul(source, v)
    if isinstance(source, AffinityOperator) and source.per_row:
        return _Symmetric(source, source.T) @ v
    return source @ v


def _degrees(source: Source) -> Array:
    if isinstance(source, _Signed):
        return _degrees(source.attraction) + jnp.sum(source.repulsion, -1)
    return _product(source, jnp.ones((source.shape[-1], 1), source.dtype))[:, 0]


def _apply(source: Source, v: Array, root: Array) -> Array:
    """D^-1/2 A D^-1/2 v."""
    return root[:, None] * _product(source, root[:, None] * v)


def _normalized_product(source: Source, v: Array) -> Array:
    """D^-1/2 A D^-1/2 v with degrees computed from A, to be differentiated."""
    return _apply(source, v, inverse_root(_degrees(source)))


# --- eigenpairs, and their derivatives -------------------------------------------------------------------------------


def _cut(source: Source, key: Array, k: int, method: str, rtol: float | None) -> NormalizedCut:
    """The cut of an affinity or an operator."""
    accuracy = rtol if rtol is not None else 1e-10 if source.dtype == jnp.float64 else 1e-5
    vectors, values, degrees, residual = _eigenpairs(source, key, k, method, float(accuracy))
    if method == "lobpcg" and _arrays.is_concrete(residual) and not float(jnp.max(residual)) <= 20 * accuracy:
        warnings.warn(
            f"the eigenvectors did not reach rtol = {accuracy:g} in {_STEPS} steps; their largest residual is "
            f"{float(jnp.max(residual)):.2g}. Use fewer or more components (close eigenvalues converge slowly), or "
            'method="dense" if n x n entries fit in memory.',
            stacklevel=3,
        )
    return NormalizedCut(vectors, values, degrees, residual)


def _with_features(
    cut: NormalizedCut, x: Array, mask: Array | None, sigma: Array, density: Array | None
) -> NormalizedCut:
    """A cut with the fields of `transform`: v(x) = d(x)^-1/2 sum_j A(x, x_j) d_j^-1/2 v_j / lambda."""
    known = jnp.abs(cut.eigenvalues) > 1000 * float(jnp.finfo(x.dtype).eps)
    inverse = jnp.where(known, 1 / jnp.where(known, cut.eigenvalues, 1), jnp.nan)
    projection = cut.eigenvectors * inverse_root(cut.degrees)[:, None] * inverse[None]
    ones = jnp.ones((x.shape[0], 1), x.dtype)
    fitted = replace(cut, basis=x, basis_mask=mask, sigma=sigma, density=density)
    return replace(fitted, projection=projection, weights=ones)


def _density_of_rows(density: ArrayLike, diagonal: Diagonal, n: int, mask: Array | None, dtype: Any) -> Array:
    """The mean of a row of the affinity, with the diagonal: the density that new rows have, too."""
    c = jnp.asarray(density, dtype)
    if diagonal == "include":
        return c
    count = n if mask is None else jnp.sum(mask.astype(dtype))
    return (c * (count - 1) + 1) / count


@partial(jax.jit, static_argnums=(2, 3, 4))
def _eigenpairs(source: Source, key: Array, k: int, method: str, rtol: float) -> tuple[Array, Array, Array, Array]:
    """Vectors, values, degrees and residuals of the symmetric part."""
    if isinstance(source, Array):
        source = (source + source.T) / 2
    vectors, values = _vectors(source, key, k, method, rtol)
    degrees = _degrees(source)
    left = _apply(source, vectors, inverse_root(degrees)) - vectors * values[None]
    return vectors, values, degrees, jnp.linalg.norm(left, axis=0)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _vectors(source: Source, key: Array, k: int, method: str, rtol: float) -> tuple[Array, Array]:
    root = inverse_root(_degrees(source))
    if method == "dense":
        matrix = source if isinstance(source, Array) else source.todense()
        values, vectors = jnp.linalg.eigh(root[:, None] * matrix * root[None])
        values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
        # Rows of the matrix are 0 for isolated and masked samples, and so are those of relevant eigenvectors.
        vectors = vectors * (root > 0).astype(vectors.dtype)[:, None]
    else:
        vectors, values = _iterate(source, root, key, k, rtol)
    return vectors * signs(vectors), values


def signs(vectors: Array) -> Array:
    """The sign of the largest entry of each column, shape (1, k)."""
    largest = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), 0)[None], 0)
    return jnp.where(largest < 0, -1, 1).astype(vectors.dtype)


def _iterate(source: Source, root: Array, key: Array, k: int, rtol: float) -> tuple[Array, Array]:
    """LOBPCG, starting from the Nystroem approximation with random columns of A."""
    from jax.experimental.sparse.linalg import lobpcg_standard  # slow: imports scipy

    n = root.shape[0]
    columns_key, noise_key = jax.random.split(key)
    subset = jax.random.choice(columns_key, n, (min(max(_START_COLUMNS, 2 * k), n),), replace=False)
    units = jnp.zeros((n, subset.shape[0]), root.dtype).at[subset, jnp.arange(subset.shape[0])].set(1)
    columns = _product(source, units)
    half = _pseudoinverse_root(jnp.take(columns, subset, 0))
    spread = root[:, None] * matmul(columns, half)
    _, mix = jnp.linalg.eigh(matmul(spread.T, spread))
    begin = matmul(spread, mix[:, ::-1][:, :k])
    # Noise keeps columns independent if the subset has samples of fewer than k groups.
    noise = jax.random.normal(noise_key, begin.shape, begin.dtype) / np.sqrt(n).astype(begin.dtype)
    begin = begin / jnp.maximum(jnp.linalg.norm(begin, axis=0, keepdims=True), 1e-6) + 1e-3 * noise

    # The tolerance is relative to the eigenvalue. Adding 1 keeps it within reach for small eigenvalues.
    def shifted(v: Array) -> Array:
        return _apply(source, v, root) + v

    values, vectors, _ = lobpcg_standard(shifted, begin, _STEPS, rtol / (20 * n))
    return vectors * (root > 0).astype(vectors.dtype)[:, None], values - 1


@_vectors.defjvp
def _vectors_jvp(
    k: int, method: str, rtol: float, primals: tuple[Source, Array], tangents: tuple[Source, Any]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    # M v_j = w_j v_j. Within the span of the vectors, first-order perturbation theory; outside, (w_j - M) u = dM v_j,
    # in which w_j - M is positive definite, as the eigenvalues are the largest.
    (source, key), (change, _) = primals, tangents
    vectors, values = _vectors(source, key, k, method, rtol)
    _, product = jax.jvp(lambda source: _normalized_product(source, vectors), (source,), (change,))
    within = matmul(vectors.T, product)
    gaps = values[None, :] - values[:, None]
    apart = jnp.abs(gaps) > 100 * float(jnp.finfo(values.dtype).eps)
    turn = jnp.where(apart, within / jnp.where(apart, gaps, 1), 0)
    root = inverse_root(_degrees(source))

    def outside(u: Array) -> Array:
        return u - matmul(vectors, jnp.matmul(vectors.T, u))

    def resolvent(u: Array) -> Array:
        u_out = outside(u)
        return outside(values[None] * u_out - _apply(source, u_out, root)) + (u - u_out)

    def solve(matvec: Callable[[Array], Array], b: Array) -> Array:
        return jax.scipy.sparse.linalg.cg(
            matvec, b, tol=1e-3 * rtol if values.dtype == jnp.float64 else rtol, maxiter=500
        )[0]

    rest = lax.custom_linear_solve(resolvent, outside(product), solve, symmetric=True)
    change_of_vectors = matmul(vectors, turn) + outside(rest)
    return (vectors, values), (change_of_vectors, jnp.diagonal(within))


# --- from landmarks --------------------------------------------------------------------------------------------------


def _pseudoinverse_root(a: Array) -> Array:
    """A^-1/2 of a positive semidefinite matrix, with eigenvalues at rounding level left out."""
    values, vectors = jnp.linalg.eigh((a + a.T) / 2)
    floor = a.shape[0] * float(jnp.finfo(a.dtype).eps) * jnp.max(values)
    return matmul(vectors * inverse_root(jnp.where(values > floor, values, 0))[None], vectors.T)


def _from_landmarks(
    x: Array,
    k: int,
    sigma: Any,
    density: Any,
    bandwidth: str,
    mask: Any,
    landmarks: Any,
    key: Array,
    plan: Plan,
) -> NormalizedCut:
    n = x.shape[0]
    valid = _features.row_mask("mask", mask, (n,))
    if valid is not None and not _arrays.is_concrete(valid):
        raise ValueError('method="nystroem" draws landmarks among the valid samples, so mask= must not be traced.')
    rows = np.arange(n) if valid is None else np.flatnonzero(np.asarray(valid))
    if landmarks is None or isinstance(landmarks, (int, np.integer)):
        number = min(512, len(rows)) if landmarks is None else _checks.whole("landmarks", landmarks)
        if number > len(rows):
            raise ValueError(f"landmarks = {number}, but there are only {len(rows)} valid samples.")
        indices = jax.random.choice(key, jnp.asarray(rows), (number,), replace=False)
    else:
        indices = _checks.row_numbers("landmarks", landmarks, n)
        if not np.isin(indices, rows).all():
            raise ValueError(f"landmarks: sample {indices[~np.isin(indices, rows)][0]} is masked.")
    if k > indices.shape[0]:
        raise ValueError(f"num_components = {k}, but there are only {indices.shape[0]} landmarks.")
    known, of_landmarks, of_rows = jnp.take(x, indices, 0), sigma, None
    if bandwidth == "per_row":
        if sigma is not None:
            raise ValueError('method="nystroem" solves for one sigma per row: leave out sigma, or bandwidth="per_row".')
        of_rows = jnp.asarray(density, x.dtype)
        of_landmarks = solve_sigma(known, density=density, bandwidth="per_row").sigma
        sigma = solve_sigma(x, known, density=density, bandwidth="per_row", mask=mask, plan=plan).sigma
    elif sigma is None:
        sigma = of_landmarks = solve_sigma(known, density=density, diagonal="exclude").sigma
    a = _symmetric(x, known, sigma, of_landmarks, valid, None, plan)
    if n * len(known) <= _STORED_COLUMNS and plan == AUTO:
        a = a.todense()
    inner = _symmetric(known, known, of_landmarks, of_landmarks, None, None).todense()
    vectors, values, degrees, projection, weights = _cut_by_landmarks(a, inner, k)
    unknown = jnp.full((k,), jnp.nan, x.dtype)
    cut = NormalizedCut(vectors, values, degrees, unknown, basis=known, sigma=jnp.asarray(of_landmarks))
    return replace(cut, density=of_rows, projection=projection, weights=weights)


@partial(jax.jit, static_argnums=2)
def _cut_by_landmarks(a: Array | AffinityOperator | _Symmetric, inner: Array, k: int) -> tuple[Array, ...]:
    """The cut of C W^+ C', with C = A(x, landmarks) and W = A(landmarks, landmarks), without an n x m array."""
    half = _pseudoinverse_root(inner)
    weights = matmul(half, matmul(half, _product(a.T, jnp.ones((a.shape[0], 1), inner.dtype))))
    degrees = _product(a, weights)[:, 0]
    root = inverse_root(degrees)
    m = inner.shape[0]
    pieces = -(-m // _COLUMNS)
    columns = jnp.pad(half, ((0, 0), (0, pieces * _COLUMNS - m))).reshape(m, pieces, _COLUMNS)

    def gram(piece: Array) -> Array:
        return matmul(half, _product(a.T, (root * root)[:, None] * _product(a, piece)))

    squares = lax.map(gram, jnp.moveaxis(columns, 1, 0))
    squares = jnp.moveaxis(squares, 0, 1).reshape(m, -1)[:, :m]
    values, mix = jnp.linalg.eigh((squares + squares.T) / 2)
    values, mix = values[::-1][:k], mix[:, ::-1][:, :k]
    projection = matmul(half, mix * inverse_root(values)[None])
    vectors = root[:, None] * _product(a, projection)
    sign = signs(vectors)
    return vectors * sign, values, degrees, projection * sign, weights
