"""Features from files: .npy, .npz, .safetensors, .h5, .parquet, torch .pt, or a folder. Nothing is unpickled.

Some formats need a package of the extra [cli] or [torch], which is imported when a file of that format is read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign import _arrays
from jaxalign._memory import check_bytes
from jaxalign._positions import Positions, rows_of
from jaxalign._repr import short_repr, shown
from jaxalign.files.readers import READERS, read_arrays

# The longest name of an output file, in characters.
_LONGEST = 120
_RAW_BYTES = " numpy writes bfloat16 and float8 as raw bytes, |V2 and |V1: save x.astype(np.float32)."
_NATIVE = "Save it in the byte order of this machine."


@dataclass(frozen=True, repr=False)
class FeatureSet:
    """Features read from a file.

    Attributes:
        name: name of the file, and of the array if the file holds several.
        values: shape (n, d), (n, tokens, d) or (n, h, w, d), channels last; a memory map for .npy files. float8 is read
            as float32, and a sparse tensor as a dense array.
        path: the file.
    """

    name: str
    values: Any
    path: Path

    def __repr__(self) -> str:
        return short_repr(self)

    def rows(self, positions: Positions = "samples") -> Any:
        """Features (n, d).

        Args:
            positions: for tokens and maps: "samples" makes each position a sample, "channels" concatenates the
                positions of a sample, "mean" averages them.
        """
        values = self.values
        if not values.dtype.isnative:  # NumPy and JAX compute in native byte order
            check_bytes(f"{self.path}: a copy takes {values.nbytes / 1e9:.3g} GB of memory", values.nbytes, _NATIVE)
            values = np.asarray(values, values.dtype.newbyteorder("="))
        return rows_of(values, positions)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) for maps, otherwise None."""
        return self.values.shape[1:3] if self.values.ndim == 4 else None


def read_features(path: str | Path) -> dict[str, FeatureSet]:
    """Read all features in a file or folder, sorted by name; numbers in names sort as numbers.

    Args:
        path: a file of one of the formats, or a folder of such files (other files are ignored).

    Returns:
        {name: features}. A file with a single array is named after the file; arrays of a file with several are named
        "file/array", or "array" if `path` is that file.

    Raises:
        FileNotFoundError: `path` does not exist.
        MemoryError: a file does not fit into memory; it is not read.
        ValueError: a folder without features; a file that is damaged, holds pickled objects, or holds no
            floating-point array with 2 to 4 dimensions.
        ImportError: the package for the format is missing.

    Examples:
        >>> import numpy as np, tempfile, pathlib, jaxalign.io
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for k in (2, 10): np.save(folder / f"layer{k}.npy", np.ones((5, 3), np.float32))
        >>> list(jaxalign.io.read_features(folder))
        ['layer2', 'layer10']
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}.")
    if not path.is_dir():
        if path.suffix.lower() not in READERS:
            raise ValueError(f"{path}: features are read from {', '.join(READERS)}, or a folder of such files.")
        return {features.name: features for features in _of_file(path, alone=True)}
    entries = (entry for entry in path.iterdir() if entry.suffix.lower() in READERS and entry.is_file())
    files = sorted((entry for entry in entries if not entry.name.startswith(".")), key=natural)
    if not files:
        raise ValueError(f"the folder {path} holds no features: no file with {', '.join(READERS)}.")
    named: dict[str, FeatureSet] = {}
    for file in files:
        for features in _of_file(file, alone=False):
            if features.name in named:
                paths = f"{named[features.name].path} and {features.path}"
                raise ValueError(f"{paths} both hold features named {features.name!r}.")
            named[features.name] = features
    return named


def named_sets(argument: str, features: Any) -> dict[str, Any]:
    """Arrays of features by name, from a mapping, pairs, or a path for `read_features`; .npy files are not loaded."""
    if isinstance(features, (str, os.PathLike)):
        pairs: list[tuple[Any, Any]] = list(_read_named(argument, Path(features)).items())
    elif isinstance(features, Mapping):
        pairs = list(features.items())
    elif isinstance(features, (np.ndarray, jax.Array)):
        raise TypeError(f"{argument} must have names, {{'name': array}}; got an array of shape {features.shape}.")
    else:
        pairs = list(features) if isinstance(features, Iterable) else [()]  # pyright: ignore[reportAssignmentType]
        if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs):
            got = shown(features)
            raise TypeError(f"{argument} must be a mapping, pairs of (name, array), or a folder; got {got}.")
    if not pairs:
        raise ValueError(f"{argument} is empty: at least one representation is needed.")
    arrays: dict[str, Any] = {}
    for name, value in pairs:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: names must be strings; got {shown(name)}.")
        if name in arrays:
            raise ValueError(f"{argument}: the name {name!r} occurs twice; names must differ.")
        arrays[name] = _array_of(argument, name, value)
    return arrays


def _array_of(argument: str, name: str, value: Any) -> Any:
    """The array of a representation, from a path, a `FeatureSet` or an array."""
    label = f"{argument}[{name!r}]"
    if isinstance(value, (str, os.PathLike)):
        path, (value, *rest) = value, _read_named(label, Path(value)).values()
        if rest:
            names = ", ".join(repr(features.name) for features in (value, *rest))
            raise ValueError(
                f"{label}: {path} holds {1 + len(rest)} representations, {names}: one is needed. To use all of them, "
                f"pass {argument} = {str(path)!r}."
            )
    if isinstance(value, FeatureSet):
        value = value.values
    return _arrays.numbers(label, value)


def _of_file(path: Path, *, alone: bool) -> Iterator[FeatureSet]:
    arrays, contents = read_arrays(path)
    if not arrays:
        raise ValueError(
            f"{path} holds no features: floating-point numbers of shape (n, d), (n, tokens, d) or (n, h, w, d). It "
            f"holds {contents or 'nothing'}.{_RAW_BYTES if ' |V' in contents else ''}"
        )
    for name in sorted(arrays, key=natural):
        label = path.stem if len(arrays) == 1 else name if alone else f"{path.stem}/{name}"
        yield FeatureSet(label, arrays[name], path)


def _read_named(argument: str, path: Path) -> dict[str, FeatureSet]:
    try:
        return read_features(path)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def file_name(name: str) -> str:
    """A safe file name: special characters become %xx, and the middle of a long name is replaced by a hash."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-+ ") else f"%{ord(c):02x}" for c in name).strip(". ")
    if len(plain) > _LONGEST:
        plain = f"{plain[: _LONGEST // 2]}~{hashlib.sha256(plain.encode()).hexdigest()[:12]}~{plain[-_LONGEST // 4 :]}"
    return plain or "output"


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Distinct safe file names, even on file systems that ignore case."""
    labels: dict[str, str] = {}
    used: set[str] = set()
    for name in names:
        plain, k = file_name(name), 1
        while (label := plain if k == 1 else f"{plain}~{k}").lower() in used:
            k += 1
        used.add(label.lower())
        labels[name] = label
    return labels


def printable(name: str) -> str:
    """A name with nonprintable characters, such as terminal escapes, replaced by their codes."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in name)


def natural(value: Any) -> list[Any]:
    """A sort key that compares numbers in names as numbers: layer 10 after layer 9."""
    name = value.name if isinstance(value, Path) else str(value)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]+)", name) if part]
