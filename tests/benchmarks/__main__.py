"""Measure, and print a table of ratios with the targets next to them.

python -m tests.benchmarks                   about fifteen minutes
python -m tests.benchmarks --quick           small sizes, for trying that it runs; the targets are not meant for these
python -m tests.benchmarks --only cut peers  some sections
python -m tests.benchmarks --json docs/benchmarks/cpu.json
python -m tests.benchmarks.page              writes docs/pages/performance.md from docs/benchmarks/*.json
python -m tests.benchmarks.device            on a GPU
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import floor
from .cases import QUICK, Sizes, sections
from .report import rates_line, run_sections, surroundings


def main() -> None:
    """Parse the arguments, measure, print, and write the file."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="How fast jaxalign is here.")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to try that it runs")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these; the others stay as the file has them")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file too")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        pass
    else:
        torch.set_num_threads(os.cpu_count() or 1)

    every = sections(QUICK if arguments.quick else Sizes())
    unknown = sorted(set(arguments.only or ()) - set(every))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(every)}")
    facts, rates = surroundings(), floor.measured()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(rates_line(rates))
    print("float32, density 0.05; medians over pairs that ran in turns, and quartiles")
    chosen = {name: every[name] for name in arguments.only or every}
    failed = run_sections(chosen, facts, rates, arguments.json, quick=arguments.quick)
    if any(name.endswith("FAILED") for name in failed):
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
