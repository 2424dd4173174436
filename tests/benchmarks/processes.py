"""One process on one core against two, each on its own: python -m tests.benchmarks.processes [n] [d] [rounds].

Linux only: processes are pinned to cores before jax starts its threads.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def work(process: int, count: int, address: str, n: int, d: int, rounds: int) -> None:
    """Solve sigma with this process's share of the rows and print the seconds of each round."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[process]})
    import jax

    if count > 1:
        jax.distributed.initialize(address, count, process, cluster_detection_method="deactivate")
    import jaxalign

    rows = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    mine = rows[process * (n // count) : (process + 1) * (n // count)]
    x = jaxalign.sharding.shard_rows(mine, jaxalign.sharding.data_mesh())
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(jaxalign.solve_sigma(x).sigma)
        print(time.perf_counter() - start, flush=True)


def seconds(count: int, n: int, d: int, rounds: int) -> list[float]:
    """The seconds of each round in the first of so many processes, after one that compiles."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.benchmarks.processes"]
    folder = Path(__file__).parents[2]
    started = [
        subprocess.Popen(
            [*command, "--work", str(k), str(count), address, str(n), str(d), str(rounds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=folder,
        )
        for k in range(count)
    ]
    said = [process.communicate(timeout=600)[0] for process in started]
    return [float(line) for line in said[0].splitlines() if line[:1].isdigit()][1:]  # gloo prints too


def main(n: int = 16384, d: int = 64, rounds: int = 7) -> tuple[float, float]:
    """Print and return the medians, in turns."""
    one, two = [], []
    for _ in range(2):
        one += seconds(1, n, d, rounds)
        two += seconds(2, n, d, rounds)
    alone, both = float(np.median(one)), float(np.median(two))
    print(f"n = {n}, d = {d}: one process {alone:.3f} s, two {both:.3f} s, {alone / both:.2f} times as fast")
    return alone, both


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], *map(int, sys.argv[5:]))
    else:
        main(*map(int, sys.argv[1:]))
