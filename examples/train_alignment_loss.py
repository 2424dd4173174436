"""Two networks that learn to agree: a classifier on blobs, a second one on their stretched copy, and an alignment loss.

The published toy example of alignment as a regulariser. Two small MLPs learn the same three classes. The one sees
points on a plane, the other the same points rotated, shifted, and stretched by 1/4 along one axis and by 4 along the
other. Trained on labels alone each arranges its features in its own way. With

    loss = cross-entropy of both + WEIGHT * alignment_loss(features of the second, features of the first)

the second network arranges its features as the first does, and classifies as well.

    python -m pip install "jaxalign[viz]" optax
    python examples/train_alignment_loss.py                 # prints a table, writes train_alignment_loss/training.png
    python examples/train_alignment_loss.py --measure kl --seeds 3
    python examples/train_alignment_loss.py --devices 8     # the batch spread over 8 devices: the same parameters

The table shows, on points that were not trained on, mean and standard deviation over several seeds: the accuracy of
both networks, debiased CKA of their features, and the share of the 10 nearest neighbours that a point has in both.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

import jaxalign
from jaxalign import Plan
from jaxalign.kernels import RBF
from jaxalign.losses import alignment_loss

CLASSES, PER_CLASS, BATCH, STEPS = 3, 100, 96, 400
WIDTHS = (2, 32, 16)
WEIGHT, DENSITY = 2.0, 0.2
COLOURS = ("#0072b2", "#e69f00", "#009e73")  # told apart with colour-blind eyes too

Layers = list[tuple[jax.Array, jax.Array]]
Parameters = dict[str, Layers]  # by network


class Points(NamedTuple):
    """The same points as both networks see them."""

    first: np.ndarray  # (n, 2)
    second: np.ndarray  # (n, 2)
    label: np.ndarray  # (n,)


class Result(NamedTuple):
    """What was reached on points that were not trained on."""

    accuracy: float  # mean of both networks
    cka: float
    neighbours: float


class Run(NamedTuple):
    """One training."""

    parameters: Parameters
    losses: np.ndarray  # (steps, 2): cross-entropy, alignment
    before: Result
    after: Result


def draw_points(seed: int, number: int = CLASSES * PER_CLASS) -> tuple[Points, Points]:
    """Points to train on and as many to test on."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-6, 6, (CLASSES, 2))
    label = np.arange(2 * number) % CLASSES
    first = centres[label] + rng.normal(size=(2 * number, 2))
    turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
    second = (first @ turn.T + 3) * [0.25, 4.0]
    every = (Points(*(a[k::2] for a in (first.astype(np.float32), second.astype(np.float32), label))) for k in (0, 1))
    train, test = every
    return train, test


