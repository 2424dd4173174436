"""One sigma from rows that several processes hold: each has its own, none has all.

On a cluster every machine reads its share of the samples and runs the same program. Here the machines are processes on
this one, which talk to each other over loopback and have CPU devices only:

    python examples/multi_process.py                            # 2 processes with 2 devices each
    python examples/multi_process.py --processes 4 --devices 1 --rows 4000 --width 32
    python examples/multi_process.py --kill 1                   # process 1 dies before it solves
    python examples/multi_process.py --nan 1                    # process 1 holds a nan

What a program of your own needs of this file is the function `solve`: `jax.distributed.initialize`, a mesh over the
devices of all processes, `shard_rows` with the rows this process holds; from there on the functions of jaxalign are
called as ever. Every process calls the same functions in the same order, and every one gets the same sigma. What is
refused, is refused by all: a nan in the rows of one process is an error in each, which names the row among all rows.

The rest starts the processes, compares what they say with one process that has all rows, and prints a table:

    process      rows        sigma      density      d density / d sigma    |d log sigma / d x|    CKA(x, tanh x)

A process that waits for a dead one waits long. So the parent looks after its children: when one fails, or when time is
up, it ends the others and exits with an error. Where processes run on different machines there is no such parent; then
`heartbeat_timeout_seconds` bounds how long they outlive one that died.
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
GRACE = 3.0  # seconds that the others have to say what went wrong, after one has failed
HEARTBEAT = 10  # seconds without a sign of life, after which a process counts as dead for the others


class Problem(NamedTuple):
    """What is to be solved, and by whom."""

    processes: int = 2
    devices: int = 2  # of each process
    rows: int = 400  # of all processes together
    width: int = 16
    timeout: float = 120.0
    float64: bool = False
    kill: int | None = None  # this process ends itself before it solves
    nan: int | None = None  # the last row of this process has a nan

    @property
    def own_rows(self) -> int:
        """Rows of one process."""
        return self.rows // self.processes


class Numbers(NamedTuple):
    """What every process finds."""

    sigma: float
    density: float
    slope: float  # of the density, with respect to sigma
    gradient: float  # the norm of that of log sigma, with respect to all features
    similarity: float  # debiased CKA of the features with their tanh, from a comparison grid


# --- what each process does -----------------------------------------------------------------------------------------


def rows_of(process: int, problem: Problem) -> np.ndarray:
    """The rows that a process holds; a program of your own reads them from where they are."""
    x = np.random.default_rng([0, process]).normal(size=(problem.own_rows, problem.width))
    if problem.nan == process:
        x[-1, 0] = np.nan
    return x.astype(np.float64 if problem.float64 else np.float32)


def solve(process: int, address: str, problem: Problem) -> Numbers:
    """One process of several: its own rows, the numbers of all."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", problem.devices)
    jax.config.update("jax_enable_x64", problem.float64)
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=problem.processes,
        process_id=process,
        cluster_detection_method="deactivate",  # the addresses are given, do not ask Slurm and the like
        coordinator_bind_address=address,  # loopback only: nobody else is to reach it
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
    """Sigma, density, two derivatives and a similarity; nothing here knows where the rows are."""
    solution = jaxalign.solve_sigma(x, density=DENSITY)

    def density(sigma: jax.Array) -> jax.Array:
        return jaxalign.mean_density(x, sigma=sigma)

    def log_sigma(x: jax.Array) -> jax.Array:
        return jnp.log(jaxalign.solve_sigma(x, density=DENSITY).sigma)

    reached, slope = jax.value_and_grad(density)(solution.sigma)
    gradient = jnp.linalg.norm(jax.grad(log_sigma)(x))  # the gradient is spread as x is
    grid = jaxalign.compare_grid({"x": x, "tanh": jnp.tanh(x)}, kernel=RBF(density=DENSITY))
    return Numbers(*(float(value) for value in (solution.sigma, reached, slope, gradient, grid.values[0, 1])))


def work(process: int, address: str, problem: Problem) -> int:
    """`solve`, with the result, or the error, as the last line that is printed; the exit status."""
    try:
        answer, status = solve(process, address, problem)._asdict(), 0
    except Exception as error:
        traceback.print_exc()
        answer, status = {"error": f"{type(error).__name__}: {error}"}, 1
    print(json.dumps(answer), flush=True)
    return status


# --- what the parent does -------------------------------------------------------------------------------------------


class ProcessError(RuntimeError):
    """One process or more failed; the others were ended."""


def solve_in_processes(problem: Problem) -> list[Numbers]:
    """Start all processes and return what each of them found.

    Raises:
        ProcessError: one of them failed, or time was up. None of them is left running.
    """
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, str(Path(__file__).resolve()), "--problem", json.dumps(problem), "--address", address]
    commands = [[*command, "--process", str(process)] for process in range(problem.processes)]
    return [Numbers(**json.loads(last_line(said))) for said in run_together(commands, problem.timeout)]


