"""Functions of JAX arrays as functions of torch tensors that torch can differentiate.

torch is imported when a function is called, not before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.interop.torch import from_torch, require_torch, to_torch

# Number of compiled forms per function that are kept, one for each combination of options.
_MAX_COMPILED = 64


def torch_function(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of torch tensors from a function of JAX arrays, differentiable by autograd to every order.

    The function is compiled once per combination of shapes, dtypes and options. Tensors are read in place if possible,
    see `from_torch`. The forward and backward pass return when JAX has finished, so tensors may be overwritten
    afterwards. (A tensor that is overwritten before the backward pass makes torch raise, as with its functions.)

    Args:
        fn: a function of arrays, or pytrees of arrays, that `jax.jit` can trace and that returns arrays. Arguments that
            are not tensors must be hashable, and are static options of the compiled function.

    Returns:
        The same function of torch tensors. Results are tensors on the device of the arguments; gradients have the dtype
        of their tensors. Tensors may have any strides. On CUDA each framework waits for the current stream of the other
        (DLPack). nan and infeasible values return nan instead of raising, as always under a JAX trace.

    Raises:
        TypeError: tensors on different devices, or that JAX cannot read, see `from_torch`; options that are not
            hashable; numpy or JAX arrays among the arguments; the errors of `fn`.
        RuntimeError: inside `torch.func` transformations (vmap, grad, ...).

    Examples:
        >>> import pytest; torch = pytest.importorskip("torch")
        >>> import jaxalign
        >>> affinity = jaxalign.interop.torch_function(jaxalign.rbf_affinity)
        >>> x = torch.randn(50, 8, requires_grad=True)
        >>> affinity(x, density=0.1).square().sum().backward()
        >>> x.grad.shape
        torch.Size([50, 8])
    """
    compiled = lru_cache(maxsize=_MAX_COMPILED)(partial(_compiled, fn))

    def of_tensors(*args: Any, **kwargs: Any) -> Any:
        torch = require_torch()
        leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, torch.Tensor))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for leaf in leaves:
            if isinstance(leaf, (np.ndarray, jax.Array)):
                raise TypeError(
                    f"got an array of type {type(leaf).__name__} among torch tensors: convert it with "
                    "torch.from_numpy(...) or jaxalign.interop.to_torch(...)."
                )
        devices = {str(tensor.device) for tensor in tensors}
        if len(devices) > 1:
            raise TypeError(f"the tensors are on different devices, {', '.join(sorted(devices))}: move them to one.")
        options = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        which = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
        try:
            of_arrays = compiled(structure, which, options)
        except TypeError as error:
            if "unhashable" not in str(error):
                raise
            raise TypeError(f"options must be hashable, as they are static in the compiled {fn}: {error}.") from None
        try:
            outs = _function(torch).apply(of_arrays, *tensors)
        except RuntimeError as error:
            if "functorch" not in str(error):
                raise
            raise RuntimeError(
                "torch.func (vmap, grad, jacrev, ...) cannot transform a JAX function: use torch.autograd, and tensors "
                "with leading batch dimensions instead of vmap."
            ) from None
        return jax.tree.unflatten(of_arrays.structure[0], outs)

    @wraps(fn)
    def outside_graphs(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
            return of_tensors(*args, **kwargs)
        if not eager:
            eager.append(require_torch().compiler.disable(of_tensors))
        return eager[0](*args, **kwargs)

    eager: list[Any] = []
    # torch.compile must leave the function out of its graphs. Its decorator applies from the first call on, as torch is
    # not imported before. These attributes apply to code that is compiled around it.
    outside_graphs._torchdynamo_disable = True  # type: ignore[attr-defined]
    outside_graphs._torchdynamo_disable_msg = "a function of jax, by jaxalign.interop.torch_function"  # type: ignore[attr-defined]
    return outside_graphs


class _Compiled(NamedTuple):
    """A function of arrays in a flat form: arrays in, a tuple of arrays out."""

    value: Callable[..., tuple[Any, ...]]
    # (which inputs need a gradient, arrays) -> results, and the gradients of a single number, or else the pullback.
    with_derivative: Callable[..., tuple[tuple[Any, ...], Any]]
    pull_back: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]
    structure: list[Any]  # of its results, set by the first call
    gradient: Callable[[int], _Compiled]  # its vector-Jacobian product for a number of arrays


def _compiled(fn: Callable[..., Any], structure: Any, which: tuple[bool, ...], options: tuple[Any, ...]) -> _Compiled:
    result_structure: list[Any] = [None]

    def flat(*arrays: Any) -> tuple[Any, ...]:
        remaining = iter(arrays)
        leaves = [next(remaining) if is_array else option for is_array, option in zip(which, options, strict=True)]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        outs, result_structure[0] = jax.tree.flatten(fn(*args, **kwargs))
        return tuple(outs)

    return _of_flat(flat, result_structure)


