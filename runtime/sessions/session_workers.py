"""How the batches of a call are spread over the processor's cores.

Rules:
    * Where a graph is faster so, its batches run at the same time, one thread each, on a session of
      single-threaded runs. A batch that is alone takes that session where it is short.
    * Otherwise batches run one after the other, each on all threads, on a session of its own kind.
    * A call that is to take one thread runs its batches by itself, on that session too: others run beside it.
    * Where the memory limit leaves no room for a second session, the first does its work.

Which way is faster is decided elsewhere: :mod:`embedge.runtime.encode.batch_size`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Annotated, TypeVar

from embedge.runtime.bundle.schema import Record, Within, record
from embedge.runtime.host.workers import Workers
from embedge.runtime.sessions.pool import OpenGraph
from embedge.runtime.sessions.session import GraphSession
from embedge.runtime.sessions.task_inputs import TaskInputs

__all__ = ["RunSettings", "SessionWorkers"]

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@record
class RunSettings(Record):
    """How the batches of a graph run.

    Attributes:
        batch_tokens: padded tokens, or patches, of a batch, where the call does not say.
        single_thread: batches run at the same time, one thread each; else one after the other, each with
            all threads.
        single_thread_tokens: with ``single_thread``, most padded tokens of a batch that is alone and yet
            takes one thread.
    """

    batch_tokens: Annotated[int, Within(1)]
    single_thread: bool
    single_thread_tokens: Annotated[int, Within(0)]


class SessionWorkers:
    """Runs the batches of a call on an open graph; safe to use from several threads.

    Args:
        graph: in use by the call.
        settings: how its batches run.
        threads: of the session on which batches run one by one.
        given: inputs of every run, of a task whose graph others share.
        workers: as many, for batches that run at the same time.
    """

    def __init__(
        self,
        graph: OpenGraph,
        settings: RunSettings,
        *,
        threads: int,
        workers: Workers,
        given: TaskInputs | None = None,
    ) -> None:
        self._given = given
        self._graph = graph
        self._settings = settings
        self._threads = threads
        self._workers = workers

    def run(
        self,
        batches: Sequence[Batch],
        work: Callable[[GraphSession, Batch], Result],
        *,
        tokens: int,
        one_thread: bool = False,
    ) -> Generator[tuple[Batch, Result], None, None]:
        """Batches with their results, in their order as far as there are threads for them.

        The first error ends it, once the runs that were going on have ended. A thread that
        finishes a batch finds the next one waiting; no more than ``2 * threads`` batches are between
        their start and their result's being taken.

        Args:
            batches: what to run.
            work: gives the result of a batch; called by several threads at once.
            tokens: padded tokens of the largest batch.
            one_thread: run them by the calling thread, where batches may run at the same time.
        """
        settings, several = self._settings, len(batches) > 1
        single_thread = settings.single_thread and (
            one_thread or several or tokens <= settings.single_thread_tokens
        )
        session = self._graph.session(1 if single_thread else self._threads)
        if self._given:
            session = session.of_task(self._given)
        if single_thread and several and not one_thread and session.threads < self._threads:
            yield from self._workers.run(partial(work, session), batches, most=2 * self._threads)
            return
        for batch in batches:
            yield batch, work(session, batch)
