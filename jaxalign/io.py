"""Features from files: .npy, .npz, .safetensors, .h5, .parquet, torch's .pt, or a folder of them. Nothing is unpickled.

A format's package, where it needs one, is imported when a file of that format is read: the extra [cli], or [torch].
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _checks
from jaxalign._files import Stored, check_regular, open_npz, too_many_files
from jaxalign._plan import check_bytes
from jaxalign._positions import Positions, rows_of

# Characters of a name that become a file's.
_LONGEST = 120
_BY_BLOCKS = "Save them as .npy files: compare_grid and `jaxalign grid` read those block by block."
_RAW_BYTES = " numpy writes bfloat16 and float8 as raw bytes, |V2 and |V1: save x.astype(np.float32)."
_NATIVE = "Save it in the byte order of this machine."


@dataclass(frozen=True)
class FeatureSet:
    """Features as they lie in a file.

    Attributes:
        name: of the file, and of the array in it where there are several.
        values: shape (n, d), (n, tokens, d) or (n, h, w, d), channels last; a memory map of a .npy file. float8 is read
            as float32, and a sparse tensor as a dense array.
        path: the file.
    """

    name: str
    values: Any
    path: Path

    def rows(self, positions: Positions = "samples") -> Any:
        """Features (n, d): every position a sample, those of each sample side by side as channels, or their mean."""
        values = self.values
        if not values.dtype.isnative:  # byte order is how a file was written, not what it says
            check_bytes(f"{self.path}: a copy takes {values.nbytes / 1e9:.3g} GB of memory", values.nbytes, _NATIVE)
            values = np.asarray(values, values.dtype.newbyteorder("="))
        return rows_of(values, positions)

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
        MemoryError: a file holds more than fits into the memory; it is not read.
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
    """Arrays of features by name: of a mapping, of pairs, or as `read_features` finds them; .npy is not loaded."""
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


# What a reader opens: the arrays of a file by name, of which nothing is loaded yet.
Opened = contextlib.AbstractContextManager[dict[str, Stored]]


def _of_file(path: Path, *, alone: bool) -> Iterator[FeatureSet]:
    arrays, contents = _read(path)
    if not arrays:
        raise ValueError(
            f"{path} holds no features: floating point numbers of shape (n, d), (n, tokens, d) or (n, h, w, d). It "
            f"holds {contents or 'nothing'}.{_RAW_BYTES if ' |V' in contents else ''}"
        )
    for name in sorted(arrays, key=natural):
        label = path.stem if len(arrays) == 1 else name if alone else f"{path.stem}/{name}"
        yield FeatureSet(label, arrays[name], path)


def _is_features(array: Stored) -> bool:
    if isinstance(array.dtype, str) or not 2 <= len(array.shape) <= 4 or 0 in array.shape:
        return False
    return array.dtype.name == "bfloat16" or (array.dtype.kind == "f" and array.dtype.itemsize <= 8)


def _read(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The features in a file, and in words all that it holds; a file larger than the memory is refused unread."""
    check_regular(path)
    suffix = path.suffix.lower()
    try:
        with _READERS[suffix](path) as arrays:
            usable = {name: array for name, array in arrays.items() if _is_features(array)}
            needed = sum(array.needed for array in usable.values())
            check_bytes(f"its features take {needed / 1e9:.3g} GB of memory", needed, _BY_BLOCKS)
            contents = ", ".join(f"{name!r} {array.dtype} {array.shape}" for name, array in arrays.items())
            return {name: array.load() for name, array in usable.items()}, contents
    except ImportError as error:
        extra = "torch" if suffix in (".pt", ".pth") else "cli"
        raise ImportError(
            f'{path}: {error}. Its format needs the extra: python -m pip install "jaxalign[{extra}]"'
        ) from error
    except MemoryError as error:
        raise MemoryError(f"{path}: {_first_line(error)}") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise OSError(error.errno, too_many_files(), str(path)) from None
        # A damaged archive asks for a place before its beginning: EINVAL. All else is the file system's word.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(f"{path} cannot be read as {path.suffix}: {_first_line(error)}") from error
    except Exception as error:  # whatever a format's package raises on a damaged file
        words = f"{type(error).__name__} {error}".lower()
        if any(word in words for word in ("allow_pickle", "python objects", "weights_only", "unpickl")):
            raise ValueError(
                f"{path} is damaged, or holds pickled Python objects, which could run any code when read: they are "
                "never unpickled. Save plain arrays, or tensors in a dict."
            ) from None
        raise ValueError(f"{path} cannot be read as {path.suffix}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or holds itself."
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def open_npy(path: Path) -> np.ndarray:
    """A memory map of a .npy file."""
    check_regular(path)
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("it does not begin as a .npy file does.")
    return np.load(path, mmap_mode="r", allow_pickle=False)


@contextlib.contextmanager
def _npy(path: Path) -> Generator[dict[str, Stored], None, None]:
    array = open_npy(path)
    yield {path.stem: Stored(array.dtype, array.shape, lambda: array, nbytes=0)}


# Those of floating point numbers; float8 is loaded as float32, in which it is exact.
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "F8_E8M0": jnp.float8_e8m0fnu,
}


