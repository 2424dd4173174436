"""One sigma from rows that are distributed over several processes.

On a cluster every machine reads its share of the samples and runs the same program. Here processes on one machine stand
in for the machines. They communicate over loopback and have only CPU devices:

    python examples/multi_process.py                            # 2 processes with 2 devices each
    python examples/multi_process.py --processes 4 --devices 1 --rows 4000 --width 32
    python examples/multi_process.py --kill 1                   # process 1 dies before it solves
    python examples/multi_process.py --nan 1                    # process 1 holds a nan

The function `solve` is all that your own program needs: `jax.distributed.initialize`, a mesh over the devices of all
processes, and `shard_rows` with the rows of this process. After that, functions of jaxalign are called as usual. Every
process calls the same functions in the same order and gets the same sigma. Errors are raised in every process: a nan in
the rows of one process is an error in all, which names the row among all rows.

The rest of the file starts the processes, compares their results with a process that has all rows, and prints a table:

    process      rows        sigma      density      d density / d sigma    |d log sigma / d x|    CKA(x, tanh x)

A process waits long for one that died. The parent therefore watches its children: if one fails or the timeout passes,
it ends the others and exits with an error. Processes on different machines have no such parent; for them
`heartbeat_timeout_seconds` bounds how long they outlive a dead one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign
from jaxalign.kernels import RBF

DENSITY = 0.2
GRACE = 3.0  # seconds that the other processes have to report errors, after one has failed
HEARTBEAT = 10  # seconds without a heartbeat, after which the others consider a process dead


class Problem(NamedTuple):
    """The size of the problem, and the processes that solve it."""

    processes: int = 2
    devices: int = 2  # per process
    rows: int = 400  # in total
    width: int = 16
    timeout: float = 120.0
    float64: bool = False
    kill: int | None = None  # this process kills itself before it solves
    nan: int | None = None  # the last row of this process has a nan

    @property
    def rows_per_process(self) -> int:
        """Rows of one process."""
        return self.rows // self.processes


class Numbers(NamedTuple):
    """The results, the same in every process."""

    sigma: float
    density: float
    slope: float  # of the density, with respect to sigma
    gradient: float  # norm of the gradient of log sigma with respect to all features
    similarity: float  # debiased CKA of the features and their tanh, from a comparison grid


# --- in each process ------------------------------------------------------------------------------------------------


def rows_of(process: int, problem: Problem) -> np.ndarray:
    """The rows of a process; your own program reads them from its data."""
    x = np.random.default_rng([0, process]).normal(size=(problem.rows_per_process, problem.width))
    if problem.nan == process:
        x[-1, 0] = np.nan
    return x.astype(np.float64 if problem.float64 else np.float32)


def solve(process: int, address: str, problem: Problem) -> Numbers:
    """The results in one of several processes, from its rows."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", problem.devices)
    jax.config.update("jax_enable_x64", problem.float64)
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=problem.processes,
        process_id=process,
        cluster_detection_method="deactivate",  # the addresses are known, do not ask Slurm and the like
        coordinator_bind_address=address,  # loopback only: not reachable from other machines
        initialization_timeout=max(1, int(problem.timeout)),
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=HEARTBEAT,
    )
    mesh = jaxalign.sharding.data_mesh()
    x = jaxalign.sharding.shard_rows(rows_of(process, problem), mesh)
    if problem.kill == process:
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers(x)


def numbers(x: jax.Array | np.ndarray) -> Numbers:
    """Sigma, density, two derivatives and a similarity; the code does not depend on where the rows are."""
    solution = jaxalign.solve_sigma(x, density=DENSITY)

    def density(sigma: jax.Array) -> jax.Array:
        return jaxalign.mean_density(x, sigma=sigma)

    def log_sigma(x: jax.Array) -> jax.Array:
        return jnp.log(jaxalign.solve_sigma(x, density=DENSITY).sigma)

    reached, slope = jax.value_and_grad(density)(solution.sigma)
    gradient = jnp.linalg.norm(jax.grad(log_sigma)(x))  # the gradient is sharded like x
    grid = jaxalign.compare_grid({"x": x, "tanh": jnp.tanh(x)}, kernel=RBF(density=DENSITY))
    return Numbers(*(float(value) for value in (solution.sigma, reached, slope, gradient, grid.values[0, 1])))


def work(process: int, address: str, problem: Problem) -> int:
    """Run `solve`, print the result or the error as the last line, and return the exit status."""
    try:
        answer, status = solve(process, address, problem)._asdict(), 0
    except Exception as error:
        traceback.print_exc()
        answer, status = {"error": f"{type(error).__name__}: {error}"}, 1
    print(json.dumps(answer), flush=True)
    return status


# --- in the parent --------------------------------------------------------------------------------------------------


class ProcessError(RuntimeError):
    """One process or more failed; the others were ended."""


