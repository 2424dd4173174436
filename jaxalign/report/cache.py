"""The compilation cache of the command line: later runs load compiled programs from disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

# Bytes. Above the first number the oldest programs are removed, down to the second. A run of the demo writes 20 MB.
MAX_BYTES, BYTES_AFTER_TRIM = 2**29, 2**28
_CPU = Path("/proc/cpuinfo")


def keep_compiled(*, enabled: bool = True) -> str | None:
    """Let JAX cache compiled programs in the user's cache folder, unless the user has configured JAX's cache.

    Args:
        enabled: False: neither read nor write a cache.

    Returns:
        A message if the folder cannot be used, otherwise None.
    """
    if not enabled:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    config: Any = jax.config
    if not config.jax_enable_compilation_cache or config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR
        return None
    try:
        folder = user_folder() / _machine()
        _make_private(folder)
        trim(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        return f"compiled programs are not cached for the next run: {error}"
    config.update("jax_compilation_cache_dir", str(folder))
    # Cache fast compilations too: there are hundreds of small programs.
    config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return None


def user_folder() -> Path:
    """The cache folder of this user, by the conventions of the system."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "jaxalign"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jaxalign"
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache_home) if Path(cache_home).is_absolute() else Path.home() / ".cache") / "jaxalign"


def _machine() -> str:
    """A hash of the kind of processor: machines that share a home directory may need different programs."""
    parts = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = _CPU.read_text(errors="replace").splitlines()
        parts += dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features")))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can write to, or raise: programs are loaded from it and run."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise PermissionError(f"{folder} is writable by other users")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")


def trim(folder: Path, above: int = MAX_BYTES, to: int = BYTES_AFTER_TRIM) -> None:
    """If the files of a folder take more than `above` bytes, remove the oldest until they take at most `to`."""
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another run may have removed it
            status = path.stat()
            files += [(status.st_mtime, status.st_size, path)] if path.is_file() else []
    total = sum(size for _, size, _ in files)
    if total <= above:
        return
    for _, size, path in sorted(files, key=lambda file: file[0]):
        if total <= to:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
