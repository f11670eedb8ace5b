"""A branch: the product of rank r beside a quantized Linear that carries what rounding and adapter differ by.

``y = x̂·Ŵ + (x̂·D)·U`` with ``D`` float32 ``[in, rank]`` and ``U`` ``[rank, out]``. The branch that leaves
the least of an error ``E`` ``[out, in]`` in the outputs, ``tr((E - L) H (E - L)ᵀ)`` over all ``L`` of that
rank, is ``L = SVD_r(E·R)·R⁻¹`` for ``H = R Rᵀ``: theorem 1 of Zhang et al., "QERA: an Analytical Framework for
Quantization Error Reconstruction", arXiv 2410.06040. With ``V`` the first left singular vectors of ``E·R`` it
is ``V·Vᵀ·E``, so nothing is inverted.

Both matrices are stored as int8 within ±63: the x86-64 instruction ``vpmaddubsw`` adds two products with uint8
in 16 bits, and 255 · 2 · 63 fits. They lie in the panels that the kernels read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas, eigh, qr

FloatArray = NDArray[np.float32]

QMAX = 63
PANEL = 16  # columns of a panel; a branch's rank and the outputs are multiples of it
DEPTH = 4  # rows that lie together in a panel
_CACHED_ELEMENTS = 1 << 22  # 32 MiB of float64 at a time


@dataclass(frozen=True)
class QuantizedBranch:
    """A branch as it is stored.

    Attributes:
        down: int8 ``[in, rank]`` within ±63.
        down_scale: float32 ``[rank]``; ``down * down_scale`` approximates ``D``.
        up: int8 ``[rank, out]`` within ±63.
        up_scale: float32 ``[out]``; ``up * up_scale`` approximates ``U``.
    """

    down: NDArray[np.int8]
    down_scale: FloatArray
    up: NDArray[np.int8]
    up_scale: FloatArray

    def restored(self) -> FloatArray:
        """``(D·U)ᵀ`` of the rounded matrices, float32 ``[out, in]`` as a Linear's weight."""
        return ((self.down * self.down_scale) @ (self.up * self.up_scale)).T


def fit(error: FloatArray, R: FloatArray | None, rank: int) -> tuple[FloatArray, FloatArray]:
    """The branch of a rank that leaves the least of an error in the outputs, ``‖(E - (D·U)ᵀ)·R‖²``.

    Each of the ``rank`` numbers between the two matrices carries its singular value half in ``D`` and half in
    ``U``, so that rounding either costs alike. They come in falling order; in each column of ``U`` the
    largest magnitude is positive.

    Args:
        error: float32 ``[out, in]``, what the weights lack; Linears that share an input one below the other.
            Not changed.
        R: of the input, from :func:`embedge.quant.gptq.cholesky`; ``None`` weighs all channels alike.
        rank: of the branch, at least 1; what exceeds the rank of the error is zero.

    Returns:
        ``(down, up)``: float32 ``[in, rank]`` and ``[rank, out]``.

    Raises:
        ArithmeticError: the error or the factor holds NaN or infinity.
        ValueError: the rank is below 1.
    """
    if rank < 1:
        raise ValueError(
            f"rank {rank}: expected at least 1; a Linear without a branch needs no fit"
        )
    out_features, in_features = error.shape
    seen = error if R is None else blas.strmm(1.0, R, error.T, trans_a=1).T
    vectors, values = _left_singular(seen, rank)
    del seen
    down = np.zeros((in_features, rank), np.float32)
    up = np.zeros((rank, out_features), np.float32)
    root = np.sqrt(values, dtype=np.float32)
    down[:, : len(root)] = (error.T @ vectors) / root
    up[: len(root)] = (vectors * root).T
    return down, up


def _left_singular(matrix: FloatArray, count: int) -> tuple[FloatArray, FloatArray]:
    """The first left singular vectors ``[rows, n]`` and values ``[n]``; n may fall short of the count.

    They are eigenvectors of the smaller Gram matrix. It is summed in float64, because squaring takes half of
    the digits. ARPACK's iteration took three times as long on 8192 x 2048.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    gram = _gram(matrix if tall else matrix.T)
    size = len(gram)
    if not np.isfinite(np.diag(gram)).all():
        raise ArithmeticError("the error that a branch is fitted to holds NaN or infinity")
    largest = (size - min(count, size), size - 1)
    squares, vectors = eigh(gram, lower=True, subset_by_index=largest, overwrite_a=True)
    del gram
    kept = squares[::-1] > squares[-1] * size * np.finfo(np.float64).eps
    values = np.sqrt(squares[::-1][kept])
    found = vectors[:, ::-1][:, kept]
    if tall:  # right singular vectors so far
        found, _ = qr(matrix @ found.astype(np.float32), mode="economic")
    peaks = np.take_along_axis(found, np.abs(found).argmax(axis=0)[None], axis=0)
    return (found * np.sign(peaks)).astype(np.float32), values.astype(np.float32)


def _gram(matrix: FloatArray) -> NDArray[np.float64]:
    """``matrixᵀ·matrix`` of float32 ``[rows, n]`` in float64, its lower half, a few rows at a time."""
    size = matrix.shape[1]
    gram = np.zeros((size, size), np.float64, order="F")
    step = max(1, _CACHED_ELEMENTS // size)
    for start in range(0, len(matrix), step):
        part = np.asarray(matrix[start : start + step], np.float64)
        gram = blas.dsyrk(1.0, part.T, beta=1.0, c=gram, lower=1, overwrite_c=1)
    return gram


def quantize(down: FloatArray, up: FloatArray) -> QuantizedBranch:
    """Round a branch to nearest: a scale for each column of ``D``, and for each of ``U``.

    Args:
        down: float32 ``[in, rank]``.
        up: float32 ``[rank, out]``.
    """
    return QuantizedBranch(*_round_columns(down), *_round_columns(up))


def _round_columns(matrix: FloatArray) -> tuple[NDArray[np.int8], FloatArray]:
    """int8 of the matrix's shape and the scales of its columns; a column of zeros has scale 1."""
    step = np.abs(matrix).max(axis=0, initial=0.0) / QMAX
    scale = np.where(step > 0, step, 1.0).astype(np.float32)
    return np.rint(matrix / scale).clip(-QMAX, QMAX).astype(np.int8), scale


def panels_of(matrix: NDArray[np.int8]) -> NDArray[np.int8]:
    """The order in which the kernels read ``D`` or ``U``.

    Args:
        matrix: int8 ``[depth, columns]``; the depth is a multiple of 4, the columns are of 16.

    Returns:
        int8 ``[columns / 16, depth / 4, 16, 4]``, ``panels[p, q, c, d] = matrix[4·q + d, 16·p + c]``.

    Raises:
        ValueError: another shape.
    """
    depth, columns = matrix.shape
    if depth % DEPTH or columns % PANEL:
        raise ValueError(
            f"a branch's matrix has shape {depth} x {columns}: expected multiples of {DEPTH} and {PANEL}"
        )
    panels = matrix.reshape(depth // DEPTH, DEPTH, columns // PANEL, PANEL)
    return np.ascontiguousarray(panels.transpose(2, 0, 3, 1))
