"""The sessions of one graph, and how the batches of a call are spread over the processor's cores.

Rules:
    * The products of a small 8-bit graph scale badly over the threads of a run. Its batches run at
      the same time instead, each by one thread of a *narrow* session.
    * A batch that is alone takes the narrow session where it is short, else a *wide* one, all
      threads on one run.
    * Both sessions are opened when they are first needed. Where the memory limit leaves no room
      for the second, the first does its work.
    * Any other graph has the wide session alone and runs batch by batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TypeVar

from embedge.runtime.host.workers import Workers
from embedge.runtime.sessions.session import GraphSession

__all__ = ["SessionWorkers"]

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class SessionWorkers:
    """A graph that runs batches; safe to use from several threads.

    Args:
        open_session: opens a session whose runs take a number of threads.
        may_open_second: whether there is room for a second session; the answer "yes" reserves it.
        threads: cores to use.
        workers: threads of the runs that go on at the same time; ``None``: a wide session alone.
        narrow_tokens: most padded tokens of a run that is alone and yet takes one thread.
    """

    def __init__(
        self,
        open_session: Callable[[int], GraphSession],
        may_open_second: Callable[[], bool],
        *,
        threads: int,
        workers: Workers | None = None,
        narrow_tokens: int = 0,
    ) -> None:
        self._open_session = open_session
        self._may_open_second = may_open_second
        self._threads = threads
        self._workers = workers
        self._narrow_tokens = narrow_tokens
        self._sessions: dict[int, GraphSession] = {}  # by threads of a run
        self._second_granted = False
        self._opening = threading.Lock()

    def run(
        self,
        batches: Sequence[Batch],
        work: Callable[[GraphSession, Batch], Result],
        *,
        tokens: int,
    ) -> Generator[tuple[Batch, Result], None, None]:
        """Batches with their results, in their order as far as there are lanes for them.

        The first error ends it, once the runs that were going on have ended. A lane that
        finishes a batch finds the next one waiting; no more than ``2 * threads`` batches are between
        their start and their result's being taken.

        Args:
            batches: what to run.
            work: gives the result of a batch; called by several threads at once.
            tokens: padded tokens of the largest batch.
        """
        workers = self._workers
        narrow = workers is not None and (len(batches) > 1 or tokens <= self._narrow_tokens)
        session = self._session(1 if narrow else self._threads)
        if workers is not None and len(batches) > 1 and session.threads == 1:
            yield from workers.run(partial(work, session), batches, most=2 * self._threads)
            return
        for batch in batches:
            yield batch, work(session, batch)

    def _session(self, threads: int) -> GraphSession:
        """The session whose runs take some threads, or the other one where there is no room."""
        with self._opening:
            if threads not in self._sessions:
                if self._sessions and not self._second_granted:
                    self._second_granted = self._may_open_second()
                    if not self._second_granted:
                        return next(iter(self._sessions.values()))
                self._sessions[threads] = self._open_session(threads)
            return self._sessions[threads]
