"""Timing in turns: every run once a round, so that a busy machine is busy for all of them.

The order is drawn anew for each round, so that nobody always follows the same neighbour, whose threads
may still spin and whose weights fill the cache; a short pause before each run lets those threads fall asleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar

import numpy as np

__all__ = ["seconds_of", "take_turns"]

Key = TypeVar("Key", bound=Hashable)
_MOST_REPEATS = 25


def take_turns(
    runs: Mapping[Key, Callable[[], object]],
    lasted: dict[Key, float],
    *,
    pause_s: float,
    block_s: float,
    asleep_s: float,
    seed: int = 0,
) -> Iterator[None]:
    """Run everything once a round, round after round without end.

    Args:
        runs: what to time, by any key.
        lasted: seconds of each run, where it is known already; after a round that round's.
        pause_s: seconds of sleep before each turn, as some runtimes' threads spin for a while.
        block_s: a turn repeats a short run for about as many seconds and takes the mean, as the first
            runs after another's are slowed by what that one left; 0: one run.
        asleep_s: a shorter run is run once untimed first, so that all are timed with warm caches and
            awake threads.
        seed: of the orders.
    """
    keys, generator = list(runs), np.random.default_rng(seed)
    while True:
        for place in generator.permutation(len(keys)):
            key = keys[place]
            known = lasted.get(key, 0.0)
            time.sleep(pause_s)
            if known < asleep_s:
                runs[key]()
            repeats = max(1, min(_MOST_REPEATS, int(block_s / known))) if known else 1
            lasted[key] = seconds_of(runs[key], repeats)
        yield


def seconds_of(run: Callable[[], object], repeats: int = 1) -> float:
    """Return the mean seconds of a run."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats
