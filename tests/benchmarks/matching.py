"""How many samples `match` finds, and how far its confidence can be trusted, on the shipped digits.

python -m tests.benchmarks.matching                     about forty minutes on two cores
python -m tests.benchmarks.matching --draws 1 --only 300 30
python -m tests.benchmarks.matching --json docs/benchmarks/matching.json
python -m tests.benchmarks.matching --patches --draws 2 patches of photographs, beside their controls
python -m tests.benchmarks.matching --scale 10000       time and memory

Landmarks are random; all other digits are queries, in an order of its own in every network. Means over the six pairs of
four networks, both directions, and all draws; +- is the standard deviation over draws.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Container, Iterable, Iterator
from datetime import date
from itertools import combinations, permutations
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np

import jaxalign
from jaxalign import matching
from jaxalign.report.demo import PATCH_NETWORKS, POSITION, shuffled

DIGITS = jaxalign.datasets.load_digit_features().features
NAMES, N = tuple(DIGITS), 1000
NUMBERS = (300, 100, 50, 30, 15)
THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
PATCH_NUMBERS = (128, 30, 15)


def smooth_views(n: int, networks: int, noise: float = 0.5) -> dict[str, np.ndarray]:
    """Features (n, 384) of synthetic networks: random smooth maps of 32 common factors, and noise of their own."""
    rng = np.random.default_rng(0)
    factors, views = rng.normal(size=(n, 32)), {}
    for k in range(networks):
        hidden = np.tanh(factors @ rng.normal(size=(32, 256)) / 4 + rng.normal(size=256))
        clean = np.tanh(hidden @ rng.normal(size=(256, 384)) / 8)
        views[f"network {k}"] = (clean + noise * rng.normal(size=(n, 384))).astype(np.float32)
    return views


def print_scale(queries: int, networks: int = 5, landmarks: int = 300) -> None:
    """Time and memory of `match` from the features on, compilation included."""
    views, start = smooth_views(queries + landmarks, networks), time.perf_counter()
    matching = jaxalign.match(views, landmarks=np.arange(landmarks))
    seconds, memory = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{queries} queries, {landmarks} landmarks, {networks} networks: {seconds:.0f} s, {memory:.2g} GB, ", end="")
    print(f"{matching.rounds} rounds, {matching.score()}, confidence {matching.history.round(4)}")


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
    results: list = []

    def run(*arguments: object) -> object:
        results.extend([] if results else [real(*arguments)])
        return results[0]

    real = matching._run
    with mock.patch.object(matching, "_run", run):
        search, one = (
            jaxalign.match(features, landmarks=landmarks, method=method, **options)
            for method in ("search", "one_to_one")
        )
    return search.score(true).top1, one.score(true).top1, one.rounds


def accuracy(number: int, draw: int, *, parts: bool) -> dict[str, tuple[float, float, int]]:
    """Top-1 of the default; with `parts` also with bridges and rounds enabled one by one, and of two networks alone."""
    rng = np.random.default_rng(draw)
    chosen = rng.permutation(N)[:number]
    features, places = shuffled(DIGITS, rng)
    true, landmarks = truth(places), places[chosen]
    results = {"bridges and rounds": both_methods(features, landmarks, true)}
    if not parts:
        return results
    results["two networks, no rounds"] = both_methods(features, landmarks, true, bridges=False, rounds=0)
    results["bridges, no rounds"] = both_methods(features, landmarks, true, rounds=0)
    alone = []
    for pair, table in true.items():
        two = [NAMES.index(name) for name in pair]
        part = {name: features[name] for name in pair}
        alone.append(both_methods(part, landmarks[:, two], {pair: table}))
    results["two networks, rounds"] = tuple(np.mean(alone, 0))
    return results


def canonical_directions(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Maps of both networks onto regularized canonical directions, scaled by their correlations."""
    roots = []
    for part in (x, y):
        values, vectors = np.linalg.eigh(part.T @ part + penalty * np.eye(part.shape[1]))
        roots.append(vectors / np.sqrt(values) @ vectors.T)
    u, rho, v = np.linalg.svd(roots[0] @ x.T @ y @ roots[1])
    return roots[0] @ u * rho, roots[1] @ v.T * rho


