"""What an export tells its user while it runs, and what it cost at the end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

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


class Progress:
    """A bar per task and precision, and what each cost.

    Args:
        show: draw bars on stderr; ``None``: only where stderr is a terminal.
        finished: takes the cost of a step at its end.
        lines: says how far a step is where no bar is drawn.
    """

    def __init__(
        self,
        show: bool | None = None,
        finished: Callable[[StepCost], None] | None = None,
        lines: LogLines | None = None,
    ) -> None:
        self._disable = None if show is None else not show
        self._finished = finished
        self._lines = lines
        self._bar: Any = None
        self._done = 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure and show one task at one precision."""
        self._done = 0
        started = time.perf_counter()
        bar = tqdm(desc=name, unit="B", unit_scale=True, file=sys.stderr, disable=self._disable)
        bar.desc = name  # which a bar that is not drawn does not keep
        with anonymous_peak() as peak, bar as self._bar:
            yield
        seconds = time.perf_counter() - started
        if self._finished is not None:
            self._finished(StepCost(step=name, seconds=seconds, peak_mb=peak.megabytes))

    def expect(self, nbytes: int) -> None:
        """Say how much the step is going to write, once that is known."""
        self._bar.total = nbytes
        self._bar.refresh()

    def layers(self, doing: str, count: int) -> Callable[[int], None]:
        """What takes the number of each layer while something is done to all of them."""
        return lambda layer: self._note(f"{doing}, layer {layer} of {count}")

    def advance(self, nbytes: int, name: str) -> None:
        """Account for a tensor that was written."""
        self._bar.set_postfix_str(name[-60:], refresh=False)
        self._bar.update(nbytes)
        self._done += nbytes
        self._say(name)

    def _note(self, text: str) -> None:
        self._bar.set_postfix_str(text[-60:])
        self._say(text)

    def _say(self, doing: str) -> None:
        if self._bar.disable and self._lines is not None:
            share = self._done / max(self._bar.total or 0, 1)
            self._lines.say(lambda: f"{self._bar.desc}: {share:.0%} written, now {doing}")


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
