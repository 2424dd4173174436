"""Set-up of every test: eight CPU devices, run-time shape checks, and the dtypes that are tested."""

from __future__ import annotations

import gc
import getpass
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import jaxlib
import jaxtyping
import numpy as np
import pytest

# numba compiles parts of the packages that results are compared with, and keeps them beside their source: processes
# that do so at the same time read each other's half-written programs, and abort.
# Workers inherit the environment of the process that starts them, so each sets a folder of its own.
worker = f"{getpass.getuser()}-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"jaxalign-numba-{worker}")

# Test processes run side by side: threads of OpenMP (torch, scikit-learn) in each would wait for each other's turn.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Nothing is read from the cache of the user's commands, nor written to it, here or by programs that tests start. Tests
# have a cache of their own, which their processes and the next run share.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "programs"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Compiling takes half the time with the older emitters of fused kernels, which jaxlib 0.11 no longer has, and a tenth
# less where programs are not cut into parts for several threads. Users run the newer ones, and so does .ci/run with the
# newest jax.
if jaxlib.__version__.startswith("0.10."):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

# Before anything starts the backend: the number of devices cannot change afterwards.
jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of the suite's time, and slower programs are no matter here, nor in programs that tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes so many objects that looking for garbage among all that is imported takes an eighth of the time.
gc.set_threshold(100_000, 50, 100)
# The library broadcasts and converts where it says so, never by accident.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Shapes and dtypes in signatures are checked at every call. The hook rewrites modules while they are imported, so it
# comes before the first import of the package: test modules and doctests are collected after this file. It takes a
# seventh of the time, which the slow tests spare in .ci/run.
if not os.environ.get("JAXALIGN_TESTS_SKIP_TYPES"):
    jaxtyping.install_import_hook("jaxalign", "beartype.beartype")

sys.path.insert(0, str(Path(__file__).parent))  # `import helpers`, `import reference`, whatever pytest's import mode

hypothesis.settings.register_profile(
    "jaxalign",
    deadline=None,  # an example that compiles takes a second, the next one a millisecond
    derandomize=True,  # a failure is one for everybody
    database=None,
    max_examples=25,
    # The fixtures used with @given set nothing but the width of floats, which is the same for every example.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxalign")


def pytest_configure(config: pytest.Config) -> None:
    import memory

    config.pluginmanager.register(memory.WATCH, "jaxalign-memory")


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit floats for the duration of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", pytest.param("float64", marks=pytest.mark.slow)])
def dtype(request: pytest.FixtureRequest) -> Iterator[np.dtype]:
    """Each of the two dtypes the library computes in, with JAX set to hold it."""
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Run-time type checks off, as they are for users."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def usual_promotion() -> Iterator[None]:
    """Ranks and dtypes promoted implicitly, as they are for users: for code that is not the library's."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator of its own for every test, the same in every run and for every dtype."""
    name = request.node.name.replace("float32", "").replace("float64", "")
    return np.random.default_rng(zlib.crc32(name.encode()))
