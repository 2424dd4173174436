"""Losses of tokens: maps and texts, of networks whose grids and widths differ."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxalign import _checks, _features
from jaxalign._linalg import unit
from jaxalign._repr import shown
from jaxalign._typing import Data, Mask, Numbers
from jaxalign.core.features import centered_columns
from jaxalign.kernels import Kernel
from jaxalign.losses._alignment import MEASURES, Measure, alignment_loss
from jaxalign.plan import Plan

Relations = Literal["within", "across", "both"]
Grid = tuple[int, int]


def token_loss(
    student: Numbers[Data, "b *tokens c1"],
    teacher: Numbers[Data, "b *teacher_tokens c2"],
    measure: Measure | Literal["cosine"] = "cka",
    *,
    relations: Relations = "within",
    student_prefix: int = 0,
    teacher_prefix: int = 0,
    student_grid: Grid | None = None,
    teacher_grid: Grid | None = None,
    spatial_norm: bool = False,
    mask: Mask[Data, "b tokens"] | None = None,
    kernel: Kernel = "rbf",
    reduction: Literal["mean", "none"] = "mean",
    stop_gradient_target: bool = True,
    plan: Plan | None = None,
) -> Float[Array, "..."]:
    """The distance of the geometry of a student's tokens from that of a teacher's tokens of the same images or texts.

    Relations of tokens are compared, so widths may differ and no projector is trained. Grids may differ too: the finer
    one is resized to the coarser one (linear, antialiased). Relations of tokens within an image are what makes a
    teacher help the training of diffusion transformers (Singh et al. 2025).

    Args:
        student: tokens of the network in training, shape (b, t, c1), or maps (b, h, w, c1).
        teacher: tokens of the same images in the other network, shape (b, t', c2) or (b, h', w', c2).
        measure: one of `alignment_loss`, or "cosine": the mean of 1 - cos(student token, teacher token), for tokens
            that a projector has mapped to the width of the teacher (REPA, Yu et al. 2025), see `Projector`.
        relations: "within" compares the tokens of each image with each other, with a bandwidth per image; "across" the
            tokens of all images of the batch; "both" is the mean of the two.
        student_prefix: the number of tokens before the grid, such as class and register tokens, which are left out.
        teacher_prefix: the same of the teacher.
        student_grid: (h, w) of tokens (b, t, c1). None: that of the teacher or, if token counts differ, a square.
        teacher_grid: (h', w') of the teacher's tokens.
        spatial_norm: subtract from each channel of the teacher its mean over the tokens of an image, and divide by
            their standard deviation (Singh et al. 2025), so that what all tokens of an image share does not count.
        mask: shape (b, t), True marks valid tokens, for texts of different lengths. Without prefix tokens.
        kernel: see `alignment_loss`.
        reduction: "mean" over images, or "none" for one value per image, (b,); "across" has only "mean".
        stop_gradient_target: see `alignment_loss`.
        plan: see `alignment_loss`.

    Returns:
        The loss, shape () or (b,). Under a trace, an image with too few valid tokens counts as 0; else it is an error.

    Raises:
        TypeError, ValueError: see `alignment_loss`; batches or tokens that do not match; token counts that are not
            those of a grid; a mask of tokens whose grid changes; "cosine" of different widths.

    Examples:
        >>> import jax, jaxalign
        >>> student = jax.random.normal(jax.random.key(0), (2, 64, 16))  # 8 x 8
        >>> teacher = jax.random.normal(jax.random.key(1), (2, 1 + 256, 32))  # a class token, 16 x 16
        >>> loss = jaxalign.losses.token_loss(student, teacher, teacher_prefix=1)
        >>> loss.shape, bool(loss > 0.5)
        ((), True)
        >>> jaxalign.losses.token_loss(student, teacher, teacher_prefix=1, reduction="none").shape
        (2,)
    """
    _checks.choice("measure", measure, (*MEASURES, "cosine"))
    _checks.choice("relations", relations, ("within", "across", "both"))
    _checks.choice("reduction", reduction, ("mean", "none"))
    if reduction == "none" and relations != "within":
        raise ValueError(
            f'reduction="none" has no value per image with relations={relations!r}: use relations="within".'
        )
    x, grid_x = _tokens("student", student, student_prefix, student_grid)
    y, grid_y = _tokens("teacher", teacher, teacher_prefix, teacher_grid)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"student and teacher must hold the same images or texts, in the same order: {x.shape[0]} and {y.shape[0]}."
        )
    if x.shape[1] == y.shape[1]:  # tokens of an unknown grid are on the known one
        grid_x, grid_y = grid_x or grid_y, grid_y or grid_x
    if grid_x != grid_y or x.shape[1] != y.shape[1]:
        if mask is not None:
            raise ValueError(
                f"mask marks tokens, but the grids differ: {x.shape[1]} and {y.shape[1]} tokens. Resize one of them."
            )
        x, y = _on_one_grid(x, y, grid_x, grid_y)
    valid = _features.row_mask("mask", mask, x.shape[:2])
    if valid is not None:
        x, y = (jnp.where(valid[..., None], a, 0) for a in (x, y))
    for name, value in (("student", x), ("teacher", y)):
        _features.finite_rows(name, value, way_out="Leave out such tokens with mask=.")
    if stop_gradient_target:
        y = lax.stop_gradient(y)
    if spatial_norm:
        y = _spatially_normalized(y, valid)
    if measure == "cosine":
        if kernel != "rbf" or relations != "within" or plan is not None:
            raise ValueError('kernel, relations and plan have no effect on measure="cosine": leave them out.')
        return _cosine_loss(x, y, valid, reduction)
    options: dict[str, Any] = {
        "kernel": kernel, "stop_gradient_target": stop_gradient_target, "plan": plan,
    }  # fmt: skip
    losses = []
    if relations != "across":
        each = alignment_loss(x, y, measure, mask=valid, **options)
        losses.append(each if reduction == "none" else jnp.mean(each))
    if relations != "within":
        rows_x, rows_y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
        rows = None if valid is None else valid.reshape(-1)
        losses.append(alignment_loss(rows_x, rows_y, measure, mask=rows, **options))
    return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2


@partial(jax.tree_util.register_dataclass, data_fields=("weights", "biases"), meta_fields=())
@dataclass(frozen=True, repr=False)
class Projector:
    """A trainable map of tokens to another width, as in REPA (Yu et al. 2025): three linear layers with SiLU between.

    A pytree of parameters, made by `Projector.init`; call it on tokens (..., c).

    Attributes:
        weights: matrices (c, hidden), (hidden, hidden), (hidden, c2).
        biases: vectors (hidden,), (hidden,), (c2,).
    """

    weights: tuple[Any, ...]
    biases: tuple[Any, ...]

    @staticmethod
    def init(key: Array, width: int, target_width: int, hidden: int | None = None) -> Projector:
        """Random parameters of variance 1 / inputs, and biases of 0.

        Args:
            key: a `jax.random.key`.
            width: the number of channels c of the student's tokens.
            target_width: the number of channels of the teacher's tokens.
            hidden: the width between; None: twice the larger of the two.

        Examples:
            >>> import jax, jaxalign
            >>> projector = jaxalign.losses.Projector.init(jax.random.key(0), 16, 32)
            >>> tokens, teacher = jax.numpy.ones((2, 9, 16)), jax.numpy.ones((2, 9, 32))
            >>> def loss(projector):
            ...     return jaxalign.losses.token_loss(projector(tokens), teacher, "cosine")
            >>> jax.grad(loss)(projector).weights[0].shape
            (16, 64)
        """
        _checks.random_key(key)
        hidden = 2 * max(width, target_width) if hidden is None else _checks.whole("hidden", hidden)
        widths = [_checks.whole("width", width), hidden, hidden, _checks.whole("target_width", target_width)]
        keys = jax.random.split(key, 3)
        sizes = list(itertools.pairwise(widths))
        weights = tuple(jax.random.normal(k, size) / math.sqrt(size[0]) for k, size in zip(keys, sizes, strict=True))
        return Projector(weights, tuple(jnp.zeros(width) for _, width in sizes))

    def __repr__(self) -> str:
        shapes = [np.shape(weight) for weight in self.weights]  # a mapped pytree may hold anything
        return f"Projector({' @ '.join(map(str, shapes))})"

    def __call__(self, tokens: Numbers[Data, "*b c"]) -> Float[Array, "*b c2"]:
        """Tokens of the target width."""
        x = _features.features("tokens", tokens)
        if x.shape[-1] != self.weights[0].shape[0]:
            raise ValueError(
                f"tokens have {x.shape[-1]} channels, but the projector was made for {self.weights[0].shape[0]}."
            )
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = jnp.matmul(jax.nn.silu(x) if k else x, weight)
            x = x + jnp.reshape(bias, (1,) * (x.ndim - 1) + bias.shape)
        return x


def _tokens(name: str, value: Any, prefix: Any, grid: Any) -> tuple[Array, Grid | None]:
    """Tokens (b, t, c) without prefix tokens, and their grid, if it is known."""
    x = _features.features(name, value)
    prefix = _checks.whole(f"{name}_prefix", prefix, 0)
    if x.ndim == 4:
        if prefix or grid is not None:
            raise ValueError(f"{name} is a map {x.shape}: {name}_prefix and {name}_grid are for tokens (b, t, c).")
        return x.reshape(x.shape[0], -1, x.shape[-1]), (x.shape[1], x.shape[2])
    if x.ndim != 3:
        raise ValueError(f"{name} must have shape (b, t, c) or (b, h, w, c), channels last; got {x.shape}.")
    if prefix >= x.shape[1]:
        raise ValueError(f"{name}_prefix={prefix} leaves no token of {x.shape[1]}.")
    x = x[:, prefix:]
    if grid is not None:
        if not isinstance(grid, (tuple, list)) or len(grid) != 2:
            raise TypeError(f"{name}_grid must be a pair (h, w); got {shown(grid)}.")
        height, width = (_checks.whole(f"{name}_grid", side) for side in grid)
        if height * width != x.shape[1]:
            raise ValueError(
                f"{name}_grid={shown(tuple(grid))} has {height * width} positions, but {name} has {x.shape[1]} tokens "
                f"after the {name}_prefix={prefix} that are left out."
            )
        grid = (height, width)
    return x, grid


def _on_one_grid(x: Array, y: Array, grid_x: Grid | None, grid_y: Grid | None) -> tuple[Array, Array]:
    """Both on the coarser grid."""
    grid_x, grid_y = _square("student", x, grid_x), _square("teacher", y, grid_y)
    height, width = (min(a, b) for a, b in zip(grid_x, grid_y, strict=True))

    def resize(a: Array, grid: Grid) -> Array:
        if grid == (height, width):
            return a
        maps = a.reshape(a.shape[0], *grid, a.shape[-1])
        resized = jax.image.resize(maps, (a.shape[0], height, width, a.shape[-1]), "linear", antialias=True)
        return resized.reshape(a.shape[0], height * width, a.shape[-1])

    return resize(x, grid_x), resize(y, grid_y)


def _square(name: str, x: Array, grid: Grid | None) -> Grid:
    if grid is not None:
        return grid
    tokens = x.shape[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"{name} has {tokens} tokens, which are not a square grid: {name}_prefix={tokens - side * side} leaves out "
            f"those before a grid of {side} x {side}, and {name}_grid=(h, w) sets another."
        )
    return side, side


def _spatially_normalized(y: Array, valid: Array | None) -> Array:
    """Channels of mean 0 and variance 1 over the tokens of each image; 0 if they do not vary."""
    centered = jax.vmap(centered_columns, (0, None if valid is None else 0))(y, valid)
    count = y.shape[1] if valid is None else jnp.maximum(jnp.sum(valid, 1), 1)[:, None, None].astype(y.dtype)
    variance = jnp.sum(centered * centered, 1, keepdims=True) / count
    return centered * jnp.where(variance > 0, lax.rsqrt(jnp.where(variance > 0, variance, 1)), 0)


def _cosine_loss(x: Array, y: Array, valid: Array | None, reduction: str) -> Array:
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f'measure="cosine" compares tokens of one width; got {x.shape[-1]} and {y.shape[-1]} channels. Map those '
            "of the student first, for example with losses.Projector, or use another measure."
        )
    each = 1 - jnp.sum(unit(x) * unit(y), -1)
    weights = jnp.ones_like(each) if valid is None else valid.astype(each.dtype)
    per_image = jnp.sum(each * weights, 1) / jnp.maximum(jnp.sum(weights, 1), 1)
    return per_image if reduction == "none" else jnp.mean(per_image)
