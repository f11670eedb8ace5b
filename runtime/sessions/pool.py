"""Graphs by name, a bounded number of them open.

An interrupt (Ctrl-C) can come between any two steps of Python's, so nothing here is counted up and later
down. A user of a graph is a lock that is held while the call runs: the interpreter leaves a ``with`` on a
lock, however the block ends, in one step.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from embedge.runtime.errors import EmbedgeError
from embedge.runtime.sessions.session_workers import SessionWorkers

__all__ = ["GraphPool"]

_LOOK_AGAIN_S = 0.1  # an interrupt may keep the end of a use from being told


@dataclass
class _Entry:
    """A graph of the pool, what its sessions count, and those who use or used it."""

    lanes: SessionWorkers
    session_bytes: int
    has_second: bool = False
    locks: list[weakref.ref[Any]] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """What its sessions count together."""
        return self.session_bytes * (1 + self.has_second)

    @property
    def users(self) -> int:
        """How many use the graph now."""
        return len(self._held())

    def add_user(self, lock: Any) -> None:
        """Counts a user for as long as the lock is held."""
        self.locks = [*self._held(), weakref.ref(lock)]

    def _held(self) -> list[weakref.ref[Any]]:
        known = ((reference, reference()) for reference in self.locks)
        return [reference for reference, lock in known if lock is not None and lock.locked()]


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
        make: Callable[[str, Callable[[], bool]], SessionWorkers],
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
        self._lock = threading.Lock()
        self._waiting: list[queue.SimpleQueue[None]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the open graphs, the longest unused first."""
        with self._lock:
            return tuple(self._entries)

    @property
    def bytes(self) -> int:
        """What the open graphs count together."""
        with self._lock:
            return sum(entry.size_bytes for entry in self._entries.values())

    @contextmanager
    def use(self, name: str) -> Iterator[SessionWorkers]:
        """The graph of a name, which is kept open inside the block.

        Raises:
            EmbedgeError: if one session of the graph is above the memory limit.
        """
        user = threading.Lock()
        try:
            with user:
                yield self._take(name, user)
        finally:
            self._tell()

    def close_unused(self) -> None:
        """Closes the graphs that nobody uses."""
        with self._lock:
            for name in [name for name, entry in self._entries.items() if not entry.users]:
                del self._entries[name]
        self._tell()

    def _take(self, name: str, user: Any) -> SessionWorkers:
        size = self._size_bytes(name)
        if self._memory_limit is not None and size > self._memory_limit:
            raise EmbedgeError(
                f"the graph of {name!r} and its weights take {size} bytes, above memory_limit "
                f"({self._memory_limit}); raise the limit or choose a smaller precision",
                arguments=["memory_limit"],
            )
        told: queue.SimpleQueue[None] = queue.SimpleQueue()
        while True:
            with self._lock:
                lanes = self._take_now(name, size, user)
                if lanes is not None:
                    return lanes
                self._waiting.append(told)
            with suppress(queue.Empty):
                told.get(timeout=_LOOK_AGAIN_S)

    def _take_now(self, name: str, size: int, user: Any) -> SessionWorkers | None:
        """The graph, in use by ``user``; ``None`` where others leave no room for it yet."""
        if name not in self._entries:
            if not self._make_room(size):
                return None
            lanes = self._make(name, lambda: self._grow(name, size))
            self._entries[name] = _Entry(lanes, size)
        entry = self._entries[name]
        entry.add_user(user)
        self._entries.move_to_end(name)
        return entry.lanes

    def _tell(self) -> None:
        """Wakes those who wait for room; whom an interrupt leaves out looks again by itself."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for told in waiting:
            told.put(None)

    def _grow(self, name: str, size: int) -> bool:
        """Counts a second session of a graph in use if it fits; nobody else's is closed for it."""
        with self._lock:
            entry = self._entries[name]
            entry.has_second = entry.has_second or self._fits(size)
            return entry.has_second

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
