"""GPTQ: round a weight column by column, passing each rounding error on to the columns still to come.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. Names are the paper's: ``H`` the Hessian of a Linear's input, ``Hinv`` the
Cholesky factor of its inverse, ``W`` the weights as the errors have left them, ``E`` the errors. The grid
of a group is chosen when the group is reached, from the weights as they are then.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from embedge.quant import int4, int8

FloatArray = NDArray[np.float32]
Grid = tuple[FloatArray, FloatArray | np.float32, int, int]
"""Scales and zero points of the output channels, and the lowest and highest level."""
ChooseGrid = Callable[[int, FloatArray, FloatArray], Grid]

_LAZY_COLUMNS = 256  # columns after which errors are passed on to all that follow
_DAMP = 0.01  # share of the mean diagonal added to it (the paper's value)
_ROW_GROUP = 128  # columns at a time, where a scale covers a whole row


def inverse_cholesky(H: FloatArray) -> FloatArray:
    """Upper Cholesky factor of the inverse of a damped Hessian, from one working copy.

    Args:
        H: float32 ``[in, in]``, ``Σ x xᵀ`` over calibration inputs. Its diagonal is damped in place.

    Returns:
        ``Hinv``, float32 ``[in, in]``, upper-triangular with ``Hinvᵀ·Hinv = (H + damp·I)⁻¹``.

    Raises:
        ArithmeticError: ``H`` holds NaN or infinity, or is not positive definite.
    """
    diagonal = np.einsum("ii->i", H)
    if not np.isfinite(diagonal).all():
        raise ArithmeticError("the calibration activations hold NaN or infinity")
    diagonal[diagonal <= 0] = 1.0  # a channel that never fires: its weights round on their own
    damp = _DAMP * float(diagonal.mean())
    for _ in range(6):
        diagonal += damp
        damp *= 10
        # With the order of the channels reversed, inverting the lower factor gives the upper one.
        lower, info = lapack.spotrf(
            np.asfortranarray(H[::-1, ::-1]), lower=1, clean=1, overwrite_a=1
        )
        if info == 0 and np.isfinite(np.diag(lower)).all():
            break
    else:
        raise ArithmeticError(f"the calibration Hessian of size {len(H)} is not positive definite")
    inverse, _ = lapack.strtri(lower, lower=1, overwrite_c=1)
    Hinv: FloatArray = inverse[::-1, ::-1]
    return Hinv


def quantize_columns(
    weight: FloatArray,
    Hinv: FloatArray,
    group_size: int,
    grid: ChooseGrid,
    *,
    pair_sum: int | None = None,
) -> NDArray[np.int16]:
    """Round a weight column by column, each error spread over the columns still to come.

    Args:
        weight: float32 ``[out, in]``; not changed.
        Hinv: of the Linear's input, from :func:`inverse_cholesky`.
        group_size: columns after which their errors reach the rest, and a new grid is asked for.
        grid: takes a group's number, its columns ``[out, group_size]`` as the errors have left them, and
            the importance ``[group_size]`` of their squared errors.
        pair_sum: largest magnitude of what columns 2i and 2i + 1 add up to, of levels around 0, ``None``
            for any; groups have an even size then.

    Returns:
        int16 ``[out, in]``: levels.
    """
    out_features, in_features = weight.shape
    W = weight.astype(np.float32, copy=True)
    levels = np.empty((out_features, in_features), np.int16)
    span = group_size * max(1, _LAZY_COLUMNS // group_size)
    for first in range(0, in_features, span):
        # errors reach the columns of the span at once, those after it in one matmul
        last = min(first + span, in_features)
        E = np.empty((last - first, out_features), np.float32)
        for begin in range(first, last, group_size):
            end = min(begin + group_size, in_features)
            errors = _quantize_group(W, Hinv, levels, begin, end, group_size, grid, pair_sum)
            E[begin - first : end - first] = errors
            if end < last:
                W[:, end:last] -= errors.T @ Hinv[begin:end, end:last]
        if last < in_features:
            W[:, last:] -= E.T @ Hinv[first:last, last:]
    return levels


def _quantize_group(
    W: FloatArray,
    Hinv: FloatArray,
    levels: NDArray[np.int16],
    begin: int,
    end: int,
    group_size: int,
    grid: ChooseGrid,
    pair_sum: int | None,
) -> FloatArray:
    """Round the columns of one group into ``levels``; float32 ``[width, out]`` errors."""
    width = end - begin
    columns = np.ascontiguousarray(W[:, begin:end].T)  # a column is contiguous
    corner = Hinv[begin:end, begin:end]
    importance = (1.0 / np.square(np.diag(corner))).astype(np.float32)
    scale, zero, lowest, highest = grid(begin // group_size, columns.T, importance)
    errors = np.empty((width, len(W)), np.float32)
    before = np.zeros(len(W), np.float32)
    for j in range(width):
        level = np.clip(np.rint(columns[j] / scale) + zero, lowest, highest)
        if pair_sum is not None and j % 2:
            level = np.clip(level, -pair_sum - before, pair_sum - before)
        before = level
        levels[:, begin + j] = level
        errors[j] = (columns[j] - (level - zero) * scale) / corner[j, j]
        if j + 1 < width:
            columns[j + 1 :] -= corner[j, j + 1 :, None] * errors[j]
    return errors


def quantize_blocks(
    weight: FloatArray, Hinv: FloatArray, block_size: int
) -> tuple[NDArray[np.uint8], FloatArray, NDArray[np.uint8]]:
    """Quantize one Linear to 4-bit blocks.

    Args:
        weight: float32 ``[out, in]``; not changed.
        Hinv: of the Linear's input, from :func:`inverse_cholesky`.
        block_size: input channels that share a scale and a zero point.

    Returns:
        ``(values, scales, zero_points)``: uint8 ``[out, blocks, block_size]`` in 0…15, float32
        ``[out, blocks]``, uint8 ``[out, blocks]``.
    """
    out_features, in_features = weight.shape
    blocks = -(-in_features // block_size)
    scales = np.ones((out_features, blocks), np.float32)
    zeros = np.zeros((out_features, blocks), np.uint8)

    def grid(block: int, columns: FloatArray, importance: FloatArray) -> Grid:
        scales[:, block], zeros[:, block] = int4.block_grid(columns, importance[None, :])
        return scales[:, block], zeros[:, block].astype(np.float32), 0, int4.LEVELS

    levels = quantize_columns(weight, Hinv, block_size, grid)
    values = np.repeat(zeros[:, :, None], block_size, axis=2).reshape(out_features, -1)
    values[:, :in_features] = levels  # what pads the last block decodes to 0
    return values.reshape(out_features, blocks, block_size), scales, zeros


def quantize_rows(
    weight: FloatArray, Hinv: FloatArray, *, pairs: bool = False
) -> tuple[NDArray[np.int8], FloatArray]:
    """Quantize one Linear to int8 with a symmetric scale per output channel.

    Args:
        weight: float32 ``[out, in]``; not changed.
        Hinv: of the Linear's input, from :func:`inverse_cholesky`.
        pairs: keep sums of columns within a bound, see :func:`embedge.quant.int8.row_scales`.

    Returns:
        ``(values, scales)``: int8 ``[out, in]`` within ±127, float32 ``[out]``.
    """
    scales = int8.row_scales(weight, pairs=pairs)
    fixed: Grid = (scales, np.float32(0), -int8.QMAX, int8.QMAX)
    bound = int8.PAIR_SUM if pairs else None
    levels = quantize_columns(weight, Hinv, _ROW_GROUP, lambda *_: fixed, pair_sum=bound)
    return levels.astype(np.int8), scales
