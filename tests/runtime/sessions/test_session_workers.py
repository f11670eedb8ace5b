from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any, cast

import pytest

from embedge.runtime import InferenceError
from embedge.runtime.host.workers import Workers
from embedge.runtime.sessions.pool import GraphPool
from embedge.runtime.sessions.session import GraphSession
from embedge.runtime.sessions.session_workers import RunSettings, SessionWorkers

THREADS = 3


@pytest.fixture
def workers() -> Workers:
    return Workers(THREADS)


class Graph:
    """An open graph whose sessions are nothing but their number of threads."""

    def __init__(self, **limits: int) -> None:
        self.opened: list[int] = []
        self._pool = GraphPool(self._open, lambda _: 1, **limits)
        with self._pool.use("graph") as self._graph:
            pass

    def _open(self, name: str, threads: int) -> GraphSession:
        self.opened.append(threads)
        return cast(GraphSession, SimpleNamespace(threads=threads))

    def workers(
        self, workers: Workers, *, single_thread: bool = True, tokens: int = 0
    ) -> SessionWorkers:
        settings = RunSettings(
            batch_tokens=1, single_thread=single_thread, single_thread_tokens=tokens
        )
        return SessionWorkers(self._graph, settings, threads=THREADS, workers=workers)


def run(workers: SessionWorkers, batches: int, *, tokens: int = 100) -> list[tuple[int, int]]:
    """``(batch, threads of its session)``, by batch."""
    return sorted(workers.run(range(batches), lambda session, _: session.threads, tokens=tokens))


def run_and_take(workers: SessionWorkers, batches: int, work: Any, take: Any) -> None:
    """Has ``take`` called with every batch and its result, as they finish."""
    with closing(workers.run(range(batches), work, tokens=1)) as results:
        for batch, result in results:
            take(batch, result)


class TestChoice:
    def test_several_batches_take_one_thread_each(self, workers: Workers) -> None:
        graph = Graph()
        assert run(graph.workers(workers), 5) == [(i, 1) for i in range(5)]
        assert graph.opened == [1]

    @pytest.mark.parametrize(("tokens", "threads"), [(65, THREADS), (64, 1), (1, 1)])
    def test_a_batch_that_is_alone_takes_all_threads_only_if_it_is_long(
        self, workers: Workers, tokens: int, threads: int
    ) -> None:
        graph = Graph()
        assert run(graph.workers(workers, tokens=64), 1, tokens=tokens) == [(0, threads)]
        assert graph.opened == [threads]

    def test_without_a_limit_for_short_ones_any_batch_that_is_alone_takes_all_threads(
        self, workers: Workers
    ) -> None:
        assert run(Graph().workers(workers), 1, tokens=1) == [(0, THREADS)]

    def test_batches_that_run_one_by_one_take_all_threads_alone(self, workers: Workers) -> None:
        graph = Graph()
        one = graph.workers(workers, single_thread=False, tokens=64)
        assert run(one, 2) + run(one, 1, tokens=1) == [(0, THREADS), (1, THREADS), (0, THREADS)]
        assert graph.opened == [THREADS]

    @pytest.mark.parametrize(("single_thread", "threads"), [(True, 1), (False, THREADS)])
    def test_a_call_of_one_thread_runs_its_batches_by_itself(
        self, workers: Workers, single_thread: bool, threads: int
    ) -> None:
        one = Graph().workers(workers, single_thread=single_thread)
        callers: set[int] = set()

        def work(session: GraphSession, _: int) -> int:
            callers.add(threading.get_ident())
            return session.threads

        for batches in (1, 3):
            results = list(one.run(range(batches), work, tokens=100, one_thread=True))
            assert results == [(batch, threads) for batch in range(batches)]
        assert callers == {threading.get_ident()}

    @pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
    def test_without_room_the_first_session_does_the_work_of_both(
        self, workers: Workers, first: int, second: int
    ) -> None:
        graph = Graph(memory_limit=1)
        one = graph.workers(workers)
        threads = run(one, first)[0][1]
        assert run(one, second) == [(i, threads) for i in range(second)]
        assert graph.opened == [threads]


class TestRunningTogether:
    def test_batches_run_at_the_same_time_but_never_more_than_the_threads(
        self, workers: Workers
    ) -> None:
        together = threading.Barrier(THREADS)  # breaks if fewer than all are ever inside
        inside, most = [0], [0]
        lock = threading.Lock()

        def work(session: GraphSession, batch: int) -> int:
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            together.wait(timeout=10)
            with lock:
                inside[0] -= 1
            return batch

        one = Graph().workers(workers)
        done = [result for _, result in one.run(range(4 * THREADS), work, tokens=1)]
        assert sorted(done) == list(range(4 * THREADS))
        assert most[0] == THREADS

    def test_results_are_taken_as_they_finish_by_the_callers_thread(self, workers: Workers) -> None:
        release = threading.Event()
        done: list[int] = []

        def work(session: GraphSession, batch: int) -> None:
            if batch == 0:
                assert release.wait(timeout=10)

        def take(batch: int, _: None) -> None:
            done.append(batch)
            assert threading.current_thread() is threading.main_thread()
            if batch == 5:
                release.set()

        run_and_take(Graph().workers(workers), 6, work, take)
        assert sorted(done) == list(range(6))
        assert done[-1] == 0

    @pytest.mark.slow
    def test_no_more_than_two_batches_a_thread_are_under_way(self, workers: Workers) -> None:
        started: list[int] = []
        taken = [0]

        def work(session: GraphSession, batch: int) -> None:
            started.append(batch)

        def take(batch: int, _: None) -> None:
            time.sleep(0.01)  # long enough for every thread to run ahead, if it could
            assert len(started) <= taken[0] + 2 * THREADS
            taken[0] += 1

        run_and_take(Graph().workers(workers), 12, work, take)
        assert taken[0] == 12

    def test_a_thread_takes_its_next_batch_while_the_callers_thread_is_away(
        self, workers: Workers
    ) -> None:
        taking = threading.Event()
        fourth_ran = threading.Event()

        def work(session: GraphSession, batch: int) -> None:
            if batch == THREADS:
                assert taking.wait(timeout=10)
                fourth_ran.set()

        def take(batch: int, _: None) -> None:
            taking.set()
            assert fourth_ran.wait(timeout=10)

        run_and_take(Graph().workers(workers), THREADS + 1, work, take)

    @pytest.mark.parametrize("where", ["work", "done"])
    def test_an_error_ends_the_call_once_nobody_runs_any_more(
        self, workers: Workers, where: str
    ) -> None:
        inside: set[int] = set()
        started: list[int] = []
        failing = threading.Event()

        def work(session: GraphSession, batch: int) -> None:
            started.append(batch)
            inside.add(batch)
            if batch == 1 and where == "work":
                failing.set()
                inside.discard(batch)
                raise InferenceError("batch 1 failed")
            if batch != 1:
                failing.wait(timeout=10)
                time.sleep(0.05)  # still running when the error is there
            inside.discard(batch)

        def take(batch: int, _: None) -> None:
            failing.set()
            raise InferenceError(f"batch {batch} failed")

        one = Graph().workers(workers)
        with pytest.raises(InferenceError, match="batch 1 failed"):
            run_and_take(one, 100, work, take)
        assert inside == set()
        assert len(started) <= 2 * THREADS
        assert run(one, 4) == [(i, 1) for i in range(4)]

    def test_several_callers_share_the_threads(self, workers: Workers) -> None:
        graph = Graph()
        one = graph.workers(workers, tokens=10)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                for batches in (5, 1, 7):
                    assert [batch for batch, _ in run(one, batches)] == list(range(batches))
            except BaseException as error:
                failures.append(error)

        _in_threads(8, work)
        assert failures == []
        assert sorted(graph.opened) == [1, THREADS]


def _in_threads(count: int, work: Callable[[], Any]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
