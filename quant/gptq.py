"""GPTQ: round a weight column by column, passing each rounding error on to the columns still to come.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, with the grid of each block chosen when the block is reached, from
the weights as the errors so far have left them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from embedge.quant import int4, int8

Grid = tuple[NDArray[np.float32], NDArray[np.float32] | np.float32, int, int]
"""Scales and zero points of the output channels, and the lowest and highest level."""

_SPAN_COLUMNS = 256  # columns after which errors are passed on to all that follow
_DAMP = 0.01  # share of the mean diagonal added to it (the paper's value)


def inverse_factor(hessian: NDArray[np.float32]) -> NDArray[np.float32]:
    """Upper Cholesky factor of the inverse of a damped Hessian, from one working copy.

    Args:
        hessian: float32 ``[n, n]``, ``sum(x xᵀ)`` over calibration inputs; its
            diagonal is damped in place.

    Returns:
        float32 ``[n, n]`` upper-triangular ``U`` with ``UᵀU = (H + λI)⁻¹``.

    Raises:
        ArithmeticError: the Hessian holds NaN or infinity.
    """
    size = hessian.shape[0]
    diagonal = np.einsum("ii->i", hessian)
    if not np.isfinite(diagonal).all():
        raise ArithmeticError("the calibration activations hold NaN or infinity")
    diagonal[diagonal <= 0] = 1.0  # a channel that never fires: its weights round on their own
    damp = _DAMP * float(diagonal.mean())
    for _ in range(6):
        diagonal += damp
        damp *= 10
        # With the order of the channels reversed, inverting the lower factor gives the upper one.
        lower, info = lapack.spotrf(
            np.asfortranarray(hessian[::-1, ::-1]), lower=1, clean=1, overwrite_a=1
        )
        if info == 0 and np.isfinite(np.diag(lower)).all():
            break
    else:
        raise ArithmeticError(f"the calibration Hessian of size {size} is not positive definite")
    inverse, _ = lapack.strtri(lower, lower=1, overwrite_c=1)
    upper: NDArray[np.float32] = inverse[::-1, ::-1]
    return upper


def sweep(
    weight: NDArray[np.float32],
    upper: NDArray[np.float32],
    block_size: int,
    grid: Callable[[int, NDArray[np.float32], NDArray[np.float32]], Grid],
) -> NDArray[np.int16]:
    """Round a weight column by column, each error spread over the columns still to come.

    Args:
        weight: float32 ``[out_features, in_features]``; not changed.
        upper: what :func:`inverse_factor` returned for the Linear's input.
        block_size: columns after which the errors are applied to the rest, and a new grid is asked for.
        grid: called with the block's number, its columns ``[out, width]`` as the errors have left
            them and the importance ``[width]`` of their squared errors.

    Returns:
        int16 ``[out_features, in_features]``: levels.
    """
    out_features, in_features = weight.shape
    left = weight.astype(np.float32, copy=True)
    levels = np.empty((out_features, in_features), np.int16)
    span = block_size * max(1, _SPAN_COLUMNS // block_size)
    for first in range(0, in_features, span):
        # errors reach the columns of the span at once, those after it in one product
        last = min(first + span, in_features)
        collected = np.empty((last - first, out_features), np.float32)
        for begin in range(first, last, block_size):
            end = min(begin + block_size, in_features)
            errors = _sweep_block(left, upper, levels, begin, end, block_size, grid)
            collected[begin - first : end - first] = errors
            if end < last:
                left[:, end:last] -= errors.T @ upper[begin:end, end:last]
        if last < in_features:
            left[:, last:] -= collected.T @ upper[first:last, last:]
    return levels


def _sweep_block(
    left: NDArray[np.float32],
    upper: NDArray[np.float32],
    levels: NDArray[np.int16],
    begin: int,
    end: int,
    block_size: int,
    grid: Callable[[int, NDArray[np.float32], NDArray[np.float32]], Grid],
) -> NDArray[np.float32]:
    """Round the columns of one block into ``levels``; float32 ``[width, out]`` errors."""
    width = end - begin
    part = np.ascontiguousarray(left[:, begin:end].T)  # a column is contiguous
    corner = upper[begin:end, begin:end]
    importance = (1.0 / np.square(np.diag(corner))).astype(np.float32)
    scale, zero, lowest, highest = grid(begin // block_size, part.T, importance)
    errors = np.empty((width, len(left)), np.float32)
    for j in range(width):
        level = np.clip(np.rint(part[j] / scale) + zero, lowest, highest)
        levels[:, begin + j] = level
        errors[j] = (part[j] - (level - zero) * scale) / corner[j, j]
        if j + 1 < width:
            part[j + 1 :] -= corner[j, j + 1 :, None] * errors[j]
    return errors


def quantize_blocks(
    weight: NDArray[np.float32], upper: NDArray[np.float32], block_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Quantize one Linear to 4-bit blocks.

    Args:
        weight: float32 ``[out_features, in_features]``; not changed.
        upper: what :func:`inverse_factor` returned for the Linear's input.
        block_size: input channels that share a scale and a zero point.

    Returns:
        ``(values, scales, zero_points)``: uint8 ``[out, blocks, block_size]`` in 0…15, float32
        ``[out, blocks]``, uint8 ``[out, blocks]``.
    """
    out_features, in_features = weight.shape
    blocks = -(-in_features // block_size)
    scales = np.ones((out_features, blocks), np.float32)
    zeros = np.zeros((out_features, blocks), np.uint8)

    def grid(block: int, part: NDArray[np.float32], importance: NDArray[np.float32]) -> Grid:
        scales[:, block], zeros[:, block] = int4.block_grid(part, importance[None, :])
        return scales[:, block], zeros[:, block].astype(np.float32), 0, int4.LEVELS

    levels = sweep(weight, upper, block_size, grid)
    values = np.repeat(zeros[:, :, None], block_size, axis=2).reshape(out_features, -1)
    values[:, :in_features] = levels  # what pads the last block decodes to 0
    return values.reshape(out_features, blocks, block_size), scales, zeros


def quantize_rows(
    weight: NDArray[np.float32], upper: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize one Linear to int8 with a symmetric scale per output channel.

    Args:
        weight: float32 ``[out_features, in_features]``; not changed.
        upper: what :func:`inverse_factor` returned for the Linear's input.

    Returns:
        ``(values, scales)``: int8 ``[out_features, in_features]`` within ±127, float32 ``[out]``.
    """
    peak = np.abs(weight).max(axis=1)
    scales = np.where(peak > 0, peak / int8.QMAX, 1.0).astype(np.float32)
    fixed: Grid = (scales, np.float32(0), -int8.QMAX, int8.QMAX)
    levels = sweep(weight, upper, 128, lambda block, part, importance: fixed)
    return levels.astype(np.int8), scales