def _of_flat(flat: Callable[..., tuple[Any, ...]], structure: list[Any]) -> _Compiled:
    @lru_cache(maxsize=1)
    def gradient(count: int) -> _Compiled:
        def vjp(*both: Any) -> tuple[Any, ...]:
            primals, cotangents = both[:count], both[count:]
            pulled = jax.vjp(flat, *primals)[1](_typed(cotangents))
            return tuple(jnp.zeros((), jnp.int8) if a.dtype == jax.dtypes.float0 else a for a in pulled)

        return _of_flat(vjp, [None])

    def with_derivative(needed: tuple[bool, ...], *arrays: Any) -> tuple[tuple[Any, ...], Any]:
        def of_needed(*moving: Any) -> tuple[Any, ...]:
            remaining = iter(moving)
            return flat(*(next(remaining) if need else a for need, a in zip(needed, arrays, strict=True)))

        outs, pullback = jax.vjp(of_needed, *(a for need, a in zip(needed, arrays, strict=True) if need))
        # The gradient of a loss is its derivative times a number: computed with the loss, it needs no second call.
        return outs, pullback((jnp.ones((), outs[0].dtype),)) if _is_number(outs) else pullback

    return _Compiled(
        jax.jit(flat),
        jax.jit(with_derivative, static_argnums=0),
        jax.jit(lambda pullback, cotangents: pullback(_typed(cotangents))),
        structure,
        gradient,
    )


def _is_number(outs: tuple[Any, ...]) -> bool:
    return len(outs) == 1 and outs[0].ndim == 0 and jnp.issubdtype(outs[0].dtype, jnp.floating)


def _typed(cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cotangents as JAX wants those of integers."""
    return tuple(
        a if jnp.issubdtype(a.dtype, jnp.floating) else np.zeros(a.shape, jax.dtypes.float0) for a in cotangents
    )


def _arguments(torch: Any, tensors: tuple[Any, ...]) -> Any:
    """Arrays for a compiled function, which has finished when its caller goes on."""
    # NumPy arrays, which share memory too, take a few microseconds less each than JAX arrays.
    if all(a.dtype == torch.float32 and a.device.type == "cpu" and a.layout == torch.strided for a in tensors):
        return tuple(a.detach().numpy() for a in tensors)
    return from_torch(tensors)


@lru_cache(maxsize=1)
def _function(torch: Any) -> Any:
    """The torch.autograd.Function of all converted functions."""

    class JaxFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, of_arrays: _Compiled, *tensors: Any) -> Any:
            arrays, needed = _arguments(torch, tensors), ctx.needs_input_grad[1:]
            if any(needed):
                outs, ctx.derivative = jax.block_until_ready(of_arrays.with_derivative(needed, *arrays))
            else:
                outs = jax.block_until_ready(of_arrays.value(*arrays))
            ctx.is_number = _is_number(outs)
            outs = to_torch(outs)
            ctx.of_arrays, ctx.count = of_arrays, len(tensors)
            # So that torch raises if a tensor that JAX still has to read is overwritten.
            ctx.save_for_backward(*tensors, *outs)
            ctx.mark_non_differentiable(*(out for out in outs if not out.is_floating_point()))
            return outs

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            saved, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
            if torch.is_grad_enabled():  # create_graph=True: the gradient will be differentiated
                tensors = saved[: ctx.count]
                function = ctx.of_arrays.gradient(ctx.count)
                gradients = JaxFunction.apply(function, *tensors, *_dense(torch, saved[ctx.count :], cotangents))
                return None, *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
            if ctx.is_number:
                # Given away, so that torch need not copy it; computed again if there is a second backward pass.
                derivative, ctx.derivative = ctx.derivative, None
                if derivative is None:
                    arrays = _arguments(torch, saved[: ctx.count])
                    derivative = jax.block_until_ready(ctx.of_arrays.with_derivative(needed, *arrays))[1]
                is_one = cotangents[0].device.type == "cpu" and cotangents[0].item() == 1
                gradients = (a if is_one else cotangents[0].to(a.dtype) * a for a in to_torch(derivative))
            else:
                dense = tuple(from_torch(_dense(torch, saved[ctx.count :], cotangents)))
                pulled = jax.block_until_ready(ctx.of_arrays.pull_back(ctx.derivative, dense))
                gradients = iter(to_torch(pulled))
            return None, *(next(gradients) if need else None for need in needed)

    return JaxFunction


def _dense(torch: Any, outs: Any, cotangents: Any) -> list[Any]:
    """Cotangents of all results, with their dtypes."""
    return [
        torch.zeros_like(out) if cotangent is None else cotangent.to(out.dtype)
        for out, cotangent in zip(outs, cotangents, strict=True)
    ]
