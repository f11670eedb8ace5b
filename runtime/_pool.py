"""Graphs by name, a bounded number of them open."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from embedge.runtime._errors import EmbedgeError
from embedge.runtime._lanes import Lanes

__all__ = ["GraphPool"]


@dataclass
class _Entry:
    """A graph of the pool, what its sessions count, and how many use it."""

    lanes: Lanes
    size_bytes: int
    users: int = 0


class GraphPool:
    """Graphs by name; the longest unused is closed when there are too many.

    A graph in use is never closed. A call that would need more than the limits waits until others
    have finished theirs. A graph counts its size once per session: the first is granted with the
    graph, a second one only into room that is free.

    Args:
        make: the graph of a name, without a session yet; its second argument answers whether it
            may open a second session, and reserves the room.
        size_bytes: what a session of a graph counts towards the memory limit.
        max_graphs: most graphs at once, ``None``: no limit.
        memory_limit: most bytes at once, ``None``: no limit.
    """

    def __init__(
        self,
        make: Callable[[str, Callable[[], bool]], Lanes],
        size_bytes: Callable[[str], int],
        *,
        max_graphs: int | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self._make = make
        self._size_bytes = size_bytes
        self._max_graphs = max_graphs
        self._memory_limit = memory_limit
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # longest unused first
        self._changed = threading.Condition()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the open graphs, the longest unused first."""
        with self._changed:
            return tuple(self._entries)

    @property
    def bytes(self) -> int:
        """What the open graphs count together."""
        with self._changed:
            return sum(entry.size_bytes for entry in self._entries.values())

    @contextmanager
    def use(self, name: str) -> Iterator[Lanes]:
        """The graph of a name, kept open until the block ends.

        Raises:
            EmbedgeError: if one session of the graph is above the memory limit.
        """
        entry = self._take(name)
        try:
            yield entry.lanes
        finally:
            with self._changed:
                entry.users -= 1
                self._changed.notify_all()

    def close_unused(self) -> None:
        """Closes the graphs that nobody uses."""
        with self._changed:
            for name in [name for name, entry in self._entries.items() if not entry.users]:
                del self._entries[name]
            self._changed.notify_all()

    def _take(self, name: str) -> _Entry:
        size = self._size_bytes(name)
        if self._memory_limit is not None and size > self._memory_limit:
            raise EmbedgeError(
                f"the graph of {name!r} and its weights take {size} bytes, above memory_limit "
                f"({self._memory_limit}); raise the limit or choose a smaller precision"
            )
        with self._changed:
            while name not in self._entries:
                if self._make_room(size):
                    lanes = self._make(name, lambda: self._grow(name, size))
                    self._entries[name] = _Entry(lanes, size)
                else:
                    self._changed.wait()
            entry = self._entries[name]
            entry.users += 1
            self._entries.move_to_end(name)
            return entry

    def _grow(self, name: str, size: int) -> bool:
        """Counts a second session of a graph in use if it fits; nobody else's is closed for it."""
        with self._changed:
            if not self._fits(size):
                return False
            self._entries[name].size_bytes += size
            return True

    def _make_room(self, size: int) -> bool:
        """Closes unused graphs until one more fits; ``False`` if those in use leave no room."""
        while self._is_full() or not self._fits(size):
            unused = next((name for name, e in self._entries.items() if not e.users), None)
            if unused is None:
                return False
            del self._entries[unused]
        return True

    def _is_full(self) -> bool:
        return self._max_graphs is not None and len(self._entries) >= self._max_graphs

    def _fits(self, size: int) -> bool:
        total = size + sum(entry.size_bytes for entry in self._entries.values())
        return self._memory_limit is None or total <= self._memory_limit
