"""Arrays to and from torch through DLPack: without a copy where both sides can read the same memory.

torch is imported when a function is called, never before.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _checks
from jaxalign._numbers import ALLOWED, error_of_narrowing


def from_torch(tree: Any, *, copy: bool = False) -> Any:
    """Convert to jax arrays the torch tensors in a pytree (a tensor, or lists, tuples, dicts of them).

    Args:
        tree: torch tensors on CPU or on a device that jax has too; other leaves are returned as they are.
        copy: False shares memory where possible (dense, contiguous, aligned to 64 bytes) and copies otherwise. With
            shared memory an in-place change of the tensor shows in the array, which jax takes to be immutable:
            give True if the tensor will be written to, as optimizers do with parameters.

    Returns:
        The same tree with arrays of the same shape, dtype and device. Gradients do not pass: the tensors are detached.

    Raises:
        TypeError: a float64, complex128, int64 or uint64 tensor while jax is set to 32 bits (it would be narrowed); a
            sparse, quantized or meta tensor; a device that jax does not have.

    Example:
        >>> import pytest; torch = pytest.importorskip("torch")
        >>> import jaxalign
        >>> jaxalign.interop.from_torch({"features": torch.ones(2, 3)})["features"].shape
        (2, 3)
    """
    torch = require_torch()

    def convert(leaf: Any) -> Any:
        return _array(torch, leaf, copy) if isinstance(leaf, torch.Tensor) else leaf

    return jax.tree.map(convert, tree, is_leaf=lambda leaf: isinstance(leaf, torch.Tensor))


def to_torch(tree: Any, *, copy: bool = False) -> Any:
    """Convert to torch tensors the jax arrays in a pytree.

    Args:
        tree: jax arrays; other leaves (numpy arrays too) are returned as they are. Result objects of jaxalign become
            the same objects with tensors in them.
        copy: False shares memory where possible. Writing into such a tensor in place changes the jax array, and
            whatever jax computes with it: give True to be free to write.

    Returns:
        The same tree with tensors of the same shape, dtype and device, without gradients.

    Raises:
        TypeError: traced arrays (convert outside jit, grad and vmap), arrays spread over several devices, dtypes that
            torch does not have.

    Example:
        >>> import pytest; torch = pytest.importorskip("torch")
        >>> import jax.numpy as jnp, jaxalign
        >>> jaxalign.interop.to_torch(jnp.ones((2, 3))).dtype
        torch.float32
    """
    torch = require_torch()

    def convert(leaf: Any) -> Any:
        return _tensor(torch, leaf, copy) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(convert, tree)


def require_torch() -> Any:
    """The module torch, or an error that says how to get it."""
    try:
        import torch
    except ImportError as error:
        raise ImportError("jaxalign.interop needs torch: python -m pip install torch") from error
    return torch


def _array(torch: Any, tensor: Any, copy: bool) -> jax.Array:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(
            f"only dense tensors convert; got layout {tensor.layout}, dtype {tensor.dtype} on {tensor.device}. "
            "Write tensor.to_dense() for a sparse one, tensor.dequantize() for a quantized one."
        )
    code = None if _checks.x64_enabled() else _narrow(torch, tensor)
    if code is not None:
        raise TypeError(
            f"the tensor is {tensor.dtype}, but jax is set to 32 bits and would narrow it without a word. "
            + ("Either " if code else "Its values do not fit: ")
            + 'jax.config.update("jax_enable_x64", True) at the start of the program'
            + (f", or {code}." if code else ".")
        )
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    try:
        array = jax.dlpack.from_dlpack(tensor)
    except Exception as error:
        away = tensor.device.type != "cpu"
        way_out = "Write tensor.cpu() to come over the host." if away else "Convert it to a dtype that jax has."
        raise TypeError(
            f"jax cannot take a tensor of dtype {tensor.dtype} on {tensor.device}; it has the devices "
            f"{', '.join(map(str, jax.devices()))}. {way_out}"
        ) from error
    # Finished before the caller gets to write into the tensor again.
    return jnp.array(array, copy=True).block_until_ready() if copy else array


def _narrow(torch: Any, tensor: Any) -> str | None:
    """Code that makes of a tensor of 64 bits one of 32, '' where values do not fit; None for a tensor that is not wide.

    Whole numbers would wrap around, and of a large offset nothing but the offset would be left.
    """
    wide = {
        torch.float64: "float()",
        torch.complex128: "to(torch.complex64)",
        torch.int64: "int()",
        torch.uint64: "to(torch.uint32)",
    }
    if tensor.dtype not in wide:
        return None
    code = f"tensor.{wide[tensor.dtype]}"
    host = tensor.detach().resolve_conj().resolve_neg().cpu().numpy()
    if host.dtype.kind in "iu" and host.size:
        limits = np.iinfo(host.dtype.name.replace("64", "32"))
        return code if limits.min <= host.min() and host.max() <= limits.max else ""
    if host.dtype.kind == "f" and (error := error_of_narrowing(host)) > ALLOWED:
        return "" if np.isinf(error) else "(tensor - tensor.mean(0)).float()"
    return code


def _tensor(torch: Any, array: jax.Array, copy: bool) -> Any:
    if not _checks.is_concrete(array):
        raise TypeError(f"a traced array has no values yet: {array}. Convert outside jit, grad and vmap.")
    if len(array.devices()) > 1:
        raise TypeError(
            f"the array is spread over {len(array.devices())} devices; gather it first: "
            "jax.device_put(array, jax.devices()[0])."
        )
    try:
        tensor = torch.from_dlpack(array)
    except Exception as error:
        raise TypeError(f"torch cannot take an array of dtype {array.dtype} on {array.devices()}.") from error
    return tensor.clone() if copy else tensor
