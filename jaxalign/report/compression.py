"""Rows compressed for a page: small integers per sample, from which JavaScript and Python compute affinities.

A row keeps its leading principal components, rounded to whole steps, and the squared length of what is left out. What
is left out of two rows is nearly orthogonal, so its squared lengths add to the squared distance of the two.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8

from jaxalign.affinity import rbf_affinity
from jaxalign.bandwidth import solve_sigma

# Components at least and at most. In between two per byte of a sample: more components in larger steps, or fewer in
# smaller ones, have larger errors.
_FEWEST, _MOST, _PER_BYTE = 16, 512, 2
_LARGEST = 127  # code
# Rows whose exact affinities are computed to measure the error, and what counts as a strong affinity.
_MEASURED, _STRONG = 64, 0.2


class Error(NamedTuple):
    """Absolute differences from the exact affinities: of all, of those that are at least 0.2, and the largest."""

    mean: float
    strong: float
    largest: float


@dataclass(frozen=True)
class CompressedRows:
    """Features (n, d) as a page stores them.

    Attributes:
        codes: leading principal components, divided by the step and rounded.
        step: the unit of the codes.
        rest: squared length of what the codes leave out of each row.
        sigma: bandwidth of each row, at which its mean affinity is the density.
    """

    codes: Int8[np.ndarray, "n p"]
    step: float
    rest: Float[np.ndarray, " n"]
    sigma: Float[np.ndarray, " n"]

    def affinity(self, i: int) -> Float[np.ndarray, " n"]:
        """The affinity of all samples to sample i, to the last digit what the page computes.

        D_ij = step^2 |codes_i - codes_j|^2 + rest_i + rest_j and A_ij = exp(-D_ij / (2 sigma_i^2)); A_ii = 1.
        """
        difference = self.codes.astype(np.int64) - self.codes[i]
        rest = self.rest.astype(np.float64)
        squared = self.step**2 * (difference * difference).sum(1) + rest[i] + rest
        affinity = np.exp(-squared / (2 * float(self.sigma[i]) ** 2))
        affinity[i] = 1
        return affinity


def compress(x: Float[np.ndarray, "n d"], num_bytes: int, density: float) -> CompressedRows:
    """Features as integers that zlib compresses to about `num_bytes`, with one bandwidth per sample."""
    centered = x - x.mean(0)
    _, axes = np.linalg.eigh(centered.T @ centered)
    number = int(np.clip(_PER_BYTE * num_bytes // len(x), _FEWEST, _MOST))
    components = centered @ axes[:, ::-1][:, :number]
    codes, step = _whole_steps(components, num_bytes)
    rounded = codes.astype(np.float32) * np.float32(step)
    # |x|^2 - 2 x.q + |q|^2, where q is what the codes stand for.
    rest = (centered**2).sum(1) - 2 * (components * rounded).sum(1) + (rounded**2).sum(1)
    rest = np.maximum(rest, 0).astype(np.float32)
    # Two columns that are 0 in either array add the rest of both rows to their squared distance.
    root, zero = np.sqrt(rest)[:, None], np.zeros((len(x), 1), np.float32)
    rows, columns = np.hstack([rounded, root, zero]), np.hstack([rounded, zero, root])
    sigma = solve_sigma(rows, columns, density=density, bandwidth="per_row").sigma
    return CompressedRows(codes, step, rest, np.asarray(sigma, np.float32))


def _whole_steps(components: Float[np.ndarray, "n p"], num_bytes: int) -> tuple[Int8[np.ndarray, "n p"], float]:
    """Components in whole steps, which are as small as the number of bytes allows."""
    step = float(np.abs(components).max()) / _LARGEST or 1.0
    while True:
        codes = np.round(components / step).astype(np.int8)
        if len(zlib.compress(packed(codes), 1)) <= num_bytes or not codes.any():
            return codes, step
        step *= 1.25


def packed(codes: Int8[np.ndarray, "n p"]) -> bytes:
    """Codes component after component, which compresses better than sample after sample."""
    return codes.T.tobytes()


def compression_error(x: Float[np.ndarray, "n d"], rows: CompressedRows, density: float, seed: int = 0) -> Error:
    """The error of the affinities of all samples to random ones."""
    measured = np.random.default_rng(seed).permutation(len(x))[:_MEASURED]
    exact = np.asarray(rbf_affinity(x[measured], x, density=density, bandwidth="per_row"))
    error = np.abs(np.stack([rows.affinity(int(i)) for i in measured]) - exact)
    strong = exact >= _STRONG
    strong[np.arange(len(measured)), measured] = False  # every sample has the affinity 1 to itself
    return Error(float(error.mean()), float(error[strong].mean()) if strong.any() else 0.0, float(error.max()))
