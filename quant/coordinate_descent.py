"""Coordinate descent behind GPTQ: each level, and each block's scale, once more with all others as they are.

GPTQ rounds a column when those behind it are still exact, and never comes back. Here every column is rounded anew
to what is best beside the rounded rest: with ``lost = W - restored`` and the Hessian ``H`` of the input, column ``j``
moves by the multiple of its scale that is nearest to ``(lost·H)[j] / H[j, j]``. Then the block's scale takes its
least squares. No step raises ``tr(lost · H · lostᵀ)``.

Source: Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", arXiv 2309.01885. The
gradient is kept as ``Y = Rᵀ·lost``, with ``H = R Rᵀ`` from :func:`embedge.quant.gptq.cholesky`, so that the Hessian
itself is not needed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

from embedge.quant import int4, int8

FloatArray = NDArray[np.float32]

__all__ = ["refine_blocks", "refine_rows"]

_SPAN_COLUMNS = 256  # columns whose changes reach the others in one matmul
_ROW_BLOCK = 32  # columns at a time, where a scale covers a whole row


def refine_blocks(
    weight: FloatArray,
    R: FloatArray,
    values: NDArray[np.uint8],
    scales: FloatArray,
    zero_points: NDArray[np.uint8],
    *,
    sweeps: int,
) -> tuple[NDArray[np.uint8], FloatArray, float]:
    """Bring 4-bit blocks closer to a weight; zero points stay.

    Args:
        weight: float32 ``[out, in]``; not changed.
        R: of the Linear's input, from :func:`embedge.quant.gptq.cholesky`.
        values: uint8 ``[out, blocks, block_size]`` in 0…15; what pads the last block is its zero point.
        scales: float32 ``[out, blocks]``.
        zero_points: uint8 ``[out, blocks]``.
        sweeps: over all columns.

    Returns:
        ``(values, scales, noise)`` of the same shapes, and :func:`embedge.quant.gptq.energy` of what is lost.
    """
    out_features, in_features = weight.shape
    size = values.shape[2]
    grids = [
        _Grid(np.array(scale), -zero.astype(np.float32), int4.LEVELS - zero.astype(np.float32))
        for scale, zero in zip(scales.T, zero_points.T, strict=True)
    ]
    levels = values.astype(np.float32) - zero_points[:, :, None]
    levels = np.ascontiguousarray(levels.reshape(out_features, -1)[:, :in_features].T)
    noise = _sweep(weight, R, levels, grids, size, sweeps=sweeps, refit=True)
    result = np.repeat(zero_points[:, :, None], size, axis=2).reshape(out_features, -1)
    result[:, :in_features] += levels.T.astype(np.int8).view(np.uint8)  # modulo 256
    return result.reshape(values.shape), np.stack([of.scale for of in grids], axis=1), noise


def refine_rows(
    weight: FloatArray,
    R: FloatArray,
    values: NDArray[np.int8],
    scales: FloatArray,
    *,
    sweeps: int,
    pairs: bool = False,
) -> tuple[NDArray[np.int8], float]:
    """Bring int8 with a scale per output channel closer to a weight; the scales stay.

    Args:
        weight: float32 ``[out, in]``; not changed.
        R: of the Linear's input, from :func:`embedge.quant.gptq.cholesky`.
        values: int8 ``[out, in]`` within ±127.
        scales: float32 ``[out]``.
        sweeps: over all columns.
        pairs: keep sums of columns within a bound, see :func:`embedge.quant.int8.row_scales`.

    Returns:
        ``(values, noise)``, as of :func:`refine_blocks`.
    """
    levels = np.array(values.T, np.float32, order="C")
    limit = np.full_like(scales, int8.QMAX)
    grids = [_Grid(scales, -limit, limit)] * -(-len(levels) // _ROW_BLOCK)
    bound = int8.PAIR_SUM if pairs else None
    noise = _sweep(weight, R, levels, grids, _ROW_BLOCK, sweeps=sweeps, pair_sum=bound)
    return levels.T.astype(np.int8), noise


@dataclass(frozen=True)
class _Grid:
    """Of one block, float32 ``[out]`` each: the scale, and the smallest and the largest level less the zero point."""

    scale: FloatArray
    lowest: FloatArray
    highest: FloatArray


def _sweep(
    weight: FloatArray,
    R: FloatArray,
    levels: FloatArray,
    grids: list[_Grid],
    block_size: int,
    *,
    sweeps: int,
    refit: bool = False,
    pair_sum: int | None = None,
) -> float:
    """Round all blocks anew, in place.

    Args:
        weight: float32 ``[out, in]``.
        R: as of :func:`refine_blocks`.
        levels: float32 ``[in, out]``, less the zero points.
        grids: of the blocks.
        block_size: columns of a block, an even number.
        sweeps: how often.
        refit: whether scales change too.
        pair_sum: see :func:`embedge.quant.gptq.quantize_columns`.

    Returns:
        :func:`embedge.quant.gptq.energy` of what is lost.
    """
    lost = np.array(weight.T, np.float32, order="C")
    for block, grid in enumerate(grids):
        part = slice(block * block_size, (block + 1) * block_size)
        lost[part] -= levels[part] * grid.scale
    outputs: FloatArray = blas.strmm(1.0, R, lost, trans_a=1)
    del lost
    span = block_size * max(1, _SPAN_COLUMNS // block_size)
    for _ in range(sweeps):
        for first in range(0, len(levels), span):
            rows = R[first : first + span, first:]  # R is upper triangular
            gradient, hessian = rows @ outputs[first:], rows @ rows.T
            moved = np.zeros_like(gradient)
            for start in range(0, len(gradient), block_size):
                part = slice(start, start + block_size)
                if start:
                    gradient[part] += hessian[part, :start] @ moved[:start]
                own, grid = levels[first : first + span][part], grids[(first + start) // block_size]
                corner = hessian[part, part]
                _round_block(own, grid, corner, gradient[part], moved[part], pair_sum)
                if refit:
                    _refit_scale(own, grid, corner, gradient[part], moved[part])
            outputs[first:] += rows.T @ moved
    return float(np.vdot(outputs, outputs))


def _round_block(
    levels: FloatArray,
    grid: _Grid,
    hessian: FloatArray,
    gradient: FloatArray,
    moved: FloatArray,
    pair_sum: int | None,
) -> None:
    """Round the columns of one block, in place.

    Args:
        levels: float32 ``[width, out]``, less the zero point.
        grid: of the block.
        hessian: float32 ``[width, width]``, of these columns.
        gradient: float32 ``[width, out]``: ``(lost·H)ᵀ`` of these columns before anything moves.
        moved: float32 ``[width, out]``, written: by how much ``lost`` changes.
        pair_sum: see :func:`_sweep`.
    """
    step = np.empty_like(grid.scale)
    for j, level in enumerate(levels):
        np.dot(hessian[j, :j], moved[:j], out=step)
        step += gradient[j]
        step /= grid.scale
        step /= hessian[j, j]
        step += level
        np.rint(step, out=step)
        np.maximum(step, grid.lowest, out=step)
        np.minimum(step, grid.highest, out=step)
        if pair_sum is not None and (j ^ 1) < len(levels):
            other = levels[j ^ 1]
            np.clip(step, -pair_sum - other, pair_sum - other, out=step)
        np.subtract(level, step, out=moved[j])
        moved[j] *= grid.scale
        level[:] = step


def _refit_scale(
    levels: FloatArray, grid: _Grid, hessian: FloatArray, gradient: FloatArray, moved: FloatArray
) -> None:
    """Give a block the scale of the least squares, in place; the arguments are those of :func:`_round_block`."""
    change = np.einsum("jn,jn->n", gradient + hessian @ moved, levels)
    curvature = np.einsum("jn,jn->n", hessian @ levels, levels)
    np.divide(change, curvature, out=change, where=curvature > 0)
    change[(curvature <= 0) | (grid.scale + change <= 0)] = 0
    moved -= levels * change
    grid.scale[:] += change
