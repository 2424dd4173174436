"""Several processes that hold their own rows each find what one process finds that has all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest

import jaxalign

ROOT = Path(__file__).parent.parent
TIMEOUT = 240.0  # far more than it takes, so that a busy machine is no failure


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    with helpers.example("multi_process") as module:
        yield module


@pytest.fixture(autouse=True)
def children_find_the_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "float64"),
    [(3, 1, False), (2, 2, True)],
    ids=["3 processes", "2 processes with 2 devices, float64"],
)
def test_every_process_finds_what_one_process_finds(example, processes, devices, float64):
    problem = example.Problem(processes, devices, rows=48, width=5, timeout=TIMEOUT, float64=float64)
    found = example.solve_in_processes(problem)
    with jax.enable_x64(float64):
        expected = example.in_one_process(problem)
    assert len(found) == processes
    assert found == [found[0]] * processes  # to the last bit
    np.testing.assert_allclose(found[0].density, example.DENSITY, rtol=1e-12 if float64 else 1e-6)
    np.testing.assert_allclose(found[0], expected, rtol=1e-12 if float64 else 1e-6)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(example):
    begin = time.monotonic()
    with pytest.raises(example.ProcessError, match=r"(?s)process 0 was still running.*process 1 was killed by SIGKILL"):
        example.solve_in_processes(example.Problem(2, 1, rows=40, width=5, timeout=TIMEOUT, kill=1))
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_a_nan_in_the_rows_of_one_process_is_an_error_in_each(example):
    with pytest.raises(example.ProcessError) as caught:
        example.solve_in_processes(example.Problem(2, 1, rows=40, width=5, timeout=TIMEOUT, nan=0))
    said = str(caught.value).splitlines()[1:]
    what = "failed: ValueError: x has nan or inf in 1 row(s), the first is row 19."
    assert [line.partition(what)[0].strip() for line in said] == ["process 0", "process 1"]


UNEQUAL = """
import sys
import jax
process = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, process, cluster_detection_method="deactivate")
import numpy as np
import jaxalign
try:
    jaxalign.sharding.shard_rows(np.ones((40 + process, 3), np.float32), jaxalign.sharding.data_mesh())
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_another_number_of_rows_in_another_process_is_an_error_in_each(example):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    said = example.run_together([[sys.executable, "-c", UNEQUAL, address, str(k)] for k in range(2)], timeout=TIMEOUT)
    assert all("the same number of rows in every process; got [40, 41]" in one for one in said)


@pytest.mark.slow
def test_a_process_that_takes_too_long_ends_all(example):
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    begin = time.monotonic()
    with pytest.raises(example.ProcessError, match=r"(?s)not finished after 3 s.*0 had finished.*1 was still running"):
        example.run_together([[sys.executable, "-c", "print(1)"], sleep], timeout=3)
    assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_what_a_process_says_is_handed_on(example):
    fails = [sys.executable, "-c", "raise SystemExit('out of luck')"]
    ignores = [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
    ]
    with pytest.raises(example.ProcessError, match=r"(?s)process 0 failed: out of luck.*process 1 was still running"):
        example.run_together([fails, ignores], timeout=60)
    assert example.run_together([[sys.executable, "-c", "print('done')"]], timeout=60) == ["done\n"]


def test_rows_that_do_not_divide(example):
    with pytest.raises(ValueError, match="41 rows do not divide evenly among 2 processes with 2 devices"):
        example.main(example.Problem(rows=41))


def test_the_table_has_a_line_for_each_process_and_one_for_all_rows(example):
    found = example.Numbers(1.5, 0.2, 0.25, 0.125, 0.75)
    lines = example.table([found] * 2, found, example.Problem(2, 1, rows=40)).splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["process", "0 of 2", "1 of 2", "single"]
    assert "20 to 39" in lines[2]
    assert all(number in lines[-1] for number in ("0 to 39", "1.5", "0.2", "0.25", "0.125", "0.75"))


def test_the_command_line_names_the_fields_of_a_problem(example):
    options = example.parse(["--processes", "3", "--kill", "1"])
    assert {name: getattr(options, name) for name in example.Problem._fields} == example.Problem(3, kill=1)._asdict()


def launched(file: Path, environments: list[dict[str, str]], *options: list[str]) -> list[str]:
    """What the recipes of docs/pages/scaling.md print, one process for each environment."""
    command = [sys.executable, str(ROOT / "examples" / "sharded_sigma.py"), str(file)]
    here = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_FLAGS", "JAX_", "SLURM"))}
    started = [
        subprocess.Popen(
            [*command, *(options[k] if options else [])],
            env={**here, "JAX_PLATFORMS": "cpu", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k, environment in enumerate(environments)
    ]
    said = [process.communicate(timeout=TIMEOUT) for process in started]
    assert all(process.returncode == 0 for process in started), said
    return [out for out, _ in said]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["one process", "slurm", "coordinator"])
def test_the_launch_recipes_work_as_written(tmp_path, launcher):
    x = np.random.default_rng(0).normal(size=(101, 6)).astype(np.float32)  # divides among nothing
    np.save(tmp_path / "features.npy", x)
    if launcher == "one process":
        said = launched(tmp_path / "features.npy", [{"JAX_NUM_CPU_DEVICES": "4"}])
    elif launcher == "slurm":  # what srun sets; the port of the coordinator follows from the number of the job
        job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        ranks = [{"SLURM_PROCID": str(k), "SLURM_LOCALID": str(k), "JAX_NUM_CPU_DEVICES": "2"} for k in range(2)]
        said = launched(tmp_path / "features.npy", [{**job, **rank} for rank in ranks], *[["--distributed"]] * 2)
    else:
        common = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
        environment = {"JAX_NUM_CPU_DEVICES": "2"}
        said = launched(tmp_path / "features.npy", [environment] * 2, [*common, "0"], [*common, "1"])
    lines = "".join(said).splitlines()
    sigma = float(next(line for line in lines if line.startswith("sigma of 101 samples on 4 devices: ")).split()[-1])
    np.testing.assert_allclose(sigma, jaxalign.solve_sigma(x).sigma, rtol=2e-6)
    # The library that connects processes writes to the same stream, without a lock.
    lines = [line.split("[Gloo]")[0] for line in lines]
    held = sorted(line.split(": ")[1] for line in lines if ": rows " in line)
    assert held == sorted(f"rows {26 * k} to {26 * k + 25}, 624 bytes" for k in range(4))
