"""Known pairs of samples of several networks, from any of the forms in which a user may pass them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from jaxalign import _arrays, _checks
from jaxalign._repr import shown

Names = tuple[str, str]


def known_pairs(label: str, value: Any, sizes: Mapping[str, int], *, least: int) -> dict[Names, np.ndarray]:
    """Known pairs (m, 2) of every pair of networks, a before b, from any of the forms that `match` accepts."""
    names = list(sizes)
    if value is None:
        raise ValueError(f"{label} are needed: indices of samples that are known to be the same.")
    if isinstance(value, Mapping):
        if not value:
            raise ValueError(f"{label} is empty: pass pairs for at least two of the names {shown(tuple(names))}.")
        pairs: dict[Names, np.ndarray] = {}
        for ab, part in value.items():
            if not (isinstance(ab, tuple) and len(ab) == 2 and set(ab) <= set(names) and ab[0] != ab[1]):
                raise ValueError(f"{label} has the entry {ab!r}: use two of the names {shown(tuple(names))}.")
            table = _index_table(f"{label}[{ab!r}]", part, [sizes[name] for name in ab], least)
            forward = names.index(ab[0]) < names.index(ab[1])
            ab, table = (ab, table) if forward else (ab[::-1], table[:, ::-1])
            if ab in pairs:
                raise ValueError(f"{label} has entries for {ab!r} in both orders: use one.")
            pairs[ab] = table
        return pairs
    table = np.asarray(_arrays.array(label, value))
    if table.ndim == 1 and np.issubdtype(table.dtype, np.integer):
        table = np.repeat(table[:, None], len(names), 1)
    table = _index_table(label, table, list(sizes.values()), least)
    columns = dict(zip(names, table.T, strict=True))
    return {(a, b): np.stack([columns[a], columns[b]], 1) for a, b in combinations(names, 2)}


def _index_table(label: str, value: Any, sizes: Sequence[int], least: int) -> np.ndarray:
    """Indices (m, k), each column distinct and within the size of its network."""
    table = np.asarray(_arrays.array(label, value))
    if table.ndim != 2 or table.shape[1] != len(sizes) or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(
            f"{label} must be indices of shape (m, {len(sizes)}); got shape {table.shape}, dtype {table.dtype}."
            + (f" For a mask write np.flatnonzero({label})." if table.dtype == bool else "")
        )
    if len(table) < least:
        raise ValueError(f"{label} has {len(table)} pairs, at least {least} are needed.")
    for column, size in zip(table.T, sizes, strict=True):
        try:
            _checks.row_numbers(label, column, size)
        except ValueError as error:
            raise ValueError(f"{error} A sample has one partner in each network.") from None
    return table.astype(np.int64)


def same_size(sizes: Mapping[str, int], what: str) -> int:
    """The number of samples, the same in all networks."""
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{what} needs the same samples in all networks; got n = {shown(dict(sizes))}. Pass indices.")
    return next(iter(sizes.values()))


def refuse_contradictions(known: Mapping[Names, np.ndarray]) -> None:
    """Raise if landmarks of three pairs of networks disagree: a = b and b = c, but not a = c."""
    links = {ab: dict(pairs.tolist()) for ab, pairs in both_directions(known).items()}
    names = dict.fromkeys(name for ab in known for name in ab)
    for a, b, c in combinations(names, 3):
        if not {(a, b), (b, c), (a, c)} <= set(links):
            continue
        for i, j in links[a, b].items():
            k = links[b, c].get(j)
            if k is not None and links[a, c].get(i, k) != k:
                raise ValueError(
                    f"landmarks contradict each other: {a!r} {i} = {b!r} {j} = {c!r} {k}, but {a!r} {i} = {c!r} "
                    f"{links[a, c][i]}. Remove the wrong pair."
                )


def both_directions(pairs: Mapping[Names, np.ndarray]) -> dict[Names, np.ndarray]:
    """Pairs (m, 2) of a and b, and the same pairs as those of b and a."""
    return {**pairs, **{(b, a): table[:, ::-1] for (a, b), table in pairs.items()}}
