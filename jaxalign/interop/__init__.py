"""Bridges to other libraries; importing this imports none of them."""

from jaxalign.interop.torch import from_torch as from_torch
from jaxalign.interop.torch import to_torch as to_torch
