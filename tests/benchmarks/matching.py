"""How many samples `match` finds, and how far its confidence can be trusted, on the shipped digits.

python -m tests.benchmarks.matching                     about forty minutes on two cores
python -m tests.benchmarks.matching --draws 1 --only 300 30
python -m tests.benchmarks.matching --json docs/benchmarks/matching.json

Landmarks are random; all other digits are queries, in an order of its own in every network. Means over the six pairs of
four networks, both directions, and all draws; +- is the standard deviation over draws.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from itertools import combinations
from pathlib import Path
from unittest import mock

import numpy as np

import jaxalign
from jaxalign import matching

DIGITS = jaxalign.datasets.load_digit_features().features
NAMES, N = tuple(DIGITS), 1000
NUMBERS = (300, 100, 50, 30, 15)
THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)


def mixed(samples: dict[str, np.ndarray], rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features of the samples of each network in a random order, and the index of digit i in each network, or -1."""
    features, places = {}, np.full((N, len(samples)), -1)
    for k, (name, chosen) in enumerate(samples.items()):
        order = rng.permutation(chosen)
        features[name] = np.asarray(DIGITS[name])[order]
        places[order, k] = np.arange(len(order))
    return features, places


def truth(places: np.ndarray, names: tuple[str, ...] = NAMES) -> dict[tuple[str, str], np.ndarray]:
    """The true pairs of every pair of networks."""
    columns = dict(zip(names, places.T, strict=True))
    tables = {(a, b): np.stack([columns[a], columns[b]], 1) for a, b in combinations(names, 2)}
    return {pair: table[(table >= 0).all(1)] for pair, table in tables.items()}


def both_methods(features: dict, landmarks: np.ndarray, true: dict, **options: object) -> tuple[float, float, int]:
    """Top-1 of search and of one-to-one from one run, and its rounds."""
    with mock.patch.object(matching, "assign", wraps=matching.assign) as assign:
        one = jaxalign.match(features, landmarks=landmarks, method="one_to_one", **options)
    probabilities = assign.call_args.args[1]
    result = matching._evidence.best_candidates(probabilities), probabilities, one.history
    with mock.patch.object(matching, "_run", return_value=result):
        search = jaxalign.match(features, landmarks=landmarks, **options)
    return search.score(true).top1, one.score(true).top1, one.rounds


def accuracy(number: int, draw: int) -> dict[str, tuple[float, float, int]]:
    """Top-1 with bridges and rounds enabled one by one, and of two networks alone."""
    rng = np.random.default_rng(draw)
    chosen = rng.permutation(N)[:number]
    features, places = mixed(dict.fromkeys(NAMES, np.arange(N)), rng)
    true, landmarks = truth(places), places[chosen]
    results = {
        "evidence of two networks": both_methods(features, landmarks, true, bridges=False, rounds=0),
        "+ bridges": both_methods(features, landmarks, true, rounds=0),
        "+ rounds": both_methods(features, landmarks, true),
    }
    alone = []
    for pair, table in true.items():
        two = [NAMES.index(name) for name in pair]
        part = {name: features[name] for name in pair}
        alone.append(both_methods(part, landmarks[:, two], {pair: table}))
    results["two networks alone, with rounds"] = tuple(np.mean(alone, 0))
    return results


def regime(kind: str, number: int, draw: int) -> list[tuple[np.ndarray, ...]]:
    """Confidence, whether right and whether there is a partner, of all mutual candidates in one regime."""
    rng = np.random.default_rng(100 + draw)
    chosen = rng.permutation(N)[:number]
    rest = np.setdiff1d(np.arange(N), chosen)
    kept = {
        name: np.concatenate([chosen, rng.permutation(rest)[: round(0.7 * len(rest))] if kind == "partial" else rest])
        for name in NAMES
    }
    features, places = mixed(kept, rng)
    landmarks, strangers = places[chosen], set()
    if kind == "noise":
        strangers = {NAMES[-1]}
    elif kind == "unrelated":
        strangers = set(NAMES)
    for name in strangers:
        features[name] = rng.permutation(features[name])
    found = jaxalign.match(features, landmarks=landmarks)
    facts = []
    for (a, b), table in truth(places).items():
        for first, second, pairs in ((a, b, table), (b, a, table[:, ::-1])):
            partner = np.full(len(features[first]), -1)
            if not {a, b} & strangers:
                partner[pairs[:, 0]] = pairs[:, 1]
            queries = np.ones(len(partner), bool)
            queries[found.landmarks[first, second][:, 0]] = False
            candidate, mutual = found.candidate[first, second], found.mutual[first, second]
            right = (candidate == partner) & (candidate >= 0)
            facts.append(tuple(v[queries] for v in (found.confidence[first, second] * mutual, right, partner >= 0)))
    return facts


def calibration(kind: str, number: int, draws: int) -> dict[str, tuple[float, float, int]]:
    """Precision, recall and number of matches above each threshold."""
    facts = [part for draw in range(draws) for part in regime(kind, number, draw)]
    confidence, right, has = (np.concatenate(part) for part in zip(*facts, strict=True))
    rows = {}
    for threshold in THRESHOLDS:
        taken = confidence >= threshold
        precision = float(right[taken].mean()) if taken.any() else float("nan")
        recall = float((right & taken).sum() / has.sum()) if has.any() else float("nan")
        rows[str(threshold)] = (precision, recall, int(taken.sum()))
    return rows


def main() -> None:
    """Run, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", default=NUMBERS, help="numbers of landmarks")
    parser.add_argument("--regimes", nargs="*", default=["all", "partial", "noise", "unrelated"])
    parser.add_argument("--no-accuracy", dest="accuracy", action="store_false", help="only the regimes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record: dict = {"date": str(date.today()), "draws": options.draws, "accuracy": {}, "calibration": {}}
    start = time.time()
    for number in options.only if options.accuracy else ():
        draws = [accuracy(number, draw) for draw in range(options.draws)]
        record["accuracy"][number] = rows = {}
        for name in draws[0]:
            values = np.array([draw[name] for draw in draws])
            rows[name] = {"mean": values.mean(0).tolist(), "std": values.std(0).tolist()}
            texts = (f"{m:.3f} +- {s:.3f}" for m, s in zip(values.mean(0)[:2], values.std(0)[:2], strict=True))
            print(f"{number:4d} {name:34s} search {{}}  one-to-one {{}}  rounds {values.mean(0)[2]:.0f}".format(*texts))
        print(f"{time.time() - start:.0f} s", flush=True)
    for kind in options.regimes:
        for number in (n for n in options.only if n in (300, 30)):
            rows = record["calibration"].setdefault(kind, {})[number] = calibration(kind, number, options.draws)
            cells = "  ".join(f"{t}: {p:.3f} / {r:.2f}" for t, (p, r, _) in rows.items())
            print(f"{kind:10s}{number:4d} precision / recall  {cells}", flush=True)
    print(f"{time.time() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
