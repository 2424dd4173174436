"""What does each loss preserve where it is small? Free features are fitted to a teacher by each loss, and compared.

The teacher is the features of 128 handwritten digits in a ViT, shipped with the library. The student is a table of
features (128, 64), from random numbers, so that nothing but the loss decides what it becomes: with all samples in each
step, and with random batches of 32. Two yardsticks have a linear projector that is trained along and discarded. Then
the table says, of all 128 samples:

    loss         its last value, of the value at the start
    distances    Pearson correlation of Euclidean distances with the teacher's
    neighbors    share of the 10 nearest neighbors in common
    Procrustes   similarity of the shapes: 1 if equal up to rotation, shift and scale
    norms        correlation of the norms of samples (where the origin counts)
    scale        mean distance divided by the teacher's
    rank         effective rank (exponential of the entropy of variances) divided by the teacher's

    python -m pip install jaxalign optax
    python examples/what_losses_preserve.py            # about five minutes on two cores
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxalign
from jaxalign import losses
from jaxalign.kernels import Linear

SAMPLES, WIDTH, SMALL, NEIGHBORS = 128, 64, 32, 10
TEACHER = "vit-s14 layer 8"
Loss = Callable[[Any, jax.Array], jax.Array]  # of the student's features and projector, and the teacher's features


def relational(measure: Any, **options: Any) -> Loss:
    """A loss of the library."""
    return lambda student, teacher: losses.alignment_loss(student[0], teacher, measure, **options)


def projected_mse(student: Any, teacher: jax.Array) -> jax.Array:
    """Mean squared error after a linear projector."""
    return jnp.mean((student[0] @ student[1] - teacher) ** 2)


def projected_cosine(student: Any, teacher: jax.Array) -> jax.Array:
    """Cosine distance after a linear projector, as in REPA."""
    return losses.token_loss((student[0] @ student[1])[None], teacher[None], "cosine")


def decorrelated(student: Any, teacher: jax.Array) -> jax.Array:
    """Distances, and channels that vary and are not correlated."""
    return losses.alignment_loss(student[0], teacher, "distances") + 0.1 * losses.decorrelation_loss(student[0])


LOSSES: dict[str, Loss] = {
    '"cka"': relational("cka"),
    '"cka", linear kernel': relational("cka", kernel=Linear()),
    '"affinity"': relational("affinity"),
    '"kl"': relational("kl"),
    '"infonce"': relational("infonce"),
    '"gram"': relational("gram"),
    '"distances"': relational("distances"),
    '"angles"': relational("angles"),
    '"procrustes"': relational("procrustes"),
    '"distances" + 0.1 decorrelation': decorrelated,
    "projector, MSE": projected_mse,
    "projector, cosine": projected_cosine,
}


def fit(loss: Loss, teacher: jax.Array, batch: int, steps: int) -> tuple[jax.Array, float, float]:
    """Features (n, 64), the loss of all samples relative to its start, and milliseconds of a step."""
    keys = jax.random.split(jax.random.key(0), 3)
    student = jax.random.normal(keys[0], (SAMPLES, WIDTH)), jax.random.normal(keys[1], (WIDTH, teacher.shape[1])) / 8
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps))

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        student, moments = state
        rows = jax.random.permutation(key, SAMPLES)[:batch]
        gradient = jax.grad(lambda s: loss((s[0][rows], s[1]), teacher[rows]))(student)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(student, updates), moments), None

    train = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0])
    every = jax.random.split(keys[2], steps)
    compiled = train.lower((student, optimizer.init(student)), every).compile()
    start = time.perf_counter()
    fitted, _ = jax.block_until_ready(compiled((student, optimizer.init(student)), every))
    elapsed = 1000 * (time.perf_counter() - start) / steps
    whole = jax.jit(loss)
    return fitted[0], float(whole(fitted, teacher) / whole(student, teacher)), elapsed


def effective_rank(x: np.ndarray) -> float:
    """Exp of the entropy of the shares of variance (Roy & Vetterli 2007)."""
    variances = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    shares = variances[variances > 0] / variances.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def distances(x: np.ndarray) -> np.ndarray:
    """Of all pairs."""
    return np.sqrt(np.asarray(jaxalign.squared_distances(x)))[np.triu_indices(len(x), 1)]


def preserved(x: np.ndarray, y: np.ndarray) -> list[float]:
    """The columns of the table."""
    dx, dy = distances(x), distances(y)
    return [
        float(np.corrcoef(dx, dy)[0, 1]),
        float(jaxalign.compare(x, y, "mutual_knn", k=NEIGHBORS, metric="euclidean")),
        float(jaxalign.compare(x, y, "procrustes", result="similarity")),
        float(np.corrcoef(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))[0, 1]),
        dx.mean() / dy.mean(),
        effective_rank(x) / effective_rank(y),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--only", nargs="*", default=list(LOSSES))
    options = parser.parse_args()
    features = np.asarray(jaxalign.datasets.load_digit_features().features[TEACHER][:SAMPLES], np.float32)
    teacher = jnp.asarray((features - features.mean(0)) / features.std())
    print("| loss | batch | loss | distances | neighbors | Procrustes | norms | scale | rank | ms per step |")
    print("|" + " --- |" * 10)
    for name in options.only:
        for batch in (SAMPLES, SMALL):
            # n^3 operations: fewer steps.
            steps = options.steps // 4 if name == '"angles"' and batch == SAMPLES else options.steps
            found, value, elapsed = fit(LOSSES[name], teacher, batch, steps)
            cells = [f"{a:.2f}" for a in preserved(np.asarray(found), np.asarray(teacher))]
            print(f"| {name} | {batch} | {value:.1e} | " + " | ".join(cells) + f" | {elapsed:.2f} |", flush=True)


if __name__ == "__main__":
    main()
