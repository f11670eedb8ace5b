from __future__ import annotations

import itertools
import threading
from contextlib import closing
from types import SimpleNamespace
from typing import Any, cast

import pytest

from embedge.runtime import BundleError, EmbedgeError
from embedge.runtime.encode import prefetch
from embedge.runtime.encode.prefetch import prefetched
from embedge.runtime.host import workers as workers_module
from embedge.runtime.sessions import pool as pool_module
from embedge.runtime.sessions import session_workers
from embedge.runtime.sessions.pool import GraphPool, OpenGraph
from embedge.runtime.sessions.session import GraphSession
from embedge.runtime.sessions.session_workers import RunSettings, SessionWorkers
from tests.helpers.interrupts import Interrupts, in_time, swallowed

SIZE = 10
FILES = tuple(
    module.__file__ for module in (pool_module, session_workers, prefetch, workers_module)
)


class Opener:
    """Stands for ONNX Runtime: sessions that are nothing but their number of threads."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, int]] = []
        self.broken = False

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.opened]

    def __call__(self, name: str, threads: int) -> GraphSession:
        if self.broken:
            raise BundleError("broken graph")
        self.opened.append((name, threads))
        return cast(GraphSession, SimpleNamespace(name=name, threads=threads))


def make_pool(**limits: Any) -> tuple[GraphPool, Opener]:
    opener = Opener()
    return GraphPool(opener, lambda _: SIZE, **limits), opener


def use(pool: GraphPool, *names: str) -> None:
    for name in names:
        with pool.use(name) as graph:
            session: Any = graph.session(1)
        assert session.name == name


def test_a_graph_is_opened_at_its_first_use_and_kept() -> None:
    pool, opener = make_pool()
    with pool.use("a"):
        assert opener.names == []
    use(pool, "a", "b", "a", "b")
    assert opener.names == ["a", "b"]


@pytest.mark.parametrize("limits", [{"max_graphs": 2}, {"memory_limit": 25}], ids=str)
def test_the_longest_unused_goes_first(limits: dict[str, int]) -> None:
    pool, opener = make_pool(**limits)
    use(pool, "a", "b", "a", "c")
    assert pool.names == ("a", "c")
    use(pool, "b")
    assert pool.names == ("c", "b")
    assert opener.names == ["a", "b", "c", "b"]


def test_a_graph_above_the_memory_limit_is_refused() -> None:
    pool, _ = make_pool(memory_limit=SIZE - 1)
    with pytest.raises(
        EmbedgeError, match=r"'a' and its weights take 10 bytes, above memory_limit"
    ):
        use(pool, "a")


def test_a_graph_in_use_is_not_closed_and_the_next_one_waits() -> None:
    pool, opener = make_pool(max_graphs=1)
    other = threading.Thread(target=use, args=(pool, "b"))

    with pool.use("a") as graph:
        graph.session(1)
        other.start()
        other.join(timeout=0.1)
        assert other.is_alive()
        assert pool.names == ("a",)
    other.join(timeout=10)
    assert not other.is_alive()
    assert opener.names == ["a", "b"]


def test_a_second_session_counts_and_closes_nobody() -> None:
    pool, _ = make_pool(memory_limit=35)
    use(pool, "a", "b")
    with pool.use("b") as unused:
        pass
    with pool.use("a") as graph:
        for _ in range(2):  # an interrupt may have kept the first answer from being used
            assert pool.reserve_second(graph)
            assert pool.bytes == 3 * SIZE
        assert not pool.reserve_second(unused)  # "b", unused, would have to go
    assert pool.names == ("b", "a")
    use(pool, "c")
    assert pool.names == ("a", "c")
    assert pool.bytes == 3 * SIZE
    use(pool, "b")  # and with "a" both of its sessions
    assert pool.names == ("c", "b")
    assert pool.bytes == 2 * SIZE


def test_without_a_limit_a_second_session_always_fits() -> None:
    pool, _ = make_pool(max_graphs=1)
    with pool.use("a") as graph:
        assert pool.reserve_second(graph)
    assert pool.names == ("a",)


def both(graph: OpenGraph) -> list[int]:
    """The threads of the sessions that a graph gives for runs of one thread, and of three."""
    return [graph.session(threads).threads for threads in (1, 3)]


def test_both_sessions_of_a_graph_are_opened_once_when_they_are_first_needed() -> None:
    pool, opener = make_pool(memory_limit=2 * SIZE)
    for _ in range(2):
        with pool.use("a") as graph:
            assert both(graph) == [1, 3]
    assert opener.opened == [("a", 1), ("a", 3)]


@pytest.mark.parametrize("first", [1, 3])
def test_without_room_the_first_session_does_the_work_of_both(first: int) -> None:
    pool, opener = make_pool(memory_limit=2 * SIZE)
    with pool.use("a") as graph:
        graph.session(first)
        with pool.use("b"):  # takes the room
            pass
        assert both(graph) == [first, first]
        assert opener.opened == [("a", first)]
        pool.close_unused()
        assert both(graph) == [1, 3]


def test_a_session_that_cannot_be_opened_can_be_tried_again_and_its_room_was_kept() -> None:
    pool, opener = make_pool(memory_limit=2 * SIZE)
    with pool.use("a") as graph:
        graph.session(1)
        opener.broken = True
        for _ in range(2):
            with pytest.raises(BundleError, match="broken graph"):
                graph.session(3)
            assert pool.bytes == 2 * SIZE
        opener.broken = False
        assert both(graph) == [1, 3]


def test_threads_that_want_the_same_graph_open_it_once() -> None:
    pool, opener = make_pool()
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        use(pool, "a")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert opener.names == ["a"]


@swallowed
@pytest.mark.parametrize("limits", [{"max_graphs": 1}, {"memory_limit": SIZE}], ids=str)
def test_an_interrupt_at_any_moment_leaves_no_graph_in_use(limits: dict[str, int]) -> None:
    for moment in itertools.count():
        pool, _ = make_pool(**limits)
        use(pool, "a")
        interrupts = Interrupts(moment, FILES)
        interrupts.during(lambda pool=pool: use(pool, "b", "a"))  # type: ignore[misc]
        assert all(graph.users == 0 for graph in pool._graphs.values())
        in_time(lambda pool=pool: use(pool, "a", "b"))  # type: ignore[misc]
        if not interrupts.hit:
            break
    assert moment > 20


@swallowed
def test_an_interrupt_of_batches_that_run_together_leaves_the_threads_working() -> None:
    workers = workers_module.Workers(2)
    settings = RunSettings(batch_tokens=1, single_thread=True, single_thread_tokens=0)

    def run(pool: GraphPool, found: list[int]) -> None:
        with pool.use("a") as graph:
            one = SessionWorkers(graph, settings, threads=2, workers=workers)
            with closing(one.run(range(7), lambda _, batch: batch, tokens=1)) as results:
                found.extend(result for _, result in results)

    for moment in itertools.count():
        (pool, _), found = make_pool(max_graphs=1), list[int]()
        interrupts = Interrupts(moment, FILES)
        interrupts.during(lambda pool=pool: run(pool, []))  # type: ignore[misc]
        in_time(lambda pool=pool, found=found: run(pool, found))  # type: ignore[misc]
        assert sorted(found) == list(range(7))
        if not interrupts.hit:
            break
    assert moment > 20


@swallowed
def test_an_interrupt_ends_what_is_prefetched() -> None:
    for moment in itertools.count():
        source = iter(range(4))
        interrupts = Interrupts(moment, FILES)

        def take(source: Any = source) -> None:
            with closing(prefetched(source)) as items:
                for _ in items:
                    pass

        in_time(lambda take=take, interrupts=interrupts: interrupts.during(take))  # type: ignore[misc]
        if not interrupts.hit:
            break
    assert moment > 20
