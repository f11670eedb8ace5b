"""What calibration found for the inputs of int8 Linears; α is set in ``calibration/smoothing.py``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedge.export.graph.initializers import digest
from embedge.export.graph.values import FloatArray, ScaleSink


@dataclass(frozen=True, kw_only=True)
class SmoothingConstants:
    """Constants of one Linear input, the same for all tasks of a bundle.

    Attributes:
        shift: float32 ``[in]`` subtracted from the input, or ``None``.
        smooth: float32 ``[in]`` by which the input is divided, or ``None``.
        int4_smooth: what ``smooth`` is at int4, for an input that is shifted, or ``None``.
        sink: the producer that takes ``1 / smooth`` into its scales, or ``None``.
        outliers: int64, channels that are multiplied in float32; ``smooth`` makes them vanish among
            the others, or ``None``.
    """

    shift: FloatArray | None = None
    smooth: FloatArray | None = None
    int4_smooth: FloatArray | None = None
    sink: ScaleSink | None = None
    outliers: NDArray[np.int64] | None = None

    @property
    def digest(self) -> str:
        """Identifies the constants of int8 in initializer keys."""
        return digest(self.shift, self.smooth, self.outliers)


def producer_channels(smooth: FloatArray, sink: ScaleSink) -> FloatArray:
    """A consumer's per-channel smoothing as one value per producer channel.

    Under grouped-query attention one value channel feeds a channel of several query heads; calibration
    gives those one common value.
    """
    if sink.groups is None:
        return smooth
    kv_heads, repeat, head_size = sink.groups
    shared: FloatArray = smooth.reshape(kv_heads, repeat, head_size)[:, 0].reshape(-1)
    return shared
