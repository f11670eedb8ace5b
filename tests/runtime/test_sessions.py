from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from embedge.runtime import EmbedgeError
from embedge.runtime._session import GraphSession, SessionPool

SIZE = 10


@dataclass
class Opener:
    """Stands for the graphs: records what was opened, fails for "broken"."""

    opened: list[str] = field(default_factory=list)

    def __call__(self, name: str) -> GraphSession:
        self.opened.append(name)
        if name == "broken":
            raise EmbedgeError("broken graph")
        return cast(GraphSession, f"session of {name}")


def make_pool(**limits: Any) -> tuple[SessionPool, Opener]:
    opener = Opener()
    return SessionPool(opener, lambda _: SIZE, **limits), opener


def use(pool: SessionPool, *names: str) -> None:
    for name in names:
        with pool.use(name):
            pass


def test_a_session_is_opened_at_its_first_use_and_kept() -> None:
    pool, opener = make_pool()
    assert opener.opened == []
    use(pool, "a", "b", "a", "b")
    assert opener.opened == ["a", "b"]


@pytest.mark.parametrize("limits", [{"max_sessions": 2}, {"memory_limit": 25}], ids=str)
def test_the_longest_unused_goes_first(limits: dict[str, int]) -> None:
    pool, opener = make_pool(**limits)
    use(pool, "a", "b", "a", "c")
    assert pool.names == ("a", "c")
    use(pool, "b")
    assert pool.names == ("c", "b")
    assert opener.opened == ["a", "b", "c", "b"]


def test_a_session_above_the_memory_limit_is_refused() -> None:
    pool, _ = make_pool(memory_limit=SIZE - 1)
    with pytest.raises(
        EmbedgeError, match=r"'a' and its weights take 10 bytes, above memory_limit"
    ):
        use(pool, "a")


def test_a_session_in_use_is_not_closed_and_the_next_one_waits() -> None:
    pool, opener = make_pool(max_sessions=1)
    other = threading.Thread(target=use, args=(pool, "b"))
    with pool.use("a"):
        other.start()
        other.join(timeout=0.1)
        assert other.is_alive()
        assert pool.names == ("a",)
    other.join(timeout=10)
    assert not other.is_alive()
    assert opener.opened == ["a", "b"]


def test_one_that_cannot_be_opened_leaves_room_and_can_be_tried_again() -> None:
    pool, opener = make_pool(max_sessions=1)
    for _ in range(2):
        with pytest.raises(EmbedgeError, match="broken graph"):
            use(pool, "broken")
    use(pool, "a")
    assert opener.opened == ["broken", "broken", "a"]


def test_threads_that_want_the_same_session_open_it_once() -> None:
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
    assert opener.opened == ["a"]
