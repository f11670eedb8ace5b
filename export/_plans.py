"""From calibration statistics to the constants of int8 inputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedge.export._calibration import InputStatistics
from embedge.export._graph import Fold
from embedge.export._int8_form import InputPlan
from embedge.quant import _int8


def input_plan(statistics: InputStatistics, alpha: float) -> InputPlan:
    """The shift and smoothing of one Linear input.

    A norm with a bias takes both for free; one without, and a foldable producer, take the smoothing.
    Any other input would pay for a pass of its own and is left as it is; on the bounded ones (GELU)
    smoothing was measured to cost accuracy as well, as it multiplies the bound.

    Args:
        statistics: of the input, over the backbone's calibration run.
        alpha: SmoothQuant's α, see :func:`embedge.quant._int8.smoothing_scales`.
    """
    tap = statistics.tap
    low, high = statistics.low, statistics.high
    if tap.norm is not None:
        shift = None if tap.norm.rms else ((low + high) / 2).astype(np.float32)
        centre = np.float32(0) if shift is None else shift
        peak = np.maximum(np.abs(low - centre), np.abs(high - centre))
        return InputPlan(
            shift=shift, smooth=_int8.smoothing_scales(peak, statistics.weight_peak, alpha)
        )
    peak = np.maximum(np.abs(low), np.abs(high))
    if tap.fold is not None:
        peak, weight_peak = (_shared(p, tap.fold) for p in (peak, statistics.weight_peak))
        return InputPlan(smooth=_int8.smoothing_scales(peak, weight_peak, alpha), fold=tap.fold)
    return InputPlan()


def _shared(peak: NDArray[np.float32], fold: Fold) -> NDArray[np.float32]:
    """The largest of the channels that one producer channel feeds, for each of them."""
    if fold.groups is None:
        return peak
    kv_heads, repeat, head_size = fold.groups
    heads = peak.reshape(kv_heads, repeat, head_size).max(axis=1, keepdims=True)
    return np.broadcast_to(heads, (kv_heads, repeat, head_size)).reshape(-1).copy()
