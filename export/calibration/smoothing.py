"""SmoothQuant over a model: from calibration statistics to the constants of int8 inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedge.export.calibration.layers import calibrate
from embedge.export.calibration.statistics import InputStatistics
from embedge.export.calibration.tokens import TokenBatch
from embedge.export.graph.architecture import Architecture
from embedge.export.graph.values import ScaleSink
from embedge.export.schemes.smoothing_constants import SmoothingConstants
from embedge.export.weights.rotated import RotatedWeights
from embedge.export.weights.tensors import Weights
from embedge.quant import int8
from embedge.quant.rotation import block_rotation

ALPHA = 0.7  # SmoothQuant's α; measured on MiniLM: 0.4 … 0.7 differ little, 0.7 is best
INT4_ALPHA = 0.5  # at int4, where weights lose more than activations (lab note 60)
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # tried for each input of a rotated model
OUTLIER_RATIO = 4.0
MOST_OUTLIERS = 16
STREAM_RATIO = 8.0


def smoothing_constants(
    architecture: Architecture,
    base: Weights,
    batches: Sequence[TokenBatch],
    *,
    scratch: Path,
    report: Callable[[int], None],
) -> dict[tuple[str, ...], SmoothingConstants]:
    """Shift and smoothing of every Linear input, by its Linears, from the backbone without an adapter.

    They are the same for all tasks, so that what adapters leave alone stays one tensor for all.

    Args:
        architecture: the model.
        base: the backbone's tensors.
        batches: calibration tokens; none: no constants.
        scratch: folder for a layer's weights.
        report: takes the number of each layer that was run.
    """
    constants: dict[tuple[str, ...], SmoothingConstants] = {}
    if not batches:
        return constants
    rotated = isinstance(base, RotatedWeights)
    passes = calibrate(
        architecture,
        base,
        batches,
        scratch=scratch,
        wants_sample=lambda group: rotated and group.gated,
    )
    for index, statistics in passes:
        report(index + 1)
        for value in statistics.values():
            of = rotated_constants(value) if rotated else plain_constants(value)
            constants[value.group.labels] = of
    return constants


def rotated_constants(statistics: InputStatistics) -> SmoothingConstants:
    """The constants of one Linear input of a rotated model.

    Only what a gated MLP multiplies is left with outliers: its channels are smoothed as far as it pays,
    and those that are far above a usual row's largest value in single tokens are set apart. Smoothing a
    rotated stream, or the mixed values of attention, gained nothing (measured, lab note 19).

    Args:
        statistics: of the input, over the rotated backbone's calibration run.
    """
    sink, sample = statistics.group.sink, statistics.sample
    if not statistics.group.gated or not sample:
        return SmoothingConstants()
    inputs = np.concatenate(sample)
    peak = np.maximum(np.abs(statistics.low), np.abs(statistics.high))
    usual = float(np.median(np.abs(inputs).max(axis=1)))
    outliers = _largest(peak, OUTLIER_RATIO * usual)
    weights, rest = statistics.matrices, peak
    if len(outliers):
        inputs[:, outliers] = 0
        rest = peak.copy()
        rest[outliers] = 0
        weights = [weight.copy() for weight in weights]
        for weight in weights:
            weight[outliers] = 0
    smooth = int8.search_smoothing(inputs, rest, weights, ALPHAS, block_rotation(len(peak)))
    if not len(outliers):
        return SmoothingConstants(smooth=smooth, sink=sink)
    smooth[outliers] = peak[outliers] / np.float32(usual * 1e-4)
    return SmoothingConstants(smooth=smooth, sink=sink, outliers=outliers)


def plain_constants(statistics: InputStatistics) -> SmoothingConstants:
    """The shift and smoothing of one Linear input of a model that is not rotated.

    The shift is the mean: what it leaves out, ``W·shift``, joins the bias with the exact weight.
    A norm with a bias takes both for free; one without, and a foldable producer, take the smoothing.
    Any other input would pay for a pass of its own and is left as it is; on the bounded ones (GELU)
    smoothing was measured to cost accuracy as well, as it multiplies the bound. Of a residual stream that a
    Linear reads as it is, the channels that are large in all tokens are set apart.

    Args:
        statistics: of the input, over the backbone's calibration run.
    """
    group = statistics.group
    low, high = statistics.low, statistics.high
    if group.value.norm is not None:
        mean = (statistics.total / statistics.rows).astype(np.float32)
        shift = None if group.value.norm.rms else mean
        centre = np.float32(0) if shift is None else shift
        peak = np.maximum(np.abs(low - centre), np.abs(high - centre))
        smooth, int4_smooth = (
            int8.smoothing_scales(peak, statistics.weight_peak, alpha)
            for alpha in (ALPHA, INT4_ALPHA)
        )
        return SmoothingConstants(
            shift=shift, smooth=smooth, int4_smooth=None if shift is None else int4_smooth
        )
    peak = np.maximum(np.abs(low), np.abs(high))
    if group.sink is not None:
        peak, weight_peak = (_shared(p, group.sink) for p in (peak, statistics.weight_peak))
        return SmoothingConstants(
            smooth=int8.smoothing_scales(peak, weight_peak, ALPHA), sink=group.sink
        )
    if group.gated or group.value.lower_bound is not None:
        return SmoothingConstants()
    usual = float(np.median(peak))
    outliers = _largest(peak, STREAM_RATIO * usual)
    if not len(outliers):
        return SmoothingConstants()
    smooth = np.ones_like(peak)
    smooth[outliers] = peak[outliers] / np.float32(max(usual, 1e-30) * 1e-4)
    return SmoothingConstants(smooth=smooth, outliers=outliers)


def _largest(peak: NDArray[np.float32], bound: float) -> NDArray[np.int64]:
    """The channels above a bound, ascending, the largest of them where there are many."""
    above = np.flatnonzero(peak > bound)
    return np.sort(above[np.argsort(-peak[above], kind="stable")][:MOST_OUTLIERS]).astype(np.int64)


def _shared(peak: NDArray[np.float32], sink: ScaleSink) -> NDArray[np.float32]:
    """The largest of the channels that one producer channel feeds, for each of them."""
    if sink.groups is None:
        return peak
    kv_heads, repeat, head_size = sink.groups
    heads = peak.reshape(kv_heads, repeat, head_size).max(axis=1, keepdims=True)
    return np.broadcast_to(heads, (kv_heads, repeat, head_size)).reshape(-1).copy()
