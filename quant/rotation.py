"""Rotating the residual stream of models that normalize before a block, so that no channel is an outlier.

With an orthogonal ``R``, ``RMSNorm(x·R) = RMSNorm(x)·R`` for a norm without weights. So the norm's weights
go into the Linears behind it, what writes the stream is multiplied by ``R`` and what reads it by its
inverse, and the model computes the same. A random Hadamard matrix spreads a channel that is a hundred
times the others over all of them. LayerNorm also takes the mean away, which commutes with an ``R`` that
maps rows of equal values to themselves.

Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456,
sections 3 and 4.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

_LARGEST_FACTOR = 64  # a Hadamard matrix of 2048 is applied as one of 32 and one of 64


class Rotation:
    """The orthogonal matrix ``R = D · (C ⊗ H) · F · P`` of a width, the same on every machine.

    ``D`` are signs drawn by a hash, ``H`` is the Hadamard matrix of the width's largest power of two and
    ``C`` the orthogonal DCT-II matrix of its odd part. ``F`` and ``P`` are the identity, or ``P`` is
    Householder's reflection that turns what the others make of a row of equal values into that row, and
    ``F`` signs that make it all negative before, so that no channel gets much more of the reflection
    than others. Factors are applied one after the other.

    Args:
        width: channels of the stream.
        keeps_mean: whether rows of equal values stay as they are, as LayerNorm wants.

    Attributes:
        signs: float32 ``[width]``, the diagonal of ``D``.
        factors: float32 ``C``, and two whose Kronecker product is ``H``.
        flips: float32 ``[width]``, the diagonal of ``F``; ``None`` where means are not kept.
        mirror: float32 ``[width]`` of length √2, ``P = I - mirror · mirrorᵀ``, or ``None`` too.
    """

    def __init__(self, width: int, *, keeps_mean: bool = False) -> None:
        self.width = width
        power = width & -width
        draws = np.frombuffer(hashlib.shake_256(b"embedge rotation").digest(width), np.uint8)
        self.signs = np.where(draws & 1, 1.0, -1.0).astype(np.float32)
        second = min(power, _LARGEST_FACTOR)
        factors = (_dct(width // power), _hadamard(power // second), _hadamard(second))
        self.factors = tuple(factor.astype(np.float32) for factor in factors)
        self.flips: FloatArray | None = None
        self.mirror: FloatArray | None = None
        if keeps_mean:
            even = np.full(width, width**-0.5, np.float32)
            made = self.rows(even)
            apart = even.astype(np.float64) + np.abs(made)
            self.flips = np.where(made < 0, 1, -1).astype(np.float32)
            self.mirror = (apart * (math.sqrt(2) / np.linalg.norm(apart))).astype(np.float32)

    def rows(self, values: FloatArray) -> FloatArray:
        """``values @ R`` for float32 ``[…, width]``, a fresh array."""
        odd, first, second = self.factors
        x: FloatArray = (values * self.signs).reshape(-1, len(odd), len(first), len(second))
        x = np.matmul(first, np.matmul(x, second))
        x = np.matmul(odd.T, x.reshape(-1, len(odd), len(first) * len(second)))
        x = x.reshape(values.shape)
        if self.flips is not None and self.mirror is not None:
            x *= self.flips
            x -= (x @ self.mirror)[..., None] * self.mirror
        return x

    def columns(self, values: FloatArray) -> FloatArray:
        """``Rᵀ @ values`` for float32 ``[width, …]``, a fresh array."""
        flat = values.reshape(self.width, -1)
        return np.ascontiguousarray(self.rows(flat.T).T).reshape(values.shape)

    def matrix(self) -> FloatArray:
        """``R`` itself, float32 ``[width, width]``."""
        return self.rows(np.eye(self.width, dtype=np.float32))


LARGEST_BLOCK = 16  # larger ones were no better (lab note 49), and it is what a register holds


def block_rotation(width: int) -> FloatArray:
    """The orthogonal matrix by which each block of a row is multiplied before it is quantized.

    A few large values in a row are spread over their blocks, so that one scale suits it better; the rows
    of the weight are rotated alike, and the product is the same (QuaRot's online Hadamard transforms).

    Args:
        width: of the rows.

    Returns:
        float32 ``[n, n]``, ``n`` the largest divisor of the width up to 16: the Hadamard matrix of 16, or
        the Kronecker product of a DCT-II and a Hadamard matrix.
    """
    size = max(n for n in range(1, LARGEST_BLOCK + 1) if width % n == 0)
    power = size & -size
    matrix: FloatArray = np.kron(_dct(size // power), _hadamard(power)).astype(np.float32)
    return matrix


def rotate_blocks(values: FloatArray, rotation: FloatArray) -> FloatArray:
    """Each block of float32 ``[…, width]`` times the matrix of :func:`block_rotation`, a fresh array."""
    blocks = values.reshape(*values.shape[:-1], -1, len(rotation))
    rotated: FloatArray = (blocks @ rotation).reshape(values.shape)
    return rotated


def _hadamard(size: int) -> NDArray[np.float64]:
    """Sylvester's Hadamard matrix of a power of two, scaled to be orthogonal."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def _dct(size: int) -> NDArray[np.float64]:
    """The orthogonal DCT-II matrix, ``[1]`` for one channel."""
    rows, columns = np.mgrid[:size, :size]
    matrix: NDArray[np.float64] = np.cos(np.pi * rows * (2 * columns + 1) / (2 * size)) * math.sqrt(
        2 / size
    )
    matrix[0] /= math.sqrt(2)
    return matrix
