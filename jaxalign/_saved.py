"""What is finished of a long job, in a file that is whole at any time."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign._files import check_regular, locked, open_npz, replace_file

WAY_OUT = "Delete it to start again, or name another file."


@dataclass(frozen=True)
class Saved:
    """What is finished, in a file."""

    path: Path | None
    identity: str
    arrays: dict[str, np.ndarray]

    @staticmethod
    def open(path: str | os.PathLike[str] | None, identity: dict[str, Any], initial: Mapping[str, np.ndarray]) -> Saved:
        """What a file holds, in arrays like the initial ones, or these; refused where it is of another job."""
        told = json.dumps(identity, sort_keys=True)
        arrays = dict(initial)
        if path is None or not Path(path).exists():
            return Saved(None if path is None else Path(path), told, arrays)
        path = Path(path)
        check_regular(path)
        try:
            with open_npz(path) as content:
                found = dict(json.loads(str(content.pop("identity").load())))
                wanted = json.loads(told)
                different = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
                if not different:
                    for name, stored in content.items():
                        if (stored.dtype, stored.shape) != (initial[name].dtype, initial[name].shape):
                            raise ValueError(f"{name} of shape {stored.shape}")
                        arrays[name] = stored.load()
        except Exception:  # whatever a damaged archive raises
            raise damaged(path, "compare_grid") from None
        if different:
            raise ValueError(
                f"checkpoint {path} belongs to another job; what differs: {', '.join(different)}. {WAY_OUT}"
            )
        return Saved(path, told, arrays)

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the file in one step, so that a kill leaves the old one or the new one."""
        if self.path is not None:
            content = io.BytesIO()
            everything: dict[str, Any] = {"identity": np.asarray(self.identity), **arrays}
            np.savez(content, **everything)
            replace_file(self.path, content.getvalue())

    def remove(self) -> None:
        """The job is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def damaged(path: Path | None, writer: str | None = None) -> ValueError:
    """The error of a checkpoint that holds something else than a job writes."""
    of = "" if writer is None else f" of {writer}"
    return ValueError(f"checkpoint {path} is truncated or not a checkpoint{of}. {WAY_OUT}")


@contextlib.contextmanager
def checkpoint_of_one_job(path: str | os.PathLike[str] | None) -> Generator[None, None, None]:
    """Raise before any work is done where a file cannot be written to, or where another job writes to it."""
    if path is not None:
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"checkpoint {path} is a folder: name a file in it.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"checkpoint {path}: there is no folder {path.parent}.")
    with locked(path):
        yield


def told(value: Any) -> Any:
    """An option as JSON holds it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [told(part) for part in value]
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)  # not repr: it tells an address
        return f"{named.__module__}.{named.__qualname__}"
    return np.asarray(value).tolist()


def plain(value: Any) -> Any:
    """Results as JSON holds them; nan and inf as None."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (np.ndarray, jax.Array, np.generic)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value
