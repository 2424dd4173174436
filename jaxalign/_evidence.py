"""The evidence that two samples of different networks are the same: likelihood ratios, partial assignment, bridges.

Everything here is shape-stable and jitted once per problem: K networks padded to n samples, P = K (K - 1) / 2 pairs of
networks a < b. `matching` decides what the known pairs are and what to make of the result.

Kernel features phi (n, r) approximate the kernel of a network by inner products. Known pairs (i, j) with weights w
define the covariances C_a, C_b, C_ab of phi_a(i) and phi_b(j), regularized by lambda on the diagonal. Under a joint
Gaussian model, regularized kernel CCA (Bach and Jordan, A probabilistic interpretation of canonical correlation
analysis, 2005), the evidence for a pair (x, y) is the log-likelihood ratio of "same sample" to "unrelated samples",

    log p(x, y) / (p(x) p(y)) = x'Q y - c(x) - d(y).

Known pairs are divided into folds, and a row is scored by the model without its own fold: a pair that an earlier round
proposed never confirms itself.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._linalg import matmul

FOLDS = 16
# Canonical correlations are multiplied by this, or a sample with a duplicate would have infinite evidence.
_SHRINKAGE = 0.98
# Iterations of the partial assignment; after these, marginals are off by less than 1e-3 on the shipped features.
_SINKHORN_STEPS = 15
# Log-likelihood ratio of an impossible pair.
_NEVER = -1e9


class Pairs(NamedTuple):
    """Known pairs of every pair of networks, with weights in 0 .. 1; weight 0 is no pair. All of shape (P, n)."""

    partner: Array  # index in b of the partner of each sample of a
    weight: Array


class Problem(NamedTuple):
    """What stays the same in all rounds."""

    phi: Array  # (K, n, r) centered kernel features, rows of padding are 0
    valid: Array  # (K, n) False: padding
    landmarks: Pairs
    network: Array  # (P, 2) indices a, b of the networks of each pair
    bridges: Array  # (P, K - 2) indices of the other networks, or (P, 0)
    related: Array  # (P,) 0 or 1: whether landmarks give evidence at all
    ridge: Array  # lambda
    prior: Array  # prior probability that a sample has a partner


class Matches(NamedTuple):
    """The best candidates after a round, for both directions of every pair of networks. All of shape (P, n)."""

    partner_ab: Array
    confidence_ab: Array
    partner_ba: Array
    confidence_ba: Array


class _Model(NamedTuple):
    """The log-likelihood ratio phi_a Q phi_b' - c - d, with c and d as quadratic forms; all (r, r)."""

    cross: Array
    quadratic_a: Array
    quadratic_b: Array
    constant: Array


def _inverse(a: Array) -> tuple[Array, Array]:
    """Inverse and log-determinant of a symmetric positive definite matrix."""
    factor = jnp.linalg.cholesky(a)
    inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(a.shape[0], dtype=a.dtype))
    return inverse, 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))


class _Moments(NamedTuple):
    """Weighted sums over known pairs: phi_a phi_a', phi_b phi_b', phi_a phi_b', and of the weights."""

    aa: Array
    bb: Array
    ab: Array
    weight: Array


def _moments(x: Array, y: Array, weight: Array) -> _Moments:
    wx, wy = x * weight[:, None], y * weight[:, None]
    return _Moments(matmul(wx.T, x), matmul(wy.T, y), matmul(wx.T, y), jnp.sum(weight))


def _fit(moments: _Moments, ridge: Array, related: Array) -> _Model:
    """The model of the known pairs.

    With [[J_aa, J_ab], [J_ba, J_bb]] the inverse of the joint covariance, the log-likelihood ratio is
    -x'J_ab y - x'(J_aa - C_a^-1)x / 2 - y'(J_bb - C_b^-1)y / 2, times the number of pairs.
    """
    identity = ridge * jnp.eye(moments.aa.shape[0], dtype=moments.aa.dtype)
    a, b, cross = moments.aa + identity, moments.bb + identity, _SHRINKAGE * related * moments.ab
    (inverse_a, volume_a), (inverse_b, _) = _inverse(a), _inverse(b)
    onto_b = matmul(cross, inverse_b)  # regression of phi_a on phi_b
    precision_a, volume = _inverse(a - matmul(onto_b, cross.T))
    count = jnp.maximum(moments.weight, 1)
    return _Model(
        cross=count * matmul(precision_a, onto_b),
        quadratic_a=count / 2 * (precision_a - inverse_a),
        quadratic_b=count / 2 * matmul(onto_b.T, matmul(precision_a, onto_b)),  # J_bb - C_b^-1, by Woodbury's identity
        constant=(volume_a - volume) / 2,
    )


