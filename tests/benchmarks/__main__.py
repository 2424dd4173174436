"""Measure, and print a table of ratios with the targets next to them.

python -m tests.benchmarks            about five minutes
python -m tests.benchmarks --quick    small sizes, for trying that it runs; the targets are not meant for these
python -m tests.benchmarks --json benchmarks.json
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

from .cases import QUICK, Sizes, run
from .timing import Result

PACKAGES = ("jaxalign", "jax", "jaxlib", "numpy", "torch", "ncut-pytorch")


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


def line(result: Result) -> str:
    """One line of the table."""
    value = f"{result.value:.3g} {result.unit}"
    spread = f"{result.low:.3g} .. {result.high:.3g}"
    target = "" if result.target is None else f"{result.bound} {result.target:g} {result.unit}"
    met = {None: "", True: "met", False: "MISSED"}[result.met]
    return f"{result.case:62} {value:>10} {spread:>18} {target:>10} {met:7} {result.detail}"


def main() -> None:
    """Parse the arguments, measure, print, and write the file."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="How fast jaxalign is on this CPU.")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to try that it runs")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file too")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        pass
    else:
        torch.set_num_threads(os.cpu_count() or 1)

    sizes = QUICK if arguments.quick else Sizes()
    facts = surroundings()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"float32, n = {sizes.n}, d = {sizes.d}, density 0.05; medians over pairs that ran in turns, and quartiles\n")
    header = ("case", "median", "quartiles", "target")
    print(f"{header[0]:62} {header[1]:>10} {header[2]:>18} {header[3]:>10}")
    results, remarks = [], []
    for result in run(sizes):
        if isinstance(result, Result):
            results.append(result)
            print(line(result), flush=True)
        else:
            remarks.append(result)
            print(f"  {result}", flush=True)
    if arguments.json is not None:
        rows = [{**asdict(result), "met": result.met} for result in results]
        content = {"surroundings": facts, "sizes": asdict(sizes), "results": rows, "remarks": remarks}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
