"""Random tensors of a model whose residual stream has a few channels that are many times larger than the others."""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
OUTLIERS = 6
LARGEST = 50.0  # of the outlier channels; the smallest is a quarter of it
ENERGY = 0.4  # of all outlier channels behind a norm, relative to that of the others
NOISE = 0.25  # of what varies in an outlier channel, relative to its size


class Outliers:
    """The channels that are larger than others, and draws of tensors that have or damp them.

    Args:
        width: channels of the residual stream.
        seed: of all values.
    """

    def __init__(self, width: int, seed: int) -> None:
        self.width, self.seed = width, seed
        generator = self.generator("outliers")
        self.channels = np.sort(generator.choice(width, OUTLIERS, replace=False))
        self.sizes = np.geomspace(LARGEST / 4, LARGEST, OUTLIERS).astype(np.float32)
        self.shifts = self.sizes * generator.choice(np.array([-1, 1], np.float32), OUTLIERS)
        rest = width - OUTLIERS
        self.damping = math.sqrt(ENERGY * rest / OUTLIERS) / self.sizes
        # by what a norm divides the stream, whose other channels have size 1
        self.norm = math.sqrt((rest + float(np.sum(self.sizes**2))) / width)

    def soften(self, factor: float) -> None:
        """Make the outlier channels smaller, as they are where norms follow the sum."""
        self.sizes /= np.float32(factor)
        self.shifts /= np.float32(factor)
        self.damping *= factor

    def generator(self, name: str) -> np.random.Generator:
        """Random numbers of a tensor, the same whatever else is made."""
        return np.random.Generator(np.random.SFC64([self.seed, zlib.crc32(name.encode())]))

    def draw(self, name: str, shape: tuple[int, ...], std: float = 1.0) -> Floats:
        """Normally distributed values."""
        values: Floats = self.generator(name).standard_normal(shape, np.float32)
        values *= np.float32(std)
        return values

    def table(self, name: str, shape: tuple[int, ...], scale: float = 1.0) -> Floats:
        """Rows of size 1 with the outlier channels, times ``scale``."""
        rows = self.draw(name, shape)
        rows[:, self.channels] = rows[:, self.channels] * (NOISE * self.sizes) + self.shifts
        rows *= np.float32(scale)
        return rows

    def writer(self, name: str, shape: tuple[int, ...], size: float) -> Floats:
        """A Linear that adds ``size`` to the stream, and its share to the outlier channels."""
        weight = self.draw(name, shape, size / math.sqrt(shape[1]))
        weight[self.channels] *= (NOISE * self.sizes)[:, None]
        return weight

    def reader_norm(self, name: str) -> Floats:
        """Weights of a norm that damps the outlier channels."""
        weight = self.draw(name, (self.width,), 0.2) + 1
        weight[self.channels] *= self.damping
        return weight

    def reader_gain(self, inputs: int) -> float:
        """The size of a Linear's weights that makes outputs of size 1 behind such a norm."""
        return self.norm / math.sqrt((1 + ENERGY) * inputs)