def likelihood_ratios(
    x: Array, y: Array, pairs: Pairs, folds: tuple[Array, Array], ridge: Array, related: Array
) -> tuple[Array, Array]:
    """Log-likelihood ratios of all pairs of rows of two networks, each by two models.

    Args:
        x: kernel features of network a, (n, r).
        y: kernel features of network b, (n, r).
        pairs: known pairs, (n,); a pair is in one fold of both networks.
        folds: the fold of every sample of a and of b, (n,); a fold outside 0 .. FOLDS - 1 is never left out.
        ridge: see `Problem`.
        related: see `Problem`.

    Returns:
        Two arrays (n, n): by the model without the fold of the row, and by that without the fold of the column.
    """
    partners = y[pairs.partner]
    total = _moments(x, partners, pairs.weight)

    def quadratic(rows: Array, form: Array) -> Array:
        return jnp.sum(matmul(rows, form) * rows, -1)

    def step(carry: tuple[Array, Array], fold: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        part = _moments(x, partners, jnp.where(folds[0] == fold, pairs.weight, 0))
        model = _fit(jax.tree.map(jnp.subtract, total, part), ridge, related)
        of_rows, of_columns = carry
        of_rows = jnp.where((folds[0] == fold)[:, None], matmul(x, model.cross), of_rows)
        of_columns = jnp.where((folds[1] == fold)[:, None], matmul(y, model.cross.T), of_columns)
        c, d = quadratic(x, model.quadratic_a), quadratic(y, model.quadratic_b) - model.constant
        return (of_rows, of_columns), (c, d)

    (of_rows, of_columns), (c, d) = lax.scan(step, (jnp.zeros_like(x), jnp.zeros_like(y)), jnp.arange(FOLDS))
    # c and d, (FOLDS, n), by the model of the row's fold and by that of the column's.
    each = jnp.arange(x.shape[0])
    rows = matmul(of_rows, y.T) - c[folds[0], each][:, None] - d[folds[0]]
    columns = matmul(x, of_columns.T) - c[folds[1]].T - d[folds[1], each][None]
    return rows, columns


def draw_folds(key: Array, pairs: Pairs, is_landmark: Array) -> tuple[Array, Array]:
    """Random folds of the samples of two networks; both samples of a known pair are in the same one.

    Landmarks are in none: they are right, and never left out.
    """
    n = pairs.partner.shape[-1]
    of_a, of_b = jax.random.randint(key, (2, n), 0, FOLDS)
    of_a = jnp.where(is_landmark, FOLDS, of_a)
    known = jnp.where(pairs.weight > 0, pairs.partner, n)
    return of_a, of_b.at[known].set(of_a, mode="drop")


def partial_assignment(evidence: Array, null: Array) -> Array:
    """Probabilities of a partial one-to-one assignment, by Sinkhorn iterations with a dustbin for rows and columns.

    Args:
        evidence: log-likelihood ratios (n, n).
        null: log prior odds against any one candidate: what the evidence for a partner has to exceed.

    Returns:
        P (n, n) >= 0; rows and columns sum to at most 1, the rest is the probability of having no partner.
    """

    def normalize(potential: Array, axis: int) -> Array:
        total = jax.nn.logsumexp(evidence + potential, axis, keepdims=True)
        return -jnp.logaddexp(total, null / 2)

    def step(column: Array, _: None) -> tuple[Array, None]:
        return normalize(normalize(column, 1), 0), None

    column = lax.scan(step, jnp.zeros_like(evidence[:1]), None, length=_SINKHORN_STEPS)[0]
    return jnp.exp(evidence + normalize(column, 1) + column)


def _known_matrix(problem: Problem, p: Array) -> tuple[Array, Array]:
    """Landmarks of the networks of pair p, a matrix (n, n) of 0 and 1, and the pairs of samples they leave possible."""
    a, b = problem.network[p]
    landmarks = jax.tree.map(lambda values: values[p], problem.landmarks)
    n = landmarks.partner.shape[-1]
    columns = jnp.where(landmarks.weight > 0, landmarks.partner, n)
    one_hot = jax.nn.one_hot(columns, n, dtype=landmarks.weight.dtype)
    rows, columns = problem.valid[a] & ~jnp.any(one_hot > 0, 1), problem.valid[b] & ~jnp.any(one_hot > 0, 0)
    return one_hot, rows[:, None] & columns[None]


def _direct(problem: Problem, pairs: Pairs, key: Array, p: Array) -> tuple[Array, Array]:
    """Probabilities (n, n) from the evidence of the two networks of pair p alone, for rows and for columns."""
    a, b = problem.network[p]
    own = jax.tree.map(lambda values: values[p], pairs)
    folds = draw_folds(jax.random.fold_in(key, p), own, problem.landmarks.weight[p] > 0)
    one_hot, possible = _known_matrix(problem, p)
    rows, columns = (jnp.sum(jnp.any(possible, axis), dtype=problem.phi.dtype) for axis in (1, 0))
    null = jnp.log(jnp.sqrt(jnp.maximum(rows * columns, 1)) * (1 - problem.prior) / problem.prior)

    def assigned(evidence: Array) -> Array:
        return partial_assignment(jnp.where(possible, evidence, _NEVER), null) + one_hot

    rows, columns = likelihood_ratios(problem.phi[a], problem.phi[b], own, folds, problem.ridge, problem.related[p])
    return assigned(rows), assigned(columns)


@jax.jit
def run_round(problem: Problem, pairs: Pairs, key: Array) -> tuple[Matches, Array]:
    """One round: probabilities from the known pairs, over all bridges, and the best candidates of every sample.

    The probability of a pair (i, j) of networks a and b is an average over paths: directly, and by way of any sample
    of another network c, sum_k P_ac(i, k) P_cb(k, j), both as seen from a and from b. A path has as much weight as
    information: the mean over queries of its largest probability.

    Returns:
        The best candidates, and the probabilities (P, n, n).
    """
    num_networks, n = problem.valid.shape
    number = problem.network.shape[0]
    rows, columns = lax.map(lambda p: _direct(problem, pairs, key, p), jnp.arange(number))
    # directed[a, b] are the probabilities of pairs of a and b as seen from a: rows are samples of a.
    directed = jnp.zeros((num_networks, num_networks, n, n), problem.phi.dtype)
    a, b = problem.network.T
    directed = directed.at[a, b].set(rows).at[b, a].set(jnp.swapaxes(columns, -1, -2))

    def average(p: Array) -> Array:
        a, b = problem.network[p]
        queries = problem.valid[a] & (problem.landmarks.weight[p] == 0)

        def add(carry: tuple[Array, Array], path: Array) -> tuple[Array, Array]:
            weight = jnp.mean(jnp.where(queries, jnp.max(path, 1), 0))
            return carry[0] + weight * path, carry[1] + weight

        def bridge(carry: tuple[Array, Array], c: Array) -> tuple[tuple[Array, Array], None]:
            carry = add(carry, matmul(directed[a, c], directed[c, b]))
            return add(carry, matmul(directed[b, c], directed[c, a]).T), None

        carry = add((jnp.zeros((n, n), rows.dtype), jnp.zeros((), rows.dtype)), directed[a, b])
        carry = add(carry, directed[b, a].T)
        if problem.bridges.size:  # without a compiler, jax has no scan over nothing
            carry = lax.scan(bridge, carry, problem.bridges[p])[0]
        total, weight = carry
        # Landmarks stay what they are, whatever the other networks say of them.
        one_hot, possible = _known_matrix(problem, p)
        return jnp.where(possible, total / jnp.maximum(weight, jnp.finfo(rows.dtype).tiny), one_hot)

    probabilities = lax.map(average, jnp.arange(number))
    return best_candidates(probabilities), probabilities


def best_candidates(probabilities: Array) -> Matches:
    """The most probable partner of every row and every column, and its probability."""
    return Matches(
        jnp.argmax(probabilities, 2).astype(jnp.int32),
        jnp.max(probabilities, 2),
        jnp.argmax(probabilities, 1).astype(jnp.int32),
        jnp.max(probabilities, 1),
    )


@jax.jit
def next_pairs(landmarks: Pairs, matches: Matches) -> Pairs:
    """The landmarks, and mutual best candidates weighted by their confidence, as known pairs of the next round."""
    is_landmark = landmarks.weight > 0
    weight = jnp.where(mutual(matches), jnp.minimum(matches.confidence_ab, 1), 0)
    return Pairs(
        jnp.where(is_landmark, landmarks.partner, matches.partner_ab), jnp.where(is_landmark, landmarks.weight, weight)
    )


def mutual(matches: Matches) -> Array:
    """Whether each sample of a is the best candidate of its best candidate, shape (P, n)."""
    back = jnp.take_along_axis(matches.partner_ba, matches.partner_ab, -1)
    return (back == jnp.arange(back.shape[-1], dtype=back.dtype)[None]) & (matches.confidence_ab > 0)


@jax.jit
def landmark_ranks(problem: Problem) -> Array:
    """Mean rank, 0 (best) .. 1, of held-out landmarks among all samples of the other network, shape (P,)."""

    def mean_rank(p: Array) -> Array:
        a, b = problem.network[p]
        own = jax.tree.map(lambda values: values[p], problem.landmarks)
        known = own.weight > 0
        # Folds of about the same size, whatever their number: consecutive landmarks are in different folds.
        of_a = jnp.where(known, jnp.cumsum(known) % FOLDS, -1)
        of_b = jnp.full_like(of_a, -1).at[jnp.where(known, own.partner, known.size)].set(of_a, mode="drop")
        one = jnp.ones((), problem.phi.dtype)
        rows, columns = likelihood_ratios(problem.phi[a], problem.phi[b], own, (of_a, of_b), problem.ridge, one)

        def rank(evidence: Array, candidates: Array) -> Array:
            """Mean rank of the entry of the true partner in each row; ties count half."""
            above = jnp.where(candidates[None], jnp.sign(evidence - true[:, None]) + 1, 0) / 2
            others = jnp.sum(candidates, dtype=evidence.dtype) - 1
            ranks = (jnp.sum(above, 1) - 0.5) / jnp.maximum(others, 1)
            return jnp.sum(jnp.where(known, ranks, 0)) / jnp.maximum(jnp.sum(known, dtype=ranks.dtype), 1)

        true = jnp.take_along_axis(rows, own.partner[:, None], 1)[:, 0]
        rank_in_b = rank(rows, problem.valid[b])
        true = jnp.take_along_axis(columns, own.partner[:, None], 1)[:, 0]
        return (rank_in_b + rank(columns.T[own.partner], problem.valid[a])) / 2

    return lax.map(mean_rank, jnp.arange(problem.network.shape[0]))


@partial(jax.jit, static_argnames="rank")
def kernel_features(block: Array, rows: Array, rank: int) -> Array:
    """Features (n, rank) whose inner products approximate a centered kernel, by Nystrom's method.

    A wide kernel is nearly constant: it is centered before its eigenvectors are taken, or rounding would hide them.

    Args:
        block: kernel between m inducing samples, (m, m).
        rows: kernel between all samples and the inducing ones, (n, m).
        rank: number of leading eigenvectors, at most m.
    """
    mean = jnp.mean(block, 0, keepdims=True)
    rows = rows - jnp.mean(rows, 1, keepdims=True) - (mean - jnp.mean(mean))
    block = block - mean.T - (mean - jnp.mean(mean))
    values, vectors = jnp.linalg.eigh(block)
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    usable = values > block.shape[0] * jnp.finfo(block.dtype).eps * values[0]
    inverse_root = jnp.where(usable, 1 / jnp.sqrt(jnp.where(usable, values, 1)), 0)
    phi = matmul(rows, vectors * inverse_root[None])
    return phi - jnp.mean(phi, 0, keepdims=True)
