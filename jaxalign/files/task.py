"""What a comparison grid compares, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign.files.json_values import json_option
from jaxalign.files.progress import Progress
from jaxalign.measures._evaluate import Missing


@dataclass(frozen=True)
class GridTask:
    """What is compared with what, and how."""

    features: list[Any]  # (n, d) of each representation, those of the rows of the grid first
    names: list[str]
    split: int  # how many of them are rows of the grid; all: they are its columns too
    options: dict[str, Any]  # of the measure
    mask: Any
    missing: Missing
    tile_size: Any
    progress: Progress

    @property
    def num_samples(self) -> int:
        """Rows of every representation."""
        return self.features[0].shape[0]

    @property
    def columns(self) -> range:
        """The representations that are columns of the grid."""
        return range(self.split, len(self.names)) if len(self.names) > self.split else range(self.split)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the grid."""
        return self.split, len(self.columns)

    def sigma_of(self, k: int) -> Any:
        """The sigma that the options give a representation."""
        sigma = self.options.get("sigma")
        return sigma[k] if isinstance(sigma, (tuple, list)) else sigma

    def subset(self, numbers: Sequence[int]) -> GridTask:
        """The task of some of the representations."""
        return replace(
            self,
            features=[self.features[k] for k in numbers],
            names=[self.names[k] for k in numbers],
            split=sum(k < self.split for k in numbers),
            options={**self.options, "sigma": [self.sigma_of(k) for k in numbers]},
        )

    def inputs(self, measure: str) -> dict[str, Any]:
        """What a checkpoint is compared by, beside the features."""
        return {
            "measure": measure,
            "options": {name: json_option(value) for name, value in self.options.items()},
            # A few values of a function of distances: two with one name may differ.
            "kernels": {
                name: np.asarray(value(jnp.logspace(-3, 3, 13))).tolist()
                for name, value in self.options.items()
                if callable(value)
            },
            "names": self.names,
            "split": self.split,
            "missing": self.missing,
        }


class GridResult(NamedTuple):
    """The numbers of a grid."""

    values: np.ndarray
    sigma: np.ndarray  # of each representation
    num_samples: int  # that counted
