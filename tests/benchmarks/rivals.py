"""The same affinities without jaxalign, in torch: each as fast as one would write it.

torch is imported when a function is called: pytest imports this file to look for doctests.
"""

from __future__ import annotations

import math
from typing import Any


def distances(x: Any) -> Any:
    """Squared distances by |a|^2 + |b|^2 - 2 a.b, in one n x n array."""
    squares = (x * x).sum(1, keepdim=True)
    result = squares + squares.T
    result.addmm_(x, x.T, beta=1.0, alpha=-2.0)
    return result.clamp_(min=0)


def careful(x: Any, sigma: float) -> Any:
    """The affinity at a given sigma, all in place."""
    return distances(x).div_(-2 * sigma * sigma).exp_()


def simple(x: Any, sigma: float) -> Any:
    """The affinity at a given sigma as it is usually written."""
    import torch

    return torch.exp(-(torch.cdist(x, x) ** 2) / (2 * sigma * sigma))


def careful_auto(x: Any, density: float, tolerance: float = 1e-5) -> Any:
    """Distances once, then bisect log sigma until the mean is within the tolerance, then the affinity."""
    import torch

    d2 = distances(x)
    low, high = math.log(float(d2[d2 > 0].min())) / 2 - 1, math.log(float(d2.max())) / 2 + 1
    while True:
        middle = (low + high) / 2
        affinity = torch.exp(d2 * (-0.5 * math.exp(-2 * middle)))
        mean = float(affinity.mean())
        if abs(mean - density) < tolerance or high - low < 1e-7:
            return affinity
        low, high = (low, middle) if mean > density else (middle, high)


def loop_of_bisections(sets: Any, density: float) -> Any:
    """The same for each set."""
    import torch

    result = torch.empty(sets.shape[0], sets.shape[1], sets.shape[1])
    for k, x in enumerate(sets):
        result[k] = careful_auto(x, density)
    return result


def loop_as_published(sets: Any, density: float, tolerance: float = 1e-5) -> Any:
    """For each set: bisect sigma, the affinity computed from the features at each step, as the published code does."""
    import torch

    result = torch.empty(sets.shape[0], sets.shape[1], sets.shape[1])
    for k, x in enumerate(sets):
        low, high = 1e-3, 1e3
        while True:
            middle = math.sqrt(low * high)
            affinity = simple(x, middle)
            mean = float(affinity.mean())
            if abs(mean - density) < tolerance or high / low < 1 + 1e-7:
                break
            low, high = (low, middle) if mean > density else (middle, high)
        result[k] = affinity
    return result


def density_in_chunks(x: Any, sigma: float, rows: int = 2048, count: int | None = None) -> float:
    """The mean affinity of the first `count` rows with all at a given sigma; so many at a time: memory is rows x n."""
    squares = (x * x).sum(1)
    total, count = 0.0, x.shape[0] if count is None else count
    for start in range(0, count, rows):
        part = x[start : min(start + rows, count)]
        d2 = squares[None, :] + squares[start : start + len(part), None]
        d2.addmm_(part, x.T, beta=1.0, alpha=-2.0).clamp_(min=0)
        total += float(d2.div_(-2 * sigma * sigma).exp_().sum())
    return total / count / x.shape[0]


def bisected_rate(d2: Any, density: float, steps: int = 24) -> Any:
    """1 / (2 sigma^2) of each matrix of squared distances, all bisected in parallel; no test waits for the device."""
    import torch

    low = d2.mean((-2, -1), keepdim=True).log() / 2 - 5
    high = low + 8
    for _ in range(steps):
        middle = (low + high) / 2
        above = (d2 * (-0.5 * torch.exp(-2 * middle))).exp_().mean((-2, -1), keepdim=True) > density
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * torch.exp(-low - high)


def careful_auto_batch(sets: Any, density: float) -> Any:
    """All sets (k, n, d) at once: distances in one batched product, then bisection of every log sigma in parallel."""
    squares = (sets * sets).sum(-1)
    d2 = squares[:, :, None] + squares[:, None, :]
    d2.baddbmm_(sets, sets.mT, beta=1.0, alpha=-2.0).clamp_(min=0)
    return d2.mul_(-bisected_rate(d2, density)).exp_()


