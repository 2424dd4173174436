"""A function of jax arrays as one of torch tensors that torch differentiates.

torch is imported when a function is called, never before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.interop.torch import from_torch, require_torch, to_torch

# Compiled forms that are kept of one function: of as many sets of options.
_KEPT = 64


def torch_function(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch tensors from a function of jax arrays, differentiable by torch's autograd to every order.

    The function is compiled once for each set of shapes, dtypes and options. The tensors are read in place where
    possible, see `from_torch`; forward and backward pass wait until jax is done, so a tensor may be written to right
    afterwards. (Written to before the backward pass, it makes torch raise, as for its own functions.)

    Args:
        fn: a function of arrays, or pytrees of them, that `jax.jit` can trace, and that returns arrays. Anything in its
            arguments that is not a tensor must be hashable and counts as an option that is fixed while it is compiled.

    Returns:
        The same function of torch tensors: results are tensors on the device of the arguments; gradients have the dtype
        of the tensors they belong to. Tensors may be strided in any way. On CUDA, work of either side waits for what
        the other has put into its current stream (DLPack). nan and infeasible values give nan rather than an exception,
        as always while jax traces.

    Raises:
        TypeError: tensors on different devices, or such that jax cannot read: see `from_torch`; options that are
            not hashable; numpy or jax arrays among the arguments; what `fn` refuses.
        RuntimeError: inside `torch.func` transformations (vmap, grad, ...).

    Example:
        >>> import pytest; torch = pytest.importorskip("torch")
        >>> import jaxalign
        >>> affinity = jaxalign.interop.torch_function(jaxalign.rbf_affinity)
        >>> x = torch.randn(50, 8, requires_grad=True)
        >>> affinity(x, density=0.1).square().sum().backward()
        >>> x.grad.shape
        torch.Size([50, 8])
    """
    compiled = lru_cache(maxsize=_KEPT)(partial(_compiled, fn))

    def of_tensors(*args: Any, **kwargs: Any) -> Any:
        torch = require_torch()
        leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, torch.Tensor))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for leaf in leaves:
            if isinstance(leaf, (np.ndarray, jax.Array)):
                raise TypeError(
                    f"got an array of type {type(leaf).__name__} among torch tensors: give torch.from_numpy(...) or "
                    "jaxalign.interop.to_torch(...) of it."
                )
        places = {str(tensor.device) for tensor in tensors}
        if len(places) > 1:
            raise TypeError(f"the tensors are on different devices, {', '.join(sorted(places))}: move them to one.")
        options = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        which = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
        try:
            of_arrays = compiled(structure, which, options)
        except TypeError as error:
            if "unhashable" not in str(error):
                raise
            raise TypeError(f"options must be hashable, as they are fixed when {fn} is compiled: {error}.") from None
        try:
            outs = _function(torch).apply(of_arrays, *tensors)
        except RuntimeError as error:
            if "functorch" not in str(error):
                raise
            raise RuntimeError(
                "torch.func (vmap, grad, jacrev, ...) cannot look into a function of jax: use torch.autograd, and "
                "tensors with leading batch dimensions in place of vmap."
            ) from None
        return jax.tree.unflatten(of_arrays.structure[0], outs)

    @wraps(fn)
    def outside_graphs(*args: Any, **kwargs: Any) -> Any:
        if not eager:
            eager.append(require_torch().compiler.disable(of_tensors))
        return eager[0](*args, **kwargs)

    eager: list[Any] = []
    # torch.compile leaves it out of its graphs. Its own decorator says so from the first call on: torch is not imported
    # before that; this says so to what compiles around it.
    outside_graphs._torchdynamo_disable = True  # type: ignore[attr-defined]
    outside_graphs._torchdynamo_disable_msg = "a function of jax, by jaxalign.interop.torch_function"  # type: ignore[attr-defined]
    return outside_graphs


class _Compiled(NamedTuple):
    """A function of arrays in a flat form: arrays in, a tuple of arrays out."""

    value: Callable[..., tuple[Any, ...]]
    with_pullback: Callable[..., tuple[tuple[Any, ...], Any]]
    pull_back: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]
    structure: list[Any]  # of what it returns, once it was called
    gradient: Callable[[int], _Compiled]  # its vector-Jacobian product as such a function, of so many arrays


def _compiled(fn: Callable[..., Any], structure: Any, which: tuple[bool, ...], options: tuple[Any, ...]) -> _Compiled:
    told: list[Any] = [None]

    def flat(*arrays: Any) -> tuple[Any, ...]:
        some = iter(arrays)
        leaves = [next(some) if is_array else option for is_array, option in zip(which, options, strict=True)]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        outs, told[0] = jax.tree.flatten(fn(*args, **kwargs))
        return tuple(outs)

    return _of_flat(flat, told)


def _of_flat(flat: Callable[..., tuple[Any, ...]], structure: list[Any]) -> _Compiled:
    @lru_cache(maxsize=1)
    def gradient(count: int) -> _Compiled:
        def vjp(*both: Any) -> tuple[Any, ...]:
            primals, cotangents = both[:count], both[count:]
            return _pulled(jax.vjp(flat, *primals)[1], cotangents)

        return _of_flat(vjp, [None])

    return _Compiled(
        jax.jit(flat), jax.jit(lambda *arrays: jax.vjp(flat, *arrays)), jax.jit(_pulled), structure, gradient
    )


def _pulled(pullback: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cotangents of the inputs from those of the outputs; of an integer there is none, and a zero stands for it."""
    given = (a if jnp.issubdtype(a.dtype, jnp.floating) else np.zeros(a.shape, jax.dtypes.float0) for a in cotangents)
    return tuple(jnp.zeros((), jnp.int8) if a.dtype == jax.dtypes.float0 else a for a in pullback(tuple(given)))


@lru_cache(maxsize=1)
def _function(torch: Any) -> Any:
    """The torch.autograd.Function behind all of them."""

    class JaxFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, of_arrays: _Compiled, *tensors: Any) -> Any:
            arrays = from_torch(tensors)
            if any(ctx.needs_input_grad):
                outs, ctx.pullback = of_arrays.with_pullback(*arrays)
            else:
                outs = of_arrays.value(*arrays)
            outs = to_torch(jax.block_until_ready(outs))
            ctx.of_arrays, ctx.count = of_arrays, len(tensors)
            # So that torch notices if what jax still has to read is written to.
            ctx.save_for_backward(*tensors, *outs)
            ctx.mark_non_differentiable(*(out for out in outs if not out.is_floating_point()))
            return outs

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            saved = ctx.saved_tensors
            tensors, outs = saved[: ctx.count], saved[ctx.count :]
            of_arrays = ctx.of_arrays
            given = [
                torch.zeros_like(out) if cotangent is None else cotangent.to(out.dtype)
                for out, cotangent in zip(outs, cotangents, strict=True)
            ]
            if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated
                gradients = JaxFunction.apply(of_arrays.gradient(ctx.count), *tensors, *given)
            else:
                pulled = of_arrays.pull_back(ctx.pullback, tuple(from_torch(given)))
                gradients = to_torch(jax.block_until_ready(pulled))
            wanted = ctx.needs_input_grad[1:]
            return None, *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))

    return JaxFunction
