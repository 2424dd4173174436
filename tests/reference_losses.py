"""The alignment losses once more, in float64 torch: plain, and differentiated by its autograd.

Sigma is found by bisection, and one Newton step from there carries its derivative: that of the implicit function.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")  # pytest looks for doctests here, also where there is no torch


def sq_distances(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """From explicit differences."""
    y = x if y is None else y
    return ((x[:, None] - y[None]) ** 2).sum(-1)


def affinity_rate(d2: torch.Tensor, density: float, counts: torch.Tensor) -> torch.Tensor:
    """t with the mean of exp(-t D) over the counted pairs equal to the density, with its derivative."""

    def mean(t: Any, d2: torch.Tensor) -> torch.Tensor:
        return torch.exp(-t * d2)[counts].mean()

    low, high = -60.0, 60.0
    with torch.no_grad():
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if mean(torch.tensor(middle, dtype=torch.float64).exp(), d2) > density else (low, middle)
            )
        rate = torch.tensor(low, dtype=torch.float64).exp()
        slope = -(d2 * torch.exp(-rate * d2))[counts].mean()
    return rate - (mean(rate, d2) - density) / slope


def affinity(x: torch.Tensor, density: float, diagonal: str, fixed_sigma: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A and its logarithm."""
    d2 = sq_distances(x)
    counts = torch.ones_like(d2, dtype=torch.bool)
    if diagonal == "exclude":
        counts.fill_diagonal_(False)
    rate = affinity_rate(d2, density, counts)
    if fixed_sigma:
        rate = rate.detach()
    return torch.exp(-rate * d2), -rate * d2


def debiased_hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Song et al. 2012, eq. 5."""
    n = len(k)
    off = 1 - torch.eye(n, dtype=k.dtype)
    k, m = k * off, m * off
    cross = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
    return ((k * m).sum() + cross) / (n * (n - 3))


def loss_of(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    measure: str,
    density: float = 0.05,
    diagonal: str = "exclude",
    fixed_sigma: bool = False,
    landmarks: int = 0,
    temperature: float = 0.1,
) -> torch.Tensor:
    """One value a sample, or a scalar for cka."""
    if measure == "infonce":
        return contrast(x, y, density, diagonal, landmarks, temperature)
    if measure in WITHOUT_KERNEL:
        return WITHOUT_KERNEL[measure](x, y)
    (a, log_a), (b, log_b) = (affinity(z, density, diagonal, fixed_sigma) for z in (x, y))
    if measure == "cka":
        return 1 - debiased_hsic(a, b) / torch.sqrt(debiased_hsic(a, a) * debiased_hsic(b, b))
    if measure == "affinity":
        return ((a - b) ** 2).mean(1)
    own = torch.eye(len(x), dtype=torch.bool)
    log_q, log_p = (torch.log_softmax(log.masked_fill(own, -torch.inf), 1) for log in (log_a, log_b))
    return (log_p.exp() * (log_p - log_q).masked_fill(own, 0)).sum(1)


def contrast(x: Any, y: Any, density: float, diagonal: str, landmarks: int, temperature: float) -> torch.Tensor:
    """Cross-entropy of the correlations of relative features, both directions."""
    n, rows = len(x) - landmarks, []
    for z in (x, y):
        of_landmarks = sq_distances(z[n:])
        counts = torch.ones_like(of_landmarks, dtype=torch.bool)
        if diagonal == "exclude":
            counts.fill_diagonal_(False)
        a = torch.exp(-affinity_rate(of_landmarks, density, counts) * sq_distances(z[:n], z[n:]))
        a = a - a.mean(1, keepdim=True)
        rows.append(a / a.norm(dim=1, keepdim=True))
    logits = rows[0] @ rows[1].T / temperature
    right = torch.arange(n)
    both = (torch.nn.functional.cross_entropy(z, right, reduction="none") for z in (logits, logits.T))
    return sum(both) / 2


def gram(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Differences of cosines."""
    a, b = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
    return ((a @ a.T - b @ b.T) ** 2).sum(1) / (len(x) - 1)


def huber(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of a - b, elementwise."""
    return torch.nn.functional.huber_loss(a, b, reduction="none")


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Park et al. 2019, eq. 5 and 6, with distances over pairs of different samples."""
    off = ~torch.eye(len(x), dtype=torch.bool)

    def of(z: torch.Tensor) -> torch.Tensor:
        d = (z[:, None] - z[None]).masked_fill(~off[..., None], 1).norm(dim=-1)
        return (d / d[off].mean()).masked_fill(~off, 0)

    return huber(of(x), of(y)).sum(1) / (len(x) - 1)


def angles(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Park et al. 2019, eq. 7 and 8, over triples of different samples; one value for each corner."""
    n = len(x)
    index = torch.arange(n)
    j, i, k = torch.meshgrid(index, index, index, indexing="ij")
    different = (i != j) & (j != k) & (i != k)

    def of(z: torch.Tensor) -> torch.Tensor:
        e = z[None] - z[:, None]  # from j to i
        e = e / e.norm(dim=-1, keepdim=True).masked_fill(torch.eye(n, dtype=torch.bool)[..., None], 1)
        return torch.einsum("jid,jkd->jik", e, e)

    return (huber(of(x), of(y)) * different).sum((1, 2)) / ((n - 1) * (n - 2))


def procrustes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 - the sum of singular values."""
    a, b = ((z - z.mean(0)) / (z - z.mean(0)).norm() for z in (x, y))
    return 1 - torch.linalg.svdvals(a.T @ b).sum()


WITHOUT_KERNEL = {"gram": gram, "distances": distances, "angles": angles, "procrustes": procrustes}