def solve_in_processes(problem: Problem) -> list[Numbers]:
    """Start all processes and return their results.

    Raises:
        ProcessError: a process failed, or the timeout passed. No process is left running.
    """
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, str(Path(__file__).resolve()), "--problem", json.dumps(problem), "--address", address]
    commands = [[*command, "--process", str(process)] for process in range(problem.processes)]
    return [Numbers(**json.loads(last_line(output))) for output in run_together(commands, problem.timeout)]


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_together(commands: Sequence[Sequence[str]], timeout: float) -> list[str]:
    """Run commands that wait for each other, and return their outputs.

    Raises:
        ProcessError: a command failed, or did not end in time. The message contains the last line of each that failed.
    """
    with tempfile.TemporaryDirectory() as folder, started(commands, Path(folder)) as children:
        end = time.monotonic() + timeout
        while any(child.poll() is None for child in children) and time.monotonic() < end:
            if any(child.poll() for child in children):
                wait_for(children, min(end, time.monotonic() + GRACE))
                break
            time.sleep(0.05)
        codes = [child.poll() for child in children]
        if all(code == 0 for code in codes):
            return [printed(folder, process) for process in range(len(commands))]
        lines = [describe(process, code, printed(folder, process)) for process, code in enumerate(codes)]
        first = "a process failed" if any(codes) else f"not finished after {timeout:g} s"
        raise ProcessError(f"{first}; the processes that were still running were ended.\n  " + "\n  ".join(lines))


@contextlib.contextmanager
def started(commands: Sequence[Sequence[str]], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run commands as processes that write to files; all are ended on exit."""
    children: list[subprocess.Popen[bytes]] = []
    try:
        for process, command in enumerate(commands):
            with (folder / f"{process}.out").open("wb") as out, (folder / f"{process}.err").open("wb") as err:
                children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err))
        yield children
    finally:
        for child in children:
            child.kill()  # not terminate(): jax treats SIGTERM as a notice of a later end
        for child in children:
            child.wait()


def wait_for(children: Sequence[subprocess.Popen[bytes]], end: float) -> None:
    """Wait until all processes have ended, or until the time `end`."""
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))


def printed(folder: str, process: int) -> str:
    """The output of a process: stdout or, if that is empty, stderr."""
    out, err = (Path(folder, f"{process}.{kind}").read_text(errors="replace") for kind in ("out", "err"))
    return out if out.strip() else err


def last_line(output: str) -> str:
    """The last line that is not empty."""
    return output.strip().rpartition("\n")[2]


def describe(process: int, code: int | None, output: str) -> str:
    """How a process ended, in words."""
    if code is None:
        return f"process {process} was still running"
    if code == 0:
        return f"process {process} had finished"
    if code < 0:
        return f"process {process} was killed by {signal.Signals(-code).name}"
    message = last_line(output)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        message = json.loads(message)["error"]
    return f"process {process} failed: {message}"


def in_one_process(problem: Problem) -> Numbers:
    """The same results from all rows in this process."""
    return numbers(np.concatenate([rows_of(process, problem) for process in range(problem.processes)]))


def table(results: Sequence[Numbers], expected: Numbers, problem: Problem) -> str:
    """The results of each process, and of one process that has all rows."""

    def line(name: str, first: int, last: int, row: Numbers) -> str:
        return f"{name:12}{f'{first} to {last}':>14}" + "".join(f"{value:>22.8g}" for value in row)

    head = ("sigma", "density", "d density / d sigma", "|d log sigma / d x|", "CKA(x, tanh x)")
    lines = [f"{'process':12}{'rows':>14}" + "".join(f"{name:>22}" for name in head)]
    n = problem.rows_per_process
    lines += [line(f"{k} of {len(results)}", k * n, (k + 1) * n - 1, row) for k, row in enumerate(results)]
    return "\n".join([*lines, line("single", 0, problem.rows - 1, expected)])


def main(problem: Problem = Problem()) -> list[Numbers]:  # noqa: B008 (immutable)
    """Solve in processes, compare with one process that has all rows, and print the table.

    Raises:
        ValueError: the rows do not divide evenly among the devices.
        ProcessError: a process failed.
        AssertionError: the results differ.
    """
    devices = problem.processes * problem.devices
    if problem.processes < 1 or problem.devices < 1 or problem.rows < devices or problem.rows % devices:
        raise ValueError(
            f"{problem.rows} rows do not divide evenly among {problem.processes} processes with {problem.devices} "
            "devices each."
        )
    results = solve_in_processes(problem)
    with jax.enable_x64(problem.float64):
        expected = in_one_process(problem)
    print(table(results, expected, problem))
    for row in results:
        np.testing.assert_allclose(row, expected, rtol=1e-11 if problem.float64 else 1e-5)
    return results


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    default = Problem()
    parser = argparse.ArgumentParser(description="One sigma from rows that are distributed over several processes.")
    parser.add_argument("--processes", type=int, default=default.processes)
    parser.add_argument("--devices", type=int, default=default.devices, help="CPU devices per process")
    parser.add_argument("--rows", type=int, default=default.rows, help="rows in total")
    parser.add_argument("--width", type=int, default=default.width, help="features of a row")
    parser.add_argument(
        "--timeout", type=float, default=default.timeout, help="seconds after which all processes are ended"
    )
    parser.add_argument("--float64", action="store_true", help="64-bit floats")
    parser.add_argument("--kill", type=int, metavar="PROCESS", help="this process kills itself before it solves")
    parser.add_argument("--nan", type=int, metavar="PROCESS", help="this process holds a nan")
    for name in ("--process", "--address", "--problem"):  # for the processes that the parent starts
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    if options.process is not None:
        sys.exit(work(int(options.process), options.address, Problem(*json.loads(options.problem))))
    try:
        main(Problem(**{name: getattr(options, name) for name in Problem._fields}))
    except (ProcessError, ValueError, AssertionError) as error:
        sys.exit(f"error: {error}")
