"""Two classifiers with similar features: one on blobs, one on a stretched copy of them, trained with an alignment loss.

This is the published toy example of alignment as a regularizer. Two small MLPs learn the same three classes. The first
sees points on a plane; the second sees the same points rotated, shifted, and scaled by 1/4 along one axis and by 4
along the other. Trained on labels alone, their features have different geometries. With

    loss = cross-entropy of both + WEIGHT * alignment_loss(features of the second, features of the first)

the second network learns the geometry of the first, at the same accuracy.

    python -m pip install "jaxalign[viz]" optax
    python examples/train_alignment_loss.py                 # prints a table, writes train_alignment_loss/training.png
    python examples/train_alignment_loss.py --measure kl --seeds 3
    python examples/train_alignment_loss.py --devices 8     # batches sharded over 8 devices: the same parameters

On held-out points the table shows the accuracy of both networks, debiased CKA of their features, and the share of the
10 nearest neighbors of a point that they have in common: mean and standard deviation over several seeds.
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
COLORS = ("#0072b2", "#e69f00", "#009e73")  # color-blind safe

Layers = list[tuple[jax.Array, jax.Array]]
Parameters = dict[str, Layers]  # by network


class Points(NamedTuple):
    """The same points, as inputs of both networks."""

    first: np.ndarray  # (n, 2)
    second: np.ndarray  # (n, 2)
    label: np.ndarray  # (n,)


class Result(NamedTuple):
    """Scores on held-out points."""

    accuracy: float  # mean of both networks
    cka: float
    neighbors: float


class Run(NamedTuple):
    """One training."""

    parameters: Parameters
    losses: np.ndarray  # (steps, 2): cross-entropy, alignment
    before: Result
    after: Result


def draw_points(seed: int, number: int = CLASSES * PER_CLASS) -> tuple[Points, Points]:
    """Training points and as many test points."""
    rng = np.random.default_rng(seed)
    centers = rng.uniform(-6, 6, (CLASSES, 2))
    label = np.arange(2 * number) % CLASSES
    first = centers[label] + rng.normal(size=(2 * number, 2))
    rotation = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
    second = (first @ rotation.T + 3) * [0.25, 4.0]
    arrays = first.astype(np.float32), second.astype(np.float32), label
    train, test = (Points(*(a[k::2] for a in arrays)) for k in (0, 1))
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
    """Cross-entropy of both networks, and the alignment loss, of the whole batch, also if it is sharded."""
    outputs = {name: forward(layers, getattr(batch, name)) for name, layers in parameters.items()}
    entropy = sum(
        optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean() for _, logits in outputs.values()
    )
    if axis_name is not None:
        entropy = jax.lax.pmean(entropy, axis_name)
    x, y = outputs["second"][0], outputs["first"][0]
    return entropy, alignment_loss(x, y, measure=measure, kernel=RBF(density=DENSITY), plan=Plan(axis_name=axis_name))


def make_step(optimizer: optax.GradientTransformation, weight: float, measure: str, devices: int) -> Any:
    """A compiled training step; with several devices the batch is sharded."""

    def total(parameters: Parameters, batch: Points, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
        both = losses_of(parameters, batch, measure, axis_name)
        return both[0] + weight * both[1], jnp.stack(both)

    gradient = jax.grad(partial(total, axis_name="data" if devices > 1 else None), has_aux=True)
    if devices > 1:
        mesh = jaxalign.sharding.data_mesh(devices)
        gradient = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())

    @jax.jit
    def step(parameters: Parameters, state: Any, batch: Points) -> tuple[Parameters, Any, jax.Array]:
        gradients, both = gradient(parameters, batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, both

    return step


def evaluate(parameters: Parameters, points: Points) -> Result:
    """Scores on points."""
    outputs = {name: forward(layers, getattr(points, name)) for name, layers in parameters.items()}
    accuracies = [np.mean(np.argmax(logits, -1) == points.label) for _, logits in outputs.values()]
    a, b = (features for features, _ in outputs.values())
    cka = jaxalign.measures.cka(a, b, kernel=RBF(density=DENSITY))
    return Result(
        float(np.mean(accuracies)), float(cka), float(jaxalign.measures.mutual_knn(a, b, 10, metric="euclidean"))
    )


def train(seed: int, weight: float = WEIGHT, measure: str = "cka", steps: int = STEPS, devices: int = 1) -> Run:
    """Train both networks from scratch; weight 0 trains on labels alone."""
    points, held_out = draw_points(seed)
    names = ("first", "second")
    keys = jax.random.split(jax.random.key(seed), len(names))
    parameters = {name: initial_layers(key) for name, key in zip(names, keys, strict=True)}
    before = evaluate(parameters, held_out)
    optimizer = optax.adam(1e-2)
    state, step = optimizer.init(parameters), make_step(optimizer, weight, measure, devices)
    rng, losses = np.random.default_rng(seed), []
    for _ in range(steps):
        rows = rng.permutation(len(points.label))[:BATCH]
        parameters, state, both = step(parameters, state, Points(*(a[rows] for a in points)))
        losses.append(both)
    return Run(parameters, np.asarray(losses), before, evaluate(parameters, held_out))


def table(runs: dict[str, list[Run]]) -> str:
    """Means and standard deviations over the seeds."""
    lines = [f"{'':24}{'accuracy':>16}{'CKA':>16}{'neighbors':>16}"]
    for name, of_method in runs.items():
        values = np.array([run.after for run in of_method])
        cells = [f"{m:.3f} +- {s:.3f}" for m, s in zip(values.mean(0), values.std(0), strict=True)]
        lines.append(f"{name:24}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]], seed: int) -> Figure:
    """Curves of both losses, and the first two principal components of held-out features in each network."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    _, held_out = draw_points(seed)
    for row, (name, of_method) in zip(axes, runs.items(), strict=True):
        run = of_method[0]
        for k, loss in enumerate(("cross-entropy", "alignment loss")):
            row[0].plot(run.losses[:, k], label=loss, color=COLORS[k], linewidth=1)
        row[0].set(title=name, xlabel="step", ylabel="loss", ylim=(0, None))
        row[0].legend(frameon=False)
        for ax, (network, layers) in zip(row[1:], run.parameters.items(), strict=True):
            features = np.asarray(forward(layers, getattr(held_out, network))[0])
            features = features - features.mean(0)
            plane = features @ np.linalg.svd(features, full_matrices=False)[2][:2].T
            ax.scatter(*plane.T, c=[COLORS[k] for k in held_out.label], s=8)
            ax.set(title=f"{network} network, held-out features", xticks=[], yticks=[], xlabel="PC 1", ylabel="PC 2")
            ax.set_aspect("equal", adjustable="datalim")
        row[2].set_xlabel(f"PC 1\nCKA {run.after.cka:.2f}, shared neighbors {run.after.neighbors:.2f}")
    return figure


