"""Threads that go on working when an interrupt (Ctrl-C) hits the thread that gives them work.

An interrupt while a ``ThreadPoolExecutor`` takes a task may leave one of its locks taken; its threads then wait
forever. Here a task goes through ``SimpleQueue``, the interpreter's own, in one step.
"""

from __future__ import annotations

import _thread
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from functools import partial
from typing import TypeVar

__all__ = ["Workers"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOOK_AGAIN_S = 0.05  # whether what an error or interrupt left under way has ended

Task = Callable[[], object]
_Tasks = queue.SimpleQueue[Task | None]


class _NotStarted(Exception):
    """Stands for the result of an item that nobody waited for any more."""


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

    def run(
        self,
        work: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        most: int,
    ) -> Generator[tuple[Item, Result], None, None]:
        """Each item with the result of some work on it, in the order in which they come.

        The first error ends it, and so does closing it, once what was under way has ended.

        Args:
            work: gives the result of an item; called by the threads.
            items: in their order.
            most: items between their start and their result's being taken.
        """
        results: queue.SimpleQueue[tuple[Item, Result] | BaseException] = queue.SimpleQueue()
        ended: list[None] = []  # a member for each item that is not under way any more
        wanted = threading.Lock()  # held while the results are
        given = taken = 0

        def run(item: Item) -> None:
            result: tuple[Item, Result] | BaseException
            try:
                result = (item, work(item)) if wanted.locked() else _NotStarted()
            except BaseException as error:
                result = error
            ended.append(None)
            results.put(result)

        def take() -> tuple[Item, Result]:
            nonlocal taken
            result = results.get()
            taken += 1
            if isinstance(result, BaseException):
                raise result
            return result

        try:
            with wanted:
                for item in items:
                    if given - taken == most:
                        yield take()
                    self.put(partial(run, item))
                    given += 1
                while taken < given:
                    yield take()
        finally:
            # After an error: whoever closes what the work uses must find nobody in it.
            while len(ended) < given:
                with suppress(queue.Empty):
                    results.get(timeout=_LOOK_AGAIN_S)

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
