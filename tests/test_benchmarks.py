"""The benchmarks run: small sizes, on the device at hand. Times are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.benchmarks import rejection
from tests.benchmarks.floor import Rates
from tests.benchmarks.report import run_sections
from tests.benchmarks.timing import Result

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_device_benchmark(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.device", "--quick", "--json", str(tmp_path / "device.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sections = json.loads((tmp_path / "device.json").read_text())["sections"]
    assert next(iter(sections)) == "device_correct"
    assert len(sections) == 11
    assert all(result["met"] for result in sections["device_correct"]["results"])
    assert not any(remark.startswith("FAILED") for part in sections.values() for remark in part["remarks"])


def test_the_page_has_the_rejection_rates_of_the_file() -> None:
    text = rejection.PAGE.read_text()
    assert rejection.tables(json.loads(rejection.FILE.read_text())) in text


def test_a_rejection_rate_is_that_of_a_valid_test() -> None:
    for structure in ("blocks", "maps, by position"):
        one = partial(rejection.p_value, name="rsa", structure=structure, d=4, effect=0.0)
        assert rejection.rate(one, 100, 0, 0.05) < 0.15  # 0.05 + 4.6 standard errors
        assert rejection.rate(partial(one, effect=0.8), 20, 0, 0.05) > 0.9


def test_a_part_that_fails_lets_the_next_one_start(tmp_path: Path) -> None:
    def broken() -> Iterator[Result | str]:
        yield Result("wrong", 2.0, "", 2.0, 2.0, "<=", 1.0)
        raise RuntimeError("no such kernel")

    file = tmp_path / "out.json"
    parts = {"a": broken(), "b": iter(["a remark"])}
    assert run_sections(parts, {}, Rates(1.0, 1.0, 1.0), file, quick=True) == ["a: wrong", "a: FAILED"]
    sections = json.loads(file.read_text())["sections"]
    assert sections["a"]["remarks"] == ["FAILED: RuntimeError: no such kernel"]
    assert sections["b"]["remarks"] == ["a remark"]
