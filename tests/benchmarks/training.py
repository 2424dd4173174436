"""A training step: the alignment loss and its gradient, against the same at a fixed sigma and against one by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign
from jaxalign.kernels import RBF
from jaxalign.losses import alignment_loss

from . import floor, rivals
from .timing import Result, compare

DENSITY = 0.05


def run(batch: int, width: int, rounds: int) -> Iterator[Result]:
    """Results as they are measured."""
    rng = np.random.default_rng(0)
    x, noise = (jnp.asarray(a) for a in rng.normal(size=(2, batch, width)).astype(np.float32))
    y = jnp.tanh(x) + 0.5 * noise
    sigmas = tuple(float(jaxalign.solve_sigma(a, density=DENSITY, diagonal="exclude").sigma) for a in (x, y))
    once = floor.affinity(batch, width, sets=2)  # and a product of its cotangent with the features for the gradient
    work = floor.Work(once.flops + 2 * 2 * batch * batch * width, once.exps)
    for measure in ("cka", "affinity", "kl"):
        auto, fixed, constant = (
            jax.jit(jax.value_and_grad(partial(alignment_loss, measure=measure, **options)))
            for options in (
                {"kernel": RBF(density=DENSITY)},
                {"kernel": RBF(sigmas)},
                {"kernel": RBF(density=DENSITY), "stop_gradient_sigma": True},
            )
        )
        case = f"loss {measure}, batch {batch}, d = {width}, value and gradient: auto-scaled / fixed sigma"
        other = ("fixed", lambda f=fixed: f(x, y))
        yield compare(case, ("auto", lambda f=auto: f(x, y)), other, rounds, bound="<=", target=1.5, work=work)
        case = f"loss {measure}: sigma solved but constant in the gradient / fixed sigma"
        yield compare(case, ("constant", lambda f=constant: f(x, y)), other, rounds)
    for small in (32, 256):
        yield from by_hand(small, rounds)


def by_hand(batch: int, rounds: int) -> Iterator[Result]:
    """The loss of a small batch, features of 384 and 768 channels, against hand-written ones.

    One does the same, with sigma by Newton steps; the other sets sigma by a rule.
    """
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(batch, d)).astype(np.float32) for d in (384, 768))
    case = f"loss cka, batch {batch}, 20 steps of value and gradient: times of one written by hand"
    densities = {"": DENSITY, ", with a sigma by rule": None}
    arrays = jnp.asarray(x), jnp.asarray(y)
    ours = jax.jit(jax.value_and_grad(lambda x, y: alignment_loss(x, y)))
    for rule, density in densities.items():
        plain = jax.jit(jax.value_and_grad(partial(rivals.jax_loss, density=density)))
        goal: dict[str, Any] = {} if rule else {"bound": "<=", "target": 1.2}
        both = [_repeated(lambda f=f: f(*arrays)) for f in (ours, plain)]
        yield compare(f"{case}{rule}, in JAX", ("jaxalign", both[0]), ("plain JAX", both[1]), rounds, **goal)
    if find_spec("torch") is None:
        return
    import torch

    from jaxalign.interop import torch_losses

    tx, ty = torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)

    def step(loss: Any) -> None:
        tx.grad = None
        loss(tx, ty).backward()

    for rule, density in densities.items():
        plain_torch = partial(rivals.torch_loss, density=density)
        goal = {} if rule else {"bound": "<=", "target": 1.0}
        both = [_repeated(lambda f=f: step(f)) for f in (torch_losses.alignment_loss, plain_torch)]
        yield compare(f"{case}{rule}, in torch", ("jaxalign", both[0]), ("plain torch", both[1]), rounds, **goal)


def _repeated(step: Callable[[], Any], times: int = 20) -> Callable[[], None]:
    """Several steps, as one takes less than the scheduler of a busy machine."""

    def steps() -> None:
        for _ in range(times):
            jax.block_until_ready(step())

    return steps