def u_centered(k: Any) -> Any:
    """A torch kernel centered as the debiased estimator wants it (Szekely & Rizzo 2014); torch can differentiate it."""
    import torch

    n = len(k)
    off = 1 - torch.eye(n, device=k.device)
    k = k * off
    means = k.sum(1) / (n - 2)
    return (k - means - means[:, None] + means.sum() / (n - 1)) * off


def loss_and_gradient(x: Any, y: Any, density: float) -> tuple[Any, Any]:
    """1 - debiased CKA of two auto-scaled affinities, and its gradient in x; y is a constant target.

    Sigma by bisection outside of autograd, then one Newton step inside, whose derivative is the implicit one.
    """
    import torch

    def affinity(z: Any) -> Any:
        squares = (z * z).sum(1)
        d2 = torch.addmm(squares[:, None] + squares, z, z.T, alpha=-2.0).clamp(min=0)
        with torch.no_grad():
            rate = bisected_rate(d2, density)
            slope = (torch.exp(-rate * d2) * d2).mean()
        return torch.exp(-(rate + (torch.exp(-rate * d2).mean() - density) / slope) * d2)

    x = x.detach().requires_grad_(True)
    k = u_centered(affinity(x))
    with torch.no_grad():
        m = u_centered(affinity(y))
    loss = 1 - (k * m).sum() / torch.sqrt((k * k).sum() * (m * m).sum())
    loss.backward()
    return loss.detach(), x.grad


def permuted_cka_on_device(k: Any, m: Any, permutations: Any) -> Any:
    """Debiased CKA of two stored torch affinities for each permutation, centered once, without waiting in between."""
    import torch

    k, m = u_centered(k), u_centered(m)
    size = k.norm() * m.norm()
    return torch.stack([(k * m[p][:, p]).sum() / size for p in permutations])


def density_by_keops(x: Any, sigma: float) -> float:
    """The mean affinity at a given sigma, by KeOps' lazy tensors."""
    from pykeops.torch import LazyTensor

    rows, columns = LazyTensor(x[:, None, :]), LazyTensor(x[None, :, :])
    affinity = (-((rows - columns) ** 2).sum(-1) / (2 * sigma * sigma)).exp()
    return float(affinity.sum(1).sum()) / x.shape[0] ** 2


def ncut_sigma(x: Any, density: float, samples: int) -> float:
    """The sigma that ncut-pytorch finds on so many samples, with its own settings (tolerance 1e-4 on the mean)."""
    from ncut_pytorch.utils.sigma import find_sigma

    return find_sigma(x, n_sample=samples, A_degree=density)


def ncut(x: Any, density: float, samples: int) -> Any:
    """ncut-pytorch's affinity at the sigma that it finds on so many samples."""
    from ncut_pytorch.utils.math import rbf_affinity

    return rbf_affinity(x, sigma=ncut_sigma(x, density, samples))


def centred_gram(x: Any, sigma: float) -> Any:
    """The affinity less its diagonal, centred as the debiased estimator wants it (Szekely & Rizzo 2014), in place."""
    gram = careful(x, sigma).fill_diagonal_(0)
    n = gram.shape[0]
    means = gram.sum(1) / (n - 2)
    gram -= means
    gram -= means[:, None]
    gram += gram.new_tensor(float(means.sum()) / (n - 1))
    return gram.fill_diagonal_(0)


def cka_grid(first: list[Any], second: list[Any], sigmas: list[list[float]]) -> list[list[float]]:
    """Debiased CKA at known sigmas of all pairs, each pair as if it were the only one."""
    return [
        [_cosine(centred_gram(x, s), centred_gram(y, t)) for y, t in zip(second, sigmas[1], strict=True)]
        for x, s in zip(first, sigmas[0], strict=True)
    ]


def cka_grid_cached(first: list[Any], second: list[Any], sigmas: list[list[float]]) -> list[list[float]]:
    """The same with every centred affinity kept."""
    kept = [
        [centred_gram(x, s) for x, s in zip(sets, own, strict=True)]
        for sets, own in zip((first, second), sigmas, strict=True)
    ]
    return [[_cosine(a, b) for b in kept[1]] for a in kept[0]]


def _cosine(a: Any, b: Any) -> float:
    a, b = a.ravel(), b.ravel()
    return float(a.dot(b) / (a.dot(a) * b.dot(b)).sqrt())


