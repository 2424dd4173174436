"""The losses of `jaxalign.losses` for torch tensors, differentiable by torch, with the same options and results.

    loss = jaxalign.interop.torch_losses.alignment_loss(student(x), teacher(x).detach(), measure="cka")
    loss.backward()

`empty_queue` makes a queue of tensors, and `push` adds a batch to it.
"""

from __future__ import annotations

from functools import partial

from jaxalign import losses
from jaxalign.interop.autograd import torch_function
from jaxalign.interop.torch import to_torch

alignment_loss = torch_function(losses.alignment_loss)
token_loss = torch_function(losses.token_loss)
decorrelation_loss = torch_function(losses.decorrelation_loss)
gradient_cosine = torch_function(losses.gradient_cosine)
multi_layer_loss = partial(losses.multi_layer_loss, loss=alignment_loss)
push = torch_function(losses.FeatureQueue.push)


def empty_queue(capacity: int, width_x: int, width_y: int) -> losses.FeatureQueue:
    """A queue of tensors without samples; see `jaxalign.losses.FeatureQueue.empty`."""
    return to_torch(losses.FeatureQueue.empty(capacity, width_x, width_y))
