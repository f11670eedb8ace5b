"""Alternating timing: every system once a round, so that a busy machine is busy for all of them.

A time by itself says little on a shared machine; the ratio of two systems in the same round says a
lot. So ratios are made round by round and their median is quoted. The order is drawn anew for each
round, so that nobody always follows the same neighbour, whose threads may still spin and whose
weights fill the cache; a short pause before each run lets those threads fall asleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

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
        pause_s: seconds of sleep before each turn, as some runtimes' threads spin for a while; a
            short run (below 50 ms) is then run once untimed, so that all are timed with warm caches
            and awake threads.
        block_s: a turn repeats a short run for about as many seconds and takes the mean, as the
            first runs after another system's are slowed by what that one left; 0: one run.
        seed: of the orders.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    lasted = dict.fromkeys(names, 0.0)
    generator = np.random.default_rng(seed)
    for turn in range(warm_up + rounds):
        for name in generator.permutation(names).tolist():
            time.sleep(pause_s)
            if lasted[name] < 0.05:
                runs[name]()
            known = lasted[name] > 0 and turn > 0
            repeats = max(1, min(25, int(block_s / lasted[name]))) if known else 1
            start = time.perf_counter()
            for _ in range(repeats):
                runs[name]()
            lasted[name] = (time.perf_counter() - start) / repeats
            if turn >= warm_up:
                times[name].append(lasted[name] * 1000)
    return {name: np.array(values) for name, values in times.items()}


def percentiles(times_ms: Times) -> dict[str, float]:
    """Return ``p50_ms`` and ``p95_ms``."""
    p50, p95 = np.percentile(times_ms, [50, 95])
    return {"p50_ms": float(p50), "p95_ms": float(p95)}


def ratio(slower_ms: Times, faster_ms: Times) -> float:
    """Return the median over rounds of ``slower / faster``: how many times as fast it is."""
    return float(np.median(slower_ms / faster_ms))
