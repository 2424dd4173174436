"""Permutations of the samples of one representation, and inner products of pair matrices under them.

Under the null, groups of samples of equal size may be exchanged (single samples are groups of size 1), or the grid of
positions of each image may be flipped and rotated. Either set of permutations is a group in the sense of
algebra, so with the identity and m random permutations P(p <= a) <= a.

All shifts of m groups of one size take the time of a few permutations: if g_k is the matrix g with its groups shifted
by k, then <f, g_k> for all k is a cross-correlation along the diagonals of f and g, computed by FFT. A few random
orders of the groups of f, each with a few of g and with all m shifts, give any number of permutations. The first order
of both is the same, so one of them is the identity. Under the null all entries are exchangeable: the distribution stays
the same if orders change places, or if all shifts grow by one. So the p-value is exact (see also Ramdas et al. 2023,
Permutation tests using arbitrary permutation distributions). Two entries that are not shifts of each other are
independent.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxalign._groups import Groups
from jaxalign._linalg import matmul

# Gathered entries, of all orders of groups, that are transformed at a time.
_GATHERED = 2**23


@dataclass(frozen=True)
class GroupExchange:
    """Whole groups are exchanged with groups that have samples at the same places, so groups of the same size.

    Attributes:
        members: the samples of the groups of each kind, (groups, size).
    """

    members: tuple[np.ndarray, ...]

    @staticmethod
    def of(groups: Groups | None, n: int) -> GroupExchange:
        """The exchange of groups; None makes every sample a group."""
        if groups is None:
            return GroupExchange((np.arange(n, dtype=np.int32)[:, None],))
        by_group = np.lexsort((groups.place, groups.number)).astype(np.int32)
        kinds: dict[bytes, list[np.ndarray]] = {}
        for members in np.split(by_group, np.cumsum(np.bincount(groups.number))[:-1]):
            kinds.setdefault(groups.place[members].tobytes(), []).append(members)
        return GroupExchange(tuple(np.stack(kind) for kind in kinds.values()))

    @property
    def movable(self) -> int:
        """The number of samples in groups that can be exchanged."""
        return sum(members.size for members in self.members if len(members) > 1)

    def has_more_than(self, number: int) -> bool:
        """Whether there are more permutations than a number."""
        found = 1
        for members in self.members:
            for k in range(2, len(members) + 1):  # stops early, as factorials are huge
                found *= k
                if found > number:
                    return True
        return False

    @property
    def is_regular(self) -> bool:
        """Whether all groups have one size, so that all can be shifted."""
        return len(self.members) == 1

    def orders(self, key: Array, number: int) -> Array:
        """The identity and random permutations, or all permutations if there are no more: (<= number + 1, n)."""
        n = sum(members.size for members in self.members)
        if not self.has_more_than(number + 1):
            parts = itertools.product(*(itertools.permutations(range(len(members))) for members in self.members))
            shuffled = [np.asarray(column) for column in zip(*parts, strict=True)]
        else:
            keys = jax.random.split(key, len(self.members))
            shuffled = [_shuffled(k, number + 1, len(members)) for k, members in zip(keys, self.members, strict=True)]
        orders = jnp.zeros((len(shuffled[0]), n), jnp.int32)
        for members, order in zip(self.members, shuffled, strict=True):
            moved = jnp.take(jnp.asarray(members), jnp.asarray(order), 0)
            orders = orders.at[:, members.reshape(-1)].set(moved.reshape(len(order), -1))
        return orders


@dataclass(frozen=True)
class GridMoves:
    """The grid of each image is flipped and, if square, rotated by quarter turns, each image for itself.

    These moves keep the distance of any two positions. Cyclic shifts would not: where the grid is wrapped, neighbors
    become distant. Maps of one network are smooth everywhere, and so are those of another, so that every pair would
    seem to agree better than with its shifts.
    """

    images: int
    height: int
    width: int

    @property
    def moves(self) -> np.ndarray:
        """All different moves of one grid, the identity first, (moves, positions)."""
        grid = np.arange(self.height * self.width, dtype=np.int32).reshape(self.height, self.width)
        turned = [np.rot90(grid, k) for k in (range(4) if self.height == self.width else (0, 2))]
        every = np.stack([np.ravel(a) for grid in turned for a in (grid, grid[:, ::-1])])
        return every[np.sort(np.unique(every, axis=0, return_index=True)[1])]

    def has_more_than(self, number: int) -> bool:
        """Whether there are more moves of all images than a number."""
        return len(self.moves) ** self.images > number

    def orders(self, key: Array, number: int) -> Array:
        """The identity and random moves, or all moves if there are no more: (<= number + 1, n)."""
        moves = self.moves
        if not self.has_more_than(number + 1):
            chosen = jnp.asarray(list(itertools.product(range(len(moves)), repeat=self.images)), jnp.int32)
        else:
            drawn = jax.random.randint(key, (number, self.images), 0, len(moves), jnp.int32)
            chosen = jnp.concatenate((jnp.zeros((1, self.images), jnp.int32), drawn))
        first = jnp.arange(self.images, dtype=jnp.int32)[:, None] * moves.shape[1]
        return (jnp.take(jnp.asarray(moves), chosen, 0) + first[None]).reshape(len(chosen), -1)


Permutations = GroupExchange | GridMoves


def permuted_products(x: Array, y: Array, permutations: Permutations, key: Array, number: int) -> Array:
    """<F, G permuted> of matrices (L, n, n) and (M, n, n), the identity first: (at most number + 1, L, M)."""
    if isinstance(permutations, GroupExchange) and permutations.is_regular and permutations.has_more_than(number + 1):
        (members,) = permutations.members
        return _products_of_shifts(x, y, jnp.asarray(members), key, number)
    return _products_of_orders(x, y, permutations.orders(key, number))


def _shuffled(key: Array, number: int, n: int) -> Array:
    """The identity and number - 1 random permutations, (number, n)."""
    identity = jnp.arange(n, dtype=jnp.int32)
    shuffled = jax.vmap(lambda k: jax.random.permutation(k, identity))(jax.random.split(key, max(number - 1, 1)))
    return jnp.concatenate((identity[None], shuffled))[:number]


@jax.jit
def _products_of_orders(x: Array, y: Array, orders: Array) -> Array:
    def products(order: Array) -> Array:
        permuted = jnp.take(jnp.take(y, order, 1), order, 2)
        return matmul(x.reshape(x.shape[0], -1), permuted.reshape(y.shape[0], -1).T)

    return lax.map(products, orders)


@partial(jax.jit, static_argnames="number")
def _products_of_shifts(x: Array, y: Array, members: Array, key: Array, number: int) -> Array:
    """Products (number + 1, L, M), of groups `members` (m, size) in random orders, with all m shifts."""
    m, size = members.shape
    needed = -(-(number + 1) // m)
    num_x = math.isqrt(needed)
    num_y = -(-needed // num_x)
    base_key, x_key, y_key, choice_key = jax.random.split(key, 4)
    base = jax.random.permutation(base_key, members)

    def orders(key: Array, number: int) -> Array:
        """The base and random orders of it, (number, size, m)."""
        return jnp.swapaxes(jnp.take(base, _shuffled(key, number, m), 0), 1, 2)

    orders_x, orders_y = orders(x_key, num_x), orders(y_key, num_y)
    num_offsets = m // 2 + 1
    rows, columns = x.shape[0] * num_x, y.shape[0] * num_y
    gathered = (rows + columns) * size * size * m
    at_a_time = min(max(_GATHERED // gathered, 1), num_offsets)

    def add(total: Array, piece: Array) -> tuple[Array, None]:
        offset = piece * at_a_time + jnp.arange(at_a_time, dtype=jnp.int32)
        # Symmetric matrices: offset m - d repeats offset d.
        weight = jnp.where((offset == 0) | (2 * offset == m), 1, 2) * (offset < num_offsets).astype(jnp.int32)
        weight = weight.astype(x.dtype)[None, :, None, None]
        real, imaginary = _spectra(x, orders_x, offset)
        a = _rows_by_frequency(jnp.stack((real * weight, imaginary * weight), 1))
        real, imaginary = _spectra(y, orders_y, offset)
        # conj(a) b, in real arithmetic.
        b = [_rows_by_frequency(jnp.stack(parts, 1)) for parts in ((real, imaginary), (imaginary, -real))]
        return total + matmul(a, jnp.swapaxes(jnp.concatenate(b, 1), 1, 2)), None

    start = jnp.zeros((num_offsets, rows, 2 * columns), x.dtype)
    total, _ = lax.scan(add, start, jnp.arange(-(-num_offsets // at_a_time), dtype=jnp.int32))
    spectrum = lax.complex(total[..., :columns], total[..., columns:])
    shifted = jnp.fft.irfft(spectrum, m, axis=0).reshape(m, x.shape[0], num_x, y.shape[0], num_y)
    products = jnp.transpose(shifted, (2, 4, 0, 1, 3)).reshape(-1, x.shape[0], y.shape[0])
    chosen = 1 + jax.random.permutation(choice_key, len(products) - 1)[:number]
    observed = matmul(x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1).T)
    return jnp.concatenate((observed[None], jnp.take(products, chosen, 0)))


def _spectra(matrices: Array, orders: Array, offset: Array) -> tuple[Array, Array]:
    """Fourier transforms of block diagonals along the groups, two of (matrices * orders, offsets, size^2, m / 2 + 1).

    Entry g of the diagonal at offset d holds the pairs of samples of group g with those of group g + d.
    """
    n, m = matrices.shape[-1], orders.shape[-1]
    group = (jnp.arange(m, dtype=jnp.int32)[None] + offset[:, None]) % m  # (offsets, m)
    partner = jnp.take(orders, group, 2)  # (orders, size, offsets, m)
    place = orders[:, None, :, None, :] * n + jnp.transpose(partner, (0, 2, 1, 3))[:, :, None]
    entries = jnp.take(matrices.reshape(-1, n * n), place, 1, mode="clip")
    spectrum = jnp.fft.rfft(entries.reshape(-1, len(offset), orders.shape[1] ** 2, m))
    return jnp.real(spectrum), jnp.imag(spectrum)


def _rows_by_frequency(parts: Array) -> Array:
    """(rows, ..., frequencies) as (frequencies, rows, everything else)."""
    return jnp.moveaxis(parts.reshape(parts.shape[0], -1, parts.shape[-1]), -1, 0)
