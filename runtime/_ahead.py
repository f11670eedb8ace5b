"""The next item is made while the last one is in use."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]

Item = TypeVar("Item")


def ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """An iterator's items in their order; a thread makes the next one while one is in use.

    No more than one item is made ahead, and none that was handed out is held. The first is made by
    the caller's thread. An error of the iterator is raised where its item would have come. Close
    what this returns (``contextlib.closing``) where the loop may end early, by an error too: the
    thread has then ended.

    Args:
        items: advanced by one thread at a time.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="embedge-ahead") as executor:
        made = list(_next(items))
        while made:
            coming = executor.submit(_next, items)
            yield made.pop()  # popped, so that nothing here keeps it alive
            made = list(coming.result())


def _next(items: Iterator[Item]) -> tuple[Item, ...]:
    """The next item, or nothing after the last one."""
    for item in items:
        return (item,)
    return ()
