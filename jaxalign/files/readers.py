"""Readers for the file formats of `jaxalign.io`, which check the headers of arrays before loading them.

Some formats need a package of the extra [cli] or [torch], which is imported when a file of that format is read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import warnings
import zipfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign._memory import check_bytes
from jaxalign.files.storage import check_regular, too_many_files

_BY_BLOCKS = "Save them as .npy files, which compare_grid and `jaxalign grid` read block by block."


@dataclass(frozen=True)
class Stored:
    """An array in a file, described by its header.

    Attributes:
        dtype: dtype of the loaded array; a string if NumPy has no such dtype.
        shape: shape of the array.
        load: function that reads the array.
        nbytes: bytes of memory that loading takes; None: the size of the array.
    """

    dtype: np.dtype[Any] | str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]
    nbytes: int | None = None

    @property
    def needed(self) -> int:
        """Bytes of memory that loading takes."""
        if self.nbytes is not None or isinstance(self.dtype, str):
            return self.nbytes or 0
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def open_npz(path: Path) -> Generator[dict[str, Stored], None, None]:
    """The arrays of an .npz file, from their headers alone: a small file can hold many gigabytes of zeros."""
    check_regular(path)
    with zipfile.ZipFile(path) as archive:
        arrays: dict[str, Stored] = {}
        for member in archive.infolist():
            # NumPy writes no other methods, and Python decompresses those without a size limit.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename!r} has a compression method that NumPy does not write.")
            array = _member(archive, member)
            name = member.filename.removesuffix(".npy")
            if array is not None:
                if name in arrays:
                    raise ValueError(f"two arrays are named {name!r}.")
                arrays[name] = array
        yield arrays


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Stored | None:
    """An array in an archive; None for other members."""
    readers = {b"\x01\x00": np.lib.format.read_array_header_1_0, b"\x02\x00": np.lib.format.read_array_header_2_0}
    with archive.open(member) as file:
        start = file.read(len(np.lib.format.MAGIC_PREFIX) + 2)
        version = start[-2:]
        if not start.startswith(np.lib.format.MAGIC_PREFIX) or version not in readers:
            return None
        shape, _, dtype = readers[version](file)
        room = member.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename!r} holds Python objects.")
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize > room:
        raise ValueError(f"{member.filename!r} claims shape {shape} of {dtype}, which is more data than it holds.")

    def load() -> np.ndarray:
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    return Stored(dtype, shape, load)


def _is_features(array: Stored) -> bool:
    if isinstance(array.dtype, str) or not 2 <= len(array.shape) <= 4 or 0 in array.shape:
        return False
    return array.dtype.name == "bfloat16" or (array.dtype.kind == "f" and array.dtype.itemsize <= 8)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The features in a file, and a description of all its arrays; files larger than memory are rejected unread."""
    check_regular(path)
    suffix = path.suffix.lower()
    try:
        with READERS[suffix](path) as arrays:
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
        # EINVAL: a damaged archive makes Python seek before its start. All other codes come from the file system.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(f"{path} cannot be read as {path.suffix}: {_first_line(error)}") from error
    except Exception as error:  # packages raise all kinds of exceptions for damaged files
        words = f"{type(error).__name__} {error}".lower()
        if any(word in words for word in ("allow_pickle", "python objects", "weights_only", "unpickl")):
            raise ValueError(
                f"{path} is damaged, or holds pickled Python objects, which are never unpickled because they could run "
                "any code. Save plain arrays, or tensors in a dict."
            ) from None
        raise ValueError(f"{path} cannot be read as {path.suffix}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or contains itself."
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# --- formats ---------------------------------------------------------------------------------------------------------


def open_npy(path: Path) -> np.ndarray:
    """A memory map of a .npy file."""
    check_regular(path)
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("it does not start like a .npy file.")
    return np.load(path, mmap_mode="r", allow_pickle=False)


@contextlib.contextmanager
def _npy(path: Path) -> Generator[dict[str, Stored], None, None]:
    array = open_npy(path)
    yield {path.stem: Stored(array.dtype, array.shape, lambda: array, nbytes=0)}


# The floating-point dtypes; float8 is loaded as float32, without rounding.
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
    """Format: the length of the header, the header in JSON with the positions of the arrays, and the arrays."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        if not 8 < start <= size:
            raise ValueError("it does not start with the length of its header.")
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
        raise ValueError(f"{name!r} claims shape {shape} of {entry['dtype']} at a position that does not hold it.")

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
                # Check first: even the shape of a virtual dataset may come from another file.
                _check_in_file(file, name, node, checked)
                if node.shape is not None:
                    arrays[name] = Stored(node.dtype, node.shape, lambda: node[()])

        file.visititems(visit)  # does not follow links
        yield arrays


def _check_in_file(file: Any, name: str, node: Any, checked: set[Any], above: tuple[Any, ...] = ()) -> None:
    """Raise unless the values of a dataset are in this file, possibly in the sources of a virtual dataset."""
    if node in checked:
        return
    if node.external:
        raise ValueError(f"{name!r} is stored in another file, {node.external[0][0]!r}, which is not opened.")
    if node in above:
        raise ValueError(f"the virtual dataset {name!r} contains itself.")
    for source in node.virtual_sources() if node.is_virtual else ():
        if source.file_name != ".":
            raise ValueError(f"{name!r} is stored in another file, {source.file_name!r}, which is not opened.")
        inner = source.dset_name
        if "%" in inner or len(above) == _MAX_LINKS:
            raise ValueError(f"{name!r} has the source {inner!r}, which is a pattern, or nested too deeply.")
        _check_in_file(file, inner, _dataset(file, file, inner), checked, (*above, node))
    checked.add(node)


def _dataset(file: Any, group: Any, name: str, links: int = 0) -> Any:
    """The dataset with a name in a file; raises for links to other files, which are not opened."""
    from h5py import Dataset, Group, h5l  # pyright: ignore[reportAttributeAccessIssue]

    node = file if name.startswith("/") else group
    for part in filter(lambda part: part not in ("", "."), name.split("/")):
        if not isinstance(node, Group) or not node.id.links.exists(part.encode()):
            raise ValueError(f"{name!r}, the source of a dataset, does not exist.")
        kind = node.id.links.get_info(part.encode()).type
        if kind == h5l.TYPE_HARD:
            node = node[part]
        elif kind == h5l.TYPE_SOFT and links < _MAX_LINKS:
            node = _dataset(file, node, node.id.links.get_val(part.encode()).decode(), links + 1)
        else:
            raise ValueError(f"{name!r} is a link to another file, or to itself, which is not followed.")
    if links == 0 and not isinstance(node, Dataset):
        raise ValueError(f"{name!r} is not a dataset.")
    return node


# Limit for links and nested virtual datasets; real files have few.
_MAX_LINKS = 16


@contextlib.contextmanager
def _parquet(path: Path) -> Generator[dict[str, Stored], None, None]:
    """Each column of lists is an array; all columns of floating-point numbers together are another one."""
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
            raise ValueError(f"column {name!r} holds lists of different lengths: {widths[:5].tolist()}.")
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), widths[0])
        arrays[name] = _loaded(values)
    if numbers:
        values = np.stack([table.column(name).to_numpy() for name in numbers], 1)
        arrays[path.stem if path.stem not in arrays else f"{path.stem} columns"] = _loaded(values)
    yield arrays


# Copies in memory: the table, and the array of its columns.
_COPIES = 2


def _parquet_bytes(metadata: Any) -> int:
    """Bytes of all floating-point numbers once loaded; repeated numbers take hardly any space in the file."""
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

    # Members of an archive may be compressed: add up their full sizes.
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
        warnings.simplefilter("ignore", UserWarning)  # some sparse layouts warn that they are new
        walk("", torch.load(path, map_location="cpu", weights_only=True))
        yield arrays


def _of_tensor(tensor: Any) -> Stored:
    """A tensor, made dense and contiguous when loaded, which may take far more memory than its file."""
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta or tensor.is_nested or tensor.is_quantized:
        return Stored(f"{kind} without an array of values", () if tensor.is_nested else tuple(tensor.shape), _nothing)
    if kind == "bfloat16" or kind.startswith("float8"):  # exact in float32, and missing in NumPy
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


# Each reader yields the arrays of a file by name, not loaded yet.
READERS: dict[str, Callable[[Path], contextlib.AbstractContextManager[dict[str, Stored]]]] = {
    ".npy": _npy,
    ".npz": open_npz,
    ".safetensors": _safetensors,
    ".h5": _h5,
    ".hdf5": _h5,
    ".parquet": _parquet,
    ".pt": _torch,
    ".pth": _torch,
}
