"""Alternating timing: every system once a round, see :mod:`embedge.runtime.tuning.turns`.

A time by itself says little on a shared machine; the ratio of two systems in the same round says a
lot. So ratios are made round by round and their median is quoted.

Of texts and pages one by one each is timed in several rounds, and all of them pass before any has its next turn: what
others do on the machine changes in between. What a limit is compared with is the 95th percentile of the slowest times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.tuning.turns import take_turns

__all__ = ["Times", "alternate", "one_by_one", "ratio", "spread"]

Times = NDArray[np.float64]
Runs = Mapping[str, Callable[[], object]]
Item = TypeVar("Item")


def alternate(
    runs: Runs,
    rounds: int,
    *,
    warm_up: int = 2,
    pause_s: float = 0.2,
    block_s: float = 0.05,
    seed: int = 0,
) -> dict[str, Times]:
    """Return the time of every run in every round, milliseconds, float64 ``[rounds]`` by name.

    Args:
        runs: what to time, by name.
        rounds: times each is run.
        warm_up: untimed rounds before them.
        pause_s: seconds of sleep before each turn.
        block_s: a turn repeats a short run for about as many seconds, see :func:`take_turns`.
        seed: of the orders.
    """
    lasted: dict[str, float] = {}
    turns = take_turns(runs, lasted, pause_s=pause_s, block_s=block_s, asleep_s=0.05, seed=seed)
    for _ in range(warm_up):
        next(turns)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        next(turns)
        for name, values in times.items():
            values.append(lasted[name] * 1000)
    return {name: np.array(values) for name, values in times.items()}


def one_by_one(
    runs: Mapping[str, Callable[[Item], object]],
    items: Sequence[Item],
    rounds: int,
    skip: int = 0,
) -> dict[str, Times]:
    """Return the time of each item alone in every round, milliseconds, float64 ``[rounds, items]`` by name.

    Args:
        runs: what to time, by name.
        items: what each is called with, all in turn before the next round.
        rounds: passes over the items.
        skip: untimed turns before the first.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for number, item in enumerate(items):
            calls = {name: functools.partial(run, item) for name, run in runs.items()}
            lasted = alternate(
                calls,
                1,
                warm_up=0 if turn or number else skip,
                pause_s=0.01,
                block_s=0,
                seed=turn * len(items) + number,
            )
            for name, values in times.items():
                values.extend(lasted[name])
    return {name: np.reshape(values, (rounds, len(items))) for name, values in times.items()}


def spread(times_ms: Times) -> dict[str, float]:
    """Return ``p50_ms`` and ``p95_ms`` of all times, and ``p95_slow_ms``, of the slowest time of each item.

    Args:
        times_ms: float64 ``[rounds, items]``.
    """
    p50, p95 = np.percentile(times_ms, [50, 95])
    slow = np.percentile(times_ms.max(axis=0), 95)
    return {"p50_ms": float(p50), "p95_ms": float(p95), "p95_slow_ms": float(slow)}


def ratio(slower_ms: Times, faster_ms: Times) -> float:
    """Return the median over rounds of ``slower / faster``: how many times as fast it is."""
    return float(np.median(slower_ms / faster_ms))
