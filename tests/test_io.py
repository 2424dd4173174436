"""Features from files of every format, and files that hold none."""

from __future__ import annotations

import contextlib
import io as stdio
import json
import os
import pickle
import re
import struct
import sys
import tracemalloc
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign import _memory, io, streaming
from jaxalign.io import read_features

X = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)


def write_npy(path, arrays):
    np.save(path, next(iter(arrays.values())))


def write_npz(path, arrays):
    np.savez(path, **arrays)


def write_safetensors(path, arrays):
    pytest.importorskip("safetensors.numpy").save_file(
        {name: np.ascontiguousarray(one) for name, one in arrays.items()}, path
    )


def write_h5(path, arrays):
    with pytest.importorskip("h5py").File(path, "w") as file:
        for name, one in arrays.items():
            file[f"group/{name}"] = one


def write_parquet(path, arrays):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({name: list(one) for name, one in arrays.items()}), path)


def write_pt(path, arrays):
    torch = pytest.importorskip("torch")
    torch.save({"model": {name: torch.from_numpy(one) for name, one in arrays.items()}}, path)


WRITERS = {
    ".npy": write_npy,
    ".npz": write_npz,
    ".safetensors": write_safetensors,
    ".h5": write_h5,
    ".parquet": write_parquet,
    ".pt": write_pt,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_formats(suffix, tmp_path):
    several = suffix != ".npy"
    arrays = {"a10": X, "a9": X[:, :3]} if several else {"a9": X[:, :3]}
    path = tmp_path / f"clip{suffix}"
    WRITERS[suffix](path, arrays)
    found = read_features(path)
    assert [name.rsplit("/")[-1].rsplit(".")[-1] for name in found] == (["a9", "a10"] if several else ["clip"])
    for one, expected in zip(found.values(), (X[:, :3], X), strict=False):
        np.testing.assert_array_equal(one.rows(), expected)
        assert one.path == path
    # Of a folder the file's name comes first where a file holds several.
    (tmp_path / "notes.txt").write_text("not features")
    assert all(name.startswith("clip") for name in read_features(tmp_path))


def test_half_precision(tmp_path):
    flax = pytest.importorskip("safetensors.flax")
    flax.save_file({"x": jnp.asarray(X, jnp.bfloat16)}, tmp_path / "x.safetensors")
    (found,) = read_features(tmp_path / "x.safetensors").values()
    np.testing.assert_array_equal(np.asarray(found.rows(), np.float32), np.asarray(jnp.asarray(X, jnp.bfloat16)))


def test_columns_of_numbers_are_one_set(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"label": list(range(20)), "u": X[:, 0], "v": X[:, 1]}), tmp_path / "t.parquet")
    (found,) = read_features(tmp_path / "t.parquet").values()
    np.testing.assert_array_equal(found.rows(), X[:, :2])


def test_maps_and_tokens(tmp_path):
    maps = np.random.default_rng(1).normal(size=(3, 4, 5, 6)).astype(np.float32)
    np.save(tmp_path / "m.npy", maps)
    (one,) = read_features(tmp_path / "m.npy").values()
    assert one.grid == (4, 5)
    np.testing.assert_array_equal(one.rows("samples"), maps.reshape(60, 6))
    np.testing.assert_allclose(one.rows("mean"), maps.mean((1, 2)), rtol=1e-5, atol=1e-7)
    assert isinstance(one.rows("samples"), np.memmap)


class Harmful:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_pickled_objects_are_refused_and_not_run(suffix, tmp_path):
    path, mark = tmp_path / f"x{suffix}", tmp_path / "was run"
    if suffix == ".npy":
        np.save(path, np.array([Harmful(mark)], object), allow_pickle=True)
    elif suffix == ".npz":
        np.savez(path, x=np.array([Harmful(mark)], object))
    else:
        pytest.importorskip("torch")
        path.write_bytes(pickle.dumps(Harmful(mark)))
    with pytest.raises(ValueError, match="never unpickled"):
        read_features(path)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", WRITERS)
