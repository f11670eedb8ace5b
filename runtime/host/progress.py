"""How far something is: a progress bar, lines in a log, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["LogLines", "Progress"]

_LOG_SECONDS = 30.0
_counter: ContextVar[Callable[[int], object] | None] = ContextVar("_counter", default=None)


class LogLines:
    """Lines on standard error, no more than one in a while: for logs, where a bar would be noise.

    Args:
        seconds: between two lines, and before the first.
    """

    def __init__(self, seconds: float = _LOG_SECONDS) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def say(self, describe: Callable[[], str]) -> None:
        """Prints what ``describe`` gives if it is time for a line."""
        now = time.monotonic()
        if now - self._last >= self._seconds:
            self._last = now
            print(f"embedge: {describe()}", file=sys.stderr, flush=True)


class Progress:
    """Counts what was embedded, by tqdm's bar or by lines; closes with its block.

    More than a bar: a command's calls of ``encode`` count together, see :meth:`counts_all`.

    Args:
        total: texts or images to come, ``None`` where that is not known.
        shown: draws a bar on standard error; ``False`` counts in silence.
        unit: what is counted.
        lines: says how far it is where no bar is drawn.
    """

    def __init__(
        self, total: int | None, *, shown: bool, unit: str = "text", lines: LogLines | None = None
    ) -> None:
        self._bar: Any = None
        self._lines = lines
        self._unit = unit
        self._count = 0
        self._started = time.monotonic()
        self._also = _counter.get()
        if shown:
            from tqdm import tqdm  # here, so that importing embedge stays quick

            self._bar = tqdm(total=total, unit=unit, desc="embed", dynamic_ncols=True)

    def advance(self, count: int) -> None:
        """Counts some more."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._lines is not None:
            self._lines.say(self._line)
        if self._also is not None:
            self._also(count)

    @contextmanager
    def counts_all(self) -> Iterator[None]:
        """Counts what every ``Progress`` counts that is made inside the block, by this thread."""
        token = _counter.set(self.advance)
        try:
            yield
        finally:
            _counter.reset(token)

    def _line(self) -> str:
        rate = self._count / max(time.monotonic() - self._started, 1e-9)
        return f"{self._count:,} {self._unit}s, {rate:.3g} a second"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
