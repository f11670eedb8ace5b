"""The owner of open sessions: graphs by name, a bounded number of them open.

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
from typing import Any

from embedge.runtime.errors import EmbedgeError
from embedge.runtime.sessions.session import GraphSession

__all__ = ["GraphPool", "OpenGraph"]

_LOOK_AGAIN_S = 0.1  # an interrupt may keep the end of a use from being told


class OpenGraph:
    """A graph of a pool: its sessions, which are opened when they are first needed, and its users.

    Args:
        pool: its owner.
        name: the graph's.
        session_bytes: what a session counts towards the memory limit.

    Attributes:
        name: as given.
        session_bytes: as given.
        has_second: whether there is room for a second session, which then counts too.
    """

    def __init__(self, pool: GraphPool, name: str, session_bytes: int) -> None:
        self.name = name
        self.session_bytes = session_bytes
        self.has_second = False
        self._pool: GraphPool = weakref.proxy(pool)  # or sessions would outlive what is deleted
        self._sessions: dict[int, GraphSession] = {}  # by threads of a run
        self._opening = threading.Lock()
        self._locks: list[weakref.ref[Any]] = []

    def session(self, threads: int) -> GraphSession:
        """The session whose runs take some threads, or the other one where there is no room for both.

        Raises:
            BundleError: if the graph cannot be opened.
        """
        with self._opening:
            if threads not in self._sessions:
                if self._sessions and not self._pool.reserve_second(self):
                    return next(iter(self._sessions.values()))
                self._sessions[threads] = self._pool.open_session(self.name, threads)
            return self._sessions[threads]

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
        self._locks = [*self._held(), weakref.ref(lock)]

    def _held(self) -> list[weakref.ref[Any]]:
        known = ((reference, reference()) for reference in self._locks)
        return [reference for reference, lock in known if lock is not None and lock.locked()]


class GraphPool:
    """Graphs by name; the longest unused is closed when there are too many.

    A graph in use is never closed. A call that would need more than the limits waits until others
    have finished theirs. A graph counts its size once per session: the first is granted with the
    graph, a second one only into room that is free.

    Args:
        open_session: opens the session of a graph, by name and threads of a run.
        size_bytes: what a session of a graph counts towards the memory limit.
        max_graphs: most graphs at once, ``None``: no limit.
        memory_limit: most bytes at once, ``None``: no limit.
    """

    def __init__(
        self,
        open_session: Callable[[str, int], GraphSession],
        size_bytes: Callable[[str], int],
        *,
        max_graphs: int | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.open_session = open_session
        self._size_bytes = size_bytes
        self._max_graphs = max_graphs
        self._memory_limit = memory_limit
        self._graphs: OrderedDict[str, OpenGraph] = OrderedDict()  # longest unused first
        self._lock = threading.Lock()
        self._waiting: list[queue.SimpleQueue[None]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the open graphs, the longest unused first."""
        with self._lock:
            return tuple(self._graphs)

    @property
    def bytes(self) -> int:
        """What the open graphs count together."""
        with self._lock:
            return sum(graph.size_bytes for graph in self._graphs.values())

    @contextmanager
    def use(self, name: str) -> Iterator[OpenGraph]:
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
            for name in [name for name, graph in self._graphs.items() if not graph.users]:
                del self._graphs[name]
        self._tell()

    def reserve_second(self, graph: OpenGraph) -> bool:
        """Counts a second session of a graph in use if it fits; nobody else's is closed for it."""
        with self._lock:
            graph.has_second = graph.has_second or self._fits(graph.session_bytes)
            return graph.has_second

    def _take(self, name: str, user: Any) -> OpenGraph:
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
                graph = self._take_now(name, size, user)
                if graph is not None:
                    return graph
                self._waiting.append(told)
            with suppress(queue.Empty):
                told.get(timeout=_LOOK_AGAIN_S)

    def _take_now(self, name: str, size: int, user: Any) -> OpenGraph | None:
        """The graph, in use by ``user``; ``None`` where others leave no room for it yet."""
        if name not in self._graphs:
            if not self._make_room(size):
                return None
            self._graphs[name] = OpenGraph(self, name, size)
        graph = self._graphs[name]
        graph.add_user(user)
        self._graphs.move_to_end(name)
        return graph

    def _tell(self) -> None:
        """Wakes those who wait for room; whom an interrupt leaves out looks again by itself."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for told in waiting:
            told.put(None)

    def _make_room(self, size: int) -> bool:
        """Closes unused graphs until one more fits; ``False`` if those in use leave no room."""
        while self._is_full() or not self._fits(size):
            unused = next((name for name, graph in self._graphs.items() if not graph.users), None)
            if unused is None:
                return False
            del self._graphs[unused]
        return True

    def _is_full(self) -> bool:
        return self._max_graphs is not None and len(self._graphs) >= self._max_graphs

    def _fits(self, size: int) -> bool:
        total = size + sum(graph.size_bytes for graph in self._graphs.values())
        return self._memory_limit is None or total <= self._memory_limit