def free_port() -> int:
    """A port of the loopback interface that nobody uses just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_together(commands: Sequence[Sequence[str]], timeout: float) -> list[str]:
    """What commands that wait for each other print.

    Raises:
        ProcessError: one of them failed, or has not ended in time. The message says which, and what each of those that
            failed printed last.
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
        what = [describe(process, code, printed(folder, process)) for process, code in enumerate(codes)]
        first = "a process failed" if any(codes) else f"not done after {timeout:g} s"
        raise ProcessError(f"{first}; those that still ran were ended.\n  " + "\n  ".join(what))


@contextlib.contextmanager
def started(commands: Sequence[Sequence[str]], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The commands as processes that write to files; none of them outlives this."""
    children: list[subprocess.Popen[bytes]] = []
    try:
        for process, command in enumerate(commands):
            with (folder / f"{process}.out").open("wb") as out, (folder / f"{process}.err").open("wb") as err:
                children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err))
        yield children
    finally:
        for child in children:
            child.kill()  # not terminate(): jax takes SIGTERM for the announcement of an end that comes later
        for child in children:
            child.wait()


def wait_for(children: Sequence[subprocess.Popen[bytes]], end: float) -> None:
    """Wait until all have ended, or the time has come."""
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))


def printed(folder: str, process: int) -> str:
    """What a process printed: to stdout or, if that is nothing, to stderr."""
    out, err = (Path(folder, f"{process}.{kind}").read_text(errors="replace") for kind in ("out", "err"))
    return out if out.strip() else err


def last_line(said: str) -> str:
    """The last line that is not empty."""
    return said.strip().rpartition("\n")[2]


def describe(process: int, code: int | None, said: str) -> str:
    """How a process ended, in words."""
    if code is None:
        return f"process {process} still ran"
    if code == 0:
        return f"process {process} was done"
    if code < 0:
        return f"process {process} was killed by {signal.Signals(-code).name}"
    words = last_line(said)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        words = json.loads(words)["error"]
    return f"process {process} failed: {words}"


def in_one_process(problem: Problem) -> Numbers:
    """The same numbers from all rows in this process."""
    return numbers(np.concatenate([rows_of(process, problem) for process in range(problem.processes)]))


def table(found: Sequence[Numbers], expected: Numbers, problem: Problem) -> str:
    """The numbers of each process, and of one that has all rows."""

    def line(name: str, first: int, last: int, row: Numbers) -> str:
        return f"{name:12}{f'{first} to {last}':>14}" + "".join(f"{value:>22.8g}" for value in row)

    head = ("sigma", "density", "d density / d sigma", "|d log sigma / d x|", "CKA(x, tanh x)")
    lines = [f"{'process':12}{'rows':>14}" + "".join(f"{name:>22}" for name in head)]
    own = problem.own_rows
    lines += [line(f"{k} of {len(found)}", k * own, (k + 1) * own - 1, row) for k, row in enumerate(found)]
    return "\n".join([*lines, line("one alone", 0, problem.rows - 1, expected)])


def main(problem: Problem = Problem()) -> list[Numbers]:  # noqa: B008 (immutable)
    """Solve in processes, compare with one process that has all rows, print the table.

    Raises:
        ValueError: rows that do not divide among the devices.
        ProcessError: a process failed.
        AssertionError: the numbers differ.
    """
    devices = problem.processes * problem.devices
    if problem.processes < 1 or problem.devices < 1 or problem.rows < devices or problem.rows % devices:
        raise ValueError(
            f"{problem.rows} rows do not divide among {problem.processes} processes with {problem.devices} devices."
        )
    found = solve_in_processes(problem)
    with jax.enable_x64(problem.float64):
        expected = in_one_process(problem)
    print(table(found, expected, problem))
    for row in found:
        np.testing.assert_allclose(row, expected, rtol=1e-11 if problem.float64 else 1e-5)
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    default = Problem()
    parser = argparse.ArgumentParser(description="One sigma from rows that several processes hold.")
    parser.add_argument("--processes", type=int, default=default.processes)
    parser.add_argument("--devices", type=int, default=default.devices, help="CPU devices of each process")
    parser.add_argument("--rows", type=int, default=default.rows, help="of all processes together")
    parser.add_argument("--width", type=int, default=default.width, help="features of a row")
    parser.add_argument("--timeout", type=float, default=default.timeout, help="seconds until all processes are ended")
    parser.add_argument("--float64", action="store_true", help="64-bit floats")
    parser.add_argument("--kill", type=int, metavar="PROCESS", help="this process ends itself before it solves")
    parser.add_argument("--nan", type=int, metavar="PROCESS", help="this process holds a nan")
    for name in ("--process", "--address", "--problem"):  # how the parent starts the others
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
