"""int8: symmetric weights per output channel, and the smoothing that moves outliers into them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

QMAX = 127
_LEAST_SMOOTHING = 0.25
_CHUNK_ELEMENTS = 4 * 1024 * 1024  # bounds the float temporaries of one step to 16 MiB


def quantize_columns(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize a matrix symmetrically, one scale per column (output channel).

    Args:
        weight: float32 ``[in_features, out_features]``.

    Returns:
        ``(values, scales)``: int8 ``[in_features, out_features]`` within ±127 and float32
        ``[out_features]``, so that ``values * scales`` approximates ``weight``. A column of zeros
        has scale 1.
    """
    peak = np.abs(weight).max(axis=0, initial=0.0)
    scales = np.where(peak > 0, peak / QMAX, 1.0).astype(np.float32)
    values = np.empty(weight.shape, np.int8)
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        np.clip(np.rint(weight[rows] / scales), -QMAX, QMAX, out=values[rows], casting="unsafe")
    return values, scales


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
