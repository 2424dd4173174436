"""Sigma of the features in a .npy file, on all devices of all processes; each process reads only its rows.

    python examples/sharded_sigma.py features.npy                                # one machine: all of its devices
    srun python examples/sharded_sigma.py features.npy --distributed             # SLURM, TPU pods, Open MPI
    python examples/sharded_sigma.py features.npy --distributed \
        --coordinator 127.0.0.1:1234 --processes 2 --process 0                   # and the same with --process 1

Every process prints the placement of its rows, and the first one prints sigma. Launch recipes: docs/pages/scaling.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np

import jaxalign


def read_local_rows(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The rows of this process, padded so that all devices hold equally many, and the mask of all rows."""
    features = np.load(file, mmap_mode="r")
    n, local_devices = features.shape[0], jax.local_device_count()
    rows_per_device = -(-n // jax.device_count())
    start = rows_per_device * local_devices * jax.process_index()
    rows = np.zeros((rows_per_device * local_devices, features.shape[1]), np.float32)
    valid = features[start : start + len(rows)]
    rows[: len(valid)] = valid
    return rows, np.arange(rows_per_device * jax.device_count()) < n


def placement(x: jax.Array) -> str:
    """One line per device of this process: its rows, and their bytes."""
    lines = []
    for shard in x.addressable_shards:
        rows = shard.index[0]
        lines.append(
            f"{shard.device}: rows {rows.start or 0} to {(rows.stop or x.shape[0]) - 1}, {shard.data.nbytes} bytes"
        )
    return "\n".join(f"process {jax.process_index()}, {line}" for line in lines)


def main(file: Path) -> float:
    """Print the placement of the rows and sigma, and return sigma."""
    mesh = jaxalign.sharding.data_mesh()  # all devices of all processes
    rows, mask = read_local_rows(file)
    x = jaxalign.sharding.shard_rows(rows, mesh)
    print(placement(x), flush=True)
    sigma = float(jaxalign.solve_sigma(x, mask=mask).sigma)
    if jax.process_index() == 0:
        print(f"sigma of {int(mask.sum())} samples on {jax.device_count()} devices: {sigma:.7g}", flush=True)
    return sigma


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sigma of the features in a .npy file, on all devices.")
    parser.add_argument("file", type=Path, help="features (n, d)")
    parser.add_argument("--distributed", action="store_true", help="run as one of several processes")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process, without a launcher")
    parser.add_argument("--processes", type=int, help="number of processes")
    parser.add_argument("--process", type=int, help="number of this process, from 0")
    options = parser.parse_args()
    if options.distributed:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    main(options.file)