def permuted_cka(k: Any, m: Any, permutations: Any) -> Any:
    """Debiased CKA of two stored affinities (numpy) for each permutation of the second's samples, one by one."""
    import numpy as np

    def hsic(k: Any, m: Any) -> float:
        n = len(k)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        cross = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
        return ((k * m).sum() + cross) / (n * (n - 3))

    values = []
    for p in permutations:
        permuted = m[np.ix_(p, p)]
        values.append(hsic(k, permuted) / np.sqrt(hsic(k, k) * hsic(permuted, permuted)))
    return np.asarray(values)


def permuted_cka_cached(k: Any, m: Any, permutations: Any) -> Any:
    """The same as a careful person writes it: centred once, as permutations change neither centring nor norms."""
    import numpy as np

    def centred(k: Any) -> Any:
        n = len(k)
        k = k - np.diag(np.diag(k))
        means = k.sum(0) / (n - 2)
        k = k - means - means[:, None] + means.sum() / (n - 1)
        return k - np.diag(np.diag(k))

    k, m = centred(k), centred(m)
    size = np.linalg.norm(k) * np.linalg.norm(m)
    return np.asarray([np.vdot(k, m[np.ix_(p, p)]) / size for p in permutations])


# 1 - debiased CKA of RBF affinities as one writes it by hand. With a density, sigma is found by Newton steps in log
# gamma, of which the last one carries the derivative; without, sigma is a fixed share of the mean distance, a constant.
_SHARE = 0.3
_NEWTON_STEPS = 6


def torch_loss(x: Any, y: Any, density: float | None = None) -> Any:
    """In torch; y needs no gradient."""
    import torch

    def affinity(x: Any) -> Any:
        d2 = torch.cdist(x, x) ** 2
        with torch.no_grad():
            gamma = 1 / (2 * _SHARE * d2.sum() / (len(x) * (len(x) - 1)))
            for _ in range(_NEWTON_STEPS if density else 0):
                mean, slope = _density(torch.exp(-gamma * d2), d2)
                gamma = gamma * torch.exp(torch.log(mean / density) * mean / (gamma * slope))
        if density:
            mean, slope = _density(torch.exp(-gamma * d2), d2)
            gamma = gamma + (mean - density) / slope.detach()
        a = torch.exp(-gamma * d2)
        return a - torch.diag(torch.diag(a))

    a = affinity(x)
    with torch.no_grad():
        b = affinity(y)
        size_y = _hsic(b, b)
    return 1 - _hsic(a, b) / torch.sqrt(_hsic(a, a) * size_y)


def jax_loss(x: Any, y: Any, density: float | None = None) -> Any:
    """In JAX."""
    import jax
    import jax.numpy as jnp

    n = len(x)

    def affinity(x: Any) -> Any:
        squares = jnp.sum(x * x, 1)
        d2 = jnp.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0)
        d2 = jnp.where(jnp.eye(n, dtype=bool), 0, d2)
        constant = jax.lax.stop_gradient(d2)
        gamma = 1 / (2 * _SHARE * jnp.sum(constant) / (n * (n - 1)))
        for _ in range(_NEWTON_STEPS if density else 0):
            mean, slope = _density(jnp.exp(-gamma * constant), constant)
            gamma = gamma * jnp.exp(jnp.log(mean / density) * mean / (gamma * slope))
        if density:
            mean, slope = _density(jnp.exp(-gamma * d2), d2)
            gamma = gamma + (mean - density) / jax.lax.stop_gradient(slope)
        return jnp.where(jnp.eye(n, dtype=bool), 0, jnp.exp(-gamma * d2))

    a, b = affinity(x), affinity(jax.lax.stop_gradient(y))
    return 1 - _hsic(a, b) / jnp.sqrt(_hsic(a, a) * _hsic(b, b))


def _density(a: Any, d2: Any) -> tuple[Any, Any]:
    """The mean of an affinity off the diagonal, and minus its derivative by gamma."""
    pairs = len(a) * (len(a) - 1)
    return (a.sum() - len(a)) / pairs, (a * d2).sum() / pairs


def _hsic(a: Any, b: Any) -> Any:
    """Song et al. 2012, eq. 5, of matrices without diagonal."""
    n = len(a)
    rows = a.sum(0) @ b.sum(0)
    return ((a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))
