"""Features from files: .npy, .npz, .safetensors, .h5, .parquet, torch's .pt, or a folder of them. Nothing is unpickled.

Each format's package is imported when a file of that format is read; they are the extra [cli].
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxalign import _checks

Positions = Literal["rows", "mean"]
# Characters of a name that become a file's.
_LONGEST = 120


@dataclass(frozen=True)
class FeatureSet:
    """Features as they lie in a file.

    Attributes:
        name: of the file, and of the array in it where there are several.
        values: shape (n, d), (n, tokens, d) or (n, h, w, d), channels last; a memory map of a .npy file.
        path: the file.
    """

    name: str
    values: Any
    path: Path

    def rows(self, positions: Positions = "rows") -> Any:
        """Samples and their features, (samples, d): every position a sample, or the mean over the positions of each."""
        values = self.values
        if not values.dtype.isnative:  # byte order is how a file was written, not what it says
            values = np.asarray(values, values.dtype.newbyteorder("="))
        if values.ndim == 2:
            return values
        if positions == "rows":
            return values.reshape(-1, values.shape[-1])
        axes = tuple(range(1, values.ndim - 1))
        return np.asarray(values).mean(axes, dtype=np.float64).astype(np.result_type(values.dtype, np.float32))

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) of maps."""
        return self.values.shape[1:3] if self.values.ndim == 4 else None


