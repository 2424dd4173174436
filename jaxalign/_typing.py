"""Types that stand in many signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Real

__all__ = ["AnyArray", "Data", "Mask", "Numbers"]

AnyArray = jax.Array | np.ndarray


class _Convertible(Protocol):
    def __array__(self) -> np.ndarray: ...


# Whatever `jaxalign._arrays.numbers` takes: arrays, lists, and what numpy makes an array of, as a DataFrame.
Data = AnyArray | list[Any] | tuple[Any, ...] | _Convertible

if TYPE_CHECKING:
    from typing import Annotated as Mask
    from typing import Annotated as Numbers
else:
    # With a checker of types at run time, as in the tests: arrays are checked for shape and kind, and what becomes an
    # array later, which has none yet, is let through to the checks that convert it.

    class _Later(type):
        def __instancecheck__(cls, value: Any) -> bool:
            is_array = isinstance(value, AnyArray)
            has_numbers = any(hasattr(type(value), name) for name in ("__array__", "__dlpack__"))
            return not is_array and (isinstance(value, (list, tuple)) or has_numbers)

    class _NotYetAnArray(metaclass=_Later):
        pass

    class Numbers:
        """Real numbers of a shape: `Numbers[Data, "n d"]`."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            """The types that are let through."""
            return Real[AnyArray, item[1]] | Bool[AnyArray, item[1]] | _NotYetAnArray

    class Mask:
        """Booleans of a shape: `Mask[Data, "n"]`."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            """The types that are let through."""
            return Bool[AnyArray, item[1]] | _NotYetAnArray
