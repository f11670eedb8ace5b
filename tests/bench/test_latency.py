"""Every system runs once a round, in turns; ratios are made round by round."""

from __future__ import annotations

import numpy as np

from embedge.bench._latency import alternate, percentiles, ratio


def test_runs_alternate_and_the_first_of_a_round_changes() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}

    times = alternate(runs, 3, warm_up=0, pause_s=0)

    # A short run is run once untimed before it is timed.
    assert order == [name for name in "abcbcacab" for _ in range(2)]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_warm_up_rounds_are_not_timed() -> None:
    calls: list[int] = []

    times = alternate({"a": lambda: calls.append(1)}, 2, warm_up=3, pause_s=0)

    assert len(times["a"]) == 2
    assert len(calls) == 10


def test_a_ratio_is_the_median_of_rounds_and_ignores_what_slows_both() -> None:
    fast = np.array([1.0, 1.0, 100.0, 1.0, 1.0])

    assert ratio(fast * 3, fast) == 3.0
    assert ratio(fast, fast * 2) == 0.5


def test_percentiles_are_in_milliseconds() -> None:
    assert percentiles(np.arange(101.0)) == {"p50_ms": 50.0, "p95_ms": 95.0}
