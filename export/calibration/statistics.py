"""What calibration learns of the inputs of Linears."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

from embedge.export.calibration.scratch import mapped_zeros
from embedge.export.graph.values import LinearGroup

FloatArray = NDArray[np.float32]

_TILE = 256  # rows and columns that a core's cache holds


class InputStatistics:
    """What is known of a Linear's input after calibration.

    Attributes:
        group: where in the graph the input is.
        low: float32 ``[in]``, smallest value of every channel.
        high: float32 ``[in]``, largest value.
        rows: tokens seen.
        total: float64 ``[in]``, sum of every channel.
        hessian: float32 ``[in, in]`` ``Σ x xᵀ``, whole after :meth:`finish`, or ``None`` when it was not
            asked for.
        sample: float32 ``[rows, in]`` parts, some of the rows, where they were asked for.
        weight_peak: float32 ``[in]``, largest magnitude of every row of the matrices.
        matrices: float32 ``[in, out]`` weights of the Linears that read the input, until the next layer.

    Args:
        group: see above.
        width: its channels.
        scratch: folder for a large Hessian, which is mapped from there; ``None``: it is not wanted.
    """

    def __init__(self, group: LinearGroup, width: int, scratch: Path | None) -> None:
        self.group = group
        self.rows = 0
        self.low = np.full(width, np.inf, np.float32)
        self.high = np.full(width, -np.inf, np.float32)
        self.total = np.zeros(width, np.float64)
        self.hessian = None if scratch is None else mapped_zeros((width, width), scratch)
        self.weight_peak = np.zeros(width, np.float32)
        self.sample: list[FloatArray] = []
        self.matrices: list[FloatArray] = []

    def add(self, x: FloatArray) -> None:
        """Account for float32 ``[rows, in]`` of attended tokens."""
        self.rows += len(x)
        np.minimum(self.low, x.min(axis=0), out=self.low)
        np.maximum(self.high, x.max(axis=0), out=self.high)
        self.total += x.sum(axis=0, dtype=np.float64)
        if self.hessian is not None:  # the lower half, in place: seen from Fortran, the upper
            x = np.ascontiguousarray(x, np.float32)
            blas.ssyrk(1.0, x.T, 1.0, self.hessian.T, overwrite_c=1)

    def finish(self) -> None:
        """Fill the upper half of the Hessian, once all tokens are added."""
        hessian = self.hessian
        if hessian is None:
            return
        for start in range(0, len(hessian), _TILE):
            stop = start + _TILE
            corner = hessian[start:stop, start:stop]
            corner += np.tril(corner, -1).T
            for row in range(stop, len(hessian), _TILE):
                rows = slice(row, row + _TILE)
                hessian[start:stop, rows] = hessian[rows, start:stop].T

    def shift(self, shift: FloatArray) -> None:
        """Make the finished Hessian that of inputs less float32 ``[in]``, ``Σ (x - shift)(x - shift)ᵀ``.

        What a Linear adds for its shift is exact (it is in the bias), so that only the rest is to be rounded well.
        """
        assert self.hessian is not None
        total = self.total.astype(np.float32)
        both = np.float32(self.rows) * shift - total
        for row in range(len(shift)):  # mapped from a file: row by row
            self.hessian[row] += shift[row] * both - total[row] * shift
