"""Centering of the matrices of pair functions, one class per centering.

Matrices are never formed: inner products of centered matrices follow from sums over the pairs i != j, see `PairSums`.
If the centering removes what depends on one sample only, f_ij may be shifted by any a_i + a_j beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxalign._linalg import matmul
from jaxalign.core.devices import over_devices


class PairSums(NamedTuple):
    """Sums over the pairs i != j of L shifted matrices f and M shifted matrices g, and their diagonals."""

    products: Array  # (L, M): sum f_ij g_ij
    rows: tuple[Array, Array]  # (n, L), (n, M): sum_j f_ij
    diagonals: tuple[Array, Array]  # (n, L), (n, M): f_ii
    shifts: tuple[Array, Array]  # (n, L), (n, M)
    weights: Array  # (n, 1): 1 for a valid sample
    num_samples: Array  # (): valid samples on all devices
    axis_name: str | None

    def dot(self, a: Array, b: Array) -> Array:
        """The product a' b over the samples of all devices."""
        return over_devices(lax.psum, matmul(a.T, b), self.axis_name)

    def total(self, a: Array) -> Array:
        """The sum over the samples of all devices."""
        return over_devices(lax.psum, jnp.sum(a, 0), self.axis_name)

    def product_of_totals(self) -> Array:
        """(sum f_ij) (sum g_ij), each over all pairs, (L, M)."""
        first, second = map(self.total, self.rows)
        return jnp.outer(first, second)

    def double_centered(self) -> Array:
        """tr(H F H G), diagonals included."""
        (d, e), n = self.diagonals, self.num_samples
        r, s = (rows + diagonal for rows, diagonal in zip(self.rows, self.diagonals, strict=True))
        totals = jnp.outer(self.total(r), self.total(s))
        return self.products + self.dot(d, e) - 2 / n * self.dot(r, s) + totals / n**2


def _off_diagonal(f: Array) -> Array:
    return jnp.where(jnp.eye(f.shape[0], dtype=bool), 0, f)


def _double_centered(f: Array) -> Array:
    rows = jnp.mean(f, 1, keepdims=True)
    return f - rows - rows.T + jnp.mean(rows)


def _subtract_mean(f: Array) -> Array:
    """The off-diagonal entries minus their mean; the diagonal is 0."""
    n = f.shape[0]
    return _off_diagonal(f - jnp.sum(_off_diagonal(f)) / (n * (n - 1)))


@dataclass(frozen=True)
class Centering:
    """No centering: the off-diagonal entries as they are. Base class of all centerings."""

    may_shift: ClassVar[bool] = False  # whether adding a_i + a_j to f_ij changes nothing
    is_double: ClassVar[bool] = False  # whether means of rows and of columns are removed
    samples_channels: ClassVar[bool] = False  # whether channels are a sample of more channels
    has_bootstrap: ClassVar[bool] = True  # whether pairs of different samples alone make an estimate

    def shift(self, means: Array, half: Array) -> Array:
        """The shift a_i of f, from its row means and half of its overall mean."""
        del half
        return jnp.zeros_like(means)

    def inner(self, sums: PairSums) -> Array:
        """The inner products of the centered matrices, (L, M)."""
        return sums.products

    def matrix(self, f: Array) -> Array:
        """The centered matrix (n, n): its inner products with other centered matrices are those of `inner`."""
        return _off_diagonal(f)


@dataclass(frozen=True)
class Pearson(Centering):
    """The off-diagonal entries minus their mean: the inner product is a covariance over pairs."""

    may_shift: ClassVar[bool] = True

    def shift(self, means: Array, half: Array) -> Array:
        """See `Centering`."""
        return jnp.broadcast_to(half, means.shape)

    def inner(self, sums: PairSums) -> Array:
        """See `Centering`."""
        return sums.products - sums.product_of_totals() / (sums.num_samples * (sums.num_samples - 1))

    def matrix(self, f: Array) -> Array:
        """See `Centering`."""
        return _subtract_mean(f)


