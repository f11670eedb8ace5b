"""Pictures of random pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIZES = [(8, 8), (4, 4), (16, 8), (8, 16), (12, 20), (8, 8), (4, 64), (28, 24), (5, 9), (8, 8)]


def picture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    generator = np.random.default_rng([seed, width, height])
    return generator.integers(0, 256, (height, width, 3)).astype(np.uint8)


def pictures() -> list[NDArray[np.uint8]]:
    return [picture(*size, seed) for seed, size in enumerate(SIZES)]