def initial_layers(key: jax.Array) -> Layers:
    """Random weights of the hidden layers and of the classifier on top."""
    widths = (*WIDTHS, CLASSES)
    keys = jax.random.split(key, len(widths) - 1)
    return [
        (jax.random.normal(k, (a, b)) / jnp.sqrt(a), jnp.zeros(b))
        for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def forward(layers: Layers, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features (n, 16) and logits (n, 3)."""
    *hidden, (weights, bias) = layers
    for w, b in hidden:
        x = jnp.tanh(x @ w + b)
    return x, x @ weights + bias


def losses_of(
    parameters: Parameters, batch: Points, measure: str, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of both networks, and the alignment loss; of the whole batch, also where devices share it."""
    outputs = {name: forward(layers, getattr(batch, name)) for name, layers in parameters.items()}
    entropy = sum(
        optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean() for _, logits in outputs.values()
    )
    if axis_name is not None:
        entropy = jax.lax.pmean(entropy, axis_name)
    x, y = outputs["second"][0], outputs["first"][0]
    return entropy, alignment_loss(x, y, measure=measure, kernel=RBF(density=DENSITY), plan=Plan(axis_name=axis_name))


def make_step(optimiser: optax.GradientTransformation, weight: float, measure: str, devices: int) -> Any:
    """A step of training, compiled once; with several devices each has its share of the batch."""

    def total(parameters: Parameters, batch: Points, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
        both = losses_of(parameters, batch, measure, axis_name)
        return both[0] + weight * both[1], jnp.stack(both)

    gradient = jax.grad(partial(total, axis_name="data" if devices > 1 else None), has_aux=True)
    if devices > 1:
        mesh = jaxalign.sharding.data_mesh(devices)
        gradient = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())

    @jax.jit
    def step(parameters: Parameters, state: Any, batch: Points) -> tuple[Parameters, Any, jax.Array]:
        found, both = gradient(parameters, batch)
        updates, state = optimiser.update(found, state)
        return optax.apply_updates(parameters, updates), state, both

    return step


def evaluate(parameters: Parameters, points: Points) -> Result:
    """Scores on points."""
    outputs = {name: forward(layers, getattr(points, name)) for name, layers in parameters.items()}
    right = [np.mean(np.argmax(logits, -1) == points.label) for _, logits in outputs.values()]
    a, b = (features for features, _ in outputs.values())
    cka = jaxalign.measures.cka(a, b, kernel=RBF(density=DENSITY))
    return Result(float(np.mean(right)), float(cka), float(jaxalign.measures.mutual_knn(a, b, 10, metric="euclidean")))


def train(seed: int, weight: float = WEIGHT, measure: str = "cka", steps: int = STEPS, devices: int = 1) -> Run:
    """Both networks from scratch; weight 0 trains on labels alone."""
    points, held_out = draw_points(seed)
    names = ("first", "second")
    keys = jax.random.split(jax.random.key(seed), len(names))
    parameters = {name: initial_layers(key) for name, key in zip(names, keys, strict=True)}
    before = evaluate(parameters, held_out)
    optimiser = optax.adam(1e-2)
    state, step = optimiser.init(parameters), make_step(optimiser, weight, measure, devices)
    rng, losses = np.random.default_rng(seed), []
    for _ in range(steps):
        rows = rng.permutation(len(points.label))[:BATCH]
        parameters, state, both = step(parameters, state, Points(*(a[rows] for a in points)))
        losses.append(both)
    return Run(parameters, np.asarray(losses), before, evaluate(parameters, held_out))


def table(runs: dict[str, list[Run]]) -> str:
    """Means and standard deviations over the seeds."""
    lines = [f"{'':24}{'accuracy':>16}{'CKA':>16}{'neighbours':>16}"]
    for name, some in runs.items():
        values = np.array([run.after for run in some])
        cells = [f"{m:.3f} +- {s:.3f}" for m, s in zip(values.mean(0), values.std(0), strict=True)]
        lines.append(f"{name:24}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]], seed: int) -> Figure:
    """Curves of both losses, and the features of held-out points in each network, on two principal axes."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    _, held_out = draw_points(seed)
    for row, (name, some) in zip(axes, runs.items(), strict=True):
        run = some[0]
        for k, what in enumerate(("cross-entropy", "alignment loss")):
            row[0].plot(run.losses[:, k], label=what, color=COLOURS[k], linewidth=1)
        row[0].set(title=f"{name}", xlabel="step", ylabel="loss", ylim=(0, None))
        row[0].legend(frameon=False)
        for ax, (network, layers) in zip(row[1:], run.parameters.items(), strict=True):
            features = np.asarray(forward(layers, getattr(held_out, network))[0])
            features = features - features.mean(0)
            plane = features @ np.linalg.svd(features, full_matrices=False)[2][:2].T
            ax.scatter(*plane.T, c=[COLOURS[k] for k in held_out.label], s=8)
            ax.set(title=f"features of the {network} network", xticks=[], yticks=[], aspect="equal")
        row[2].set_xlabel(f"CKA {run.after.cka:.2f}, shared neighbours {run.after.neighbours:.2f}")
    return figure


def main(
    out: Path = Path("train_alignment_loss"), seeds: int = 5, measure: str = "cka", devices: int = 1, steps: int = STEPS
) -> dict[str, list[Run]]:
    """Train with and without the alignment loss, print the table, write the figure into the folder `out`."""
    plans = {"labels alone": 0.0, f"with alignment ({measure})": WEIGHT}
    runs = {
        name: [train(seed, weight, measure, steps, devices) for seed in range(seeds)] for name, weight in plans.items()
    }
    print(table(runs))
    out.mkdir(parents=True, exist_ok=True)
    draw(runs, 0).savefig(out / "training.png", dpi=120)
    print(f"\non held-out points, {seeds} seeds; curves and features of the first seed are in {out / 'training.png'}")
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Two classifiers that learn to arrange their features alike.")
    parser.add_argument("--out", type=Path, default=Path("train_alignment_loss"), help="folder for the figure")
    parser.add_argument("--seeds", type=int, default=5, help="trainings that the table averages over")
    parser.add_argument("--measure", default="cka", choices=("cka", "affinity", "kl", "infonce"))
    parser.add_argument("--devices", type=int, default=1, help="spread each batch over so many devices (CPU devices)")
    arguments = parser.parse_args()
    if arguments.devices > 1:
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    main(arguments.out, arguments.seeds, arguments.measure, arguments.devices)
