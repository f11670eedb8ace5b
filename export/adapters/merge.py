"""The arithmetic of merging a LoRA into a weight, as PEFT does it, in float32.

    plain   W + s · B·A
    DoRA    m · (W + s · B·A) / ‖W + s · B·A‖, with one magnitude m and one norm per output

with A ``[rank, in]`` and B ``[out, rank]``. W is ``[out, in]`` in a Linear. It is ``[in, out]`` in
an embedding table (in = tokens) and in the Conv1D of GPT-2's kind, which are merged with
``transposed=True``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["add_low_rank", "output_norms", "scale_to_magnitude"]

_BLOCK_VALUES = 1 << 22  # 16 MB of B·A at a time


def add_low_rank(
    weight: NDArray[np.float32],
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    scaling: float,
    *,
    transposed: bool,
) -> None:
    """Add ``scaling · B·A`` to ``weight`` in place, a block of rows at a time.

    Args:
        weight: float32 ``[out, in]``, or ``[in, out]`` if ``transposed``.
        a: float32 ``[rank, in]``.
        b: float32 ``[out, rank]``.
        scaling: the factor s.
        transposed: whether ``weight`` has its inputs first.
    """
    left, right = (a.T, b.T) if transposed else (b, a)
    rows = max(1, _BLOCK_VALUES // max(1, weight.shape[1]))
    for begin in range(0, weight.shape[0], rows):
        block = left[begin : begin + rows] @ right
        block *= np.float32(scaling)
        weight[begin : begin + rows] += block


def output_norms(weight: NDArray[np.float32], *, transposed: bool) -> NDArray[np.float64]:
    """Length of the weights of every output, ``[out]``.

    Args:
        weight: float32 ``[out, in]``, or ``[in, out]`` if ``transposed``.
        transposed: whether ``weight`` has its inputs first.
    """
    squares = "ij,ij->j" if transposed else "ij,ij->i"
    norms: NDArray[np.float64] = np.sqrt(np.einsum(squares, weight, weight, dtype=np.float64))
    return norms


def scale_to_magnitude(
    weight: NDArray[np.float32], magnitude: NDArray[np.float32], *, transposed: bool
) -> None:
    """Scale ``weight`` in place so that the weights of every output have the length ``magnitude``.

    Args:
        weight: float32 ``[out, in]``, or ``[in, out]`` if ``transposed``; the adapter is already
            added.
        magnitude: float32 ``[out]``.
        transposed: whether ``weight`` has its inputs first.

    Raises:
        ZeroDivisionError: if all weights of an output are zero, which have no direction.
    """
    norm = output_norms(weight, transposed=transposed)
    if not norm.all():
        raise ZeroDivisionError(f"output {int(np.argmin(norm))} has the norm 0")
    factor = (magnitude / norm).astype(np.float32)
    weight *= factor if transposed else factor[:, np.newaxis]
