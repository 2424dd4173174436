"""The losses of `jaxalign.losses` for torch tensors, differentiable by torch; options and results are the same.

    loss = jaxalign.interop.torch_losses.alignment_loss(student(x), teacher(x).detach(), measure="cka")
    loss.backward()

With a memory: `empty_memory` and `remember` here hold tensors.
"""

from __future__ import annotations

from functools import partial

from jaxalign import losses
from jaxalign.interop.autograd import torch_function
from jaxalign.interop.torch import to_torch

alignment_loss = torch_function(losses.alignment_loss)
multi_layer_loss = partial(losses.multi_layer_loss, loss=alignment_loss)
remember = torch_function(losses.remember)


def empty_memory(capacity: int, width_x: int, width_y: int) -> losses.Memory:
    """A memory of tensors that holds nothing yet; see `jaxalign.losses.empty_memory`."""
    return to_torch(losses.empty_memory(capacity, width_x, width_y))
