"""Conversion of arrays to and from torch through DLPack, without a copy if both can read the same memory.

torch is imported when a function is called, not before.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _arrays
from jaxalign._numbers import ALLOWED, error_of_narrowing, is_wide


def from_torch(tree: Any, *, copy: bool = False) -> Any:
    """Convert the torch tensors in a pytree (a tensor, or lists, tuples or dicts of tensors) to JAX arrays.

    Args:
        tree: torch tensors on the CPU or on a device that JAX also has; other leaves are returned as they are.
        copy: False shares memory if possible (dense, contiguous, aligned to 64 bytes) and copies otherwise. With shared
            memory, an in-place change of the tensor changes the array, which JAX assumes to be immutable: pass True if
            the tensor will be overwritten, as parameters are by optimizers.

    Returns:
        The same tree with arrays of the same shape, dtype and device. Tensors are detached: gradients do not pass.

    Raises:
        TypeError: a float64, complex128, int64 or uint64 tensor if JAX uses 32 bits (it would be narrowed); a sparse,
            quantized or meta tensor; a device that JAX does not have.

    Examples:
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
    """Convert the JAX arrays in a pytree to torch tensors.

    Args:
        tree: JAX arrays; other leaves (also numpy arrays) are returned as they are. Result objects of jaxalign are
            returned with tensors in place of arrays.
        copy: False shares memory if possible. Writing into such a tensor in place changes the JAX array, and all that
            JAX computes with it: pass True to write into the tensor.

    Returns:
        The same tree with tensors of the same shape, dtype and device, without gradients.

    Raises:
        TypeError: traced arrays (convert outside jit, grad and vmap), arrays spread over several devices, dtypes that
            torch does not have.

    Examples:
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
    """Import torch, or raise an error that says how to install it."""
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
    code = _narrow(torch, tensor) if is_wide(np.float64) else None
    if code is not None:
        raise TypeError(
            f"the tensor is {tensor.dtype}, but JAX uses 32 bits and would narrow it silently. "
            + ("Either " if code else "Its values do not fit: ")
            + 'jax.config.update("jax_enable_x64", True) at the start of the program'
            + (f", or {code}." if code else ".")
        )
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    try:
        array = jax.dlpack.from_dlpack(tensor)
    except Exception as error:
        on_device = tensor.device.type != "cpu"
        way_out = "Write tensor.cpu() to copy it to the host." if on_device else "Convert it to a dtype that JAX has."
        raise TypeError(
            f"JAX cannot convert a tensor of dtype {tensor.dtype} on {tensor.device}; it has the devices "
            f"{', '.join(map(str, jax.devices()))}. {way_out}"
        ) from error
    # Finish the copy before the caller can overwrite the tensor.
    return jnp.array(array, copy=True).block_until_ready() if copy else array


def _narrow(torch: Any, tensor: Any) -> str | None:
    """Code that narrows a tensor of 64 bits to 32; '' if values do not fit; None if the tensor does not have 64 bits.

    Values do not fit if integers would wrap around. A large offset is subtracted, as float32 would keep little else.
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
    if not _arrays.is_concrete(array):
        raise TypeError(f"a traced array has no values yet: {array}. Convert outside jit, grad and vmap.")
    if len(array.devices()) > 1:
        raise TypeError(
            f"the array is spread over {len(array.devices())} devices; gather it first: "
            "jax.device_put(array, jax.devices()[0])."
        )
    try:
        tensor = torch.from_dlpack(array)
    except Exception as error:
        raise TypeError(
            f"torch cannot convert an array of dtype {array.dtype} on {array.devices()}: use a dtype that torch has."
        ) from error
    return tensor.clone() if copy else tensor
