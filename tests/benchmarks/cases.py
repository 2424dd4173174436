"""What is measured, and the targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign

from . import accuracy, curves, cuts, floor, peers, rivals, similarity, tiled, training, wide
from .timing import Result, compare, import_seconds, milliseconds

DENSITY = 0.05


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    n: int = 4096
    d: int = 768
    sets: int = 64
    set_n: int = 256
    set_d: int = 384
    rounds: int = 15
    slow_rounds: int = 5  # for what takes seconds
    calls: int = 100  # of what takes a millisecond
    imports: int = 9
    tiled_n: int = 16384
    tiled_widths: tuple[int, ...] = (64, 256)
    training: tuple[int, int] = (1024, 768)  # batch, d
    grid: tuple[int, int, int] = (12, 4096, 768)  # layers of either model, n, d
    permutations: tuple[int, int] = (10_000, 512)  # how many, n
    wide: tuple[int, int] = (64, 2048)  # n, d above it
    images: tuple[int, int] = (12, 1)  # how many, and the stride of their patches
    conditions: int = 1024  # of an RSA against rsatoolbox
    accuracy: tuple[int, int] = (1024, 256)  # n, d
    curve_n: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    curve_d: tuple[int, ...] = (64, 16, 256, 1024)  # the first is that of the curve in n
    curve_layers: tuple[int, ...] = (2, 4, 8, 16)
    processes: int = 16384  # n of one process against two, 0: not measured
    # what, (n, d) or (n, d, layers), and the MB by which memory may grow at its peak
    memory: tuple[tuple[str, tuple[int, ...], float | None], ...] = (
        ("solve", (16384, 64), 100.0),
        ("solve", (16384, 256), 100.0),
        ("solve", (100_000, 64), 250.0),
        ("gradient", (16384, 64), 400.0),
        ("loss", (16384, 64), 400.0),
        ("cut", (20_000, 64), 500.0),
        ("torch-affinity", (8192, 256), None),
        ("ncut-affinity", (8192, 256), None),
        ("affinity", (8192, 256), 560.0),  # twice the result, 268 MB
        ("torch-grid", (4096, 768, 12), None),
        ("grid", (4096, 768, 12), 160.0),  # a tenth of that
        ("grid-alone", (50_000, 256, 4), 500.0),
    )


QUICK = Sizes(
    n=1024,
    d=128,
    sets=8,
    rounds=3,
    slow_rounds=2,
    calls=10,
    imports=3,
    tiled_n=2048,
    tiled_widths=(16,),
    training=(128, 64),
    images=(2, 4),
    grid=(3, 512, 64),
    permutations=(500, 128),
    wide=(16, 64),
    conditions=128,
    accuracy=(128, 16),
    curve_n=(256, 512, 1024),
    curve_d=(16, 32),
    curve_layers=(2,),
    processes=0,
    memory=(),
)


def make_features(*shape: int) -> np.ndarray:
    """Features of shape (..., n, d) as networks have them: correlated channels, an offset, a long tail; float32."""
    *batch, n, d = shape
    rng = np.random.default_rng(0)
    rank = min(64, d)
    mix = rng.normal(size=(rank, d)) / np.arange(1, rank + 1)[:, None] ** 0.5
    x = rng.standard_t(5, size=(*batch, n, rank)) @ mix + 0.1 * rng.normal(size=shape) + rng.normal(size=d)
    return x.astype(np.float32)


def density_reached(x: np.ndarray, sigma: float) -> float:
    """The mean affinity at a sigma, in float64, block after block of rows."""
    x = x.astype(np.float64)
    x -= x.mean(0)
    squares = np.sum(x * x, 1)
    total = 0.0
    for start in range(0, len(x), 512):
        rows = slice(start, start + 512)
        d2 = np.maximum(squares[rows, None] + squares - 2 * x[rows] @ x.T, 0)
        own = np.arange(len(d2))
        d2[own, start + own] = 0
        total += np.exp(-d2 / (2 * sigma * sigma)).sum()
    return float(total / len(x) ** 2)


def sections(sizes: Sizes) -> dict[str, Iterator[Result | str]]:
    """What there is to measure, by name: results as they are measured; a string is a remark to print."""
    return {
        "affinity": affinities(sizes),
        "tiles": tiled.run(sizes.tiled_n, sizes.tiled_widths, sizes.slow_rounds),
        "grids": similarity.run(*sizes.grid, sizes.slow_rounds, *sizes.permutations),
        "wide": wide.run(*sizes.wide, sizes.rounds),
        "training": training.run(*sizes.training, sizes.rounds),
        "cut": cuts.run(sizes.n, sizes.set_d, sizes.slow_rounds),
        "images": cuts.images(*sizes.images, sizes.slow_rounds),
        "peers": peers.run(sizes.n, sizes.d, sizes.conditions, sizes.slow_rounds),
        "accuracy": accuracy.run(*sizes.accuracy),
        "growth": curves.run(sizes.curve_n, sizes.curve_d, sizes.curve_layers, sizes.processes, sizes.slow_rounds),
        "memory": tiled.memory(sizes.memory),
    }


def affinities(sizes: Sizes) -> Iterator[Result | str]:
    """The auto-scaled affinity, stored, of one representation and of a batch."""
    x = make_features(sizes.n, sizes.d)
    jx = jnp.asarray(x)
    sigma = float(jaxalign.solve_sigma(jx, density=DENSITY).sigma)
    own_auto = ("auto", lambda: jaxalign.rbf_affinity(jx, density=DENSITY))
    own_fixed = ("fixed", lambda: jaxalign.rbf_affinity(jx, sigma=sigma))
    work = floor.affinity(sizes.n, sizes.d)
    yield compare("auto-scaled / fixed sigma", own_auto, own_fixed, sizes.rounds, bound="<=", target=1.3, work=work)

    torch_here = find_spec("torch") is not None
    if not torch_here:
        yield "torch is missing, comparisons with it are left out: python -m pip install torch"
    else:
        import torch

        tx = torch.from_numpy(x)
        careful, simple = (
            (name, lambda affinity=affinity: affinity(tx, sigma))
            for name, affinity in (("torch", rivals.careful), ("torch", rivals.simple))
        )
        case = "fixed sigma / careful torch"
        yield compare(case, own_fixed, careful, sizes.rounds, bound="<=", target=1.05, work=work)
        yield compare("fixed sigma / simple torch (cdist)", own_fixed, simple, sizes.rounds, work=work)
        yield from against_ncut(sizes, x, tx, own_auto)

        sets = make_features(sizes.sets, sizes.set_n, sizes.set_d)
        jsets, tsets = jnp.asarray(sets), torch.from_numpy(sets)
        batch = floor.affinity(sizes.set_n, sizes.set_d, sizes.sets)
        yield compare(
            f"batch of {sizes.sets} representations: times faster than a torch loop that bisects",
            ("jaxalign", lambda: jaxalign.rbf_affinity(jsets, density=DENSITY)),
            ("torch", lambda: rivals.loop_of_bisections(tsets, DENSITY)),
            sizes.slow_rounds,
            bound=">=",
            target=4.0,
            inverse=True,
            work=batch,
        )

        yield compare(
            f"batch of {sizes.sets} representations: times faster than the published torch loop",
            ("jaxalign", lambda: jaxalign.rbf_affinity(jsets, density=DENSITY)),
            ("torch", lambda: rivals.loop_as_published(tsets, DENSITY)),
            sizes.slow_rounds,
            bound=">=",
            target=4.0,
            inverse=True,
            work=batch,
        )

    small = jnp.asarray(make_features(sizes.set_n, sizes.set_d))
    case = f"one representation, n = {sizes.set_n}, d = {sizes.set_d}, compiled"
    work = floor.affinity(sizes.set_n, sizes.set_d)
    call = lambda: jaxalign.rbf_affinity(small, density=DENSITY)  # noqa: E731
    yield milliseconds(case, call, sizes.calls, target=2.0, work=work)
    yield import_seconds(sizes.imports, target=0.3)
    yield from for_information(sizes, jx, sigma, own_auto)


def against_ncut(sizes: Sizes, x: np.ndarray, tx: Any, own_auto: Any) -> Iterator[Result | str]:
    """ncut-pytorch finds its sigma by bisection, on all samples or on 1000 that are far apart."""
    if find_spec("ncut_pytorch") is None:
        yield "ncut-pytorch is missing, comparisons with it are left out: python -m pip install ncut-pytorch"
        return
    plans = (
        (f"all {sizes.n} samples", sizes.n, sizes.slow_rounds, 10.0),
        ("1000 samples", 1000, sizes.rounds, 1.0),
    )
    for name, samples, rounds, target in plans:
        yield compare(
            f"times faster than ncut-pytorch, sigma on {name}",
            own_auto,
            ("ncut-pytorch", lambda samples=samples: rivals.ncut(tx, DENSITY, samples)),
            rounds,
            bound=">=",
            target=target,
            inverse=True,
        )
    solved = {"jaxalign": float(jaxalign.solve_sigma(x, density=DENSITY).sigma)}
    solved |= {f"ncut-pytorch, {name}": rivals.ncut_sigma(tx, DENSITY, samples) for name, samples, _, _ in plans}
    errors = {name: density_reached(x, sigma) / DENSITY - 1 for name, sigma in solved.items()}
    listed = "; ".join(f"{name} {error:+.1e}" for name, error in errors.items())
    yield f"relative error of the density that is reached, evaluated in float64: {listed}"


def for_information(sizes: Sizes, jx: jax.Array, sigma: float, own_auto: Any) -> Iterator[Result]:
    """What has no target."""
    sigmas = jaxalign.solve_sigma(jx, density=DENSITY, bandwidth="per_row").sigma
    yield compare(
        "per row: auto-scaled / fixed sigmas",
        ("auto", lambda: jaxalign.rbf_affinity(jx, density=DENSITY, bandwidth="per_row")),
        ("fixed", lambda: jaxalign.rbf_affinity(jx, sigma=sigmas)),
        sizes.rounds,
    )
    weights = jax.random.normal(jax.random.key(0), (sizes.n, sizes.n))
    auto = jax.jit(jax.value_and_grad(lambda x: jnp.sum(weights * jaxalign.rbf_affinity(x, density=DENSITY))))
    fixed = jax.jit(jax.value_and_grad(lambda x: jnp.sum(weights * jaxalign.rbf_affinity(x, sigma=sigma))))
    names = ("auto", lambda: auto(jx)), ("fixed", lambda: fixed(jx))
    yield compare("value and gradient: auto-scaled / fixed sigma", *names, sizes.slow_rounds)
    yield compare(
        "auto-scaled: value and gradient / value", ("gradient", lambda: auto(jx)), own_auto, sizes.slow_rounds
    )