@dataclass(frozen=True)
class Biased(Centering):
    """H F H, diagonal included (Gretton et al. 2005)."""

    may_shift: ClassVar[bool] = True
    is_double: ClassVar[bool] = True
    has_bootstrap: ClassVar[bool] = False

    def shift(self, means: Array, half: Array) -> Array:
        """See `Centering`."""
        return means - half

    def inner(self, sums: PairSums) -> Array:
        """See `Centering`."""
        return sums.double_centered()

    def matrix(self, f: Array) -> Array:
        """See `Centering`."""
        return _double_centered(f)


@dataclass(frozen=True)
class Lange(Biased):
    """H F H without its diagonal (Lange et al. 2023)."""

    def inner(self, sums: PairSums) -> Array:
        """See `Centering`."""
        n = sums.num_samples

        def centered_diagonal(rows: Array, diagonal: Array) -> Array:
            rows = rows + diagonal
            return (diagonal - 2 / n * rows + sums.total(rows)[None] / n**2) * sums.weights

        return sums.double_centered() - sums.dot(*map(centered_diagonal, sums.rows, sums.diagonals))

    def matrix(self, f: Array) -> Array:
        """See `Centering`."""
        return _off_diagonal(_double_centered(f))


@dataclass(frozen=True)
class WhitenedPearson(Biased):
    """H (D - m (1 1' - I)) H: off-diagonal entries minus their mean m, then H on both sides (Diedrichsen 2021)."""

    def inner(self, sums: PairSums) -> Array:
        """See `Centering`."""
        n = sums.num_samples

        def mean(rows: Array, shift: Array) -> Array:
            return (sums.total(rows) + 2 * (n - 1) * sums.total(shift)) / (n * (n - 1))

        first, second = map(mean, sums.rows, sums.shifts)
        return sums.double_centered() - (n - 1) * jnp.outer(first, second)

    def matrix(self, f: Array) -> Array:
        """See `Centering`."""
        return _double_centered(_subtract_mean(f))


@dataclass(frozen=True)
class Debiased(Biased):
    """U-centered (Székely & Rizzo 2014): the unbiased estimator (Song et al. 2012, eq. 5), times n (n - 3)."""

    has_bootstrap: ClassVar[bool] = True

    def inner(self, sums: PairSums) -> Array:
        """See `Centering`."""
        # At least 1: fewer samples have no value, but 0 / 0 would reach their gradient.
        less_1, less_2 = (jnp.maximum(sums.num_samples - k, 1) for k in (1, 2))
        return sums.products + sums.product_of_totals() / (less_1 * less_2) - 2 / less_2 * sums.dot(*sums.rows)

    def matrix(self, f: Array) -> Array:
        """See `Centering`; Székely & Rizzo 2014, eq. 2.2."""
        n = f.shape[0]
        f = _off_diagonal(f - jnp.mean(f))  # subtracting the mean changes only rounding errors
        rows = jnp.sum(f, 1, keepdims=True) / (n - 2)
        return _off_diagonal(f - rows - rows.T + jnp.sum(rows) / (n - 1))


@dataclass(frozen=True)
class DebiasedChannels(Debiased):
    """`Debiased`, where the channels of each representation are a random sample (Chun et al. 2025), linear kernel only.

    The kernel is a sum over channels, K = sum_q k_q, so <K, K> is a sum over pairs of channels. Pairs q = r are too
    large a part of it if channels are few: only q != r are an unbiased estimate.
    """

    samples_channels: ClassVar[bool] = True
    has_bootstrap: ClassVar[bool] = False


# By the names of the estimators and comparisons of the public functions.
CENTERINGS: dict[str, Centering] = {
    "none": Centering(),
    "pearson": Pearson(),
    "biased": Biased(),
    "lange": Lange(),
    "whitened_pearson": WhitenedPearson(),
    "debiased": Debiased(),
    "debiased_channels": DebiasedChannels(),
}
