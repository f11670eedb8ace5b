"""What an export tells its user while it runs, and what it cost at the end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from embedge.runtime.host.memory import process_memory
from embedge.runtime.host.progress import LogLines


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Time and memory of one task at one precision.

    Attributes:
        step: "precision/task".
        seconds: wall time.
        peak_mb: largest anonymous resident memory of the process meanwhile, in 10⁶ bytes; ``None``
            where the system does not tell.
    """

    step: str
    seconds: float
    peak_mb: float | None


@dataclass
class Progress:
    """A bar per task and precision, and what each cost.

    Args:
        show: draw bars on stderr; ``None``: only where stderr is a terminal.
        finished: takes the cost of a step at its end.
        lines: says how far a step is where no bar is drawn.
    """

    show: bool | None = None
    finished: Callable[[StepCost], None] | None = None
    lines: LogLines | None = None
    _bar: Any = None
    _step: str = ""
    _total: int = 0
    _done: int = 0

    @contextmanager
    def step(self, name: str, total_bytes: int) -> Iterator[None]:
        """Measure and show one task at one precision."""
        show = sys.stderr.isatty() if self.show is None else self.show
        self._bar = _make_bar(name, total_bytes) if show else None
        self._step, self._total, self._done = name, total_bytes, 0
        started = time.perf_counter()
        with anonymous_peak() as peak:
            try:
                yield
            finally:
                if self._bar is not None:
                    self._bar.close()
                    self._bar = None
        seconds = time.perf_counter() - started
        if self.finished is not None:
            self.finished(StepCost(step=name, seconds=seconds, peak_mb=peak.megabytes))

    def note(self, text: str) -> None:
        """Say what is being done."""
        if self._bar is not None:
            self._bar.set_postfix_str(text[-60:])
        self._say(text)

    def advance(self, nbytes: int, name: str) -> None:
        """Account for a tensor that was written."""
        if self._bar is not None:
            self._bar.set_postfix_str(name[-60:], refresh=False)
            self._bar.update(nbytes)
        self._done += nbytes
        self._say(name)

    def _say(self, doing: str) -> None:
        if self._bar is None and self.lines is not None:
            self.lines.say(
                lambda: f"{self._step}: {self._done / max(self._total, 1):.0%} written, now {doing}"
            )


def _make_bar(name: str, total_bytes: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc=name, file=sys.stderr)


class _Peak:
    def __init__(self) -> None:
        self.bytes = process_memory().get("RssAnon")

    @property
    def megabytes(self) -> float | None:
        return None if self.bytes is None else self.bytes / 1e6

    def sample(self) -> None:
        now = process_memory().get("RssAnon")
        if now is not None:
            self.bytes = max(self.bytes or 0, now)


@contextmanager
def anonymous_peak(interval_seconds: float = 0.02) -> Iterator[_Peak]:
    """Sample the process's anonymous resident memory; on Linux only."""
    peak = _Peak()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval_seconds):
            peak.sample()

    thread = threading.Thread(target=watch, daemon=True) if peak.bytes is not None else None
    if thread:
        thread.start()
    try:
        yield peak
    finally:
        done.set()
        if thread:
            thread.join()
        peak.sample()
