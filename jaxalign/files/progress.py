"""Reports of progress: to a function of the caller, or as a bar."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

Progress = bool | Callable[[Any, int, int], None]
Reporting = Callable[[int], AbstractContextManager[Callable[[int], None]]]  # `reporting` of a total


@contextmanager
def reporting(
    progress: Progress, stage: Any, total: int, *, label: str | None = None, unit: str = "block pair"
) -> Generator[Callable[[int], None], None, None]:
    """A function to call with the number of units that are done, while the stage lasts."""
    if progress is False:
        yield lambda done: None
    elif callable(progress):
        yield lambda done: progress(stage, done, total)
    else:
        try:
            from tqdm import tqdm
        except ImportError:
            raise ImportError(
                'progress=True needs tqdm: pip install "jaxalign[cli]", or give a function of (stage, done, total).'
            ) from None
        with tqdm(total=total, desc=label or str(stage), unit=unit) as bar:

            def show(done: int) -> None:
                bar.update(done - bar.n)

            yield show
