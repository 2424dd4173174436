"""What auto-scaling costs in a training step: the alignment loss and its gradient against the same at a fixed sigma."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign
from jaxalign.kernels import RBF
from jaxalign.losses import alignment_loss

from . import floor
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
