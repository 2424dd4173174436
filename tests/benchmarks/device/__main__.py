"""Prove the library on the device at hand: right numbers, times beside torch and the device's rates, memory.

python -m tests.benchmarks.device                         under six minutes on one H100
python -m tests.benchmarks.device --quick                 small sizes, also on a CPU
python -m tests.benchmarks.device --only correct loss     some parts
python -m tests.benchmarks.device --json docs/benchmarks/gpu.json

Runs from a bare checkout. The most important parts come first; each is printed and written when it is done, and one
that fails says so and lets the next one start. Exits with 1 if a part failed or a number is wrong, not if a time missed
its target.
"""

from __future__ import annotations

import os
import sys

# Before jax starts: torch works on the same device, so jax takes a part of its memory, at once for even timings.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import jax

from .. import floor
from ..report import command_line, rates_line, run_sections, surroundings
from .parts import FULL, QUICK, compiled_ahead, parts


def main() -> None:
    """Parse the arguments, measure, print, and write the file."""
    chosen, file, quick = command_line(
        "tests.benchmarks.device", "jaxalign on this device.", lambda quick: parts(QUICK if quick else FULL)
    )
    facts = surroundings()
    small = quick or jax.default_backend() == "cpu"
    rates = floor.measured(
        512 if small else 8192, in_cache=1 << 17 if small else 1 << 22, copied=1 << (20 if small else 29)
    )
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{jax.device_count()} device(s); {rates_line(rates)}", flush=True)
    named = {f"device_{name}": part for name, part in compiled_ahead(chosen).items()}
    failed = run_sections(named, facts, rates, file, quick=quick)
    wrong = [name for name in failed if name.endswith("FAILED") or name.startswith("device_correct")]
    sys.exit("wrong or failed: " + "; ".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
