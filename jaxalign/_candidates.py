"""Sparse matrices of scores between two sets of samples: the largest entries of each row, and assignments on them.

A matrix of n x n probabilities is never formed: tiles of rows are, and of each row the best candidates are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# Candidates that are kept of each row; how many of these are steps of a path; columns are a multiple of `BUCKETS`.
CANDIDATES, STEPS, BUCKETS = 32, 16, 128
# Iterations of the partial assignment; after these, marginals are off by less than 1e-3 on the shipped features.
_SINKHORN_STEPS = 15
# Score of an impossible pair.
NEVER = -1e9


class Candidates(NamedTuple):
    """The best candidates of every row, the first is the best. Both of shape (..., n, k)."""

    column: Array
    value: Array


def largest(scores: Array) -> Candidates:
    """The `CANDIDATES` largest scores of each row, scores (t, m), m a multiple of `BUCKETS`.

    Columns are dealt to buckets, of which each gives its largest score: the first candidate is exact, another is missed
    where it shares a bucket with a better one, an eighth of them on average.
    """
    members = scores.reshape(scores.shape[0], -1, BUCKETS)
    value, bucket = lax.top_k(jnp.max(members, 1), CANDIDATES)
    member = jnp.argmax(jnp.take_along_axis(members, bucket[:, None], 2), 1)
    return Candidates(member.astype(jnp.int32) * BUCKETS + bucket, value)


def spread(candidates: Candidates, width: int) -> Array:
    """The matrix (n, width) of candidates; values of the same column are added."""
    column, value = candidates
    rows = jnp.arange(len(column))[:, None]
    return jnp.zeros((len(column), width), value.dtype).at[rows, column].add(value)


def compose(first: Candidates, second: Candidates) -> Candidates:
    """Candidates of the matrix product of the best candidates, (n, `STEPS`^2), in no order and with repetitions."""
    middle, value = (values[:, :STEPS] for values in first)
    column, weight = (values[:, :STEPS][middle] for values in second)
    return Candidates(column.reshape(len(middle), -1), (value[..., None] * weight).reshape(len(middle), -1))


def of_the_other_side(candidates: Candidates, others: Candidates) -> Array:
    """For each candidate j of row i, the value of candidate i of row j on the other side; 0 where it is none."""
    rows = jnp.arange(len(candidates.column), dtype=jnp.int32)[:, None, None]
    return jnp.sum(jnp.where(others.column[candidates.column] == rows, others.value[candidates.column], 0), -1)


def partial_assignment(evidence: Candidates, rest: Array, null: Array, possible: Array) -> Array:
    """Probabilities of a partial one-to-one assignment, by Sinkhorn iterations with a dustbin for rows and columns.

    Columns that are not among the candidates of a row count together, as if what they get were spread evenly over all.

    Args:
        evidence: log-likelihood ratios of the candidates of each row, (n, k).
        rest: log of the sum of the likelihood ratios of all other columns of each row, (n,).
        null: log prior odds against any one candidate: what the evidence for a partner has to exceed.
        possible: columns that take part, (m,).

    Returns:
        P (n, k) >= 0; rows and columns sum to at most 1, the rest is the probability of having no partner.
    """
    columns, score = evidence
    number = jnp.maximum(jnp.sum(possible, dtype=score.dtype), 1)

    def normalize(total: Array, rest: Array) -> Array:
        return -jnp.logaddexp(jnp.logaddexp(total, rest), null / 2)

    def of_rows(column: Array) -> Array:
        average = jax.nn.logsumexp(column, where=possible) - jnp.log(number)
        return normalize(jax.nn.logsumexp(score + column[columns], 1), rest + average)

    def step(column: Array, _: None) -> tuple[Array, None]:
        row = of_rows(column)
        terms = score + row[:, None]
        top = jnp.full_like(column, NEVER).at[columns].max(terms)
        total = jnp.zeros_like(column).at[columns].add(jnp.exp(terms - top[columns]))
        total = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), NEVER)
        return normalize(total, jax.nn.logsumexp(rest + row) - jnp.log(number)), None

    column = lax.scan(step, jnp.zeros(possible.shape, score.dtype), None, length=_SINKHORN_STEPS)[0]
    return jnp.exp(score + of_rows(column)[:, None] + column[columns])
