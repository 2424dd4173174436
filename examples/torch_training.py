"""A torch network trained with an alignment loss: optimizer and autograd are torch's, the loss is compiled by JAX.

A convolutional student on 8 x 8 digits learns the geometry of a real network's features of the same digits
(jaxalign.datasets), with a queue of past batches as extra samples.

    python examples/torch_training.py            # needs torch: pip install "jaxalign[torch]"
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch

import jaxalign
from jaxalign.interop import to_torch, torch_losses

TRAINED_ON, BATCH, CAPACITY, WIDTH = 700, 64, 192, 16


class Scores(NamedTuple):
    """On held-out digits: debiased CKA with the teacher, and shared nearest neighbors."""

    cka: float
    neighbors: float


def make_student() -> torch.nn.Module:
    """A small convolutional network, 8 x 8 pixels to 16 features."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.GELU(),
        torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
        torch.nn.GELU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 16, WIDTH),
    )


def score(student: torch.nn.Module, pixels: torch.Tensor, teacher: np.ndarray) -> Scores:
    """Compare the student's features of digits with the teacher's."""
    with torch.no_grad():
        features = student(pixels).numpy()
    neighbors = jaxalign.measures.mutual_knn(features, teacher, 10, metric="euclidean")
    return Scores(float(jaxalign.measures.cka(features, teacher)), float(neighbors))


def main(steps: int = 300, seed: int = 0) -> tuple[Scores, Scores]:
    """Train, print and return the scores before and after."""
    torch.manual_seed(seed)
    digits = jaxalign.datasets.load_digit_features()
    features = np.asarray(next(iter(digits.features.values())), np.float32)
    features = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)
    pixels = torch.from_numpy(np.array(digits.images, np.float32) / np.max(digits.images))[:, None]
    order = torch.randperm(len(pixels))
    rows, held_out = order[:TRAINED_ON], order[TRAINED_ON:]
    teacher = torch.from_numpy(features)

    student = make_student()
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    queue = to_torch(jaxalign.losses.FeatureQueue.empty(CAPACITY, WIDTH, features.shape[1]))
    before = score(student, pixels[held_out], features[held_out.numpy()])
    for k in range(steps):
        batch = rows[torch.randperm(TRAINED_ON)[:BATCH]]
        x = student(pixels[batch])
        loss = torch_losses.alignment_loss(x, teacher[batch], queue=queue)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = torch_losses.push(queue, x.detach(), teacher[batch])
        if k % 50 == 0 or k == steps - 1:
            print(f"step {k:4}   loss {loss.item():.3f}")
    after = score(student, pixels[held_out], features[held_out.numpy()])
    for name, scores in (("before", before), ("after", after)):
        print(f"{name:7} CKA {scores.cka:.3f}   shared neighbors {scores.neighbors:.3f}   (held-out digits)")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A torch student that learns the geometry of a real network.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.steps, arguments.seed)
