"""Many calls, at once and one after another: threads agree, memory does not grow, nothing is compiled twice.

JAXALIGN_FUZZ=20000 in the environment makes 1000 rounds of calls and not 100, and kills a job 50 times and not once.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory import resident, resident_after_trimming

import jaxalign
from jaxalign import _memory
from jaxalign.kernels import RBF

NIGHTLY = int(os.environ.get("JAXALIGN_FUZZ", "1000")) > 1000


def sets(count, n=40, d=6):
    return [np.random.default_rng(k).normal(size=(n, d)).astype(np.float32) for k in range(count)]


def test_threads_find_what_one_finds():
    def everything(x):
        affinity = jaxalign.rbf_affinity(x, density=0.2)
        return float(jnp.sum(affinity**2)), float(jaxalign.compare(x, x[:, ::-1] + 1, kernel=RBF(density=0.2)))

    some = sets(24)
    expected = [everything(x) for x in some]
    with ThreadPoolExecutor(8) as pool:
        np.testing.assert_allclose(list(pool.map(everything, some)), expected, rtol=1e-6)


def growth(calls, number):
    """How many more arrays of JAX are alive after so many calls, and by how many MB the memory of the process grew."""
    calls(number // 2)  # compiles, and fills whatever is kept once
    arrays, memory = len(jax.live_arrays()), resident_after_trimming()
    calls(number)
    gc.collect()
    return len(jax.live_arrays()) - arrays, resident_after_trimming() - memory


# Large enough that an n x n array kept per call is far above what the memory of a process varies by.
N, CALLS = 300, 1_000 if NIGHTLY else 100
MOST_ARRAYS, MOST_MEMORY = 10, N * N * 4 * CALLS / 1e6 / 3
linux = pytest.mark.skipif(not resident(), reason="reads the memory of the process from Linux")


@pytest.mark.slow
@linux
def test_memory_does_not_grow_with_calls():
    x = sets(1, n=N)[0]

    def calls(number):
        for k in range(number):
            jaxalign.rbf_affinity(x + np.float32(k), density=0.2)
            jaxalign.solve_sigma(x, density=0.1 + 0.1 * (k % 5))
            jaxalign.compare(x, x + np.float32(k), kernel=RBF(density=0.2))

    arrays, memory = growth(calls, CALLS)
    assert arrays < MOST_ARRAYS
    assert memory < MOST_MEMORY


@pytest.mark.slow
@linux
@pytest.mark.parametrize("keep", [jnp.asarray, jnp.sum, np.array], ids=["arrays", "scalars", "copies outside of JAX"])
def test_memory_that_grows_is_noticed(keep):
    x, kept = jnp.asarray(sets(1, n=N)[0]), []

    def calls(number):
        kept.extend(keep(jaxalign.rbf_affinity(x, sigma=1.0)) for _ in range(number))

    arrays, memory = growth(calls, CALLS)
    assert arrays >= MOST_ARRAYS or memory >= MOST_MEMORY
    if keep is np.array:  # these are seen by their memory alone
        assert memory >= MOST_MEMORY


def test_values_never_recompile_and_shapes_do_once(caplog):
    some = sets(3, n=31)
    operations = (
        lambda x, c: jaxalign.rbf_affinity(x, density=c),
        lambda x, c: jaxalign.solve_sigma(x, density=c).sigma,
        lambda x, c: jaxalign.compare(x, x, kernel=RBF(density=c)),
        lambda x, c: jaxalign.losses.alignment_loss(x, x, kernel=RBF(density=c)),
    )
    for operation in operations:
        operation(some[0], 0.2)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for x, c in zip(some[1:], (0.3, 0.4), strict=True):
            for operation in operations:
                operation(x, c)
    compiled = [record.message for record in caplog.records if "Finished XLA compilation" in record.message]
    assert not compiled


JOB = """
import sys, numpy as np, jaxalign
grid = jaxalign.compare_grid(sys.argv[1], measure="rsa", block_rows=100, checkpoint=sys.argv[2])
np.save(sys.argv[3], grid.values)
"""


@pytest.mark.slow
def test_jobs_that_are_killed_lose_nothing_finished(tmp_path):
    folder = tmp_path / "layers"
    folder.mkdir()
    for k, x in enumerate(sets(4, n=600, d=8)):
        np.save(folder / f"{k}.npy", x)
    expected = jaxalign.compare_grid(folder, measure="rsa").values
    arguments = [str(folder), str(tmp_path / "checkpoint.npz"), str(tmp_path / "values.npy")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    rng = np.random.default_rng(0)
    for _ in range(50 if NIGHTLY else 1):
        job = subprocess.Popen([sys.executable, "-c", JOB, *arguments], env=environment, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(1.0, 4.0))
        job.send_signal(signal.SIGKILL)
        job.wait()
        leftover = tmp_path / "checkpoint.npz"
        if leftover.exists():
            with np.load(leftover, allow_pickle=False) as content:  # whole, whenever it was killed
                assert content.files
    subprocess.run([sys.executable, "-c", JOB, *arguments], env=environment, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "values.npy"), expected, rtol=1e-4, atol=1e-6)


def test_only_what_is_surely_too_large_is_refused(monkeypatch):
    x = jnp.ones((20_000, 2))
    assert _memory._room() > 0
    monkeypatch.setattr(_memory, "_room", lambda: 1.5 * 4 * 20_000**2)
    _memory.check_room("A", (20_000, 20_000), x, "")
    monkeypatch.setattr(_memory, "_room", lambda: 1.5 * 4 * 20_000**2 - 1)
    with pytest.raises(MemoryError, match=r"A of shape \(20000, 20000\) takes 2.4 GB"):
        _memory.check_room("A", (20_000, 20_000), x, "")
    _memory.check_room("A", (2000, 2000), x, "")  # not looked at
    jax.jit(lambda x: _memory.check_room("A", (20_000, 20_000), x, ""))(x)  # nor under a trace


LIMITED = """
import resource
import jax, numpy as np
import jaxalign
x = np.random.default_rng(0).normal(size=(40_000, 2)).astype(np.float32)
jax.block_until_ready(jaxalign.rbf_affinity(x[:100]))  # all threads are there
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31,) * 2)
key = jax.random.key(0)
for call in (
    lambda: jaxalign.squared_distances(x),
    lambda: jaxalign.rbf_affinity(x),
    lambda: jaxalign.rbf_affinity(x, sigma=1.0),
    lambda: jaxalign.affinity_operator(x, sigma=1.0).todense(),
    lambda: jaxalign.measures.rdm(x, "sqeuclidean"),
    lambda: jaxalign.compare(x, x, "rsa", comparison="spearman"),
    lambda: jaxalign.normalized_cut(x, 3, sigma=1.0, method="dense"),
    lambda: jaxalign.permutation_test(x, x, key=key),
    lambda: jaxalign.bootstrap(x, x, kernel="linear", key=key),
):
    try:
        jax.block_until_ready(call())
        print("stored")
    except MemoryError as error:
        print(error)
print(float(jaxalign.mean_density(x[:20_000], sigma=1.0)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the memory of a process on Linux")
def test_what_does_not_fit_into_memory_is_an_error_and_no_endless_wait():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], env=environment, check=True, capture_output=True, text=True, timeout=300
    )
    *refused, density = done.stdout.splitlines()
    assert len(refused) == 9
    assert all("40000" in one and "GB while it is computed, but only" in one for one in refused), refused
    assert all("solve_sigma, affinity_operator" in one for one in refused[:7])
    assert 0.1 < float(density) < 1
