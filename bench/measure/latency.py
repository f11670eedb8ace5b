"""Alternating timing: every system once a round, see :mod:`embedge.runtime.tuning.turns`.

A time by itself says little on a shared machine; the ratio of two systems in the same round says a
lot. So ratios are made round by round and their median is quoted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.tuning.turns import take_turns

__all__ = ["Times", "alternate", "percentiles", "ratio"]

Times = NDArray[np.float64]
Runs = Mapping[str, Callable[[], object]]


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


def percentiles(times_ms: Times) -> dict[str, float]:
    """Return ``p50_ms`` and ``p95_ms``."""
    p50, p95 = np.percentile(times_ms, [50, 95])
    return {"p50_ms": float(p50), "p95_ms": float(p95)}


def ratio(slower_ms: Times, faster_ms: Times) -> float:
    """Return the median over rounds of ``slower / faster``: how many times as fast it is."""
    return float(np.median(slower_ms / faster_ms))
