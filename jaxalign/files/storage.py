"""Safe file access: reads regular files only, writes atomically, and locks files while a job runs."""

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

# Prefix of lock files and incomplete files.
PREFIX = ".jaxalign-"


def check_regular(path: Path) -> None:
    """Raise unless a path is a regular file: opening a pipe would wait for a writer, and a device may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        kind = "a folder" if path.is_dir() else "a pipe, socket or device"
        raise ValueError(f"{path} is {kind}: pass a regular file.")


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises ValueError for other files."""
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for a JSON file of jaxalign.") from None


def json_value(value: Any) -> Any:
    """A value that JSON can hold: nan and inf become None, functions their names."""
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
    """The message for the limit of open files."""
    limit = ""
    with contextlib.suppress(ImportError):
        import resource

        limit = f", {resource.getrlimit(resource.RLIMIT_NOFILE)[0]},"
    return (
        f"the limit of open files{limit} is reached: a .npy file stays open while its rows are in use. Raise the limit "
        "(ulimit -n 4096), or save the features in one .npz or .safetensors file."
    )


def partial_name(path: Path) -> Path:
    """A path in the same folder for an incomplete file, with a random name so that nobody can plant a link there."""
    return path.with_name(f"{PREFIX}{_tag(path)}-{secrets.token_hex(8)}.new")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically, so that a killed process leaves either the old or the new file."""
    # Mode "x" opens no existing file. Renaming replaces a link at `path` itself, not its target.
    partial = partial_name(path)
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:  # a full disk or Ctrl-C: remove the incomplete file
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # report the path that the caller passed
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextlib.contextmanager
def locked(path: Path | None) -> Generator[None, None, None]:
    """Lock a file, or a folder with all its files, for one job; the system releases the lock of a killed process."""
    if path is None:
        yield
        return
    is_folder = path.is_dir()
    folder, tag = (path, "*") if is_folder else (path.parent, _tag(path))
    lock = folder / f"{PREFIX}{'folder' if is_folder else tag}.lock"
    descriptor = _acquire(lock, path)
    try:
        for leftover in folder.glob(f"{PREFIX}{tag}-*.new"):  # of a process that was killed while writing
            leftover.unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not delete open files
            lock.unlink()
        os.close(descriptor)


def _tag(path: Path) -> str:
    """A short tag for a file, because its name may already have the maximal length."""
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]


def _acquire(lock: Path, path: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor)
            # The previous holder deletes the lock file. A lock on the deleted file excludes nobody: then try again.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), lock.stat()):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            message = "another job is using it: wait until it ends, or use another path"
            raise BlockingIOError(errno.EAGAIN, message, str(path)) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock an open file; raises BlockingIOError if another process holds the lock."""
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
        except OSError:  # the file system has no locks: run without one
            return
