"""Measure, and print a table of ratios with the targets next to them.

python -m tests.benchmarks                   about fifteen minutes
python -m tests.benchmarks --quick           small sizes, for trying that it runs; the targets are not meant for these
python -m tests.benchmarks --only cut peers  some sections
python -m tests.benchmarks --json docs/benchmarks/cpu.json
python -m tests.benchmarks.page              writes docs/pages/performance.md from docs/benchmarks/*.json
python -m tests.benchmarks.device            on a GPU
"""

from __future__ import annotations

import os
import sys

from . import floor
from .cases import QUICK, Sizes, sections
from .report import command_line, rates_line, run_sections, surroundings


def main() -> None:
    """Parse the arguments, measure, print, and write the file."""
    chosen, file, quick = command_line(
        "tests.benchmarks", "How fast jaxalign is here.", lambda quick: sections(QUICK if quick else Sizes())
    )
    try:
        import torch
    except ImportError:
        pass
    else:
        torch.set_num_threads(os.cpu_count() or 1)
    facts, rates = surroundings(), floor.measured()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(rates_line(rates))
    print("float32, density 0.05; medians over pairs that ran in turns, and quartiles")
    failed = run_sections(chosen, facts, rates, file, quick=quick)
    if any(name.endswith("FAILED") for name in failed):
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
