"""The next item is made while the last one is in use."""

from __future__ import annotations

import queue
from collections.abc import Generator, Iterator
from functools import partial
from typing import TypeAlias, TypeVar

from embedge.runtime.host.workers import Workers

__all__ = ["prefetched"]

Item = TypeVar("Item")
_Made: TypeAlias = "queue.SimpleQueue[tuple[Item, ...] | BaseException]"


def prefetched(items: Iterator[Item]) -> Generator[Item, None, None]:
    """An iterator's items in their order; a thread makes the next one while one is in use.

    No more than one item is made ahead, and none that was handed out is held. The first is made by
    the caller's thread. An error of the iterator is raised where its item would have come. Close
    what this returns (``contextlib.closing``) where the loop may end early, by an error too: the
    thread has then ended.

    Args:
        items: advanced by one thread at a time.
    """
    worker = Workers(1)
    coming: _Made[Item] = queue.SimpleQueue()
    try:
        made = list(_next(items))
        while made:
            worker.put(partial(_make, items, coming))
            yield made.pop()  # popped, so that nothing here keeps it alive
            made = list(_taken(coming))
    finally:
        ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        worker.put(partial(ended.put, None))  # behind what it is making
        ended.get()
        worker.close()


def _make(items: Iterator[Item], coming: _Made[Item]) -> None:
    try:
        coming.put(_next(items))
    except BaseException as error:
        coming.put(error)


def _taken(coming: _Made[Item]) -> tuple[Item, ...]:
    result = coming.get()
    if isinstance(result, BaseException):
        raise result
    return result


def _next(items: Iterator[Item]) -> tuple[Item, ...]:
    """The next item, or nothing after the last one."""
    for item in items:
        return (item,)
    return ()