def main(
    out: Path = Path("train_alignment_loss"), seeds: int = 5, measure: str = "cka", devices: int = 1, steps: int = STEPS
) -> dict[str, list[Run]]:
    """Train with and without the alignment loss, print the table, and write the figure to the folder `out`."""
    weights = {"labels alone": 0.0, f"with alignment ({measure})": WEIGHT}
    runs = {
        name: [train(seed, weight, measure, steps, devices) for seed in range(seeds)]
        for name, weight in weights.items()
    }
    print(table(runs))
    out.mkdir(parents=True, exist_ok=True)
    draw(runs, 0).savefig(out / "training.png", dpi=120)
    print(f"\nheld-out points, {seeds} seeds; curves and features of the first seed: {out / 'training.png'}")
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Two classifiers that learn similar features.")
    parser.add_argument("--out", type=Path, default=Path("train_alignment_loss"), help="folder for the figure")
    parser.add_argument("--seeds", type=int, default=5, help="number of trainings that the table averages over")
    parser.add_argument("--measure", default="cka", choices=("cka", "affinity", "kl", "infonce"))
    parser.add_argument("--devices", type=int, default=1, help="shard each batch over this many CPU devices")
    arguments = parser.parse_args()
    if arguments.devices > 1:
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    main(arguments.out, arguments.seeds, arguments.measure, arguments.devices)