@contextlib.contextmanager
def _safetensors(path: Path) -> Generator[dict[str, Stored], None, None]:
    """The length of a header, the header in JSON, and then the arrays, which the header tells the places of."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        if not 8 < start <= size:
            raise ValueError("it does not begin with the length of its header.")
        header = dict(json.loads(file.read(length)))
    header.pop("__metadata__", None)
    yield {name: _tensor(path, name, entry, start, size) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> Stored:
    shape = tuple(map(int, entry["shape"]))
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        return Stored(str(entry["dtype"]), shape, _nothing)
    stored = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
    dtype = np.dtype(np.float32) if stored.itemsize == 1 else stored
    first, last = map(int, entry["data_offsets"])
    count = math.prod(shape)
    if min(shape, default=0) < 0 or not 0 <= first <= last <= size - start or last - first != count * stored.itemsize:
        raise ValueError(f"{name!r} claims shape {shape} of {entry['dtype']} at a place that does not hold it.")

    def load() -> np.ndarray:
        values = np.fromfile(path, stored.newbyteorder("<"), count, offset=start + first)
        return values.reshape(shape).astype(dtype, copy=False)

    return Stored(dtype, shape, load)


def _nothing() -> np.ndarray:
    raise AssertionError("only features are loaded")


@contextlib.contextmanager
def _h5(path: Path) -> Generator[dict[str, Stored], None, None]:
    import h5py

    arrays: dict[str, Stored] = {}
    checked: set[Any] = set()
    with h5py.File(path, "r") as file:

        def visit(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset):
                # First, as even the shape of a virtual dataset may depend on others.
                _refuse_elsewhere(file, name, node, checked)
                if node.shape is not None:
                    arrays[name] = Stored(node.dtype, node.shape, lambda: node[()])

        file.visititems(visit)  # which follows no links
        yield arrays


def _refuse_elsewhere(file: Any, name: str, node: Any, checked: set[Any], above: tuple[Any, ...] = ()) -> None:
    """Raise unless the values of a dataset lie in this file: in itself, or in others that it is made of."""
    if node in checked:
        return
    if node.external:
        raise ValueError(f"{name!r} lies in another file, {node.external[0][0]!r}, which is not followed.")
    if node in above:
        raise ValueError(f"{name!r} is made of itself.")
    for source in node.virtual_sources() if node.is_virtual else ():
        if source.file_name != ".":
            raise ValueError(f"{name!r} lies in another file, {source.file_name!r}, which is not followed.")
        inner = source.dset_name
        if "%" in inner or len(above) == _MOST_LINKS:
            raise ValueError(f"{name!r} is made of {inner!r}, which is a pattern, or nested too deeply to follow.")
        _refuse_elsewhere(file, inner, _dataset(file, file, inner), checked, (*above, node))
    checked.add(node)


def _dataset(file: Any, group: Any, name: str, links: int = 0) -> Any:
    """What a name leads to within a file; where a link leads out of it, nothing is opened."""
    from h5py import Dataset, Group, h5l  # pyright: ignore[reportAttributeAccessIssue]

    node = file if name.startswith("/") else group
    for part in filter(lambda part: part not in ("", "."), name.split("/")):
        if not isinstance(node, Group) or not node.id.links.exists(part.encode()):
            raise ValueError(f"{name!r}, which a dataset is made of, is not there.")
        kind = node.id.links.get_info(part.encode()).type
        if kind == h5l.TYPE_HARD:
            node = node[part]
        elif kind == h5l.TYPE_SOFT and links < _MOST_LINKS:
            node = _dataset(file, node, node.id.links.get_val(part.encode()).decode(), links + 1)
        else:
            raise ValueError(f"{name!r} leads to another file, or in a circle: it is not followed.")
    if links == 0 and not isinstance(node, Dataset):
        raise ValueError(f"{name!r} is no dataset.")
    return node


# Links, and datasets within datasets, that are followed; a real file has few.
_MOST_LINKS = 16


@contextlib.contextmanager
def _parquet(path: Path) -> Generator[dict[str, Stored], None, None]:
    """Every column of lists is a set; columns of floating point numbers together are one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    arrays: dict[str, Stored] = {}
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        numbers = [field.name for field in schema if pa.types.is_floating(field.type)]
        lists = [
            field.name
            for field in schema
            if any(is_kind(field.type) for is_kind in is_list) and pa.types.is_floating(field.type.value_type)
        ]
        for field in schema:
            if field.name not in numbers and field.name not in lists:
                arrays[field.name] = Stored(str(field.type), (file.metadata.num_rows,), _nothing)
        needed = _COPIES * _parquet_bytes(file.metadata)
        check_bytes(f"its features take {needed / 1e9:.3g} GB of memory while read", needed, _BY_BLOCKS)
        table = file.read(columns=[*numbers, *lists])
    for name in lists:
        column = table.column(name).combine_chunks()
        widths = np.unique([len(row) for row in column])
        if len(widths) != 1 or column.null_count:
            raise ValueError(f"column {name!r} holds lists of different length: {widths[:5].tolist()}.")
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), widths[0])
        arrays[name] = _loaded(values)
    if numbers:
        values = np.stack([table.column(name).to_numpy() for name in numbers], 1)
        arrays[path.stem if path.stem not in arrays else f"{path.stem} columns"] = _loaded(values)
    yield arrays