def ridge_map(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """A linear map from the first network to the second."""
    return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y), np.eye(y.shape[1])


def fitted(x: np.ndarray, y: np.ndarray, pairs: np.ndarray, fit: Callable, penalty: float, rounds: int) -> np.ndarray:
    """Cosines of all samples of two networks under maps fitted on known pairs and, in rounds, on mutual neighbors."""
    known, i, j = pairs, *pairs.T
    for _ in range(rounds + 1):
        maps = fit(x[known[:, 0]], y[known[:, 1]], penalty)
        u, v = (part @ w for part, w in zip((x, y), maps, strict=True))
        u, v = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in (u, v))
        cosines = u @ v.T
        cosines[i], cosines[:, j] = -2, -2
        best = cosines.argmax(1)
        mutual = np.flatnonzero((cosines.argmax(0)[best] == np.arange(len(x))) & (cosines.max(1) > -2))
        known = np.concatenate([pairs, np.stack([mutual, best[mutual]], 1)])
    return cosines


def baselines(number: int, draw: int, rounds: int = 10) -> dict[str, tuple[float, float, int]]:
    """Top-1 of two networks by maps fitted on the landmarks, with the best penalty of four for each row."""
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(draw)
    chosen, rest = np.split(rng.permutation(N), [number])
    linear = {name: standardized(np.asarray(DIGITS[name], np.float64)) for name in NAMES}
    kernel = {name: nystrom(x) for name, x in linear.items()}
    results = {}
    for name, fit, features in (("kernel CCA", canonical_directions, kernel), ("ridge map", ridge_map, linear)):
        for how_many in (0, rounds):
            rows = []
            for penalty in (1e-3, 1e-2, 0.1, 1.0):
                scores = []
                for a, b in combinations(NAMES, 2):
                    x, y = features[a], features[b]
                    size = penalty * (x**2).sum(1).mean() * number / 10
                    for first, second in ((x, y), (y, x)):
                        cosines = fitted(first, second, np.stack([chosen] * 2, 1), fit, size, how_many)[rest][:, rest]
                        order = linear_sum_assignment(cosines, maximize=True)[1]
                        each = np.arange(len(rest))
                        scores.append([(cosines.argmax(1) == each).mean(), (order == each).mean()])
                rows.append(np.mean(scores, 0))
            best = max(rows, key=lambda row: row[0])
            results[f"{name}, two networks" + (", rounds" if how_many else "")] = (*best, how_many)
    return results


def standardized(x: np.ndarray) -> np.ndarray:
    """Centered channels, of unit variance."""
    x = x - x.mean(0)
    return x / np.where(x.std(0) > 0, x.std(0), 1)


def nystrom(x: np.ndarray) -> np.ndarray:
    """The kernel features of `match`, so that kernel CCA differs only in what it makes of them."""
    return np.asarray(matching._kernel_features("x", jnp.asarray(x, jnp.float32), None, 0.93, 256), np.float64)


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


def function_of_position(positions: np.ndarray, rng: np.random.Generator, width: int = 64) -> np.ndarray:
    """Random waves over the image: features of a network that knows nothing but position."""
    return np.cos(positions / 4 @ rng.normal(size=(2, width)) + rng.uniform(0, 2 * np.pi, width)).astype(np.float32)


def patch_run(
    features: dict, positions: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator, **options: object
) -> dict[tuple[str, str], list[float]]:
    """Top-1, found within 1.5 patches, right above the threshold, and matched, by ordered pair of networks."""
    mixed_up, places = shuffled(features, rng)
    found = jaxalign.match(mixed_up, landmarks=places[landmarks], **options)
    queries, place = np.setdiff1d(np.arange(len(positions)), landmarks), dict(zip(features, places.T, strict=True))
    results = {}
    for a, b in permutations(features, 2):
        candidate, partner = (v[place[a][queries]] for v in (found.candidate[a, b], found.partners(a, b)))
        away = np.linalg.norm(positions[np.argsort(place[b])[candidate]] - positions[queries], axis=1)
        true = place[b][queries]
        facts = candidate == true, (candidate >= 0) & (away < 1.5), partner == true, partner >= 0
        results[a, b] = [float(fact.mean()) for fact in facts]
    return results


