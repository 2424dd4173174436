"""Segments of a normalized cut: discrete, nested, from prompts; and the channels that drive them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxalign import _arrays, _checks, _features
from jaxalign._linalg import matmul, unit
from jaxalign._typing import AnyArray, Data, Numbers
from jaxalign.bandwidth import solve_sigma
from jaxalign.operators import affinity_operator
from jaxalign.plan import Plan
from jaxalign.spectral import NormalizedCut


def kway(
    cut: NormalizedCut | Numbers[Data, "n k"], segments: int | None = None, *, steps: int = 50
) -> Int[Array, " n"]:
    """Segments from eigenvectors: the discrete labels closest to a rotation of the eigenvectors (Yu & Shi 2003).

    Args:
        cut: a `NormalizedCut`, or eigenvectors, shape (n, k).
        segments: the number of segments, from 1 to k, and of leading eigenvectors that are used. Default: k.
        steps: the largest number of rotations; the iteration ends once labels do not change.

    Returns:
        Labels 0 .. segments - 1, shape (n,), in the order in which segments first appear. -1 for masked and isolated
        samples, or for rows of zeros if `cut` is an array. If the last eigenvalue used equals the next (a graph with
        more components than segments), it is arbitrary which components share a segment.

    Raises:
        ValueError: segments out of range; nan or inf (under a trace labels are -1 instead).

    Examples:
        >>> import jax.numpy as jnp, jaxalign
        >>> affinity = jnp.kron(jnp.eye(2), jnp.ones((3, 3)))  # two groups of three
        >>> jaxalign.kway(jaxalign.normalized_cut(affinity, 2)).tolist()
        [0, 0, 0, 1, 1, 1]
    """
    vectors = cut.eigenvectors if isinstance(cut, NormalizedCut) else _features.features("cut", cut)
    if vectors.ndim != 2:
        raise ValueError(f"eigenvectors must have shape (n, k); got {vectors.shape}.")
    number = vectors.shape[1] if segments is None else _checks.whole("segments", segments)
    if number > vectors.shape[1]:
        raise ValueError(f"segments = {number}, but there are only {vectors.shape[1]} eigenvectors.")
    _features.finite_rows("cut", vectors, way_out="Cut again without such samples.")
    present = cut.degrees > 0 if isinstance(cut, NormalizedCut) else jnp.any(vectors[:, :number] != 0, 1)
    present &= jnp.isfinite(vectors).all()
    return _kway(vectors[:, :number], present, _checks.whole("steps", steps))


def nested_segments(cut: NormalizedCut, segments: int | None = None) -> Int[Array, "segments n"]:
    """Segments of 1, 2, ... parts, each obtained by splitting one part of those before.

    The finest are those of `kway`. Going up, the two parts are merged whose union loses the least normalized
    association, the sum over parts of assoc(S, S) / vol(S) that the cut maximizes (Shi & Malik 2000), computed from the
    eigenvectors.

    Args:
        cut: a `NormalizedCut`.
        segments: the largest number of parts, from 1 to k. Default: k.

    Returns:
        Row k - 1 holds the labels 0 .. k - 1 for k parts, -1 for masked and isolated samples. The larger part of a
        split keeps its label, and the other one has the label k - 1. Parts can be empty where `kway` finds fewer.

    Raises:
        ValueError: see `kway`.

    Examples:
        >>> import jax.numpy as jnp, jaxalign
        >>> affinity = jnp.kron(jnp.asarray([[4.0, 2, 0], [2, 4, 0], [0, 0, 4]]), jnp.ones((2, 2)))
        >>> jaxalign.nested_segments(jaxalign.normalized_cut(affinity, 3)).tolist()
        [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 2, 2, 1, 1]]
    """
    _check_cut(cut)
    labels = kway(cut, segments)
    return _nested(cut, labels, cut.eigenvectors.shape[1] if segments is None else int(segments))


def prompt_scores(
    cut: NormalizedCut,
    inside: int | Sequence[int] | Int[AnyArray, " p"],
    outside: int | Sequence[int] | Int[AnyArray, " q"] | None = None,
    *,
    rows: Numbers[Data, "m k"] | None = None,
) -> Float[Array, " m"]:
    """How strongly samples belong to points inside a segment, rather than to points outside of it.

    In a joint cut, points of one image and one network find the segment in all images and networks. The similarity of
    two samples is the cosine of their rows, by which spectral clustering groups them (Ng, Jordan & Weiss 2001).

    Args:
        cut: a `NormalizedCut`.
        inside: rows of points inside the segment.
        outside: rows of points outside of it. None: a sample belongs to the segment within 60 degrees of a point.
        rows: rows of other samples, from `cut.transform`, shape (m, k). Default: all samples of the cut.

    Returns:
        Similarity to the most similar point inside minus that to the most similar one outside (without these, minus
        1/2), shape (m,). Above 0 a sample belongs to the segment; 0 for masked and isolated samples.

    Raises:
        TypeError, ValueError: points that are not in the cut, or masked or isolated; none inside; rows of another width
            or with nan.

    Examples:
        >>> import jax.numpy as jnp, jaxalign
        >>> affinity = jnp.kron(jnp.eye(2), jnp.ones((3, 3)))  # two groups of three
        >>> (jaxalign.prompt_scores(jaxalign.normalized_cut(affinity, 2), 1, 4) > 0).tolist()
        [True, True, True, False, False, False]
    """
    _check_cut(cut)
    k = cut.eigenvectors.shape[1]
    given = {"inside": inside, "outside": outside}
    points = tuple(_points(name, value, cut) for name, value in given.items() if value is not None)
    others = cut.eigenvectors if rows is None else _features.features("rows", rows)
    if others.ndim != 2 or others.shape[1] != k:
        raise ValueError(f"rows must have shape (m, {k}), from cut.transform; got {others.shape}.")
    _features.finite_rows("rows", others, way_out="Leave such rows out.")
    return _prompt_scores(cut.eigenvectors, others, points)


def segment_channels(
    x: Numbers[Data, "n d"],
    labels: Int[AnyArray, " n"],
    *,
    density: ArrayLike = 0.05,
    plan: Plan | None = None,
) -> Float[Array, "segments d"]:
    """The channels that drive each segment: the derivative of its normalized association by the scale of a channel.

    The normalized association assoc(S, S) / vol(S) is the share of a segment's affinity that stays within it, 0 to 1.
    A channel whose scale increases it separates the segment from the others. The bandwidth follows, so that the mean
    affinity stays at the density.

    Args:
        x: features, shape (n, d).
        labels: a label from 0 for each sample, -1 for none, as from `kway`.
        density: see `rbf_affinity`.
        plan: how pairs are visited, see `jaxalign.Plan`.

    Returns:
        Derivatives by the logarithm of the scale of each channel, shape (segments, d); 0 for a label of no sample.

    Raises:
        TypeError, ValueError: labels that are not one integer per sample, or traced; see also `solve_sigma`.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (90, 5)).at[:45, 2].add(4.0)
        >>> drive = jaxalign.segment_channels(x, jnp.arange(90) // 45)
        >>> drive.shape, drive.argmax(1).tolist()
        ((2, 5), [2, 2])
    """
    if not _arrays.is_concrete(labels):
        raise TypeError("labels must not be traced: the number of segments is a shape. Pass a NumPy array.")
    centered, _ = _features.centered_features("x", x, min_rows=2)
    found = np.asarray(_arrays.array("labels", labels))
    if centered.ndim != 2 or found.shape != centered.shape[:1] or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            f"labels must be one integer per sample; got shape {found.shape} of {found.dtype} for x of shape "
            f"{centered.shape}."
        )
    solve_sigma(centered, density=density, plan=plan)  # raises where there is none
    members = found[:, None] == np.arange(max(int(found.max()) + 1, 1))

    def association(scale: Array) -> Array:
        a = affinity_operator(centered * scale[None], density=density, plan=plan, throw=False)
        hot = jnp.asarray(members, centered.dtype)
        products = a @ jnp.concatenate((hot, jnp.ones_like(hot[:, :1])), 1)
        return _share(jnp.sum(hot * products[:, :-1], 0), jnp.sum(hot * products[:, -1:], 0))

    return jax.jacrev(association)(jnp.ones(centered.shape[1], centered.dtype))


def _check_cut(cut: Any) -> None:
    if not isinstance(cut, NormalizedCut):
        raise TypeError(f"cut must be a NormalizedCut; got {type(cut).__name__}.")


def _points(name: str, value: Any, cut: NormalizedCut) -> Array:
    """Rows of the cut, as indices."""
    indices = np.atleast_1d(np.asarray(value)) if _arrays.is_concrete(value) else value
    if np.size(indices) == 0:
        raise ValueError(f"{name} has no points: pass at least one row of the cut.")
    points = jnp.asarray(_checks.row_numbers(name, indices, cut.eigenvectors.shape[0]))
    if _arrays.is_concrete(cut.eigenvectors):
        empty = ~np.asarray(jnp.any(cut.eigenvectors[points] != 0, 1))
        if empty.any():
            first = np.asarray(points)[empty][0]
            raise ValueError(f"{name}: sample {first} is masked or isolated. Choose other points.")
    return points


def _share(association: Array, volume: Array) -> Array:
    """The normalized association, 0 for an empty part."""
    return jnp.where(volume > 0, association / jnp.where(volume > 0, volume, 1), 0)


# --- computations ----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=2)
def _kway(vectors: Array, present: Array, steps: int) -> Array:
    n, k = vectors.shape
    rows = unit(vectors)

    # Start from the row of largest norm, then rows as orthogonal as possible to those before.
    def choose(state: tuple[Array, Array, Array], _: Any) -> tuple[tuple[Array, Array, Array], Array]:
        index, seen, _ = state
        row = rows[index]
        seen = seen + jnp.abs(rows @ row)
        index = jnp.argmin(jnp.where(present, seen, jnp.inf))
        return (index, seen, row), row

    first = (jnp.argmax(jnp.linalg.norm(vectors, axis=1)), jnp.zeros(n, rows.dtype), rows[0])
    _, chosen = lax.scan(choose, first, None, length=k)
    turn = chosen.T

    def assign(turn: Array) -> Array:
        return jnp.argmax(rows @ turn, 1)

    def should_continue(state: tuple[Array, Array, Array]) -> Array:
        step, _, changed = state
        return changed & (step < steps)

    def update(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        step, labels, _ = state
        hot = (labels[:, None] == jnp.arange(k)[None]) & present[:, None]
        u, _, vt = jnp.linalg.svd(matmul(hot.astype(rows.dtype).T, rows))
        after = assign(vt.T @ u.T)
        return step + 1, after, jnp.any(after != labels)

    _, labels, _ = lax.while_loop(should_continue, update, (jnp.asarray(0), assign(turn), jnp.asarray(True)))
    # Number labels in the order in which they appear.
    hot = (labels[:, None] == jnp.arange(k)[None]) & present[:, None]
    appears = jnp.where(hot.any(0), jnp.argmax(hot, 0), n + jnp.arange(k))
    number = jnp.argsort(jnp.argsort(appears))
    return jnp.where(present, number[labels], -1).astype(jnp.int32)


@partial(jax.jit, static_argnums=2)
def _nested(cut: NormalizedCut, labels: Array, number: int) -> Array:
    # The affinity of the eigenvectors between parts, and the volumes of parts.
    root = jnp.sqrt(cut.degrees)
    hot = (labels[:, None] == jnp.arange(number)[None]).astype(root.dtype)
    spread = matmul(cut.eigenvectors.T, root[:, None] * hot)
    within = matmul(spread.T, cut.eigenvalues[:, None] * spread)
    volume = jnp.sum(cut.degrees[:, None] * hot, 0)

    def merge(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        within, volume, present = state
        alone = _share(jnp.diagonal(within), volume)
        both = jnp.diagonal(within)[:, None] + jnp.diagonal(within)[None] + 2 * within
        gain = _share(both, volume[:, None] + volume[None]) - alone[:, None] - alone[None]
        pairs = present[:, None] & present[None] & ~jnp.eye(number, dtype=bool)
        a, b = jnp.unravel_index(jnp.argmax(jnp.where(pairs, gain, -jnp.inf)), gain.shape)
        # The larger part keeps its label.
        a, b = jnp.where(volume[a] < volume[b], jnp.stack((b, a)), jnp.stack((a, b)))
        turn = jnp.eye(number, dtype=within.dtype).at[b, a].set(1).at[b, b].set(0)
        return (matmul(turn.T, matmul(within, turn)), matmul(volume[None], turn)[0], present.at[b].set(False)), (a, b)

    _, (kept, merged) = lax.scan(merge, (within, volume, jnp.ones(number, bool)), None, length=number - 1)
    # The part that is merged first is split off last: it has the largest label.
    label = jnp.zeros(number, jnp.int32).at[merged].set(number - 1 - jnp.arange(number - 1, dtype=jnp.int32))

    def join(parts: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        into, old = pair
        parts = jnp.where(parts == old, into, parts)
        return parts, parts

    _, coarser = lax.scan(join, label, (label[kept], label[merged]))
    levels = jnp.concatenate((label[None], coarser))[::-1]
    return jnp.where(labels[None] >= 0, levels[:, labels], -1)


@jax.jit
def _prompt_scores(vectors: Array, rows: Array, points: tuple[Array, ...]) -> Array:
    near = [jnp.max(matmul(unit(rows), unit(vectors[p]).T), 1) for p in points]
    away: Any = near[1] if len(near) > 1 else 0.5
    return jnp.where(jnp.any(rows != 0, 1), near[0] - away, 0)
