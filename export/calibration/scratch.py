"""Large arrays in mapped files: pages that the system can drop, not memory of the process.

The files lie in the folder that the export writes to. They have no name, so nothing is left of them when
the process ends, however it ends.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

_LEAST_BYTES = 4 * 1024 * 1024


def mapped_copy(array: FloatArray, folder: Path) -> FloatArray:
    """A large array as a mapped file, to be read; a small one as it is."""
    if array.nbytes < _LEAST_BYTES:
        return array
    with tempfile.TemporaryFile(dir=folder) as file:
        array.tofile(file)
        file.flush()
        return np.memmap(file, array.dtype, "r", shape=array.shape)


def mapped_zeros(shape: tuple[int, int], folder: Path) -> FloatArray:
    """Zeros of float32 to be written to, in a mapped file where they are many."""
    nbytes = 4 * shape[0] * shape[1]
    if nbytes < _LEAST_BYTES:
        return np.zeros(shape, np.float32)
    with tempfile.TemporaryFile(dir=folder) as file:
        for start in range(0, nbytes, 1 << 20):  # a full disk is an error here, not a crash later
            file.write(bytes(min(1 << 20, nbytes - start)))
        file.flush()
        return np.memmap(file, np.float32, "r+", shape=shape)
