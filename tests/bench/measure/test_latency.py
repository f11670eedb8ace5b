"""Every system runs once a round, in turns; ratios are made round by round."""

from __future__ import annotations

import numpy as np
import pytest

from embedge.bench.errors import BenchError
from embedge.bench.measure.latency import alternate, one_by_one, ratio, spread
from embedge.bench.options import Shape


def test_everybody_runs_once_a_round_in_an_order_that_changes() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}

    times = alternate(runs, 30, warm_up=0, pause_s=0, block_s=0)

    assert order[::2] == order[1::2]  # a short run is run once untimed before it is timed
    rounds = ["".join(order[i : i + 6 : 2]) for i in range(0, len(order), 6)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    assert {name: len(values) for name, values in times.items()} == {"a": 30, "b": 30, "c": 30}


def test_warm_up_rounds_are_not_timed() -> None:
    calls: list[int] = []

    times = alternate({"a": lambda: calls.append(1)}, 2, warm_up=3, pause_s=0, block_s=0)

    assert len(times["a"]) == 2
    assert len(calls) == 10


def test_a_ratio_is_the_median_of_rounds_and_ignores_what_slows_both() -> None:
    fast = np.array([1.0, 1.0, 100.0, 1.0, 1.0])

    assert ratio(fast * 3, fast) == 3.0
    assert ratio(fast, fast * 2) == 0.5


def test_percentiles_are_of_all_times_and_of_each_texts_slowest() -> None:
    times = np.stack([np.arange(101.0), 2 * np.arange(101.0)[::-1]])
    slowest = np.maximum(np.arange(101.0), 2 * np.arange(101.0)[::-1])

    found = spread(times)

    assert found["p50_ms"] == np.median(times)
    assert found["p95_ms"] == np.percentile(times, 95)
    assert found["p95_slow_ms"] == np.percentile(slowest, 95) > found["p95_ms"]


def test_every_item_has_its_turn_before_the_next_round() -> None:
    seen: list[str] = []

    times = one_by_one({"a": seen.append}, ["x", "y", "z"], 2)

    assert times["a"].shape == (2, 3)
    assert "".join(seen[::2]) == "xyzxyz"  # a short run is run once untimed before it is timed


def test_a_shape_is_read_from_its_name() -> None:
    assert Shape.parse("8x64") == Shape(batch=8, tokens=64)
    assert Shape.parse("8x64").name == "8x64"
    for wrong in ("8", "x64", "8x", "0x64", "8x-1", "8x64x2"):
        with pytest.raises(BenchError, match=f"--shapes {wrong}: expected BATCHxTOKENS"):
            Shape.parse(wrong)


def test_only_short_single_texts_get_more_rounds() -> None:
    assert [Shape.parse(s).rounds(5) for s in ("1x128", "8x64", "1x2048")] == [20, 5, 5]
