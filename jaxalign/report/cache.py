"""The compilation cache of the command line: programs that one run compiles are read from the disk by the next."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

# Bytes: beyond the first, the oldest programs are removed until the second is reached. A run of the demo writes 20 MB.
MOST, LEAST = 2**29, 2**28
_CPU = Path("/proc/cpuinfo")


def keep_compiled(*, enabled: bool = True) -> str | None:
    """Let jax keep compiled programs in the user's cache folder; what the user has set of jax's cache is respected.

    Args:
        enabled: false: nothing is read from a cache, nor written to one.

    Returns:
        Why programs are not kept, where the folder cannot be used; None otherwise.
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
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return f"compiled programs are not kept for the next run: {error}"
    config.update("jax_compilation_cache_dir", str(folder))
    # Also what compiles fast: there are hundreds of small programs.
    config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return None


def user_folder() -> Path:
    """Where programs keep what they can make again, by the rules of the system."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "jaxalign"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jaxalign"
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache_home) if Path(cache_home).is_absolute() else Path.home() / ".cache") / "jaxalign"


def _machine() -> str:
    """A name for this kind of processor: a home may be shared by machines that cannot run each other's programs."""
    parts = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = _CPU.read_text(errors="replace").splitlines()
        parts += dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features")))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _make_private(folder: Path) -> None:
    """Make a folder that this user alone can write to, or raise: programs are run from it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written by others")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")


def trim(folder: Path, most: int = MOST, least: int = LEAST) -> None:
    """Remove the oldest files of a folder where all of them together take more than `most` bytes."""
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # removed by another run meanwhile
            status = path.stat()
            files += [(status.st_mtime, status.st_size, path)] if path.is_file() else []
    total = sum(size for _, size, _ in files)
    if total <= most:
        return
    for _, size, path in sorted(files, key=lambda file: file[0]):
        if total <= least:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
