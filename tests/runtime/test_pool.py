from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from embedge.runtime import EmbedgeError
from embedge.runtime._lanes import Lanes
from embedge.runtime._pool import GraphPool

SIZE = 10


@dataclass
class Maker:
    """Stands for the graphs: records what was made, and how each asks for a second session."""

    made: list[str] = field(default_factory=list)
    ask: dict[str, Callable[[], bool]] = field(default_factory=dict)

    def __call__(self, name: str, may_open_second: Callable[[], bool]) -> Lanes:
        self.made.append(name)
        self.ask[name] = may_open_second
        return cast(Lanes, f"graph of {name}")


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
        assert maker.ask["a"]()
        assert pool.bytes == 3 * SIZE
        assert not maker.ask["a"]()  # "b", unused, would have to go
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
