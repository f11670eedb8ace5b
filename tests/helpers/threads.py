"""Functions in threads, and which threads of embedge's run."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from embedge.runtime.host import workers as workers_module


def in_threads(*work: Callable[[], None], seconds: float = 60) -> None:
    """Call every function in a thread of its own, all at once; none may fail or take longer."""
    failures: list[BaseException] = []

    def call(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=seconds)
        assert not thread.is_alive()
    assert failures == []


def workers() -> set[int]:
    """Threads of :class:`Workers` that have not ended."""
    return {ident for ident, frame in sys._current_frames().items() if _is_worker(frame)}


def all_ended(before: set[int]) -> bool:
    """Whether the workers that were not there before end at once."""
    gc.collect()  # of earlier tests, that nobody refers to any more
    end = time.monotonic() + 10
    while workers() - before and time.monotonic() < end:
        time.sleep(0.001)
    return not workers() - before


def none_added(before: set[int]) -> bool:
    """Whether there are soon no more workers than before; an interrupt may have replaced some."""
    gc.collect()
    end = time.monotonic() + 10
    while len(workers()) > len(before) and time.monotonic() < end:
        time.sleep(0.001)
    return len(workers()) <= len(before)


def _is_worker(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is workers_module._work.__code__:
            return True
        frame = frame.f_back
    return False