def test_damaged_files_are_named(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    WRITERS[suffix](path, {"x": X})
    whole = path.read_bytes()
    for cut in (0, 7, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"x\{suffix} "):
            read_features(path)
    path.write_bytes(np.random.default_rng(0).bytes(500))
    with pytest.raises(ValueError, match=rf"x\{suffix} "):
        read_features(path)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", WRITERS)
def test_damage_anywhere_is_an_error_or_other_numbers(suffix, tmp_path):
    """No crash, no exception of a format's package, no array that cannot be used. JAXALIGN_FUZZ sets how often."""
    path = tmp_path / f"x{suffix}"
    WRITERS[suffix](path, {"a": X} if suffix == ".npy" else {"a": X, "b": X[:, :2]})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)

    def somewhere(length):  # half of the time near an end, where the headers are
        near = int(rng.integers(min(length, 256)))
        return int(rng.choice([rng.integers(length), rng.integers(length), near, length - 1 - near]))

    for _ in range(int(os.environ.get("JAXALIGN_FUZZ", "1000")) // len(WRITERS)):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            at, length = somewhere(len(damaged)), int(rng.integers(1, 9))
            content = [rng.bytes(length), b"\xff" * length, b"", rng.bytes(8)[:7] + b"\x00"][rng.integers(4)]
            damaged[at : at + length] = content
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError, MemoryError):  # a size that is claimed may be any
            assert all(np.asarray(one.rows()).ndim == 2 for one in read_features(path).values())


def npy(shape, body=b"", claimed=None):
    header = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", claimed or len(header)) + header + body


def zipped(content):
    archive = stdio.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", content)
    return archive.getvalue()


