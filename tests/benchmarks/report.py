"""What every benchmark prints and writes: where it ran, a table of results, and a file that is kept after each part."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxalign import __version__

from .floor import Rates
from .timing import Result

PACKAGES = (
    *("jax", "jaxlib", "numpy", "scipy", "torch", "ncut-pytorch", "pykeops"),
    *("scikit-learn", "rsatoolbox", "ckatorch", "torchdr"),
)


Sections = Mapping[str, Iterable[Result | str]]


def command_line(
    program: str, description: str, every: Callable[[bool], Sections]
) -> tuple[Sections, Path | None, bool]:
    """The sections that are asked for, the file to write, and whether sizes are small; `every` has all, by that."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to try that it runs")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these; the others stay as the file has them")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file too")
    arguments = parser.parse_args()
    sections = every(arguments.quick)
    unknown = sorted(set(arguments.only or ()) - set(sections))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(sections)}")
    return {name: sections[name] for name in arguments.only or sections}, arguments.json, arguments.quick


def surroundings() -> dict[str, str]:
    """When, where and with what."""
    here = {"processor": processor(), "cores": str(os.cpu_count()), "device": jax.devices()[0].device_kind}
    return {**here, **versions(*PACKAGES)}


def versions(*packages: str) -> dict[str, str]:
    """The date, and the versions of Python and of packages."""
    facts = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "Python": platform.python_version()}
    for package in packages:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return {**facts, "jaxalign": __version__}


def processor() -> str:
    """The name of the processor, as far as the system says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def rates_line(rates: Rates) -> str:
    """What the machine does at best."""
    done = f"{rates.flops / 1e12:.3g} TFlop/s in float32 products"
    done += "".join(f", {value / 1e12:.3g} in {name}" for name, value in rates.products.items())
    return f"{done}; {rates.exps / 1e9:.3g} G exponentials/s; {rates.bytes / 1e9:.3g} GB/s"


def line(result: Result, rates: Rates) -> str:
    """One line of the table."""
    value = f"{result.value:.3g} {result.unit}"
    spread = "" if result.low == result.high else f"{result.low:.3g} .. {result.high:.3g}"
    target = "" if result.target is None else f"{result.bound} {result.target:g} {result.unit}"
    met = {None: "", True: "met", False: "MISSED"}[result.met]
    detail = result.detail + ("" if result.work is None else f"  ({times_floor(result, rates):.3g} x the floor)")
    return f"{result.case:86} {value:>10} {spread:>18} {target:>10} {met:7} {detail}"


def times_floor(result: Result, rates: Rates) -> float | None:
    """How many times what this machine could do at best our side takes."""
    if result.work is None or result.own is None:
        return None
    return result.own / 1e3 / rates.floor(result.work)


def run_sections(every: Sections, facts: dict[str, str], rates: Rates, file: Path | None, *, quick: bool) -> list[str]:
    """Measure, print and, after each section, write; returns what failed or missed its target.

    A section that raises says so, and the next one starts. Sections that a file holds already, and that are not
    measured now, stay there.
    """
    written: dict[str, Any] = {"sections": {}}
    if file is not None and file.exists():
        written = json.loads(file.read_text())
    failed = []
    for name, measured in every.items():
        start = time.perf_counter()
        print(f"\n{name}", flush=True)
        results, remarks = [], []
        try:
            for result in measured:
                if isinstance(result, Result):
                    results.append({**asdict(result), "met": result.met, "times_floor": times_floor(result, rates)})
                    print(line(result, rates), flush=True)
                    if result.met is False:
                        failed.append(f"{name}: {result.case}")
                else:
                    remarks.append(result)
                    print(f"  {result}", flush=True)
        except Exception as error:
            traceback.print_exc()
            remarks.append(f"FAILED: {type(error).__name__}: {str(error)[:500]}")
            print(f"  {remarks[-1]}", flush=True)
            failed.append(f"{name}: FAILED")
        print(f"  ({time.perf_counter() - start:.1f} s)", flush=True)
        written["sections"][name] = {
            "surroundings": facts,
            "rates": asdict(rates),
            "quick": quick,
            "results": results,
            "remarks": remarks,
        }
        if file is not None:
            file.write_text(json.dumps(written, indent=1) + "\n")
    return failed
