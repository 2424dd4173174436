"""A Flax NNX network trained with an alignment loss; its layers are then compared with four networks.

A convolutional student on 8 x 8 digits learns the geometry of a real network's features of the same digits
(jaxalign.datasets). The training step is compiled once; the last batch is padded to the common size. Afterwards
`interop.capture_features` captures the student's layers, and `compare_grid` compares each with each network.

    python examples/flax_training.py             # needs Flax: pip install "jaxalign[flax]"
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxalign

TRAINED_ON, BATCH, EPOCHS, WIDTH = 700, 128, 30, 16  # 700 = 5 * 128 + 60: the last batch is padded


class Student(nnx.Module):
    """A small convolutional network, 8 x 8 pixels to 16 features."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(32 * 16, WIDTH, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """(n, 8, 8, 1) to (n, 16)."""
        x = nnx.gelu(self.second(nnx.gelu(self.first(pixels))))
        return self.head(x.reshape(len(x), -1))


@nnx.jit
def step(
    student: Student, optimizer: nnx.Optimizer, pixels: jax.Array, teacher: jax.Array, mask: jax.Array
) -> jax.Array:
    """Update the student once; returns the loss before the update."""

    def loss(student: Student) -> jax.Array:
        return jaxalign.losses.alignment_loss(student(pixels), teacher, mask=mask)

    value, gradient = nnx.value_and_grad(loss)(student)
    optimizer.update(student, gradient)
    return value


def padded_batches(rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of one size, with masks: True marks valid rows."""
    starts = range(0, len(rows), BATCH)
    return [(np.resize(rows[k : k + BATCH], BATCH), np.arange(BATCH) < len(rows) - k) for k in starts]


def score(student: Student, pixels: jax.Array, teacher: np.ndarray) -> tuple[float, float]:
    """Debiased CKA with the teacher, and the share of the 10 nearest neighbors of a digit in common."""
    x = student(pixels)
    return float(jaxalign.compare(x, teacher)), float(jaxalign.measures.mutual_knn(x, teacher, 10, metric="euclidean"))


def main(epochs: int = EPOCHS, seed: int = 0) -> tuple[tuple[float, float], tuple[float, float]]:
    """Train, print, and return the scores before and after."""
    digits = jaxalign.datasets.load_digit_features()
    names = list(digits.features)
    teacher = np.asarray(digits.features[names[0]], np.float32)
    teacher = (teacher - teacher.mean(0)) / np.maximum(teacher.std(0), 1e-6)
    pixels = jnp.asarray(np.array(digits.images, np.float32) / 16)[..., None]
    rng = np.random.default_rng(seed)
    rows, held_out = np.split(rng.permutation(len(pixels)), [TRAINED_ON])

    student = Student(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(student, optax.adam(2e-3), wrt=nnx.Param)
    before = score(student, pixels[held_out], teacher[held_out])
    for epoch in range(epochs):
        for batch, mask in padded_batches(rng.permutation(rows)):
            loss = step(student, optimizer, pixels[batch], jnp.asarray(teacher[batch]), jnp.asarray(mask))
        if epoch % 5 == 0 or epoch == epochs - 1:
            print(f"epoch {epoch:3}   loss of the last batch {float(loss):.3f}")
    after = score(student, pixels[held_out], teacher[held_out])
    print(f"\nheld-out digits, teacher {names[0]}")
    for when, (cka, neighbors) in (("before", before), ("after", after)):
        print(f"{when:7} CKA {cka:.3f}   shared neighbors {neighbors:.3f}")

    layers = {"first": "first", "second": "second", "head": "head"}
    captured = jaxalign.interop.capture_features(student, pixels[held_out], layers=layers)
    student_layers = {name: x.reshape(len(x), -1) for name, x in captured.items()}
    networks = {name: digits.features[name][held_out] for name in names}
    grid = jaxalign.compare_grid(student_layers, networks)
    print("\ndebiased CKA of the student's layers with four networks\n" + " " * 10 + "   ".join(names))
    for layer, row in zip(student_layers, np.asarray(grid.values), strict=True):
        print(f"{layer:10}" + "   ".join(f"{value:{len(name)}.3f}" for name, value in zip(names, row, strict=True)))
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Flax NNX student that learns the geometry of a real network.")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.seed)
