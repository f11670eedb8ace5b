"""int4: blocks along the input axis with a scale and a zero point each, as ``MatMulNBits`` reads them.

Layout of ``com.microsoft.MatMulNBits`` (ONNX Runtime's ContribOperators.md): the weight is stored by
output channel, ``B`` uint8 ``[N, blocks, block_size / 2]`` with the earlier element in the low half of
the byte, ``scales`` float32 ``[N, blocks]`` and ``zero_points`` uint8 ``[N, ceil(blocks / 2)]``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedge.quant.int8 import decibels

LEVELS = 15
_CACHED_ELEMENTS = 1 << 16  # 256 KiB of float32 at a time, which a core's cache holds
_SHRINK = np.linspace(1.0, 0.72, 15, dtype=np.float32)  # candidate ranges, widest first


def block_grid(
    blocks: NDArray[np.float32], importance: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Choose each block's scale and zero point by the smallest (weighted) squared error.

    The range is shrunk step by step from the block's full range, as outliers cost less clipped than
    they cost the other weights when kept.

    Args:
        blocks: float32 ``[..., block_size]``.
        importance: float32 broadcastable to ``blocks``, weight of each element's squared error.

    Returns:
        ``(scales, zero_points)``: float32 and uint8 in 0…15, both of the leading shape of ``blocks``.
    """
    size = blocks.shape[-1]
    flat = blocks.reshape(-1, size)
    scales = np.empty(len(flat), np.float32)
    zeros = np.empty(len(flat), np.uint8)
    weight = None if importance is None else np.broadcast_to(importance, blocks.shape)
    flat_weight = None if weight is None else weight.reshape(-1, size)
    step = max(1, _CACHED_ELEMENTS // size)
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        # elements of a block along the first axis: every operation runs over neighbouring blocks
        part = np.ascontiguousarray(flat[rows].T)
        part_weight = None if flat_weight is None else np.ascontiguousarray(flat_weight[rows].T)
        scales[rows], zeros[rows] = _best_grid(part, part_weight)
    shape = blocks.shape[:-1]
    return scales.reshape(shape), zeros.reshape(shape)


def _best_grid(
    part: NDArray[np.float32], weight: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and zero point of every column of float32 ``[block_size, blocks]``."""
    low = np.minimum(part.min(axis=0), 0.0)
    high = np.maximum(part.max(axis=0), 0.0)
    best_scale = np.ones(low.shape, np.float32)
    best_zero = np.zeros(low.shape, np.float32)
    best_error = np.full(low.shape, np.inf, np.float32)
    work = np.empty_like(part)
    for shrink in _SHRINK:
        scale = (high - low) * (shrink / LEVELS)
        scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
        zero = np.clip(np.rint(-low * shrink / scale), 0, LEVELS).astype(np.float32)
        np.divide(part, scale, out=work)
        np.rint(work, out=work)
        # clipping the level to 0…15 before the zero point is taken off again
        np.maximum(work, -zero, out=work)
        np.minimum(work, LEVELS - zero, out=work)
        work *= scale
        work -= part
        work *= work
        if weight is not None:
            work *= weight
        error = work.sum(axis=0)
        better = error < best_error
        best_scale[better], best_zero[better] = scale[better], zero[better]
        best_error[better] = error[better]
    return best_scale, best_zero


def quantize(
    blocks: NDArray[np.float32], scales: NDArray[np.float32], zero_points: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Round float32 ``[..., block_size]`` to uint8 0…15 on the grid of each block."""
    result = np.empty(blocks.shape, np.uint8)
    size = blocks.shape[-1]
    flat, flat_result = blocks.reshape(-1, size), result.reshape(-1, size)
    scale, zero = scales.reshape(-1, 1), zero_points.reshape(-1, 1).astype(np.float32)
    step = max(1, _CACHED_ELEMENTS // size)
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        levels = flat[rows] / scale[rows]
        np.rint(levels, out=levels)
        levels += zero[rows]
        np.clip(levels, 0, LEVELS, out=levels)
        flat_result[rows] = levels
    return result


def dequantize(
    values: NDArray[np.uint8], scales: NDArray[np.float32], zero_points: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Inverse of :func:`quantize`: float32 of the shape of ``values``."""
    result: NDArray[np.float32] = (
        values.astype(np.float32) - zero_points[..., None].astype(np.float32)
    ) * scales[..., None]
    return result


def blocks_sqnr_db(
    blocks: NDArray[np.float32],
    values: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8],
    smooth: NDArray[np.float32] | None = None,
) -> float:
    """Signal to quantization noise of quantized float32 ``[rows, blocks, block_size]`` in decibels.

    Both are those of the blocks divided by ``smooth``, float32 ``[blocks, block_size]``, where it is given.
    """
    if smooth is not None:
        smooth = np.where(smooth > 0, smooth, np.float32(1))  # what pads a row
    noise = signal = 0.0
    step = max(1, _CACHED_ELEMENTS // (blocks.shape[1] * blocks.shape[2]))
    for start in range(0, len(blocks), step):
        rows = slice(start, start + step)
        part = blocks[rows]
        error = dequantize(values[rows], scales[rows], zero_points[rows]) - part
        if smooth is not None:
            part, error = part / smooth, error / smooth
        noise += float(np.square(error, out=error).sum(dtype=np.float64))
        signal += float(np.square(part).sum(dtype=np.float64))
    return decibels(signal, noise)


def pack_pairs(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack 4-bit values two to a byte along the last axis, low half first; odd lengths end in 0."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    high = (values[..., 1::2] << 4).astype(np.uint8)
    result: NDArray[np.uint8] = np.bitwise_or(values[..., 0::2], high)
    return result


def unpack_pairs(packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Inverse of :func:`pack_pairs`: uint8 ``[..., count]`` of the two values in each byte."""
    pairs = np.stack([packed & LEVELS, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :count]


def split_blocks(weight: NDArray[np.float32], block_size: int) -> NDArray[np.float32]:
    """View float32 ``[out, in]`` as ``[out, blocks, block_size]``, zero-padded at the end of a row."""
    out_features, in_features = weight.shape
    blocks = -(-in_features // block_size)
    if blocks * block_size != in_features:
        padded = np.zeros((out_features, blocks * block_size), np.float32)
        padded[:, :in_features] = weight
        weight = padded
    return weight.reshape(out_features, blocks, block_size)
