"""Batches of training rows without end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TypeVar

__all__ = ["batches"]

Item = TypeVar("Item")


def batches(rows: list[Item], size: int, seed: str) -> Iterator[list[Item]]:
    """Yield batches of shuffled rows, again and again; of fewer rows than a batch has, all of them.

    Args:
        rows: at least one; shuffled in place.
        size: of a batch.
        seed: of the order.
    """
    generator = random.Random(seed)
    while True:
        generator.shuffle(rows)
        for start in range(0, max(1, len(rows) - size + 1), size):
            yield rows[start : start + size]
