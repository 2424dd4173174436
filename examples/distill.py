"""A small student learns the geometry of a larger network: distillation by an alignment loss, without a head.

Teacher: the features of 1000 handwritten digits in a real network, shipped with the library (jaxalign.datasets).
Student: an MLP, 64-64-16, on the 8 x 8 pixels of the digits. It is trained on 700 digits in several ways:

    MSE head     the common way: a linear head, trained with the student, maps its 16 features to the teacher's
                 (standardized by channel), and the mean squared error is minimized. The head is then discarded.
    cka, ...     alignment_loss(student, teacher, "cka") and other measures: nothing to discard.

On the 300 held-out digits the table shows the share of the 10 nearest neighbors of a digit that student and teacher
have in common, and debiased CKA: mean and standard deviation over seeds, each with its own weights and split.

    python -m pip install "jaxalign[viz]" optax
    python examples/distill.py                          # prints a table, writes distill/distill.png
    python examples/distill.py --teacher "mobilenet-v2 block 13" --measures kl gram
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxalign
from jaxalign.losses import alignment_loss

TRAINED_ON, BATCH, STEPS, WIDTHS = 700, 128, 600, (64, 64, 16)
NEIGHBORS = 10
MEASURES = ("cka", "kl", "distances", "procrustes")
COLORS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")

Layers = list[tuple[jax.Array, jax.Array]]
LossFunction = Callable[[Any, jax.Array, jax.Array], jax.Array]  # of parameters, pixels, teacher


class Score(NamedTuple):
    """Similarity of student and teacher on held-out digits."""

    neighbors: float  # share of nearest neighbors in common
    cka: float


class Run(NamedTuple):
    """One training."""

    losses: np.ndarray
    scores: list[tuple[int, Score]]  # by step


def load(teacher: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1000, 64) from 0 to 1, and the teacher's features, with standardized channels."""
    digits = jaxalign.datasets.load_digit_features()
    if teacher not in digits.features:
        raise ValueError(f"teacher must be one of {', '.join(digits.features)}; got {teacher!r}.")
    features = np.asarray(digits.features[teacher], np.float32)
    features = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)
    pixels = np.asarray(digits.images, np.float32).reshape(len(features), -1)
    return pixels / pixels.max(), features


def dense(key: jax.Array, widths: tuple[int, ...]) -> Layers:
    """Random weights."""
    keys = jax.random.split(key, len(widths) - 1)
    pairs = zip(keys, widths[:-1], widths[1:], strict=True)
    return [(jax.random.normal(k, (a, b)) / jnp.sqrt(a), jnp.zeros(b)) for k, a, b in pairs]


def student(layers: Layers, pixels: jax.Array) -> jax.Array:
    """Features, (n, 16)."""
    *hidden, (weights, bias) = layers
    for w, b in hidden:
        pixels = jax.nn.gelu(pixels @ w + b)
    return pixels @ weights + bias


def through_head(parameters: Any, pixels: jax.Array, teacher: jax.Array) -> jax.Array:
    """The loss of the baseline."""
    (weights, bias) = parameters["head"]
    return jnp.mean((student(parameters["student"], pixels) @ weights + bias - teacher) ** 2)


def aligned(measure: str, parameters: Any, pixels: jax.Array, teacher: jax.Array) -> jax.Array:
    """The alignment loss."""
    return alignment_loss(student(parameters["student"], pixels), teacher, measure=measure)


def score(layers: Layers, pixels: np.ndarray, teacher: np.ndarray) -> Score:
    """Similarity of student and teacher."""
    features = student(layers, jnp.asarray(pixels))
    shared = jaxalign.measures.mutual_knn(features, teacher, NEIGHBORS, metric="euclidean")
    return Score(float(shared), float(jaxalign.measures.cka(features, teacher)))


def train(seed: int, loss_of: LossFunction, pixels: np.ndarray, teacher: np.ndarray, steps: int = STEPS) -> Run:
    """Train a student from scratch."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pixels))
    rows, held_out = order[:TRAINED_ON], order[TRAINED_ON:]
    keys = jax.random.split(jax.random.key(seed), 2)
    head = dense(keys[1], (WIDTHS[-1], teacher.shape[1]))[0]
    parameters = {"student": dense(keys[0], WIDTHS), "head": head}
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters: Any, state: Any, pixels: jax.Array, teacher: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss_of)(parameters, pixels, teacher)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(parameters, updates), state, value

    losses, scores = [], []
    for k in range(steps):
        batch = rows[rng.permutation(TRAINED_ON)[:BATCH]]
        parameters, state, value = step(parameters, state, pixels[batch], teacher[batch])
        losses.append(value)
        if k in (0, steps - 1) or (k + 1) % 50 == 0:
            scores.append((k + 1, score(parameters["student"], pixels[held_out], teacher[held_out])))
    return Run(np.asarray(losses), scores)


def table(runs: dict[str, list[Run]]) -> str:
    """Means and standard deviations over the seeds, at the last step."""
    lines = [f"{'':24}{'shared neighbors':>22}{'CKA':>18}"]
    for name, of_method in runs.items():
        values = np.array([run.scores[-1][1] for run in of_method])
        cells = [f"{m:.3f} +- {s:.3f}" for m, s in zip(values.mean(0), values.std(0), strict=True)]
        lines.append(f"{name:24}{cells[0]:>22}{cells[1]:>18}")
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]]) -> Figure:
    """Shared neighbors on held-out digits during training."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for (name, of_method), color in zip(runs.items(), itertools.cycle(COLORS), strict=False):
        steps = [k for k, _ in of_method[0].scores]
        values = np.array([[s.neighbors for _, s in run.scores] for run in of_method])
        ax.plot(steps, values.mean(0), color=color, label=name)
        ax.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
    ax.set(xlabel="step", ylabel=f"fraction of {NEIGHBORS} neighbors shared", ylim=(0, None), title="held-out digits")
    ax.legend(frameon=False)
    return figure


def main(
    out: Path = Path("distill"),
    teacher: str = "",
    measures: tuple[str, ...] = MEASURES,
    seeds: int = 5,
    steps: int = STEPS,
) -> dict[str, list[Run]]:
    """Train in every way, print the table, and write the figure to the folder `out`."""
    teacher = teacher or next(iter(jaxalign.datasets.load_digit_features().features))
    pixels, features = load(teacher)
    methods: dict[str, LossFunction] = {"MSE head": through_head} | {name: partial(aligned, name) for name in measures}
    runs = {
        name: [train(seed, loss_of, pixels, features, steps) for seed in range(seeds)]
        for name, loss_of in methods.items()
    }
    print(f"teacher {teacher}, {features.shape[1]} features; held-out digits, {seeds} seeds\n\n{table(runs)}")
    out.mkdir(parents=True, exist_ok=True)
    draw(runs).savefig(out / "distill.png", dpi=120)
    print(f"\ncurves, with their range over the seeds: {out / 'distill.png'}")
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A small student learns the geometry of a larger network.")
    parser.add_argument("--out", type=Path, default=Path("distill"), help="folder for the figure")
    parser.add_argument("--teacher", default="", help="a name in jaxalign.datasets.load_digit_features().features")
    parser.add_argument("--measures", nargs="*", default=MEASURES, choices=jaxalign.losses.MEASURES)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    main(arguments.out, arguments.teacher, tuple(arguments.measures), arguments.seeds)
