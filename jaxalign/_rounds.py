"""Rounds of matching: candidates from the evidence of two networks, over all bridges, and the pairs of the next round.

Everything here is shape-stable and jitted once per problem: K networks padded to n samples, P = K (K - 1) / 2 pairs of
networks a < b. `matching` decides what the known pairs are and what to make of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign import _candidates, _evidence
from jaxalign._candidates import BUCKETS, NEVER, Candidates, compose, largest, of_the_other_side, spread
from jaxalign._evidence import Pairs

Tree = TypeVar("Tree")

# Averages over paths are raised to this power, and assigned again: paths that agree say more than each of them.
_AGREEMENT = 1.5


class Problem(NamedTuple):
    """What stays the same in all rounds."""

    phi: Array  # (K, n, r) centered kernel features, rows of padding are 0
    valid: Array  # (K, n) False: padding
    landmarks: Pairs  # (K, K, n) from any network to any other
    network: Array  # (P, 2) indices a < b of the networks of each pair
    bridges: Array  # (P, K - 2) indices of the other networks, or (P, 0)
    related: Array  # (P,) 0 or 1: whether landmarks give evidence at all
    ridge: Array  # lambda
    prior: Array  # prior probability that a sample has a partner

    @property
    def queries(self) -> Array:
        """The samples of each network whose partner in each other is searched, (K, K, n)."""
        return self.valid[:, None] & (self.landmarks.weight == 0)

    def null(self, a: Array, b: Array) -> Array:
        """Log prior odds against any one candidate."""
        rows, columns = (jnp.maximum(jnp.sum(self.queries[ab], dtype=self.phi.dtype), 1) for ab in ((a, b), (b, a)))
        return jnp.log(jnp.sqrt(rows * columns) * (1 - self.prior) / self.prior)


class Proposals(NamedTuple):
    """Candidates after a round, for all ordered pairs of networks (a, b); all of shape (K, K, n, k)."""

    column: Array  # sample of b, for each sample of a
    weight: Array  # probability, sharpened where paths agree, in decreasing order: as a known pair of the next round
    confidence: Array  # average over all paths


def _at(tree: Any, *index: Array) -> Any:
    return jax.tree.map(lambda values: values[index], tree)


def _direct(problem: Problem, pairs: Pairs, key: Array, p: Array) -> tuple[Candidates, Candidates]:
    """Candidates from the evidence of the two networks of pair p alone, with their probabilities, from a and from b."""
    a, b = problem.network[p]
    own = _at(pairs, a, b)
    order_a, order_b = _evidence.order_by_fold(jax.random.fold_in(key, p), own)
    # Landmarks are right, and never left out.
    left_out = jnp.where(problem.landmarks.weight[a, b] > 0, 0, own.weight)
    rows, columns = (_evidence.by_fold(order) for order in (order_a, order_b))
    models = _evidence.held_out_models(
        problem.phi[a][rows],
        problem.phi[b][columns],
        own.weight[rows],
        left_out[rows],
        problem.ridge,
        problem.related[p],
    )
    return _one_way(problem, models, order_a, a, b), _one_way(problem, models.reversed, order_b, b, a)


def _one_way(problem: Problem, models: _evidence.Model, order: Array, a: Array, b: Array) -> Candidates:
    """Candidates in b of all samples of a, with their probabilities, from the evidence of the two networks alone."""
    rows, columns = problem.queries[a, b], problem.queries[b, a]

    def visit(evidence: Array, number: Array) -> tuple[Candidates, Array, Array]:
        evidence = jnp.where(rows[number][:, None] & columns[None], evidence, NEVER)
        found = largest(evidence)
        best = found.value[:, :1]
        others = jnp.sum(jnp.exp(evidence - best), 1) - jnp.sum(jnp.exp(found.value - best), 1)
        rest = jnp.where(others > 0, best[:, 0] + jnp.log(jnp.where(others > 0, others, 1)), NEVER)
        return found, rest, number

    *visited, number = _evidence.visit_evidence(visit, models, problem.phi[a], order, problem.phi[b])
    found, rest = jax.tree.map(lambda values: jnp.zeros_like(values).at[number].set(values), tuple(visited))
    probability = _candidates.partial_assignment(found, rest, problem.null(a, b), columns)
    return Candidates(*_known_first(problem, a, b, found.column, probability))


def _known_first(problem: Problem, a: Array, b: Array, column: Array, *values: Array) -> tuple[Array, ...]:
    """Candidates of the samples of a and their values, where landmarks have their partner alone."""
    known = _at(problem.landmarks, a, b)
    first = jnp.arange(column.shape[1])[None] == 0
    is_known = known.weight[:, None] > 0
    column = jnp.where(is_known & first, known.partner[:, None], column)
    return column, *(jnp.where(is_known, first.astype(value.dtype), value) for value in values)


@jax.jit
def run_round(problem: Problem, pairs: Pairs, key: Array) -> Proposals:
    """One round: candidates from the known pairs, over all bridges.

    The probability of a pair (i, j) of networks a and b is an average over paths: directly, and by way of any sample
    of another network c, sum_k P_ac(i, k) P_cb(k, j), both as seen from a and from b. A path has as much weight as
    information: the mean over queries of the largest probability, multiplied over its steps.
    """
    direct = _all_ordered(problem, lambda p: _direct(problem, pairs, key, p))
    number = jnp.maximum(jnp.sum(problem.queries, -1, dtype=problem.phi.dtype), 1)
    weight = jnp.sum(direct.value[..., 0], -1, where=problem.queries) / number
    return _all_ordered(problem, lambda p: _average(problem, direct, weight, p))


def _all_ordered(problem: Problem, of_pair: Callable[[Array], tuple[Tree, Tree]]) -> Tree:
    """Arrays (K, K, ...) of all ordered pairs of networks, from those of each pair in both directions."""
    number = problem.valid.shape[0]
    a, b = problem.network.T

    def place(forward: Array, back: Array) -> Array:
        empty = jnp.zeros((number, number, *forward.shape[1:]), forward.dtype)
        return empty.at[a, b].set(forward).at[b, a].set(back)

    return jax.tree.map(place, *lax.map(of_pair, jnp.arange(a.size)))


def _average(problem: Problem, direct: Candidates, weight: Array, p: Array) -> tuple[Proposals, Proposals]:
    """Candidates of the networks of pair p by the average over all paths, from a and from b."""
    a, b = problem.network[p]
    (ab, weight_ab), (ba, weight_ba) = (_over_paths(problem, direct, weight, p, *ends) for ends in ((a, b), (b, a)))
    total = jnp.maximum(weight_ab + weight_ba, jnp.finfo(weight_ab.dtype).tiny)

    def both_sides(candidates: Candidates, others: Candidates, a: Array, b: Array) -> Proposals:
        average = (candidates.value + of_the_other_side(candidates, others)) / total
        sharpened = _sharpened(problem, Candidates(candidates.column, average), a, b)
        sharpened, order = lax.top_k(sharpened, sharpened.shape[1])
        column, average = (jnp.take_along_axis(values, order, 1) for values in (candidates.column, average))
        return Proposals(*_known_first(problem, a, b, column, sharpened, average))

    return both_sides(ab, ba, a, b), both_sides(ba, ab, b, a)


def _sharpened(problem: Problem, average: Candidates, a: Array, b: Array) -> Array:
    """Partial assignment of averages over paths to the power `_AGREEMENT`, (n, k)."""
    rows, columns = problem.queries[a, b], problem.queries[b, a]
    log_number = jnp.log(jnp.maximum(jnp.sum(columns, dtype=average.value.dtype), 1))

    def evidence(value: Array) -> Array:
        positive = rows[:, None] & (value > 0)
        log_ratio = _AGREEMENT * (log_number + jnp.log(jnp.where(positive, value, 1)))
        return jnp.where(positive, log_ratio, NEVER)

    rest = jnp.clip(1 - jnp.sum(average.value, 1, keepdims=True), 0, 1)
    # What is left of a row is spread evenly over the other columns.
    rest = evidence(rest)[:, 0] - (_AGREEMENT - 1) * log_number
    return _candidates.partial_assignment(
        Candidates(average.column, evidence(average.value)), rest, problem.null(a, b), columns
    )


def _over_paths(
    problem: Problem, direct: Candidates, weight: Array, p: Array, a: Array, b: Array
) -> tuple[Candidates, Array]:
    """Candidates in b of the samples of a with weighted sums over paths as seen from a, and the sum of weights."""
    n = problem.valid.shape[1]
    queries, columns = problem.queries[a, b], problem.queries[b, a]

    def tile(rows: Array) -> Candidates:
        scores = weight[a, b] * spread(_at(direct, a, b, rows), n)

        def bridge(scores: Array, c: Array) -> tuple[Array, None]:
            over = compose(_at(direct, a, c, rows), _at(direct, c, b))
            return scores + weight[a, c] * weight[c, b] * spread(over, n), None

        if problem.bridges.size:  # without a compiler, jax has no scan over nothing
            scores = lax.scan(bridge, scores, problem.bridges[p])[0]
        return largest(jnp.where(queries[rows][:, None] & columns[None], scores, 0))

    found = lax.map(tile, jnp.arange(n).reshape(-1, BUCKETS))
    bridges = problem.bridges[p]
    total = weight[a, b] + jnp.sum(weight[a, bridges] * weight[bridges, b])
    return jax.tree.map(lambda values: values.reshape(n, -1), found), total


@jax.jit
def next_pairs(landmarks: Pairs, proposals: Proposals) -> Pairs:
    """The landmarks, and mutual best candidates with their weights, as known pairs of the next round."""
    is_landmark = landmarks.weight > 0
    partner, weight = proposals.column[..., 0], proposals.weight[..., 0]
    back = jnp.take_along_axis(jnp.swapaxes(partner, 0, 1), partner, -1)
    mutual = (back == jnp.arange(back.shape[-1], dtype=back.dtype)[None, None]) & (weight > 0)
    return Pairs(
        jnp.where(is_landmark, landmarks.partner, partner),
        jnp.where(is_landmark, landmarks.weight, jnp.where(mutual, jnp.minimum(weight, 1), 0)),
    )


@partial(jax.jit, static_argnames="most")
def landmark_ranks(problem: Problem, key: Array, most: int) -> Array:
    """Mean rank, 0 (best) .. 1, of held-out landmarks among all samples of the other network, shape (P,).

    Args:
        problem: networks and landmarks.
        key: for the folds in which landmarks are held out.
        most: the largest number of landmarks of two networks.
    """
    searched = min(_evidence.padded_size(most), problem.valid.shape[1])

    def mean_rank(p: Array) -> Array:
        a, b = problem.network[p]
        known = _at(problem.landmarks, a, b)
        order_a, order_b = (order[:searched] for order in _evidence.order_by_fold(jax.random.fold_in(key, p), known))
        rows, columns = _evidence.by_fold(order_a), _evidence.by_fold(order_b)
        weight, one = known.weight[rows], jnp.ones((), problem.phi.dtype)
        models = _evidence.held_out_models(
            problem.phi[a][rows], problem.phi[b][columns], weight, weight, problem.ridge, one
        )

        def one_way(models: _evidence.Model, order: Array, a: Array, b: Array) -> Array:
            landmarks = _at(problem.landmarks, a, b)

            def rank(evidence: Array, rows: Array) -> Array:
                """Rank of the true partner of each row; ties count half."""
                true = jnp.take_along_axis(evidence, landmarks.partner[rows][:, None], 1)
                above = jnp.where(problem.valid[b][None], jnp.sign(evidence - true) + 1, 0) / 2
                others = jnp.sum(problem.valid[b], dtype=evidence.dtype) - 1
                return landmarks.weight[rows] * (jnp.sum(above, 1) - 0.5) / jnp.maximum(others, 1)

            ranks = _evidence.visit_evidence(rank, models, problem.phi[a], order, problem.phi[b])
            return jnp.sum(ranks) / jnp.maximum(jnp.sum(landmarks.weight), 1)

        return (one_way(models, order_a, a, b) + one_way(models.reversed, order_b, b, a)) / 2

    return lax.map(mean_rank, jnp.arange(problem.network.shape[0]))
