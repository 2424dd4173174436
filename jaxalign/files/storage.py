"""Files on a disk that others may use too: read only if regular, written in one step, locked while a job runs."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# What begins so is not output: locks, and files that are not complete.
PREFIX = ".jaxalign-"


def check_regular(path: Path) -> None:
    """Raise unless a path leads to a regular file: opening a pipe would wait for a writer, a device never ends."""
    if not stat.S_ISREG(path.stat().st_mode):
        kind = "a folder" if path.is_dir() else "a pipe, socket or device"
        raise ValueError(f"{path} is {kind}: name a regular file.")


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError for whatever is none."""
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for JSON of jaxalign.") from None


def json_value(value: Any) -> Any:
    """A value as JSON holds it: nan and inf as None, a function by its name."""
    if isinstance(value, Mapping):
        return {str(name): json_value(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(part) for part in value]
    if isinstance(value, (np.ndarray, jax.Array, np.generic)):
        return json_value(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)  # not repr, which holds an address
        return f"{named.__module__}.{named.__qualname__}"
    return str(value) if isinstance(value, Path) else value


def hash_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def too_many_files() -> str:
    """What to say where no more files can be opened."""
    limit = ""
    with contextlib.suppress(ImportError):
        import resource

        limit = f", {resource.getrlimit(resource.RLIMIT_NOFILE)[0]},"
    return (
        f"the limit of open files{limit} is reached: a .npy file stays open while its rows are in use. Raise the limit "
        "(ulimit -n 4096), or save the sets in one .npz or .safetensors file."
    )


def partial_name(path: Path) -> Path:
    """A name beside a file's, for what is not complete: not to be guessed, so that no link can be planted there."""
    return path.with_name(f"{PREFIX}{_tag(path)}-{secrets.token_hex(8)}.new")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step, so that a kill leaves the old one or the new one."""
    # "x" opens nothing that exists. Renaming replaces a link at `path` itself, not the file it leads to.
    partial = partial_name(path)
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:  # a full disk, Ctrl-C: nothing half-written stays
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # under the name that the caller knows
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextlib.contextmanager
def locked(path: Path | None) -> Generator[None, None, None]:
    """Keep a file, or a folder and all in it, to one job; the system ends the lock of a process that is killed."""
    if path is None:
        yield
        return
    is_folder = path.is_dir()
    folder, tag = (path, "*") if is_folder else (path.parent, _tag(path))
    lock = folder / f"{PREFIX}{'folder' if is_folder else tag}.lock"
    descriptor = _acquire(lock, path)
    try:
        for leftover in folder.glob(f"{PREFIX}{tag}-*.new"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            lock.unlink()
        os.close(descriptor)


def _tag(path: Path) -> str:
    """A short name for a file, whose own may be as long as the file system allows."""
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]


def _acquire(lock: Path, path: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor)
            # The last holder removes the file: whoever opened it before that holds a lock that nobody else sees.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), lock.stat()):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            wait = "another run is working on it: wait until that ends, or name another"
            raise BlockingIOError(errno.EAGAIN, wait, str(path)) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock an open file; BlockingIOError where another holds it."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            raise BlockingIOError from None
    else:
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks: better two jobs at once than none
            return
