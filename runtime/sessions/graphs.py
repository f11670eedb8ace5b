"""The graphs of one precision of a bundle: opened when they are needed, run in batches, closed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.host.fork import keep_forever, restart_after_fork
from embedge.runtime.host.workers import Workers
from embedge.runtime.sessions.pool import GraphPool
from embedge.runtime.sessions.session import SessionConfig, open_graph
from embedge.runtime.sessions.session_workers import RunSettings, SessionWorkers
from embedge.runtime.sessions.task_inputs import TaskInputs, task_inputs

__all__ = ["Graphs"]


class Graphs:
    """Runs graphs by name, a task's or ``VISION``, and bounds how many stay open.

    Args:
        bundle: where the graphs are.
        precision: one of its precisions.
        config: how they are opened.
        settings: how the batches of a graph run, by its name.
        max_sessions: most graphs open at once, ``None``: all.
        memory_limit: most bytes of their sessions, ``None``: no limit.

    Attributes:
        device: what runs them, "cpu" or "cuda".
        settings: as given.
    """

    def __init__(
        self,
        bundle: Bundle,
        precision: str,
        config: SessionConfig,
        *,
        settings: Callable[[str], RunSettings],
        max_sessions: int | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.device = config.device
        self.settings = settings
        self._threads = config.threads
        self._key_of = partial(bundle.graph_key, precision)
        self._tensors_of = partial(bundle.task_tensors, precision)
        self._token_rows = functools.cache(partial(bundle.token_rows, precision))
        self._new_pool = partial(
            GraphPool,
            lambda name, threads: open_graph(bundle, precision, name, config, threads=threads),
            functools.cache(partial(bundle.graph_bytes, precision)),
            max_graphs=max_sessions,
            memory_limit=memory_limit,
        )
        self._start()
        restart_after_fork(self)

    def _start(self) -> None:
        self._workers = Workers(self._threads)
        self._pool = self._new_pool()
        self._inputs: dict[str, TaskInputs] = {}

    def restart(self) -> None:
        """In a forked child: without open graphs, those of the parent stay as they are."""
        keep_forever(self._pool)
        self._start()

    @contextmanager
    def use(self, name: str) -> Iterator[SessionWorkers]:
        """A graph, which is kept open inside the block.

        Raises:
            EmbedgeError: if one session of the graph is above the memory limit.
        """
        settings, threads, workers = self.settings(name), self._threads, self._workers
        given = self._task_inputs(name)
        with self._pool.use(self._key_of(name)) as graph:
            yield SessionWorkers(graph, settings, threads=threads, workers=workers, given=given)

    def _task_inputs(self, name: str) -> TaskInputs:
        """What a task brings to the graph that it shares; read once, and nothing where it has its own."""
        known = self._inputs.get(name)
        if known is None:  # two threads may both read them, and one copy stays
            tensors = self._tensors_of(name)
            known = self._inputs[name] = {} if tensors is None else task_inputs(tensors)
        return known

    def with_settings(self, settings: Callable[[str], RunSettings]) -> Graphs:
        """The same graphs, sharing what is open, whose batches run in another way."""
        shared = copy.copy(self)
        shared.settings = settings
        return shared

    def close(self) -> None:
        """Closes the open graphs that are not in use."""
        self._inputs.clear()
        self._pool.close_unused()

    def concurrency(self, name: str) -> int:
        """Batches of a graph that run at the same time."""
        return self._threads if self.settings(name).single_thread else 1

    def token_rows(self, name: str) -> int | None:
        """Rows of the table in which a task's graph looks up token ids; ``None`` without such a table."""
        return self._token_rows(name)
