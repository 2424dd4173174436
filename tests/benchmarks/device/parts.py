"""The parts, the most important ones first, and their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..report import Sections
from ..timing import Result
from . import correct, memory, speed


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    correct: int = 256  # samples, where float64 takes explicit differences
    correct_large: tuple[int, int] = (4096, 768)
    correct_tiled: tuple[int, int] = (100_000, 64)
    affinity: tuple[int, ...] = (4096, 16_384, 32_768)
    width: int = 768
    sigma: tuple[int, ...] = (100_000, 1_000_000)
    sigma_width: int = 64
    loss: tuple[int, ...] = (256, 1024, 4096)
    sets: tuple[int, int, int] = (256, 256, 384)
    grid: tuple[int, int, int] = (12, 10_000, 768)  # layers, n, d
    permutations: tuple[int, int] = (10_000, 1000)  # how many, n
    cut: tuple[int, int] = (4096, 384)
    matches: tuple[int, int, int] = (50_000, 5, 300)  # samples, networks, landmarks
    memory: tuple[tuple[str, int, int], ...] = (
        ("affinity", 16_384, 768),
        ("sigma", 1_000_000, 64),
        ("gradient", 100_000, 64),
        ("loss", 4096, 768),
        ("grid", 10_000, 768),
    )
    rounds: int = 9
    slow_rounds: int = 3


FULL = Sizes()
QUICK = Sizes(
    correct=64,
    correct_large=(512, 64),
    correct_tiled=(3000, 16),
    affinity=(256,),
    width=32,
    sigma=(3000,),
    sigma_width=16,
    loss=(64,),
    sets=(4, 64, 16),
    grid=(2, 300, 16),
    permutations=(100, 64),
    cut=(256, 16),
    matches=(200, 3, 50),
    memory=(("sigma", 3000, 16),),
    rounds=2,
    slow_rounds=1,
)


def parts(sizes: Sizes) -> dict[str, Iterator[Result | str]]:
    """What there is to do, by name; nothing is done before it is iterated over.

    All but the first begin with `speed.COMPILED`, when what they will time is compiled.
    """
    return {
        "correct": correct.run(sizes.correct, sizes.correct_large, sizes.correct_tiled),
        "affinity": speed.affinities(sizes.affinity, sizes.width, sizes.rounds),
        "sigma": speed.sigmas(sizes.sigma, sizes.sigma_width, sizes.slow_rounds),
        "loss": speed.losses(sizes.loss, sizes.width, sizes.rounds),
        "batch": speed.batch(*sizes.sets, sizes.rounds),
        "grid": speed.grid(*sizes.grid, sizes.slow_rounds),
        "permutations": speed.permutations(*sizes.permutations, sizes.slow_rounds),
        "cut": speed.cut(*sizes.cut, sizes.slow_rounds),
        "memory": memory.run(sizes.memory),
        "matches": speed.matches(*sizes.matches),
        "several": speed.several(sizes.sigma[0], sizes.sigma_width, sizes.slow_rounds),
    }


def compiled_ahead(every: Sections) -> Sections:
    """The same parts, compiled side by side while the numbers of the first are checked; then they run one by one."""
    pool = ThreadPoolExecutor(8)
    waiting = {name: pool.submit(next, iter(part)) for name, part in every.items() if name != "correct"}

    def in_turn(name: str, part: Iterable[Result | str]) -> Iterator[Result | str]:
        for other in waiting.values():  # nothing is timed beside a compiler
            other.exception()
        if name in waiting:
            first: Future[Result | str] = waiting[name]
            first.result()  # raises what compiling raised
        yield from part

    return {name: part if name == "correct" else in_turn(name, part) for name, part in every.items()}
