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

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from embedge.runtime._session import GraphSession
from embedge.runtime._workers import Workers

__all__ = ["Lanes"]

Batch = TypeVar("Batch")
Result = TypeVar("Result")

_LOOK_AGAIN_S = 0.05  # whether the batches that an error or interrupt left under way have ended


class Lanes:
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
        done: Callable[[Batch, Result], object],
        *,
        tokens: int,
    ) -> None:
        """Runs some batches, in their order as far as there are lanes for them.

        The first error ends the call, once the runs that were going on have ended. A lane that
        finishes a batch finds the next one waiting; no more than ``2 * threads`` batches are between
        their start and their result's being taken.

        Args:
            batches: what to run.
            work: gives the result of a batch; called by several threads at once.
            done: takes a batch and its result, as they finish; called by the caller's thread.
            tokens: padded tokens of the largest batch.
        """
        workers = self._workers
        narrow = workers is not None and (len(batches) > 1 or tokens <= self._narrow_tokens)
        session = self._session(1 if narrow else self._threads)
        if workers is not None and len(batches) > 1 and session.threads == 1:
            self._run_together(workers, session, batches, work, done)
            return
        for batch in batches:
            done(batch, work(session, batch))

    def _run_together(
        self,
        workers: Workers,
        session: GraphSession,
        batches: Sequence[Batch],
        work: Callable[[GraphSession, Batch], Result],
        done: Callable[[Batch, Result], object],
    ) -> None:
        results: queue.SimpleQueue[tuple[Batch, Result] | BaseException] = queue.SimpleQueue()
        ended: list[None] = []  # a member for each batch that is not under way any more
        wanted = threading.Lock()  # held while the results are
        given = taken = 0

        def run(batch: Batch) -> None:
            try:
                if wanted.locked():
                    results.put((batch, work(session, batch)))
            except BaseException as error:
                results.put(error)
            finally:
                ended.append(None)

        def take() -> None:
            nonlocal taken
            result = results.get()
            taken += 1
            if isinstance(result, BaseException):
                raise result
            done(*result)

        try:
            with wanted:
                for batch in batches:
                    if given - taken == 2 * self._threads:
                        take()
                    workers.put(partial(run, batch))
                    given += 1
                while taken < given:
                    take()
        finally:
            # After an error: whoever closes the session next must find nobody in it.
            while len(ended) < given:
                with suppress(queue.Empty):
                    results.get(timeout=_LOOK_AGAIN_S)

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
