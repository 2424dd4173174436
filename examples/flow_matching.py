"""Does a relational loss toward a vision network make a generative model learn faster? A small test, with seeds.

A transformer of 16 tokens generates handwritten digits of 8 x 8 pixels, by flow matching: from a digit with noise, it
predicts the velocity from noise to digit, given the class. It is trained on the 1000 digits that the library ships,
with the features of a ViT as the teacher:

    flow          flow matching alone
    relational    plus alignment_loss(mean token of layer 2, teacher): relations among the digits of a batch
    projector     plus the cosine distance of a projector's output to the teacher, as in REPA
    stopped       relational, stopped when the running cosine of the gradients falls below 0

Quality, every 250 steps: the Fréchet distance between features of generated and real digits in a classifier of digits,
and the share of generated digits that it assigns to the class asked for.

    python -m pip install "jaxalign[viz]" optax
    python examples/flow_matching.py               # five seeds, about half an hour on two cores; writes flow_matching/
    python examples/flow_matching.py --seeds 1 --steps 500
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxalign
from jaxalign import losses

TEACHER = "vit-s14 layer 8"
WIDTH, DEPTH, HEADS, ALIGNED, PATCH, SIDE = 64, 4, 4, 2, 2, 8
BATCH, EVERY, GENERATED, EULER = 64, 250, 500, 20
METHODS = ("flow", "relational", "projector", "stopped")
WEIGHT = 0.5
# The gradients are compared in every tenth step.
COMPARED = 10
COLORS = ("#000000", "#0072b2", "#e69f00", "#009e73")


# --- a transformer ----------------------------------------------------------------------------------------------------


def normal(key: jax.Array, *shape: int) -> jax.Array:
    """Weights of variance 1 / inputs."""
    return jax.random.normal(key, shape) / np.sqrt(shape[0])


def init(key: jax.Array) -> dict[str, Any]:
    """Random parameters; those of the last layer and of modulations are 0."""
    keys = iter(jax.random.split(key, 8 + 4 * DEPTH))
    blocks = [
        {
            "qkv": normal(next(keys), WIDTH, 3 * WIDTH),
            "out": normal(next(keys), WIDTH, WIDTH),
            "up": normal(next(keys), WIDTH, 4 * WIDTH),
            "down": normal(next(keys), 4 * WIDTH, WIDTH),
            "modulation": jnp.zeros((WIDTH, 4 * WIDTH)),
        }
        for _ in range(DEPTH)
    ]
    return {
        "embed": normal(next(keys), PATCH**2, WIDTH),
        "place": 0.1 * jax.random.normal(next(keys), ((SIDE // PATCH) ** 2, WIDTH)),
        "class": 0.5 * jax.random.normal(next(keys), (10, WIDTH)),
        "time": normal(next(keys), 32, WIDTH),
        "blocks": blocks,
        "last": jnp.zeros((WIDTH, PATCH**2)),
    }


def normalized(x: jax.Array) -> jax.Array:
    """Each token with mean 0 and variance 1."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def block(p: dict[str, jax.Array], x: jax.Array, condition: jax.Array) -> jax.Array:
    """Attention and MLP, modulated by time and class."""
    shift_a, scale_a, shift_b, scale_b = jnp.split((condition @ p["modulation"])[:, None], 4, -1)
    h = normalized(x) * (1 + scale_a) + shift_a
    q, k, v = (a.reshape(*a.shape[:2], HEADS, -1) for a in jnp.split(h @ p["qkv"], 3, -1))
    attended = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
    x = x + attended @ p["out"]
    h = normalized(x) * (1 + scale_b) + shift_b
    return x + jax.nn.gelu(h @ p["up"]) @ p["down"]


