"""Threads that do what they are given, whatever interrupts whoever gives it.

An interrupt (Ctrl-C) that comes while a ``ThreadPoolExecutor`` takes a task may leave one of its locks
taken, and then its threads wait forever. What is given here goes through a queue of the interpreter's own,
in one step.
"""

from __future__ import annotations

import _thread
import queue
import threading
import weakref
from collections.abc import Callable

__all__ = ["Workers"]

Task = Callable[[], object]
_Tasks = queue.SimpleQueue[Task | None]


class Workers:
    """Some threads, which are started with the first task, and end with this object or when it is closed.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._tasks: _Tasks = queue.SimpleQueue()
        self._started: list[int] = []
        self._starting = threading.Lock()
        self._end = weakref.finalize(self, _end, self._tasks, count)

    def put(self, task: Task) -> None:
        """Has a thread do something, which must not raise; in the order of the calls."""
        if len(self._started) < self._count:
            with self._starting:
                while len(self._started) < self._count:
                    # Not Thread.start(), which waits for the thread by locks of its own.
                    self._started.append(_thread.start_new_thread(_work, (self._tasks,)))
        self._tasks.put(task)

    def close(self) -> None:
        """Ends the threads, once they have done what they were given."""
        self._end()


def _work(tasks: _Tasks) -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # and what it holds, before the next one comes


def _end(tasks: _Tasks, count: int) -> None:
    for _ in range(count):
        tasks.put(None)