def read_features(path: str | Path) -> dict[str, FeatureSet]:
    """The sets of features in a file or folder, by name; numbers in names sort as numbers.

    Args:
        path: a file of one of the formats, or a folder of such files (others are passed over).

    Returns:
        {name: features}. A file with one array gives a set named after the file; one with several gives "file/array",
        or just "array" where `path` is that file.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a folder without features; a file that is damaged, holds pickled objects, or no array of floating
            point numbers with 2 to 4 dimensions.
        ImportError: the format's package is missing.

    Example:
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
        if path.suffix.lower() not in _READERS:
            raise ValueError(f"{path}: features are read from {', '.join(_READERS)}, or a folder of such files.")
        return {one.name: one for one in _of_file(path, alone=True)}
    every = (one for one in path.iterdir() if one.suffix.lower() in _READERS and one.is_file())
    files = sorted((one for one in every if not one.name.startswith(".")), key=natural)
    if not files:
        raise ValueError(f"the folder {path} holds no features: no file with {', '.join(_READERS)}.")
    found: dict[str, FeatureSet] = {}
    for file in files:
        for one in _of_file(file, alone=False):
            if one.name in found:
                raise ValueError(f"{found[one.name].path} and {one.path} both hold a set named {one.name!r}.")
            found[one.name] = one
    return found


def named_sets(argument: str, features: Any) -> dict[str, Any]:
    """Sets of features (n, d) by name: of a mapping, of pairs, or as `read_features` finds them; .npy is not loaded."""
    if isinstance(features, (str, os.PathLike)):
        pairs: list[tuple[Any, Any]] = list(_read_named(argument, Path(features)).items())
    elif isinstance(features, Mapping):
        pairs = list(features.items())
    elif isinstance(features, (np.ndarray, jax.Array)):
        raise TypeError(f"{argument} must be named sets, as {{'name': array}}; got an array of shape {features.shape}.")
    else:
        given: list[Any] = list(features) if isinstance(features, Iterable) else [None]
        if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in given):
            got = _checks.shown(features)
            raise TypeError(f"{argument} must be a mapping, pairs of (name, array), or a folder; got {got}.")
        pairs = [(name, value) for name, value in given]
    if not pairs:
        raise ValueError(f"{argument} is empty: at least one named set of features is needed.")
    found: dict[str, Any] = {}
    for name, value in pairs:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: names must be strings; got {_checks.shown(name)}.")
        if name in found:
            raise ValueError(f"{argument}: the name {name!r} stands for two sets; names must differ.")
        if isinstance(value, (str, os.PathLike)):
            inside = _read_named(f"{argument}[{name!r}]", Path(value))
            if len(inside) > 1:
                raise ValueError(
                    f"{argument}[{name!r}]: {value} holds {len(inside)} sets, {', '.join(map(repr, inside))}: one is "
                    f"needed. All of them are {argument} = {str(value)!r}."
                )
            value = next(iter(inside.values()))
        if isinstance(value, FeatureSet):
            path, value = value.path, value.values
            if value.dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
                again = _checks.as_floats(f"np.load({str(path)!r})", value)
                again = f"once for all: np.save({str(path)!r}, {again})"
                raise TypeError(
                    f"{argument}[{name!r}]: {path} is float64, but jax is set to 32 bits and would narrow it without a "
                    'word. Either jax.config.update("jax_enable_x64", True) at the start of the program, or '
                    f"{again if path.suffix.lower() == '.npy' else 'store it as float32'}."
                )
        _checks.refuse_foreign(f"{argument}[{name!r}]", value, is_features=True)
        if not isinstance(value, (np.ndarray, jax.Array)):
            kind = type(value).__name__
            raise TypeError(f"{argument}[{name!r}] must be an array or a path to a file; got {kind}.")
        if value.ndim != 2:
            way_out = (
                ""
                if value.ndim < 3
                else (
                    f" With every position a sample: x.reshape(-1, {value.shape[-1]}); with their mean: "
                    f"x.mean({tuple(range(1, value.ndim - 1))})."
                )
            )
            raise ValueError(f"{argument}[{name!r}] must have shape (n, d); got {value.shape}.{way_out}")
        found[name] = value
    return found


def _read_named(argument: str, path: Path) -> dict[str, FeatureSet]:
    try:
        return read_features(path)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def rows_are_finite(values: Any, rows: int) -> np.ndarray:
    """Whether each row of (n, d) holds neither nan nor inf, shape (n,); so many rows are looked at a time."""
    parts = [np.isfinite(np.asarray(values[i : i + rows])).all(1) for i in range(0, values.shape[0], rows)]
    return np.concatenate(parts)


def hash_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_name(name: str) -> str:
    """A name as a file's: what a file system or shell may take amiss as its code, the middle of a long one hashed."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-+ ") else f"%{ord(c):02x}" for c in name).strip(". ")
    if len(plain) > _LONGEST:
        plain = f"{plain[: _LONGEST // 2]}~{hashlib.sha256(plain.encode()).hexdigest()[:12]}~{plain[-_LONGEST // 4 :]}"
    return plain or "output"


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Names as files', no two the same, also where a file system does not tell capitals from small letters."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain, k = file_name(name), 1
        while (label := plain if k == 1 else f"{plain}~{k}").lower() in taken:
            k += 1
        taken.add(label.lower())
        found[name] = label
    return found