def velocity(p: dict[str, Any], x: jax.Array, time: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Predicted velocity (b, 64), and the tokens (b, 16, width) of the aligned layer."""
    side = SIDE // PATCH
    patches = x.reshape(-1, side, PATCH, side, PATCH).swapaxes(2, 3).reshape(-1, side * side, PATCH**2)
    angles = time[:, None] * jnp.exp(jnp.linspace(0, 5, 16))[None]
    condition = p["class"][label] + jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), -1) @ p["time"]
    condition = jax.nn.silu(condition)
    tokens = patches @ p["embed"] + p["place"][None]
    aligned = tokens
    for number, weights in enumerate(p["blocks"], 1):
        tokens = block(weights, tokens, condition)
        aligned = tokens if number == ALIGNED else aligned
    out = (normalized(tokens) @ p["last"]).reshape(-1, side, side, PATCH, PATCH).swapaxes(2, 3)
    return out.reshape(-1, SIDE**2), aligned


@jax.jit
def generate(p: dict[str, Any], key: jax.Array, label: jax.Array) -> jax.Array:
    """Digits (n, 64), by Euler steps from noise."""

    def step(x: jax.Array, time: jax.Array) -> tuple[jax.Array, None]:
        return x + velocity(p, x, jnp.full(label.shape, time), label)[0] / EULER, None

    return jax.lax.scan(step, jax.random.normal(key, (len(label), SIDE**2)), jnp.arange(EULER) / EULER)[0]


# --- training ---------------------------------------------------------------------------------------------------------


def flow_loss(p: dict[str, Any], batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean squared error of the velocity, and the mean token of the aligned layer."""
    pixels, label, _ = batch
    noise_key, time_key = jax.random.split(key)
    noise, time = jax.random.normal(noise_key, pixels.shape), jax.random.uniform(time_key, label.shape)
    x = time[:, None] * pixels + (1 - time[:, None]) * noise
    predicted, tokens = velocity(p["network"], x, time, label)
    return jnp.mean((predicted - (pixels - noise)) ** 2), tokens.mean(1)


def aligned_loss(p: dict[str, Any], mean_token: jax.Array, batch: Any, method: str) -> jax.Array:
    """The loss that is added."""
    if method == "flow":
        return jnp.zeros(())
    if method == "projector":
        return losses.token_loss(p["projector"](mean_token[:, None]), batch[2][:, None], "cosine")
    return losses.alignment_loss(mean_token, batch[2])


OPTIMIZER = optax.adam(1e-3)


@partial(jax.jit, static_argnames="method")
def train(state: Any, data: Any, key: jax.Array, method: str) -> Any:
    """`EVERY` steps."""

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        p, moments, agreement, number = state
        choice, noise = jax.random.split(key)
        rows = jax.random.choice(choice, len(data[0]), (BATCH,), replace=False)
        batch = tuple(a[rows] for a in data)

        def flow(p: Any) -> jax.Array:
            return flow_loss(p, batch, noise)[0]

        def added(p: Any) -> jax.Array:
            return aligned_loss(p, flow_loss(p, batch, noise)[1], batch, method)

        weight = WEIGHT * agreement.active

        def total(p: Any) -> jax.Array:
            value, mean_token = flow_loss(p, batch, noise)
            return value + weight * aligned_loss(p, mean_token, batch, method)

        if method == "stopped":

            def compared(agreement: Any) -> Any:
                both = (jax.grad(f)(p)["network"]["blocks"][:ALIGNED] for f in (flow, added))
                return agreement.update(*both)

            agreement = jax.lax.cond(number % COMPARED == 0, compared, lambda a: a, agreement)
        updates, moments = OPTIMIZER.update(jax.grad(total)(p), moments)
        return (optax.apply_updates(p, updates), moments, agreement, number + 1), None

    return jax.lax.scan(step, state, jax.random.split(key, EVERY))[0]


# --- quality ----------------------------------------------------------------------------------------------------------


def classifier(pixels: jax.Array, label: jax.Array) -> Any:
    """A classifier of digits, an MLP with 64 features: pixels -> (features, logits)."""
    keys = jax.random.split(jax.random.key(123), 3)
    weights = [normal(k, *size) for k, size in zip(keys, ((64, 256), (256, 64), (64, 10)), strict=True)]

    def apply(weights: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = jnp.tanh(jnp.tanh(x @ weights[0]) @ weights[1])
        return features, features @ weights[2]

    def loss(weights: Any, key: jax.Array) -> jax.Array:
        noisy = pixels + 0.3 * jax.random.normal(key, pixels.shape)
        return optax.softmax_cross_entropy_with_integer_labels(apply(weights, noisy)[1], label).mean()

    optimizer = optax.adamw(2e-3, weight_decay=1e-2)

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        weights, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(weights, key), moments, weights)
        return (optax.apply_updates(weights, updates), moments), None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(5), 400)))(
        (weights, optimizer.init(weights))
    )
    return jax.jit(lambda x: apply(state[0], x))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The Fréchet distance of two sets of features, (n, d) each, as Gaussians."""
    difference = x.mean(0) - y.mean(0)
    a, b = (np.cov(z.astype(np.float64).T) for z in (x, y))
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    return float(difference @ difference + np.trace(a) + np.trace(b) - 2 * cross)


def run(seed: int, method: str, steps: int, data: Any, classify: Any) -> dict[str, Any]:
    """Quality by step, of one training."""
    key = jax.random.key(seed)
    p = {"network": init(key), "projector": losses.Projector.init(key, WIDTH, data[2].shape[1], hidden=128)}
    state = (p, OPTIMIZER.init(p), losses.GradientAgreement.start(decay=0.95, warmup=20), jnp.zeros((), jnp.int32))
    label = jnp.arange(GENERATED) % 10
    real = np.asarray(classify(data[0])[0])
    rows: dict[str, Any] = {"seed": seed, "method": method, "step": [], "frechet": [], "accuracy": []}
    for number in range(steps // EVERY):
        state = train(state, data, jax.random.fold_in(key, number), method)
        digits = generate(state[0]["network"], jax.random.key(1000 + seed), label)
        features, logits = classify(digits)
        rows["step"].append((number + 1) * EVERY)
        rows["frechet"].append(frechet(np.asarray(features), real))
        rows["accuracy"].append(float((logits.argmax(1) == label).mean()))
    rows["active"], rows["cosine"] = bool(state[2].active), float(state[2].cosine)
    rows["digits"] = np.asarray(digits[:30]).tolist()
    return rows


def steps_to(rows: dict[str, Any], goal: float) -> float:
    """The first step, interpolated, with a Fréchet distance of at most the goal; inf if there is none."""
    value, step = np.array(rows["frechet"]), np.array(rows["step"], float)
    reached = np.flatnonzero(value <= goal)
    if not reached.size:
        return np.inf
    k = int(reached[0])
    if k == 0:
        return step[0]
    return step[k - 1] + (step[k] - step[k - 1]) * (value[k - 1] - goal) / (value[k - 1] - value[k])


def summary(found: list[dict[str, Any]]) -> str:
    """The table, as Markdown: means and standard deviations over seeds."""
    step = found[0]["step"]
    shown = [k for k in range(len(step)) if step[k] in (EVERY, 2 * EVERY, 4 * EVERY, step[-1])]
    early = min(1, len(step) - 1)
    baseline = {rows["seed"]: rows["frechet"][early] for rows in found if rows["method"] == "flow"}
    titles = [
        *(f"Fréchet distance, step {step[k]}" for k in shown), f"right class, step {step[0]}", f"step {step[-1]}",
        f"steps to the quality of flow at step {step[early]}",
    ]  # fmt: skip
    lines = ["| trained with | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for method in METHODS:
        chosen = [rows for rows in found if rows["method"] == method]
        if not chosen:
            continue
        distance, accuracy = (np.array([rows[name] for rows in chosen]) for name in ("frechet", "accuracy"))
        steps = np.array([steps_to(rows, baseline.get(rows["seed"], np.inf)) for rows in chosen])
        cells = [f"{column.mean():.2f} ± {column.std():.2f}" for column in distance.T[shown]]
        cells += [f"{column.mean():.3f}" for column in (accuracy[:, 0], accuracy[:, -1])]
        cells.append(f"{steps.mean():.0f} ± {steps.std():.0f}" if np.isfinite(steps).all() else "not all reach it")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: list[dict[str, Any]], digits: np.ndarray, path: Path) -> None:
    """Quality by step, and generated digits."""
    figure = Figure((9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for color, method in zip(COLORS, METHODS, strict=True):
        chosen = [rows for rows in found if rows["method"] == method]
        if chosen:
            values = np.array([rows["frechet"] for rows in chosen])
            step = chosen[0]["step"]
            left.plot(step, values.mean(0), color=color, label=method)
            left.fill_between(step, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
    left.set(xlabel="step", ylabel="Fréchet distance", yscale="log")
    left.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    left.spines[["top", "right"]].set_visible(False)
    rows = [next((r for r in found if r["method"] == method), None) for method in METHODS]
    tiles = [np.asarray(r["digits"])[:10].reshape(10, SIDE, SIDE) for r in rows if r]
    tiles.append(digits)
    canvas = np.concatenate([np.concatenate(list(np.pad(t, ((0, 0), (1, 1), (1, 1)))), 1) for t in tiles])
    right.imshow(canvas, cmap="gray", vmin=-1, vmax=1)
    right.set_yticks(
        [5 + 10 * k for k in range(len(tiles))], [*(m for m, r in zip(METHODS, rows, strict=True) if r), "real"]
    )
    right.set_xticks([])
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=Path("flow_matching"))
    options = parser.parse_args()
    shipped = jaxalign.datasets.load_digit_features()
    pixels = jnp.asarray(shipped.images, jnp.float32).reshape(-1, SIDE**2) / 8 - 1
    features = jnp.asarray(shipped.features[TEACHER], jnp.float32)
    features = (features - features.mean(0)) / features.std(0)
    label = jnp.asarray(shipped.labels, jnp.int32)
    data, classify = (pixels, label, features), classifier(pixels, label)
    options.out.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in range(options.seeds):
        for method in options.methods:
            found.append(run(seed, method, options.steps, data, classify))
            last = found[-1]
            print(f"seed {seed}, {method}: {last['frechet'][-1]:.3f}, {last['accuracy'][-1]:.3f}", flush=True)
            (options.out / "runs.json").write_text(json.dumps(found))
    print(summary(found))
    first = np.array([np.flatnonzero(np.asarray(label) == k)[0] for k in range(10)])
    draw(found, np.asarray(pixels)[first].reshape(-1, SIDE, SIDE), options.out / "flow_matching.png")


if __name__ == "__main__":
    main()
