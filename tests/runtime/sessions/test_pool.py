from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, cast

import pytest

from embedge.runtime import EmbedgeError
from embedge.runtime.encode import prefetch
from embedge.runtime.encode.prefetch import prefetched
from embedge.runtime.host import workers as workers_module
from embedge.runtime.sessions import pool as pool_module
from embedge.runtime.sessions import session_workers
from embedge.runtime.sessions.pool import GraphPool
from embedge.runtime.sessions.session_workers import SessionWorkers

SIZE = 10


@dataclass
class Maker:
    """Stands for the graphs: records what was made, and how each asks for a second session."""

    made: list[str] = field(default_factory=list)
    ask: dict[str, Callable[[], bool]] = field(default_factory=dict)

    def __call__(self, name: str, may_open_second: Callable[[], bool]) -> SessionWorkers:
        self.made.append(name)
        self.ask[name] = may_open_second
        return cast(SessionWorkers, f"graph of {name}")


def make_pool(**limits: Any) -> tuple[GraphPool, Maker]:
    maker = Maker()
    return GraphPool(maker, lambda _: SIZE, **limits), maker


def use(pool: GraphPool, *names: str) -> None:
    for name in names:
        with pool.use(name) as lanes:
            assert cast(str, lanes) == f"graph of {name}"


def test_a_graph_is_made_at_its_first_use_and_kept() -> None:
    pool, maker = make_pool()
    assert maker.made == []
    use(pool, "a", "b", "a", "b")
    assert maker.made == ["a", "b"]


@pytest.mark.parametrize("limits", [{"max_graphs": 2}, {"memory_limit": 25}], ids=str)
def test_the_longest_unused_goes_first(limits: dict[str, int]) -> None:
    pool, maker = make_pool(**limits)
    use(pool, "a", "b", "a", "c")
    assert pool.names == ("a", "c")
    use(pool, "b")
    assert pool.names == ("c", "b")
    assert maker.made == ["a", "b", "c", "b"]


def test_a_graph_above_the_memory_limit_is_refused() -> None:
    pool, _ = make_pool(memory_limit=SIZE - 1)
    with pytest.raises(
        EmbedgeError, match=r"'a' and its weights take 10 bytes, above memory_limit"
    ):
        use(pool, "a")


def test_a_graph_in_use_is_not_closed_and_the_next_one_waits() -> None:
    pool, maker = make_pool(max_graphs=1)
    other = threading.Thread(target=use, args=(pool, "b"))

    with pool.use("a"):
        other.start()
        other.join(timeout=0.1)
        assert other.is_alive()
        assert pool.names == ("a",)
    other.join(timeout=10)
    assert not other.is_alive()
    assert maker.made == ["a", "b"]


def test_a_second_session_counts_and_closes_nobody() -> None:
    pool, maker = make_pool(memory_limit=35)
    use(pool, "a", "b")

    with pool.use("a"):
        for _ in range(2):  # an interrupt may have kept the first answer from being used
            assert maker.ask["a"]()
            assert pool.bytes == 3 * SIZE
        assert not maker.ask["b"]()  # "b", unused, would have to go
    assert pool.names == ("b", "a")
    use(pool, "c")
    assert pool.names == ("a", "c")
    assert pool.bytes == 3 * SIZE
    use(pool, "b")  # and with "a" both of its sessions
    assert pool.names == ("c", "b")
    assert pool.bytes == 2 * SIZE


def test_without_a_limit_a_second_session_always_fits() -> None:
    pool, maker = make_pool(max_graphs=1)
    with pool.use("a"):
        assert maker.ask["a"]()
    assert pool.names == ("a",)


def test_threads_that_want_the_same_graph_make_it_once() -> None:
    pool, maker = make_pool()
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        use(pool, "a")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert maker.made == ["a"]


# An interrupt of a generator that is being closed goes nowhere, in Python as here.
swallowed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Interrupts:
    """Interrupts the calling thread at the n-th of the moments at which Python looks for signals.

    Those are the starts of functions and the ends of calls; ``hit`` says whether there were as many.
    """

    FILES = tuple(
        module.__file__ for module in (pool_module, session_workers, prefetch, workers_module)
    )

    def __init__(self, moment: int) -> None:
        self._left = moment
        self.hit = False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event == "c_call" or frame.f_code.co_filename not in self.FILES:
            return
        self._left -= 1
        if self._left < 0 and not self.hit:
            self.hit = True
            raise KeyboardInterrupt

    def during(self, work: Callable[[], object]) -> None:
        sys.setprofile(self)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)


def in_time(work: Callable[[], object]) -> None:
    """Does something in another thread, which must not wait for ever."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()


@swallowed
@pytest.mark.parametrize("limits", [{"max_graphs": 1}, {"memory_limit": SIZE}], ids=str)
def test_an_interrupt_at_any_moment_leaves_no_graph_in_use(limits: dict[str, int]) -> None:
    for moment in itertools.count():
        pool, _ = make_pool(**limits)
        use(pool, "a")
        interrupts = Interrupts(moment)
        interrupts.during(lambda pool=pool: use(pool, "b", "a"))  # type: ignore[misc]
        assert all(entry.users == 0 for entry in pool._entries.values())
        in_time(lambda pool=pool: use(pool, "a", "b"))  # type: ignore[misc]
        if not interrupts.hit:
            break
    assert moment > 20


@swallowed
def test_an_interrupt_of_batches_that_run_together_leaves_the_threads_working() -> None:
    workers = workers_module.Workers(2)

    def lanes() -> SessionWorkers:
        session = cast(Any, type("Session", (), {"threads": 1}))
        return SessionWorkers(lambda _: session, lambda: True, threads=2, workers=workers)

    def run(lanes: SessionWorkers, found: list[int]) -> None:
        with closing(lanes.run(range(7), lambda _, batch: batch, tokens=1)) as results:
            found.extend(result for _, result in results)

    for moment in itertools.count():
        one, found = lanes(), list[int]()
        interrupts = Interrupts(moment)
        interrupts.during(lambda one=one: run(one, []))  # type: ignore[misc]
        in_time(lambda one=one, found=found: run(one, found))  # type: ignore[misc]
        assert sorted(found) == list(range(7))
        if not interrupts.hit:
            break
    assert moment > 20


@swallowed
def test_an_interrupt_ends_what_is_made_prefetched() -> None:
    for moment in itertools.count():
        source = iter(range(4))
        interrupts = Interrupts(moment)

        def take(source: Any = source) -> None:
            with closing(prefetched(source)) as items:
                for _ in items:
                    pass

        in_time(lambda take=take, interrupts=interrupts: interrupts.during(take))  # type: ignore[misc]
        if not interrupts.hit:
            break
    assert moment > 20