def patch_rows(picture: int, number: int, draw: int) -> Iterator[tuple[str, list[float]]]:
    """`patch_run` of trained networks and of their controls, averaged over pairs of networks, on one photograph."""
    data, rng = jaxalign.datasets.load_patch_features(), np.random.default_rng([picture, draw])
    inside = data.picture_index == picture
    positions = data.positions[inside].astype(np.float32)
    checkerboard = np.flatnonzero(positions.sum(1) % 2 == draw % 2)
    landmarks = checkerboard if number == len(checkerboard) else rng.permutation(len(positions))[:number]
    trained = {name: data.features[name][inside] for name in PATCH_NETWORKS}
    two = dict(list(trained.items())[2 * (draw % 2) :][:2])
    place = {f"{POSITION} {k}": function_of_position(positions, rng) for k in range(3)}
    untrained = {name: data.features[name][inside] for name in data.controls}

    def row(results: dict, first: Container[str], second: Container[str]) -> list[float]:
        pairs = [ab for ab in results for a, b in (ab, ab[::-1]) if a in first and b in second]
        return np.mean([results[ab] for ab in pairs], 0).tolist()

    def run(features: dict, **options: object) -> dict:
        return patch_run(features, positions, landmarks, rng, **options)

    yield "trained, two networks, no rounds", row(run(trained, bridges=False, rounds=0), trained, trained)
    yield "trained, bridges and rounds", row(run(trained), trained, trained)
    alone = run({POSITION: positions} | untrained | two, bridges=False)
    yield "trained, two networks, rounds", row(alone, two, two)
    yield "position and trained, two networks, rounds", row(alone, [POSITION], two)
    yield "untrained and trained, two networks, rounds", row(alone, untrained, two)
    controls = run(place | untrained)
    yield "functions of position and untrained, bridges and rounds", row(controls, place, untrained)
    yield "functions of position, bridges and rounds", row(controls, place, place)


def print_patches(numbers: Iterable[int], draws: int) -> dict[int, dict[str, list[float]]]:
    """Means over photographs and draws."""
    record: dict = {}
    for number in numbers:
        runs = [dict(patch_rows(picture, number, draw)) for draw in range(draws) for picture in range(3)]
        record[number] = {name: np.mean([run[name] for run in runs], 0).tolist() for name in runs[0]}
        for name, (top1, near, right, matched) in record[number].items():
            precision = right / matched if matched else float("nan")
            text = f"top-1 {top1:.3f}  within 1.5 {near:.3f}  precision {precision:.3f}  recall {right:.3f}"
            print(f"{number:4d} {name:50s} {text}", flush=True)
    return record


def main() -> None:
    """Run, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--parts", type=int, default=2, help="draws of bridges and rounds enabled one by one")
    parser.add_argument("--fitted", type=int, default=2, help="draws of kernel CCA and ridge maps")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of landmarks")
    parser.add_argument("--regimes", nargs="*", default=["all", "partial", "noise", "unrelated"])
    parser.add_argument("--no-accuracy", dest="accuracy", action="store_false", help="only the regimes")
    parser.add_argument("--patches", action="store_true", help="only patches of photographs, beside their controls")
    parser.add_argument("--scale", type=int, metavar="QUERIES", help="only the time and memory of so many queries")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.only = options.only or (PATCH_NUMBERS if options.patches else NUMBERS)
    numbers = {name: getattr(options, name) for name in ("draws", "parts", "fitted")}
    record: dict = {"date": str(date.today()), **numbers, "accuracy": {}, "calibration": {}}
    start = time.time()
    if options.scale:
        print_scale(options.scale)
        return
    if options.patches:
        record |= {"patches": print_patches(options.only, options.draws)}
        options.accuracy, options.regimes = False, []
    for number in options.only if options.accuracy else ():
        draws = [accuracy(number, draw, parts=draw < options.parts) for draw in range(options.draws)]
        draws += [baselines(number, draw) for draw in range(options.fitted)]
        record["accuracy"][number] = rows = {}
        for name in dict.fromkeys(name for draw in draws for name in draw):
            values = np.array([draw[name] for draw in draws if name in draw])
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