# A table is read, and then its columns are put side by side.
_COPIES = 2


def _parquet_bytes(metadata: Any) -> int:
    """Bytes of all floating point numbers, which take next to nothing in the file if they repeat."""
    sizes = {"FLOAT": 4, "DOUBLE": 8, "FIXED_LEN_BYTE_ARRAY": 2}
    columns = (
        metadata.row_group(i).column(j) for i in range(metadata.num_row_groups) for j in range(metadata.num_columns)
    )
    return sum(column.num_values * sizes.get(column.physical_type, 0) for column in columns)


def _loaded(values: np.ndarray) -> Stored:
    return Stored(values.dtype, values.shape, lambda: values, nbytes=0)


@contextlib.contextmanager
def _torch(path: Path) -> Generator[dict[str, Stored], None, None]:
    import torch

    # A record of an archive may be compressed, and takes what the archive says.
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    check_bytes(f"its tensors take {size / 1e9:.3g} GB of memory", size, _BY_BLOCKS)
    arrays: dict[str, Stored] = {}

    def walk(name: str, node: Any) -> None:
        if isinstance(node, torch.Tensor):
            if (name or path.stem) in arrays:
                raise ValueError(f"two tensors are named {name!r}.")
            arrays[name or path.stem] = _of_tensor(node.detach())
        elif isinstance(node, Mapping):
            for key, part in node.items():
                walk(f"{name}.{key}" if name else str(key), part)
        elif isinstance(node, (list, tuple)):
            for k, part in enumerate(node):
                walk(f"{name}.{k}" if name else str(k), part)

    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants():
        warnings.simplefilter("ignore", UserWarning)  # of some sparse layouts, that they are new
        walk("", torch.load(path, map_location="cpu", weights_only=True))
        yield arrays


def _of_tensor(tensor: Any) -> Stored:
    """A tensor, dense and contiguous once loaded, which may be far larger than what its file holds of it."""
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta or tensor.is_nested or tensor.is_quantized:
        return Stored(f"{kind} without an array of values", () if tensor.is_nested else tuple(tensor.shape), _nothing)
    if kind == "bfloat16" or kind.startswith("float8"):  # exact in float32, and numpy does not have them
        dtype = np.dtype(np.float32)
    elif kind in ("float16", "float32", "float64"):
        dtype = np.dtype(kind)
    else:
        return Stored(kind, tuple(tensor.shape), _nothing)
    is_dense = tensor.layout == torch.strided
    is_ready = is_dense and tensor.is_contiguous() and str(dtype) == kind

    def load() -> np.ndarray:
        values = tensor.to(getattr(torch, str(dtype)))
        return (values if is_dense else values.to_dense()).contiguous().numpy()

    return Stored(dtype, tuple(tensor.shape), load, nbytes=0 if is_ready else None)


_READERS: dict[str, Callable[[Path], Opened]] = {
    ".npy": _npy,
    ".npz": open_npz,
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
