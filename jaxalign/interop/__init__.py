"""Conversion to and from other frameworks, none of which is imported with this module."""

from jaxalign.interop import torch_losses as torch_losses
from jaxalign.interop.autograd import torch_function as torch_function
from jaxalign.interop.capture import capture_features as capture_features
from jaxalign.interop.torch import from_torch as from_torch
from jaxalign.interop.torch import to_torch as to_torch
