"""What is finished of a long job, in a file that is whole at any time."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Saved:
    """What is finished, in a file."""

    path: Path | None
    identity: str
    arrays: dict[str, np.ndarray]

    @staticmethod
    def open(path: str | os.PathLike[str] | None, identity: dict[str, Any]) -> Saved:
        """What a file holds, if there is one; refused where it does not belong to this job."""
        told = json.dumps(identity, sort_keys=True)
        if path is None:
            return Saved(None, told, {})
        path = Path(path)
        check_place(path)
        if not path.exists():
            return Saved(path, told, {})
        way_out = "Delete it to start again, or name another file."
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files}
            found = dict(json.loads(str(arrays.pop("identity"))))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            raise ValueError(f"checkpoint {path} is truncated or not a checkpoint of compare_grid. {way_out}") from None
        wanted = json.loads(told)
        different = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
        if different:
            raise ValueError(
                f"checkpoint {path} belongs to another job; what differs: {', '.join(different)}. {way_out}"
            )
        return Saved(path, told, arrays)

    def write(self, arrays: dict[str, np.ndarray]) -> None:
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


def check_place(path: Path) -> None:
    """Raise before any work is done where a file cannot be written to."""
    if path.is_dir():
        raise IsADirectoryError(f"checkpoint {path} is a folder: name a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"checkpoint {path}: there is no folder {path.parent}.")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step, so that a kill leaves the old one or the new one."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:  # a full disk, Ctrl-C: nothing half-written stays
        beside.unlink(missing_ok=True)
        raise


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
