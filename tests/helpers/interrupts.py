"""Interrupts (Ctrl-C) at any moment."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection
from types import FrameType

import pytest

# An interrupt of a generator that is being closed goes nowhere, in Python as here.
swallowed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Interrupts:
    """Interrupts the calling thread at the n-th of the moments at which Python looks for signals.

    Those are the starts of functions and the ends of calls; ``hit`` says whether there were as many.

    Args:
        moment: n.
        files: whose functions count.
    """

    def __init__(self, moment: int, files: Collection[str | None]) -> None:
        self._left = moment
        self._files = files
        self.hit = False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event == "c_call" or frame.f_code.co_filename not in self._files:
            return
        self._left -= 1
        if self._left < 0 and not self.hit:
            self.hit = True
            raise KeyboardInterrupt

    def during(self, work: Callable[[], object]) -> None:
        sys.setprofile(self)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)


def in_time(work: Callable[[], object]) -> None:
    """Does something in another thread, which must not wait for ever."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()
