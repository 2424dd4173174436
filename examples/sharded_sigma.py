"""Sigma of the features in a .npy file, on all devices of all processes; each process reads its own rows only.

    python examples/sharded_sigma.py features.npy                                # one machine: all of its devices
    srun python examples/sharded_sigma.py features.npy --distributed             # SLURM, TPU pods, Open MPI
    python examples/sharded_sigma.py features.npy --distributed \
        --coordinator 127.0.0.1:1234 --processes 2 --process 0                   # and the same with --process 1

Every process prints where its rows are, and the first one sigma. How to start it where: docs/pages/scaling.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np

import jaxalign


def own_rows(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """This process's rows, and the mask of all: rows are added until all devices hold as many."""
    features = np.load(file, mmap_mode="r")
    n, here = features.shape[0], jax.local_device_count()
    each = -(-n // jax.device_count())  # rows of a device
    start = each * here * jax.process_index()
    rows = np.zeros((each * here, features.shape[1]), np.float32)
    mine = features[start : start + len(rows)]
    rows[: len(mine)] = mine
    return rows, np.arange(each * jax.device_count()) < n


def where_rows_are(x: jax.Array) -> str:
    """One line a device of this process: the rows it holds, and their bytes."""
    lines = []
    for shard in x.addressable_shards:
        rows = shard.index[0]
        lines.append(
            f"{shard.device}: rows {rows.start or 0} to {(rows.stop or x.shape[0]) - 1}, {shard.data.nbytes} bytes"
        )
    return "\n".join(f"process {jax.process_index()}, {line}" for line in lines)


def main(file: Path) -> float:
    """Solve, say where the rows are, and return sigma."""
    mesh = jaxalign.sharding.data_mesh()  # all devices of all processes
    rows, mask = own_rows(file)
    x = jaxalign.sharding.shard_rows(rows, mesh)
    print(where_rows_are(x), flush=True)
    sigma = float(jaxalign.solve_sigma(x, mask=mask).sigma)
    if jax.process_index() == 0:
        print(f"sigma of {int(mask.sum())} samples on {jax.device_count()} devices: {sigma:.7g}", flush=True)
    return sigma


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sigma of the features in a .npy file, on all devices.")
    parser.add_argument("file", type=Path, help="features (n, d)")
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process, where no launcher tells")
    parser.add_argument("--processes", type=int, help="how many")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    options = parser.parse_args()
    if options.distributed:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    main(options.file)
