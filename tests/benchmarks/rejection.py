"""How often tests reject a true null at 0.05, and an untrue one: every measure, width, and dependence of samples.

    python -m tests.benchmarks.rejection                    all of it, some hours on two cores
    python -m tests.benchmarks.rejection --runs 200         with a larger binomial error
    python -m tests.benchmarks.rejection --only cka rsa     some measures; other rows in the file stay
    python -m tests.benchmarks.rejection --effects 0        no power; other rows in the file stay
    python -m tests.benchmarks.rejection --test bootstrap   one kind of test; other rows in the file stay
    python -m tests.benchmarks.rejection --check            all under the null, not written: fails if a test is liberal
    python -m tests.benchmarks.rejection --page             no runs: the tables of the page, from the file

Permutation tests have 48 samples, independent or in 6 blocks of 8, or the 96 positions of smooth maps of 6 images.
Bootstrap intervals of a difference have 96 samples: independent, or in 24 blocks of 4. With 19 permutations a test at
0.05 is exact, so more would change the power alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign
from jaxalign.measures import REGISTRY

ROOT = Path(__file__).parents[2]
PAGE, FILE = ROOT / "docs/pages/statistics.md", ROOT / "docs/benchmarks/rejection.json"
N, BLOCK = 48, 8
SIDE, IMAGES = 4, 6
RESAMPLED, RESAMPLED_BLOCK = 96, 4
RATIOS = (0.25, 1, 8)
STRUCTURES = ("independent", "blocks", "maps, by image", "maps, by position")
# A part of y that is x, so that tests of independent samples find it in some runs.
EFFECTS = (0.2, 0.35, 0.5)
OPTIONS: dict[str, dict[str, Any]] = {
    "mutual_knn": {"k": 5}, "jaccard": {"k": 5}, "cknna": {"k": 5}, "linear_predictivity": {"folds": 4},
}  # fmt: skip
BOOTSTRAPPED: dict[str, dict[str, Any]] = {
    "cka": {}, "cka linear": {"kernel": "linear"}, "rsa": {}, "distance_correlation": {}, "hsic": {"kernel": "linear"},
}  # fmt: skip
# What the page says of permutation tests, which are exact, and of intervals, which are not.
LEVELS = {"permutation": 0.05, "bootstrap": 0.08}
# Runs at a time: what they store fits the cache of a core or two.
_TOGETHER = 100


def samples(key: jax.Array, structure: str, d: int, n: int = N, block: int = BLOCK) -> jax.Array:
    """Features (n, d), or maps (images, side, side, d)."""
    if structure == "independent":
        return jax.random.normal(key, (n, d))
    first, second = jax.random.split(key)
    if structure == "blocks":
        center = jax.random.normal(first, (n // block, 1, d))
        return (center + 0.5 * jax.random.normal(second, (n // block, block, d))).reshape(n, d)
    # Smooth: sums of waves of random direction and phase, shorter than twice the map, so that it has edges.
    place = jnp.stack(jnp.meshgrid(jnp.arange(SIDE), jnp.arange(SIDE), indexing="ij"), -1).astype(jnp.float32)
    waves = jax.random.normal(first, (2, IMAGES * d * 4)) * (0.6 * jnp.pi / SIDE)
    phase = jax.random.uniform(second, (IMAGES * d * 4,), maxval=2 * jnp.pi)
    values = jnp.cos(place @ waves + phase[None, None]).reshape(SIDE, SIDE, IMAGES, d, 4)
    return jnp.moveaxis(jnp.sum(values, -1), 2, 0)


def p_value(key: jax.Array, name: str, structure: str, d: int, effect: float) -> jax.Array:
    """Of one run."""
    keys = jax.random.split(key, 3)
    x, y = (samples(k, structure, d) for k in keys[:2])
    y = effect * x + (1 - effect) * y
    how: dict[str, Any] = {"groups": np.arange(N) // BLOCK} if structure == "blocks" else {}
    if structure.startswith("maps"):
        how = {"positions": "samples", "null": "groups" if structure.endswith("image") else "grid"}
    test = jaxalign.permutation_test(x, y, name, key=keys[2], permutations=19, **how, **OPTIONS.get(name, {}))
    return test.p_value


def excludes_0(key: jax.Array, label: str, structure: str, d: int, effect: float) -> jax.Array:
    """Whether an interval of the difference of two comparisons that differ by an effect excludes 0."""
    keys = jax.random.split(key, 4)
    x, a, b = (samples(k, structure, d, RESAMPLED, RESAMPLED_BLOCK) for k in keys[:3])
    groups = np.arange(RESAMPLED) // RESAMPLED_BLOCK if structure == "blocks" else None
    found = jaxalign.paired_difference(
        (x, x + a), (x, x + (1 - effect) * b), label.split()[0], key=keys[3], resamples=400, groups=groups,
        **BOOTSTRAPPED[label],
    )  # fmt: skip
    return ((found.low > 0) | (found.high < 0)).astype(jnp.float32)


def rate(run: Any, runs: int, seed: int, threshold: float) -> float:
    """The share of runs at or below the threshold; float32 rounds p-values by less than 1e-6."""
    step = jax.jit(jax.vmap(run))
    keys = jax.random.split(jax.random.key(seed), runs)
    values = [np.asarray(step(part)) for part in np.array_split(keys, max(1, runs // _TOGETHER))]
    return float(np.mean(np.concatenate(values) <= threshold + 1e-6))


def cells(test: str, effects: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """Every combination."""
    measures, structures = (REGISTRY, STRUCTURES) if test == "permutation" else (BOOTSTRAPPED, STRUCTURES[:2])
    for effect, name, ratio in itertools.product(effects, measures, RATIOS):
        for structure in structures if effect == 0 else STRUCTURES[:2]:
            if effect == 0 or ratio == 1:
                yield {"test": test, "measure": name, "n/d": ratio, "samples": structure, "effect": effect}


def measured(cell: dict[str, Any], runs: int) -> float | None:
    """The rejection rate; None if the test is an error."""
    name, structure, effect = cell["measure"], cell["samples"], cell["effect"]
    if cell["test"] == "bootstrap":
        d = max(int(RESAMPLED / cell["n/d"]), 1)
        return 1 - rate(partial(excludes_0, label=name, structure=structure, d=d, effect=effect), runs, 1, 0.5)
    n = IMAGES * SIDE**2 if structure.startswith("maps") else N
    d = max(int(n / cell["n/d"]), 1)
    if name in ("cca", "pwcca") and d >= n - 1:  # 1 for every permutation
        return None
    return rate(partial(p_value, name=name, structure=structure, d=d, effect=effect), runs, 0, 0.05)


def tables(found: list[dict[str, Any]]) -> str:
    """The rates as Markdown: under the null, and power."""
    blocks = []
    for test, effects in (("permutation", False), ("bootstrap", False), ("permutation", True), ("bootstrap", True)):
        chosen = [row for row in found if row["test"] == test and (row["effect"] > 0) == effects]
        columns = list(dict.fromkeys((row["samples"], row["effect"] if effects else row["n/d"]) for row in chosen))
        columns.sort(key=lambda column: STRUCTURES.index(column[0]))
        if not chosen:
            continue
        title = {"permutation": "Permutation tests", "bootstrap": "Intervals of a difference that exclude 0"}[test]
        unit = "effect" if effects else "n/d"
        lines = [
            f"**{title}, {'power, n/d = 1' if effects else 'under the null'}:**",
            "",
            "| measure | runs | " + " | ".join(f"{samples}, {unit} {value:g}" for samples, value in columns) + " |",
            "| --- |" + " --- |" * (len(columns) + 1),
        ]
        for measure in dict.fromkeys((*REGISTRY, *BOOTSTRAPPED)):
            if all(row["measure"] != measure for row in chosen):
                continue
            by_column = {
                (row["samples"], row["effect"] if effects else row["n/d"]): row
                for row in chosen
                if row["measure"] == measure
            }
            rates = [_shown(by_column[column]["rate"]) if column in by_column else "" for column in columns]
            number = min(row["runs"] for row in by_column.values())
            lines.append(f"| `{measure}` | {number} | " + " | ".join(rates) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _shown(rate: float | None) -> str:
    return "refused" if rate is None else f"{rate:.3f}"


def write_page(file: Path) -> str:
    """The page with the tables of a file; written if it differs."""
    text = PAGE.read_text()
    begin, end = "<!-- rejection: begin -->\n", "\n<!-- rejection: end -->"
    head, rest = text.split(begin)
    made = head + begin + tables(json.loads(file.read_text())) + end + rest.split(end)[1]
    if made != text:
        PAGE.write_text(made)
    return made


def main() -> None:
    """Print the rates, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--only", nargs="*", default=[*REGISTRY, *BOOTSTRAPPED])
    parser.add_argument("--effects", nargs="*", type=float, default=(0.0, *EFFECTS))
    parser.add_argument("--test", nargs="*", default=["permutation", "bootstrap"])
    parser.add_argument("--page", action="store_true", help="no runs: write the tables of the page")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path, default=FILE)
    options = parser.parse_args()
    if options.page:
        write_page(options.json)
        return
    effects = (0.0,) if options.check else tuple(options.effects)
    chosen = [cell for test in options.test for cell in cells(test, effects) if cell["measure"] in options.only]
    before = json.loads(options.json.read_text()) if options.json.exists() else []
    found = [row for row in before if {key: row[key] for key in chosen[0]} not in chosen]
    liberal = []
    for cell in chosen:
        row = {**cell, "rate": measured(cell, options.runs), "runs": options.runs}
        print(*(f"{value!s:>20}" for value in cell.values()), _shown(row["rate"]), flush=True)
        if options.check:
            # More than three binomial errors above the level that the page states.
            allowed = LEVELS[cell["test"]]
            error = np.sqrt(allowed * (1 - allowed) / options.runs)
            liberal += [row] if (row["rate"] or 0) > allowed + 3 * error else []
        else:
            found.append(row)
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    if liberal:
        sys.exit("\n".join(["These reject too often:", *map(str, liberal)]))


if __name__ == "__main__":
    main()
