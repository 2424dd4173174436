"""The losses of `jaxalign.losses` for torch tensors, differentiable by torch; options and results are the same.

    loss = jaxalign.interop.torch_losses.alignment_loss(student(x), teacher(x).detach(), measure="cka")
    loss.backward()

With a memory: `to_torch(jaxalign.losses.empty_memory(...))`, and `remember` here to add to it.
"""

from __future__ import annotations

from functools import partial

from jaxalign import losses
from jaxalign.interop.autograd import torch_function

alignment_loss = torch_function(losses.alignment_loss)
multi_layer_loss = partial(losses.multi_layer_loss, loss=alignment_loss)
remember = torch_function(losses.remember)
