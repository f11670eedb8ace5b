from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing

import pytest

from embedge.runtime.encode.prefetch import prefetched
from tests.helpers.threads import all_ended, workers


@pytest.fixture(autouse=True)
def _ended_afterwards() -> Iterator[None]:
    before = workers()
    yield
    assert all_ended(before)


class Source:
    """Numbers from 0, which say when and by whom they were made."""

    def __init__(self, count: int, *, fails_at: int | None = None) -> None:
        self.made: list[int] = []
        self.makers: list[threading.Thread] = []
        self.changed = threading.Condition()
        self.items = self._items(count, fails_at)

    def _items(self, count: int, fails_at: int | None) -> Iterator[int]:
        for number in range(count):
            if number == fails_at:
                raise ValueError(f"number {number} cannot be made")
            with self.changed:
                self.made.append(number)
                self.makers.append(threading.current_thread())
                self.changed.notify_all()
            yield number

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.made) >= count, timeout=10)


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_items_come_in_their_order(count: int) -> None:
    assert list(prefetched(Source(count).items)) == list(range(count))


@pytest.mark.slow
def test_the_next_item_is_made_while_one_is_in_use_and_no_other() -> None:
    source = Source(5)
    with closing(prefetched(source.items)) as items:
        for number in items:
            source.wait_for(min(number + 2, 5))
            assert len(source.made) <= number + 2
    others = {maker for maker in source.makers if maker is not threading.main_thread()}
    assert source.makers[0] is threading.main_thread()
    assert len(others) == 1


@pytest.mark.slow
def test_an_error_comes_in_the_place_of_its_item() -> None:
    source = Source(5, fails_at=3)
    found: list[int] = []
    with pytest.raises(ValueError, match="number 3 cannot be made"):
        found.extend(prefetched(source.items))
    assert found == [0, 1, 2]


@pytest.mark.slow
def test_an_error_of_the_loop_leaves_no_thread() -> None:
    source = Source(1000)

    def fail_at_2() -> None:
        with closing(prefetched(source.items)) as items:
            for number in items:
                if number == 2:
                    raise KeyError(number)

    with pytest.raises(KeyError):
        fail_at_2()
    assert len(source.made) <= 4


@pytest.mark.slow
def test_an_item_in_use_is_held_by_its_user_alone() -> None:
    class Item:
        pass

    with closing(prefetched(Item() for _ in range(4))) as items:
        for item in items:
            watched = weakref.ref(item)
            del item
            gc.collect()
            assert watched() is None
