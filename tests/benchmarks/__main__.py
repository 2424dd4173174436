"""Measure, and print a table of ratios with the targets next to them.

python -m tests.benchmarks                   about fifteen minutes
python -m tests.benchmarks --quick           small sizes, for trying that it runs; the targets are not meant for these
python -m tests.benchmarks --only cut peers  some sections
python -m tests.benchmarks --json docs/benchmarks/cpu.json
python -m tests.benchmarks.page              writes docs/pages/performance.md from docs/benchmarks/*.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import jax

from . import floor
from .cases import QUICK, Sizes, sections
from .timing import Result

PACKAGES = (
    *("jaxalign", "jax", "jaxlib", "numpy", "scipy", "torch", "ncut-pytorch", "pykeops"),
    *("scikit-learn", "rsatoolbox", "ckatorch", "torchdr"),
)


def surroundings() -> dict[str, str]:
    """When, where and with what."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "device": jax.devices()[0].device_kind,
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    if facts["jaxalign"] == "not installed":  # run from the source tree
        from jaxalign import __version__

        facts["jaxalign"] = __version__
    return facts


def processor() -> str:
    """The name of the processor, as far as the system says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def line(result: Result, rates: floor.Rates) -> str:
    """One line of the table."""
    value = f"{result.value:.3g} {result.unit}"
    spread = f"{result.low:.3g} .. {result.high:.3g}"
    target = "" if result.target is None else f"{result.bound} {result.target:g} {result.unit}"
    met = {None: "", True: "met", False: "MISSED"}[result.met]
    detail = result.detail + ("" if result.work is None else f"  ({times_floor(result, rates):.3g} x the floor)")
    return f"{result.case:86} {value:>10} {spread:>18} {target:>10} {met:7} {detail}"


def times_floor(result: Result, rates: floor.Rates) -> float | None:
    """How many times what this machine could do at best our side takes."""
    if result.work is None or result.own is None:
        return None
    return result.own / 1e3 / rates.floor(result.work)


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

    sizes = QUICK if arguments.quick else Sizes()
    every = sections(sizes)
    unknown = sorted(set(arguments.only or ()) - set(every))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(every)}")
    facts, rates = surroundings(), floor.measured()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    done = f"{rates.flops / 1e9:.0f} GFlop/s in products, {rates.exps / 1e9:.2g} G exponentials/s"
    print(f"{done}, {rates.bytes / 1e9:.2g} GB/s")
    print("float32, density 0.05; medians over pairs that ran in turns, and quartiles")
    written = {"sections": {}}
    if arguments.json is not None and arguments.json.exists():
        written = json.loads(arguments.json.read_text())
    for name in arguments.only or every:
        print(f"\n{name}")
        results, remarks = [], []
        for result in every[name]:
            if isinstance(result, Result):
                results.append({**asdict(result), "met": result.met, "times_floor": times_floor(result, rates)})
                print(line(result, rates), flush=True)
            else:
                remarks.append(result)
                print(f"  {result}", flush=True)
        written["sections"][name] = {
            "surroundings": facts,
            "rates": asdict(rates),
            "quick": arguments.quick,
            "results": results,
            "remarks": remarks,
        }
        if arguments.json is not None:  # after each section: what was measured is kept if a later one fails
            arguments.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