def printable(name: str) -> str:
    """A name without what a terminal takes as a command."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in name)


# --- formats ---------------------------------------------------------------------------------------------------------


def _of_file(path: Path, *, alone: bool) -> Iterator[FeatureSet]:
    arrays = _read(path)
    usable = {name: one for name, one in arrays.items() if _is_features(one)}
    if not usable:
        told = ", ".join(
            f"{name!r} {getattr(one, 'dtype', type(one).__name__)} {one.shape}" for name, one in arrays.items()
        )
        raise ValueError(
            f"{path} holds no features: floating point numbers of shape (n, d), (n, tokens, d) or (n, h, w, d). It "
            f"holds {told or 'nothing'}."
        )
    for name in sorted(usable, key=natural):
        label = path.stem if len(usable) == 1 else name if alone else f"{path.stem}/{name}"
        yield FeatureSet(label, usable[name], path)


def _is_features(value: np.ndarray) -> bool:
    if value.dtype.name == "bfloat16":
        return 2 <= value.ndim <= 4 and value.size > 0
    return 2 <= value.ndim <= 4 and value.size > 0 and value.dtype.kind == "f" and value.dtype.itemsize <= 8


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = _READERS[path.suffix.lower()](path)
        return {name: one for name, one in found.items() if isinstance(one, np.ndarray)}
    except ImportError as error:
        raise ImportError(
            f'{path}: {error}. Its format needs the extra: python -m pip install "jaxalign[cli]"'
        ) from error
    except (OSError, MemoryError) as error:
        # A damaged archive asks for a place before its beginning: EINVAL. All else is the file system's word.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(f"{path} cannot be read as {path.suffix}: {_first_line(error)}") from error
    except Exception as error:  # whatever a format's package raises on a damaged file
        told = f"{type(error).__name__} {error}".lower()
        if any(word in told for word in ("allow_pickle", "python objects", "weights_only", "unpickl")):
            raise ValueError(
                f"{path} is damaged, or holds pickled Python objects, which could run any code when read: they are "
                "never unpickled. Save plain arrays, or tensors in a dict."
            ) from None
        raise ValueError(f"{path} cannot be read as {path.suffix}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _npy(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("it does not begin as a .npy file does.")
    return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)}


def _npz(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise ValueError(_first_line(error)) from error


def _safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (TypeError, KeyError, AttributeError):  # bfloat16, which numpy does not know by itself
        from safetensors import flax

        return {name: np.asarray(one) for name, one in flax.load_file(path).items()}


def _h5(path: Path) -> Mapping[str, Any]:
    import h5py

    found: dict[str, Any] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.shape is not None and node.dtype.kind == "f":
            elsewhere = [place[0] for place in node.external or ()]
            if node.is_virtual:  # made of others; "." is this file
                elsewhere += [source.file_name for source in node.virtual_sources() if source.file_name != "."]
            if elsewhere:
                raise ValueError(f"{name!r} lies in another file, {elsewhere[0]!r}, which is not followed.")
            found[name] = node[()]

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def _parquet(path: Path) -> Mapping[str, Any]:
    """Every column of lists is a set; columns of floating point numbers together are one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    found: dict[str, Any] = {}
    numbers = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_floating(column.type):
            numbers.append(column.to_numpy())
        elif any(is_kind(column.type) for is_kind in lists):
            whole = column.combine_chunks()
            widths = np.unique([len(one) for one in whole])
            if len(widths) != 1 or whole.null_count:
                raise ValueError(f"column {name!r} holds lists of different length: {widths[:5].tolist()}.")
            values = whole.flatten().to_numpy(zero_copy_only=False)
            found[name] = values.reshape(len(whole), widths[0])
    if numbers:
        found[path.stem if path.stem not in found else f"{path.stem} columns"] = np.stack(numbers, 1)
    return found


def _torch(path: Path) -> Mapping[str, Any]:
    import torch

    found: dict[str, Any] = {}

    def walk(name: str, node: Any) -> None:
        if isinstance(node, torch.Tensor):
            node = node.detach().to("cpu").contiguous()
            if (name or path.stem) in found:
                raise ValueError(f"two tensors are named {name!r}.")
            found[name or path.stem] = (node.float() if node.dtype == torch.bfloat16 else node).numpy()
        elif isinstance(node, Mapping):
            for key, part in node.items():
                walk(f"{name}.{key}" if name else str(key), part)
        elif isinstance(node, (list, tuple)):
            for k, part in enumerate(node):
                walk(f"{name}.{k}" if name else str(k), part)

    walk("", torch.load(path, map_location="cpu", weights_only=True))
    return found


_READERS: dict[str, Callable[[Path], Mapping[str, Any]]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".h5": _h5,
    ".hdf5": _h5,
    ".parquet": _parquet,
    ".pt": _torch,
    ".pth": _torch,
}


def natural(value: Any) -> list[Any]:
    """Layer 10 after layer 9."""
    name = value.name if isinstance(value, Path) else str(value)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]+)", name) if part]
