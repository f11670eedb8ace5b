"""Tensors computed ahead come in order, within the limit, and their errors are not lost."""

from __future__ import annotations

import threading
import time

import pytest

from embedge.export.writing import parallel
from embedge.export.writing.parallel import in_order


def test_results_come_in_order_though_later_ones_finish_first() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item % 2 == 0 else 0)
        return item * 10

    assert list(in_order(range(9), slow_first, cost=lambda item: 1)) == [i * 10 for i in range(9)]


def test_costs_in_the_making_stay_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "available_cores", lambda: 4)
    lock, at_once, seen = threading.Lock(), [0], []

    def compute(item: int) -> int:
        with lock:
            at_once[0] += item
            seen.append(at_once[0])
        time.sleep(0.005)
        with lock:
            at_once[0] -= item
        return item

    costs = [3, 5, 12, 4, 4, 2, 9, 1]
    assert list(in_order(costs, compute, cost=lambda item: item, limit=10)) == costs
    assert max(seen) == 12  # alone, as nothing else fits beside it
    assert sorted(seen)[-2] <= 10


def test_an_error_is_raised_where_its_result_would_come() -> None:
    def fails_at_three(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = in_order(range(6), fails_at_three, cost=lambda item: 1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
