"""Kernels for measures and losses, with their bandwidths.

Measures accept a kernel as a name ("rbf", "laplacian", "linear"), as an object of this module with options, or as a
function of an array of squared distances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar, cast

import jax
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxalign import _checks
from jaxalign._problem import DENSITY, Diagonal, is_default

_registered = partial(jax.tree_util.register_dataclass, data_fields=("sigma", "density"), meta_fields=("diagonal",))


@dataclass(frozen=True, repr=False)
class _WithBandwidth:
    """Base class of the kernels with a bandwidth."""

    sigma: ArrayLike | Sequence[ArrayLike] | None = None
    density: ArrayLike = field(default=DENSITY, kw_only=True)
    diagonal: Diagonal = field(default="exclude", kw_only=True)

    @property
    def solves(self) -> bool:
        """Whether sigma is solved from the density."""
        return self.sigma is None

    def __repr__(self) -> str:
        """The class with its non-default options."""
        options = {"sigma": self.sigma, "density": self.density, "diagonal": self.diagonal}
        default = {
            "sigma": self.sigma is None,
            "density": is_default(self.density),
            "diagonal": self.diagonal == "exclude",
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in options.items() if not default[k])})"


@_registered
@dataclass(frozen=True, repr=False)
class RBF(_WithBandwidth):
    """The kernel exp(-||x_i - x_j||^2 / (2 sigma^2)), whose sigma is scaled automatically.

    Attributes:
        sigma: the bandwidth, in units of the features: a number, an array of the batch shape, or a tuple with one sigma
            per representation. None: solved for each representation, so that the mean of the kernel is `density`.
        density: the target mean, 0 < density < 1; see `jaxalign.solve_sigma`.
        diagonal: "exclude" averages over pairs i != j, which does not depend on the number of samples; "include" also
            counts the ones on the diagonal, as `jaxalign.rbf_affinity` does, and needs n > 1 / density.

    Examples:
        >>> import jax, jaxalign
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 100, 8))
        >>> wide = jaxalign.kernels.RBF(density=0.5)
        >>> round(float(jaxalign.measures.cka(x, 2 * x, wide)), 4)
        1.0
        >>> wide
        RBF(density=0.5)
    """


@_registered
@dataclass(frozen=True, repr=False)
class Laplacian(_WithBandwidth):
    """The kernel exp(-||x_i - x_j|| / sigma), of Euclidean distances.

    Attributes:
        sigma: see `RBF`.
        density: see `RBF`.
        diagonal: see `RBF`.

    Examples:
        >>> import jaxalign
        >>> jaxalign.kernels.Laplacian(2.0)
        Laplacian(sigma=2.0)
    """


@jax.tree_util.register_static
@dataclass(frozen=True)
class Linear:
    """The kernel of inner products of centered features; it has no bandwidth.

    Examples:
        >>> import jax, jaxalign
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 100, 8))
        >>> bool(jaxalign.measures.cka(x, y, jaxalign.kernels.Linear()) == jaxalign.measures.cka(x, y, "linear"))
        True
    """


Kernel = Literal["rbf", "laplacian", "linear"] | RBF | Laplacian | Linear | Callable[[Array], Array]
NAMED: dict[str, type[RBF | Laplacian | Linear]] = {"rbf": RBF, "laplacian": Laplacian, "linear": Linear}


def kernel_of(kernel: Any, name: str = "kernel") -> RBF | Laplacian | Linear | Callable[[Array], Array]:
    """The kernel with a name; objects and functions are checked and returned."""
    if isinstance(kernel, (RBF, Laplacian)):
        _checks.choice("diagonal", kernel.diagonal, ("include", "exclude"))
        if not kernel.solves and not (is_default(kernel.density) and kernel.diagonal == "exclude"):
            raise ValueError(f"{name}={kernel!r}: with sigma, density and diagonal have no effect. Leave them out.")
        return kernel
    if isinstance(kernel, type) and issubclass(kernel, (RBF, Laplacian, Linear)):
        raise TypeError(f"{name} is the class {kernel.__name__}: pass an object, {kernel.__name__}().")
    if isinstance(kernel, Linear):
        return kernel
    if callable(kernel) and not isinstance(kernel, str):
        return cast(Callable[[Array], Array], kernel)
    _checks.choice(name, kernel, tuple(NAMED))
    return NAMED[cast(str, kernel)]()


T = TypeVar("T", bound=RBF | Laplacian)


def for_representations(kernel: T, *numbers: int) -> T:
    """The kernel for a subset of the representations: selects their sigmas if there is one per representation."""
    if not isinstance(kernel.sigma, (tuple, list)):
        return kernel
    sigmas = tuple(kernel.sigma[k] for k in numbers)
    return replace(kernel, sigma=sigmas[0] if len(sigmas) == 1 else sigmas)


def with_bandwidth(options: dict[str, Any]) -> RBF | Laplacian | None:
    """The kernel with a bandwidth among the options of a measure, or None."""
    for name in ("kernel", "metric"):
        value = options.get(name)
        value = NAMED[value]() if isinstance(value, str) and value in NAMED else value
        if isinstance(value, (RBF, Laplacian)):
            return value
    return None
