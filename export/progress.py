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
        told: takes what a user should know of the model, a line each.
    """

    def __init__(
        self,
        show: bool | None = None,
        finished: Callable[[StepCost], None] | None = None,
        lines: LogLines | None = None,
        told: Callable[[str], None] | None = None,
    ) -> None:
        self._disable = None if show is None else not show
        self._finished = finished
        self._lines = lines
        self._told = told
        self._bar: Any = None
        self._step, self._done = "", 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure and show one task at one precision."""
        self._step, self._done = name, 0
        started = time.perf_counter()
        bar = tqdm(desc=name, unit="B", unit_scale=True, file=sys.stderr, disable=self._disable)
        with AnonymousPeak() as peak, bar as self._bar:
            yield
        seconds = time.perf_counter() - started
        if self._finished is not None:
            peak_mb = None if peak.bytes is None else peak.bytes / 1e6
            self._finished(StepCost(step=name, seconds=seconds, peak_mb=peak_mb))

    def tell(self, line: str) -> None:
        """Say what a user should know of the model."""
        if self._told is not None:
            self._told(line)

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
            self._lines.say(lambda: f"{self._step}: {share:.0%} written, now {doing}")


class AnonymousPeak:
    """Samples the process's anonymous resident memory inside its block; on Linux only.

    Attributes:
        bytes: the most there was; ``None`` where the system does not tell.
    """

    def __init__(self, interval_seconds: float = 0.02) -> None:
        self.bytes: int | None = None
        self._interval = interval_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._sample()
        if self.bytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self.bytes is not None:
            self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        now = process_memory().get("RssAnon")
        self.bytes = self.bytes if now is None else max(self.bytes or 0, now)
