"""Rows compressed for a page: small integers per sample, from which JavaScript and Python compute affinities.

A row keeps its leading principal components, rounded to whole steps, and the squared length of what is left out. What
is left out of two rows is nearly orthogonal, so its squared lengths add to the squared distance of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int8

from jaxalign.affinity import rbf_affinity
from jaxalign.bandwidth import solve_sigma

# The largest code. It is that of the largest component, so all components have the same step.
_LARGEST = 127
# Rows whose exact affinities are computed to measure the error.
_MEASURED = 64


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


def compress(x: Float[np.ndarray, "n d"], num_columns: int, density: float) -> CompressedRows:
    """Features as at most `num_columns` integers per sample, with one bandwidth per sample."""
    centered = x - x.mean(0)
    _, axes = np.linalg.eigh(centered.T @ centered)
    components = centered @ axes[:, ::-1][:, :num_columns]
    step = float(np.abs(components).max()) / _LARGEST or 1.0
    codes = np.round(components / step).astype(np.int8)
    rounded = codes.astype(np.float32) * np.float32(step)
    # |x|^2 - 2 x.q + |q|^2, where q is what the codes stand for.
    rest = (centered**2).sum(1) - 2 * (components * rounded).sum(1) + (rounded**2).sum(1)
    rest = np.maximum(rest, 0).astype(np.float32)
    # Two columns that are 0 in either array add the rest of both rows to their squared distance.
    root, zero = np.sqrt(rest)[:, None], np.zeros((len(x), 1), np.float32)
    rows, columns = np.hstack([rounded, root, zero]), np.hstack([rounded, zero, root])
    sigma = solve_sigma(rows, columns, density=density, bandwidth="per_row").sigma
    return CompressedRows(codes, step, rest, np.asarray(sigma, np.float32))


def compression_error(
    x: Float[np.ndarray, "n d"], rows: CompressedRows, density: float, seed: int = 0
) -> tuple[float, float]:
    """Mean and largest absolute difference from the exact affinities, on random rows."""
    measured = np.random.default_rng(seed).permutation(len(x))[:_MEASURED]
    exact = np.asarray(rbf_affinity(x[measured], x, density=density, bandwidth="per_row"))
    errors = [np.abs(rows.affinity(int(i)) - row) for i, row in zip(measured, exact, strict=True)]
    return float(np.mean(errors)), float(np.max(errors))
