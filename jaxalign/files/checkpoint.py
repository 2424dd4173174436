"""The checkpoint format: an .npz file with the state of a job, and with the inputs that identify the job.

The file is replaced atomically, so it is complete even if the job is killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign._repr import shown
from jaxalign._version import __version__
from jaxalign.files.readers import open_npz
from jaxalign.files.storage import check_regular, locked, replace_file

State = dict[str, np.ndarray]

_FORMAT = 2  # 1: JSON of sigma and density, .npz of grids without this number
_WAY_OUT = "Delete it to start again, or use another file."


@dataclass(frozen=True)
class Checkpoint:
    """A file for the state of a job."""

    path: Path | None  # None saves nothing
    task: str  # name of the function that writes the file
    inputs: dict[str, Any]  # inputs that identify the job, as JSON: checksums of features, and options

    @cached_property
    def _identity(self) -> dict[str, Any]:
        identity = {"format": _FORMAT, "version": __version__, "task": self.task, **self.inputs}
        return json.loads(json.dumps(identity))  # as read from the file: tuples become lists

    def load(self, initial: State) -> State:
        """The saved state, or `initial`; raises if the file belongs to another job, or its arrays have other shapes."""
        if self.path is None or not self.path.exists():
            return dict(initial)
        check_regular(self.path)
        try:
            with open_npz(self.path) as arrays:
                identity = dict(json.loads(str(arrays.pop("identity").load())))
                if identity == self._identity:
                    if _layout(arrays) != _layout(initial):
                        raise ValueError
                    return {name: stored.load() for name, stored in arrays.items()}
        except PermissionError:
            raise
        except Exception:  # a damaged archive can raise anything
            raise self.damaged() from None
        keys = [key for key in {**self._identity, **identity} if identity.get(key) != self._identity.get(key)]
        different = ", ".join(
            f"{key} (file: {shown(identity.get(key))}, now: {shown(self._identity.get(key))})"
            for key in (keys[:1] if "format" in keys else keys)
        )
        raise ValueError(f"checkpoint {self.path} belongs to another job; it differs in {different}. {_WAY_OUT}")

    def save(self, state: State) -> None:
        """Replace the file with the state."""
        if self.path is not None:
            content = io.BytesIO()
            arrays: dict[str, Any] = {"identity": np.asarray(json.dumps(self._identity)), **state}
            np.savez(content, **arrays)
            replace_file(self.path, content.getvalue())

    def remove(self) -> None:
        """Delete the file, once the job is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def damaged(self) -> ValueError:
        """The error for a file that the task did not write."""
        expected = f"a checkpoint of {self.task} as this version writes it"
        return ValueError(f"checkpoint {self.path} is truncated or not {expected}. {_WAY_OUT}")


def _layout(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: (array.dtype, array.shape) for name, array in arrays.items()}


@contextlib.contextmanager
def locked_checkpoint(path: str | os.PathLike[str] | None) -> Generator[Path | None, None, None]:
    """Lock a checkpoint for one job; raises before any work if another job uses it, or it cannot be written."""
    path = None if path is None else Path(path)
    if path is not None and path.is_dir():
        raise IsADirectoryError(f"checkpoint {path} is a folder: pass a file in it.")
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"checkpoint {path}: the folder {path.parent} does not exist.")
    with locked(path):
        yield path
