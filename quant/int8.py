"""int8: symmetric weights per output channel, and the smoothing that moves outliers into them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedge.quant.rotation import rotate_blocks

QMAX = 127
PAIR_SUM = 128  # 255 · 128 fits 16 bits: two products of uint8 and int8 do where the int8 values add up to it
_LEAST_SMOOTHING = 0.25
_CACHED_ELEMENTS = 1 << 16  # 256 KiB of float32 at a time, which a core's cache holds


@dataclass(frozen=True)
class QuantizedRows:
    """A quantized matrix and what it lost.

    Attributes:
        values: int8 ``[out, in]`` within ±127.
        scales: float32 ``[out]``; ``values * scales[:, None]`` approximates the matrix.
        sqnr_db: signal to quantization noise in decibels, inf when exact.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    sqnr_db: float


def quantize_rows(
    weight: NDArray[np.float32],
    smooth: NDArray[np.float32] | None = None,
    *,
    pairs: bool = False,
) -> QuantizedRows:
    """Quantize a matrix symmetrically, one scale per row (output channel).

    Args:
        weight: float32 ``[out, in]``; not changed.
        smooth: float32 ``[in]`` by which the columns are multiplied first, or ``None``. The noise
            is that of the weight without it.
        pairs: keep the sum of columns 2i and 2i + 1 within ±:data:`PAIR_SUM`, see :func:`row_scales`.

    Returns:
        The result; a row of zeros has scale 1.
    """
    rows, columns = weight.shape
    values = np.empty((rows, columns), np.int8)
    scales = np.empty(rows, np.float32)
    noise = signal = 0.0
    step = max(1, _CACHED_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        part = weight[start : start + step]
        scaled = part if smooth is None else part * smooth
        scale = row_scales(scaled, pairs=pairs)
        level = scaled / scale[:, None]
        np.rint(level, out=level)
        np.clip(level, -QMAX, QMAX, out=level)
        if pairs:
            _keep_pairs(level)
        values[start : start + step] = level
        scales[start : start + step] = scale
        level *= scale[:, None]
        if smooth is not None:
            level /= smooth
        level -= part
        noise += float(np.einsum("ij,ij->", level, level, dtype=np.float64))
        signal += float(np.einsum("ij,ij->", part, part, dtype=np.float64))
    return QuantizedRows(values, scales, decibels(signal, noise))


def row_scales(weight: NDArray[np.float32], *, pairs: bool = False) -> NDArray[np.float32]:
    """The scale of each row: its largest magnitude becomes 127; a row of zeros has 1.

    With ``pairs`` the sum of columns 2i and 2i + 1 becomes :data:`PAIR_SUM` at most. The x86-64 instruction
    ``vpmaddubsw`` adds the products of such a pair in 16 bits: 255 · 128 fits, 255 · (127 + 127) does not. A
    pair's sum is √2 times as wide as a value where values are independent, so a row keeps half a bit less;
    weights of 7 bits, which fit too, would keep a whole one less.

    Args:
        weight: float32 ``[out, in]``.
        pairs: whether sums of pairs are bounded.

    Returns:
        float32 ``[out]``.
    """
    step = np.abs(weight).max(axis=1, initial=0.0) / QMAX
    if pairs:
        sums = weight[:, :-1:2] + weight[:, 1::2]
        step = np.maximum(step, np.abs(sums).max(axis=1, initial=0.0) / PAIR_SUM)
    return np.where(step > 0, step, 1.0).astype(np.float32)


def _keep_pairs(levels: NDArray[np.float32]) -> None:
    """Takes back, in place, what rounding adds to the sum of a pair beyond :data:`PAIR_SUM`."""
    first, second = levels[:, :-1:2], levels[:, 1::2]
    np.clip(second, -PAIR_SUM - first, PAIR_SUM - first, out=second)


def decibels(signal: float, noise: float) -> float:
    """``10·log10(signal / noise)``: inf without noise, -inf without signal."""
    if noise == 0:
        return float("inf")
    return 10 * math.log10(signal / noise) if signal > 0 else float("-inf")


def smoothing_scales(
    activation_peak: NDArray[np.float32], weight_peak: NDArray[np.float32], alpha: float
) -> NDArray[np.float32]:
    """Per-channel divisors of a Linear's input (SmoothQuant, arXiv 2211.10438, equation 4).

    Args:
        activation_peak: float32 ``[in_features]``, largest magnitude of every input channel.
        weight_peak: float32 ``[in_features]``, largest magnitude of every weight row.
        alpha: 0 leaves the difficulty in the activations, 1 moves all of it into the weights.

    Returns:
        float32 ``[in_features]``, about geometric mean 1. Channels that never fire keep 1. The
        smallest is bounded: a channel that calibration saw little of must not blow up on other texts.
    """
    activation = activation_peak.astype(np.float64)
    weight = np.maximum(weight_peak.astype(np.float64), 1e-8)
    alive = activation > 1e-8
    scales = np.ones_like(activation)
    scales[alive] = activation[alive] ** alpha / weight[alive] ** (1 - alpha)
    if alive.any():
        scales[alive] /= np.exp(np.log(scales[alive]).mean())
    result: NDArray[np.float32] = np.clip(scales, _LEAST_SMOOTHING, 1e3).astype(np.float32)
    return result


def search_smoothing(
    inputs: NDArray[np.float32],
    peak: NDArray[np.float32],
    weights: Sequence[NDArray[np.float32]],
    alphas: Sequence[float],
    rotation: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Choose SmoothQuant's α for a Linear input by the noise that both roundings are expected to make.

    Rounding to a step ``s`` makes noise of variance ``s²/12``. A row of inputs brings its own into every
    output, ``step² · ‖W'‖²``, and the weights' rows theirs, ``‖x'‖² · Σ step²``; both are known without a
    matmul. Rows count alike, each relative to the power of its output. A row's step is its largest
    magnitude over 127, once its blocks are rotated.

    Args:
        inputs: float32 ``[rows, in]``, a sample.
        peak: float32 ``[in]``, largest magnitude of every channel.
        weights: float32 ``[in, out]`` of the Linears that read the input.
        alphas: candidates.
        rotation: by which blocks of the inputs and of the weights are multiplied before, see
            :func:`embedge.quant.rotation.block_rotation`, or ``None``.

    Returns:
        float32 ``[in]`` divisors, the best of the candidates' and of none at all.
    """
    weight_peak = np.max([np.abs(w).max(axis=1) for w in weights], axis=0)
    power = np.zeros(len(inputs), np.float64)
    for weight in weights:
        power += np.square(inputs @ weight).sum(axis=1, dtype=np.float64)
    rows = 1.0 / np.maximum(power, power.mean() * 1e-6 + 1e-30)
    best = np.ones(inputs.shape[1], np.float32)
    least = _expected_noise(inputs, weights, best, rows, rotation)
    for alpha in alphas:
        smooth = smoothing_scales(peak, weight_peak, alpha)
        noise = _expected_noise(inputs, weights, smooth, rows, rotation)
        if noise < least:
            best, least = smooth, noise
    return best


def _expected_noise(
    inputs: NDArray[np.float32],
    weights: Sequence[NDArray[np.float32]],
    smooth: NDArray[np.float32],
    importance: NDArray[np.float64],
    rotation: NDArray[np.float32] | None,
) -> float:
    """The noise of :func:`search_smoothing` up to a factor, summed over rows by their importance."""
    input_steps = np.zeros(len(inputs), np.float64)
    input_power = np.zeros(len(inputs), np.float64)
    chunk = max(1, _CACHED_ELEMENTS // inputs.shape[1])
    for start in range(0, len(inputs), chunk):
        part = inputs[start : start + chunk] / smooth
        if rotation is not None:
            part = rotate_blocks(part, rotation)
        input_steps[start : start + chunk] = np.abs(part).max(axis=1)
        input_power[start : start + chunk] = np.einsum("ij,ij->i", part, part)
    noise = 0.0
    block = 1 if rotation is None else len(rotation)
    for weight in weights:
        peaks = np.zeros(weight.shape[1], np.float32)
        power = 0.0
        chunk = max(1, _CACHED_ELEMENTS // weight.shape[1] // block) * block
        for start in range(0, len(weight), chunk):
            part = weight[start : start + chunk] * smooth[start : start + chunk, None]
            if rotation is not None:
                part = np.matmul(rotation.T, part.reshape(-1, block, part.shape[1]))
                part = part.reshape(-1, weight.shape[1])
            np.maximum(peaks, np.abs(part).max(axis=0), out=peaks)
            power += float(np.einsum("ij,ij->", part, part, dtype=np.float64))
        weight_steps = float(np.square(peaks, dtype=np.float64).sum())
        noise += float(importance @ (np.square(input_steps) * power + input_power * weight_steps))
    return noise
