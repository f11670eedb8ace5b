"""GPTQ: round a weight column by column, passing each rounding error on to the columns still to come.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. The paper factors the inverse of the Hessian ``H`` of a Linear's input. The
same numbers come from a factor of ``H`` itself (Chen et al., "The Geometry of LLM Quantization: GPTQ as
Babai's Nearest Plane Algorithm", arXiv 2507.18553), without inverting: with ``H = R Rᵀ``, ``R`` upper
triangular, column ``k`` rounds ``W[k] + Σ lost[j] · R[j, k] / R[k, k]`` over the columns ``j < k`` before
it, where ``lost = W - restored``. The grid of a group is chosen when the group is reached, from the weights
as the columns before have left them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas, lapack

from embedge.quant import int4, int8

FloatArray = NDArray[np.float32]
Grid = tuple[FloatArray, FloatArray | np.float32, int, int]
"""Scales and zero points of the output channels, and the lowest and highest level."""
ChooseGrid = Callable[[int, FloatArray, FloatArray], Grid]

_LAZY_COLUMNS = 256  # columns that get what all before them lost in one matmul
_STEP_COLUMNS = 16  # columns within which it is passed on one by one
_ROW_GROUP = 128  # columns at a time, where a scale covers a whole row
_SWAPPED = 1 << 16  # elements that are turned round at a time


def cholesky(H: FloatArray, damping: float = 0.01) -> FloatArray:
    """Upper Cholesky factor of a damped Hessian, in one working copy.

    Args:
        H: float32 ``[in, in]``, ``Σ x xᵀ`` over calibration inputs. Its diagonal is damped in place.
        damping: share of the mean diagonal that is added to it; .01 is the paper's.

    Returns:
        ``R``, float32 ``[in, in]``, upper-triangular with ``R·Rᵀ = H + damp·I``, in Fortran's order.

    Raises:
        ArithmeticError: ``H`` holds NaN or infinity, or is not positive definite.
    """
    diagonal = np.einsum("ii->i", H)
    if not np.isfinite(diagonal).all():
        raise ArithmeticError("the calibration activations hold NaN or infinity")
    diagonal[diagonal <= 0] = 1.0  # a channel that never fires: its weights round on their own
    damp = damping * float(diagonal.mean())
    for _ in range(6):
        diagonal += damp
        damp *= 10
        # With the order of the channels reversed, the lower factor is the upper one.
        lower, info = lapack.spotrf(
            np.asfortranarray(H[::-1, ::-1]), lower=1, clean=1, overwrite_a=1
        )
        if info == 0 and np.isfinite(np.diag(lower)).all():
            break
    else:
        raise ArithmeticError(f"the calibration Hessian of size {len(H)} is not positive definite")
    _turn_round(lower.reshape(-1, order="F"))
    return cast(FloatArray, lower)


def _turn_round(values: FloatArray) -> None:
    """Reverse the order of float32 ``[n]`` in place, a few at a time."""
    size = len(values)
    for start in range(0, size // 2, _SWAPPED):
        stop = min(start + _SWAPPED, size // 2)
        end = values[size - stop : size - start]
        kept = values[start:stop].copy()
        values[start:stop] = end[::-1]
        end[:] = kept[::-1]


def energy(weight: FloatArray, R: FloatArray) -> float:
    """``Σ (W·H) ∘ W = Σ (W·R)²``: the squares of a Linear's outputs over the calibration inputs.

    Args:
        weight: float32 ``[out, in]``; not changed.
        R: of the Linear's input, from :func:`cholesky`.
    """
    outputs = blas.strmm(1.0, R, weight.T, trans_a=1)
    return float(np.vdot(outputs, outputs))


def quantize_columns(
    weight: FloatArray,
    R: FloatArray,
    group_size: int,
    grid: ChooseGrid | Grid,
    *,
    pair_sum: int | None = None,
) -> tuple[NDArray[np.int8], float]:
    """Round a weight column by column, each with what those before it lost.

    Args:
        weight: float32 ``[out, in]``; not changed.
        R: of the Linear's input, from :func:`cholesky`.
        group_size: columns after which a new grid is asked for.
        grid: of all groups; or it takes a group's number, its columns ``[out, group_size]`` as those before
            have left them, and the importance ``[group_size]`` of their squared errors.
        pair_sum: largest magnitude of what columns 2i and 2i + 1 add up to, of levels around 0, ``None``
            for any; groups have an even size then.

    Returns:
        int8 ``[out, in]``, levels; and :func:`energy` of what is lost.
    """
    W = np.array(weight.T, np.float32, order="C")  # a column is contiguous
    levels = np.empty(W.shape, np.int8)
    noise = 0.0
    span = group_size * max(1, _LAZY_COLUMNS // group_size)
    for first in range(0, len(W), span):
        done = slice(0, first)
        carried = R[done, first : first + span].T @ W[done]
        for begin in range(0, len(carried), group_size):
            group = slice(first + begin, first + min(begin + group_size, len(carried)))
            own = carried[begin : begin + group_size]
            done = slice(first, group.start)
            own += R[done, group].T @ W[done]
            corner = np.asfortranarray(R[group, group])
            if callable(grid):
                left = W[group].T + blas.strsm(1.0, corner, own.T, side=1)
                on = grid(group.start // group_size, left, np.square(np.diag(corner)))
            else:
                on = grid
            _quantize_group(W[group], own, corner, levels[group], on, pair_sum)
        noise += float(np.vdot(carried, carried))
    return levels.T, noise


def _quantize_group(
    W: FloatArray,
    carried: FloatArray,
    R: FloatArray,
    levels: NDArray[np.int8],
    grid: Grid,
    pair_sum: int | None,
) -> None:
    """Round the columns of one group on its grid.

    Args:
        W: float32 ``[width, out]``; then what of it is lost.
        carried: float32 ``[width, out]``, what the columns before the group lost, times ``R``; then that of
            the column itself too.
        R: float32 ``[width, width]``, of these columns.
        levels: int8 ``[width, out]``, written.
        grid: of the group.
        pair_sum: see :func:`quantize_columns`.
    """
    scale, zero, lowest, highest = grid
    level = np.empty(W.shape[1], np.float32)
    for first in range(0, len(W), _STEP_COLUMNS):
        step = slice(first, first + _STEP_COLUMNS)
        if first:
            carried[step] += R[:first, step].T @ W[:first]
        for j in range(first, min(step.stop, len(W))):
            if j > first:
                carried[j] += R[first:j, j] @ W[first:j]
            np.divide(carried[j], R[j, j], out=level)
            level += W[j]
            level /= scale
            np.rint(level, out=level)
            level += zero
            np.maximum(level, lowest, out=level)
            np.minimum(level, highest, out=level)
            if pair_sum is not None and j % 2:
                before = levels[j - 1].astype(np.float32)
                np.clip(level, -pair_sum - before, pair_sum - before, out=level)
            levels[j] = level
            level -= zero
            level *= scale
            W[j] -= level
            np.multiply(W[j], R[j, j], out=level)
            carried[j] += level


def quantize_blocks(
    weight: FloatArray, R: FloatArray, block_size: int
) -> tuple[NDArray[np.uint8], FloatArray, NDArray[np.uint8], float]:
    """Quantize one Linear to 4-bit blocks.

    Args:
        weight: float32 ``[out, in]``; not changed.
        R: of the Linear's input, from :func:`cholesky`.
        block_size: input channels that share a scale and a zero point.

    Returns:
        ``(values, scales, zero_points, noise)``: uint8 ``[out, blocks, block_size]`` in 0…15, float32
        ``[out, blocks]``, uint8 ``[out, blocks]``, and what :func:`quantize_columns` says of the cost.
    """
    out_features, in_features = weight.shape
    blocks = -(-in_features // block_size)
    scales = np.ones((out_features, blocks), np.float32)
    zeros = np.zeros((out_features, blocks), np.uint8)

    def grid(block: int, columns: FloatArray, importance: FloatArray) -> Grid:
        scales[:, block], zeros[:, block] = int4.block_grid(columns, importance[None, :])
        return scales[:, block], zeros[:, block].astype(np.float32), 0, int4.LEVELS

    levels, noise = quantize_columns(weight, R, block_size, grid)
    values = np.repeat(zeros[:, :, None], block_size, axis=2).reshape(out_features, -1)
    values[:, :in_features] = levels  # what pads the last block decodes to 0
    return values.reshape(out_features, blocks, block_size), scales, zeros, noise


def quantize_rows(
    weight: FloatArray, R: FloatArray, *, pairs: bool = False
) -> tuple[NDArray[np.int8], FloatArray, float]:
    """Quantize one Linear to int8 with a symmetric scale per output channel.

    Args:
        weight: float32 ``[out, in]``; not changed.
        R: of the Linear's input, from :func:`cholesky`.
        pairs: keep sums of columns within a bound, see :func:`embedge.quant.int8.row_scales`.

    Returns:
        ``(values, scales, noise)``: int8 ``[out, in]`` within ±127, float32 ``[out]``, and what
        :func:`quantize_columns` says of the cost.
    """
    scales = int8.row_scales(weight, pairs=pairs)
    fixed: Grid = (scales, np.float32(0), -int8.QMAX, int8.QMAX)
    bound = int8.PAIR_SUM if pairs else None
    levels, noise = quantize_columns(weight, R, _ROW_GROUP, fixed, pair_sum=bound)
    return levels, scales, noise
