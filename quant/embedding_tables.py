"""Block quantization of embedding tables, asymmetric, 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from embedge.quant import int4

_CHUNK_ROWS_ELEMENTS = 2 * 1024 * 1024


def block_size_for(width: int, bits: int) -> int | None:
    """The block that divides a row: 128 at most for 8 bits, 32 for 4; ``None`` where none does."""
    for size in (128, 64, 32, 16) if bits == 8 else (32, 16):
        if width % size == 0:
            return size
    return None


def mean_row(
    read_rows: Callable[[slice], NDArray[np.float32]], shape: tuple[int, int]
) -> NDArray[np.float32]:
    """float32 ``[width]``, what the rows of a table have in common.

    Args:
        read_rows: gives float32 ``[some rows, width]`` of the table.
        shape: ``(rows, width)``.
    """
    rows, width = shape
    total, step = np.zeros(width), max(1, _CHUNK_ROWS_ELEMENTS // width)
    for start in range(0, rows, step):
        total += read_rows(slice(start, start + step)).sum(axis=0, dtype=np.float64)
    mean: NDArray[np.float32] = (total / rows).astype(np.float32)
    return mean


def quantize_table(
    read_rows: Callable[[slice], NDArray[np.float32]],
    shape: tuple[int, int],
    bits: int,
    block_size: int,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Quantize rows in blocks, a few rows at a time.

    Args:
        read_rows: gives float32 ``[some rows, width]`` of the table.
        shape: ``(rows, width)``, ``width`` a multiple of ``block_size``.
        bits: 8 or 4.
        block_size: neighbours in a row that share a scale and a zero point.

    Returns:
        ``(values, scales, zero_points)``: uint8 ``[rows, width]``, float32 and uint8
        ``[rows, width / block_size]``; ``(values - zero_point) * scale`` approximates the table.
    """
    rows, width = shape
    blocks = width // block_size
    values = np.empty((rows, width), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.uint8)
    step = max(1, _CHUNK_ROWS_ELEMENTS // width)
    for start in range(0, rows, step):
        part = read_rows(slice(start, start + step)).reshape(-1, blocks, block_size)
        stop = start + len(part)
        if bits == 4:
            scale, zero = int4.block_grid(part)
            level = int4.quantize(part, scale, zero)
        else:
            low = np.minimum(part.min(axis=-1), 0.0)
            high = np.maximum(part.max(axis=-1), 0.0)
            scale = np.where(high > low, (high - low) / 255, 1.0).astype(np.float32)
            zero = np.clip(np.rint(-low / scale), 0, 255).astype(np.uint8)
            level = np.clip(np.rint(part / scale[..., None]) + zero[..., None], 0, 255)
        values[start:stop] = level.reshape(stop - start, width)
        scales[start:stop], zeros[start:stop] = scale, zero
    return values, scales, zeros