HEADER = json.dumps({"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.npy", npy((10**12, 10**6))),
        ("x.npy", npy((2**63, 4))),
        ("x.npy", npy((-1, 4), bytes(64))),
        ("x.npy", npy((4, 4), claimed=2**32 - 1)),
        ("x.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 200_000) + b"(" * 200_000),
        ("x.npz", zipped(npy((10**9, 10**6)))),
        ("x.safetensors", struct.pack("<Q", len(HEADER)) + HEADER),
        ("x.safetensors", struct.pack("<Q", 2**63) + b"{}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_headers_that_claim_too_much(name, content, tmp_path):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        read_features(tmp_path / name)


def test_hdf5_does_not_read_what_lies_elsewhere(tmp_path):
    h5py = pytest.importorskip("h5py")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(48))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["elsewhere"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/")
        file["around"] = h5py.SoftLink("/around")
        file["x"] = X
        file["group/itself"] = file.create_group("group")
    assert list(read_features(tmp_path / "x.h5")) == ["x"]
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file.create_dataset("x", (4, 3), "f4", external=[(str(secret), 0, 48)])
    with pytest.raises(ValueError, match=r"'x' is stored in another file, .*secret', which is not opened"):
        read_features(tmp_path / "y.h5")


def test_virtual_hdf5_is_read_of_its_own_file_only(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = X
    for name, source in (("own", "."), ("foreign", str(tmp_path / "other.h5"))):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"] = X
            layout = h5py.VirtualLayout(shape=X.shape, dtype=X.dtype)
            layout[:] = h5py.VirtualSource(source, "x", shape=X.shape)
            file.create_virtual_dataset("virtual", layout)
    np.testing.assert_array_equal(read_features(tmp_path / "own.h5")["virtual"].values, X)
    with pytest.raises(ValueError, match=r"'virtual' is stored in another file, .*other\.h5', which is not opened"):
        read_features(tmp_path / "foreign.h5")


def virtual(file, name, source, place=".", dtype="f4"):
    h5py = pytest.importorskip("h5py")
    layout = h5py.VirtualLayout(shape=X.shape, dtype=dtype)
    layout[:] = h5py.VirtualSource(place, source, shape=X.shape)
    file.create_virtual_dataset(name, layout)


def external(file, name, secret):
    file.create_dataset(name, X.shape, "i4", external=[(str(secret), 0, X.nbytes)])


def leak_integers(h5py, file, secret, other):
    external(file, "labels", secret)


def leak_through_integers(h5py, file, secret, other):
    external(file, "group/labels", secret)
    virtual(file, "inner", "/group/labels", dtype="i4")
    virtual(file, "x", "inner")


def leak_through_a_link(h5py, file, secret, other):
    file["link"] = h5py.ExternalLink(str(other), "/x")
    virtual(file, "x", "link")


def leak_through_two_links(h5py, file, secret, other):
    file["link"] = h5py.ExternalLink(str(other), "/")
    file["soft"] = h5py.SoftLink("/link/x")
    virtual(file, "x", "soft")


def leak_through_a_nested_source(h5py, file, secret, other):
    virtual(file, "inner", "x", place=str(other))
    virtual(file, "outer", "inner")


def leak_by_a_pattern(h5py, file, secret, other):
    h5p, h5s = h5py.h5p, h5py.h5s
    file["link0"] = h5py.ExternalLink(str(other), "/x")
    space = h5s.create_simple((0, 6), (h5s.UNLIMITED, 6))
    space.select_hyperslab((0, 0), (h5s.UNLIMITED, 1), block=X.shape, stride=X.shape)
    how = h5p.create(h5p.DATASET_CREATE)
    how.set_layout(h5py.h5d.VIRTUAL)
    how.set_virtual(space, b".", b"link%b", h5s.create_simple(X.shape))
    h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, how)


def made_of_itself(h5py, file, secret, other):
    virtual(file, "x", "y")
    virtual(file, "y", "x")


def links_in_a_circle(h5py, file, secret, other):
    file["a"], file["b"] = h5py.SoftLink("b"), h5py.SoftLink("a")
    virtual(file, "x", "a")


def made_of_what_is_not_there(h5py, file, secret, other):
    virtual(file, "x", "none")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (leak_integers, "'labels' is stored in another file, .*secret', which is not opened"),
        (leak_through_integers, "'group/labels' is stored in another file, .*secret', which is not opened"),
        (leak_through_a_link, "'link' is a link to another file"),
        (leak_through_two_links, "'/link/x' is a link to another file"),
        (leak_through_a_nested_source, r"'inner' is stored in another file, .*other\.h5', which is not opened"),
        (leak_by_a_pattern, "has the source 'link%b', which is a pattern"),
        (made_of_itself, "the virtual dataset 'x' contains itself"),
        (links_in_a_circle, "or to itself, which is not followed"),
        (made_of_what_is_not_there, "'none', the source of a dataset, does not exist"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_outside_an_hdf5_file_is_read(fill, message, tmp_path):
    h5py = pytest.importorskip("h5py")
    secret, other = tmp_path / "secret", tmp_path / "other.h5"
    secret.write_bytes(bytes(X.nbytes))
    with h5py.File(other, "w") as file:
        file["x"] = X
    with h5py.File(tmp_path / "x.h5", "w") as file:
        fill(h5py, file, secret, other)
    with pytest.raises(ValueError, match=message):
        read_features(tmp_path / "x.h5")


def test_links_within_an_hdf5_file_are_followed(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["group/x"] = X
        file["soft"] = h5py.SoftLink("group")
        file["group/y"] = h5py.SoftLink("x")
        virtual(file, "inner", "/soft/./y")
        virtual(file, "outer", "inner")
    found = read_features(tmp_path / "x.h5")
    assert list(found) == ["group/x", "inner", "outer"]
    np.testing.assert_array_equal(found["outer"].values, X)


# --- what does not fit into memory ------------------------------------------------------------------------------------


def npz_of_zeros(path):
    np.savez_compressed(path, x=np.zeros((2000, 500), np.float32), labels=np.zeros(10))


def h5_of_zeros(path):
    with pytest.importorskip("h5py").File(path, "w") as file:
        file.create_dataset("x", (2000, 500), "f4", chunks=(100, 100), compression="gzip")


def parquet_of_zeros(path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({name: np.zeros(250_000, np.float32) for name in "xy"}), path)


def safetensors_of_zeros(path):
    pytest.importorskip("safetensors.numpy").save_file({"x": np.zeros((2000, 500), np.float32)}, path)


def expanded_pt(path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.zeros(1).expand(2000, 500)}, path)


def sparse_pt(path):
    torch = pytest.importorskip("torch")
    torch.save(torch.sparse_coo_tensor([[1], [1]], [1.0], (2000, 500)), path)


def deflated_pt(path):
    torch = pytest.importorskip("torch")
    torch.save(torch.zeros(2000, 500), path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "write",
    [npz_of_zeros, h5_of_zeros, parquet_of_zeros, safetensors_of_zeros, expanded_pt, sparse_pt, deflated_pt],
    ids=lambda write: write.__name__,
)
def test_what_is_larger_than_the_memory_is_refused_unread(write, tmp_path, monkeypatch):
    path = tmp_path / ("x." + write.__name__.removesuffix("_of_zeros").rpartition("_")[2])
    write(path)
    monkeypatch.setattr(_memory, "_UNCHECKED_BYTES", 0)
    monkeypatch.setattr(_memory, "_room", lambda: 4.1e6)
    if write is not parquet_of_zeros:  # which takes twice as much while it is read
        (found,) = read_features(path).values()
        assert found.values.nbytes == 4_000_000
    monkeypatch.setattr(_memory, "_room", lambda: 3.9e6)
    tracemalloc.start()
    with pytest.raises(MemoryError, match=r"x\.\w+: its \w+ take 0\.004 GB.*only 0\.0039 GB are free\. Save them as"):
        read_features(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_what_is_not_features_is_not_loaded(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", x=X, labels=np.zeros((2000, 500), int))
    monkeypatch.setattr(_memory, "_UNCHECKED_BYTES", 0)
    monkeypatch.setattr(_memory, "_room", lambda: 1e4)
    assert list(read_features(tmp_path / "x.npz")) == ["x"]


def test_archives_that_numpy_does_not_write(tmp_path):
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # which Python inflates without a limit
        with zipfile.ZipFile(tmp_path / "x.npz", "w", kind) as file:
            file.writestr("x.npy", npy((4, 3), bytes(48)))
        with pytest.raises(ValueError, match="a compression method that NumPy does not write"):
            read_features(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("x.npy", npy((4, 3), bytes(48)))
        file.writestr("x", npy((3, 4), bytes(48)))
    with pytest.raises(ValueError, match="two arrays are named 'x'"):
        read_features(tmp_path / "x.npz")


# --- kinds of numbers and files ---------------------------------------------------------------------------------------

FLOAT8 = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("kind", FLOAT8)
def test_float8_is_read_as_float32(kind, suffix, tmp_path):
    torch, st = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    x = torch.from_numpy(X).to(getattr(torch, kind))
    path = tmp_path / f"x.{suffix}"
    st.save_file({"x": x}, path) if suffix == "safetensors" else torch.save(x, path)
    (found,) = read_features(path).values()
    assert found.values.dtype == np.float32
    np.testing.assert_array_equal(found.values, X.astype(jnp.dtype(kind)).astype(np.float32))


def test_safetensors_of_every_width(tmp_path):
    st = pytest.importorskip("safetensors.numpy")
    arrays = {name: X.astype(name) for name in ("float16", "float32", "float64")}
    st.save_file(
        {**arrays, "ids": np.ones((3, 2), np.int64), "scalar": np.ones((), np.float32)}, tmp_path / "x.safetensors"
    )
    found = read_features(tmp_path / "x.safetensors")
    assert list(found) == list(arrays)
    for name, expected in arrays.items():
        assert found[name].values.dtype.name == name
        np.testing.assert_array_equal(found[name].values, expected)
    st.save_file({"ids": np.ones((3, 2), np.int64)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"It holds 'ids' I64 \(3, 2\)"):
        read_features(tmp_path / "x.safetensors")


@pytest.mark.parametrize("layout", ["sparse", "sparse_csr", "sparse_bsr"])
def test_sparse_tensors_are_read_as_dense(layout, tmp_path):
    torch = pytest.importorskip("torch")
    dense = np.where(X > 0.5, X, 0)
    x = torch.from_numpy(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, that a layout is new
        sparse = {"sparse": x.to_sparse, "sparse_csr": x.to_sparse_csr, "sparse_bsr": lambda: x.to_sparse_bsr((2, 3))}
        torch.save(sparse[layout](), tmp_path / "x.pt")
    np.testing.assert_array_equal(read_features(tmp_path / "x.pt")["x"].values, dense)


def test_tensors_without_values_are_no_features(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.from_numpy(X), "meta": torch.empty(4, 3, device="meta")}, tmp_path / "x.pt")
    assert list(read_features(tmp_path / "x.pt")) == ["x"]
    torch.save({"meta": torch.empty(4, 3, device="meta")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"It holds 'meta' float32 without an array of values \(4, 3\)"):
        read_features(tmp_path / "x.pt")
    nested = []
    nested.append(nested)
    torch.save(nested, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="it is nested too deeply, or contains itself"):
        read_features(tmp_path / "x.pt")


def test_raw_bytes_are_explained(tmp_path):
    np.save(tmp_path / "x.npy", np.asarray(jnp.asarray(X, jnp.bfloat16)))
    with pytest.raises(ValueError, match=r"holds 'x' \|V2 \(20, 6\)\. numpy writes bfloat16 .*astype\(np\.float32\)"):
        read_features(tmp_path / "x.npy")


def test_a_copy_in_another_byte_order_has_to_fit(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", X.astype(">f4"))
    (found,) = read_features(tmp_path / "x.npy").values()
    monkeypatch.setattr(_memory, "_UNCHECKED_BYTES", 0)
    monkeypatch.setattr(_memory, "_room", lambda: 100.0)
    with pytest.raises(MemoryError, match="Save it in the byte order of this machine"):
        found.rows()


@pytest.mark.parametrize(("suffix", "module", "extra"), [("pt", "torch", "torch"), ("h5", "h5py", "cli")])
def test_a_missing_package_names_its_extra(suffix, module, extra, tmp_path, monkeypatch):
    (tmp_path / f"x.{suffix}").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'python -m pip install "jaxalign\[{extra}\]"'):
        read_features(tmp_path / f"x.{suffix}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"x\.npy is a pipe, socket or device: pass a regular file"):
        read_features(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"x\.npy is a pipe"):
        streaming.solve_sigma(tmp_path / "x.npy")
    os.mkfifo(tmp_path / "state")
    with pytest.raises(ValueError, match=r"state is a pipe"):
        streaming.solve_sigma(X, density=0.2, checkpoint=tmp_path / "state")
    with pytest.raises(ValueError, match=r"state is a pipe"):
        jaxalign.compare_grid({"x": X}, kernel="linear", checkpoint=tmp_path / "state")
    with pytest.raises(ValueError, match=r"state is a pipe"):
        jaxalign.ComparisonGrid.from_json(tmp_path / "state")


def test_the_limit_of_open_files_is_named(tmp_path):
    resource = pytest.importorskip("resource")
    for k in range(40):
        np.save(tmp_path / f"{k}.npy", X)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = len(os.listdir("/dev/fd"))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (files + 20, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"limit of open files, {files + 20}, is reached.*ulimit -n 4096.*one \.npz"):
            read_features(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_holds_no_features(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_features(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="holds no features"):
        read_features(tmp_path)
    np.save(tmp_path / "labels.npy", np.arange(5))
    with pytest.raises(ValueError, match=r"'labels' int64 \(5,\)"):
        read_features(tmp_path / "labels.npy")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"read from \.npy, \.npz"):
        read_features(tmp_path / "x.csv")
    np.save(tmp_path / "labels.npy", X)
    np.savez(tmp_path / "labels.npz", labels=X)
    with pytest.raises(ValueError, match="both hold features named 'labels'"):
        read_features(tmp_path)


def test_names_for_files_and_terminals():
    assert io.file_name("a/b:c d") == "a%2fb%3ac d"
    assert io.printable("layer\x1b[2J\n") == "layer\\x1b[2J\\x0a"


def test_what_is_no_array_is_passed_over(tmp_path):
    np.savez(tmp_path / "x.npz", x=X)
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as file:
        file.writestr("readme.txt", "hello")
    assert list(read_features(tmp_path / "x.npz")) == ["x"]
    (tmp_path / "x.npz").rename(tmp_path / "y.npy")
    with pytest.raises(ValueError, match="does not start like a"):
        read_features(tmp_path / "y.npy")
    (tmp_path / "y.npy").unlink()
    (tmp_path / "._x.npy").write_bytes(b"")  # as some systems leave beside every file
    np.save(tmp_path / "x.npy", X)
    assert list(read_features(tmp_path)) == ["x"]
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["x"] = X
        file.create_dataset("empty", data=h5py.Empty("f4"))
    assert list(read_features(tmp_path / "e.h5")) == ["e"]


def test_columns_and_tensors_of_one_name_are_not_lost(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"emb": list(X), "u": X[:, 0], "v": X[:, 1]}), tmp_path / "emb.parquet")
    assert {name: one.values.shape for name, one in read_features(tmp_path / "emb.parquet").items()} == {
        "emb": (20, 6),
        "emb columns": (20, 2),
    }
    torch = pytest.importorskip("torch")
    torch.save({"a.b": torch.ones(3, 2), "a": {"b": torch.ones(4, 2)}}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match="two tensors are named"):
        read_features(tmp_path / "t.pt")


def test_names_of_files_differ_and_are_short():
    names = io.file_names(["a", "a.", "A", "x" * 400, "x" * 399 + "y", "\udcff", ".."])
    assert len({name.lower() for name in names.values()}) == 7
    assert max(len(name.encode()) for name in names.values()) < 200
