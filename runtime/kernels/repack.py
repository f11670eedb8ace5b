"""Weights in the order in which the kernels read them: panels of 16 columns.

The kernels lay a bundle's tensors out themselves when a session opens, unless the session says that its weights
lie in panels already: those that are made when it opens, and those of prepared graphs. A drawing of the layouts:
``runtime/kernels/native/README.md``.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.contract import INLINE_BYTES

__all__ = ["PANELS", "in_panels", "panels_of"]

Weight = TypeVar("Weight", bound=NDArray[Any])

PANELS = "16 x 4 of 8 bits, 16 x 8 of 4 bits"  # the layout of panels, as prepared graphs record it
_LANES, _GROUP = 16, 4  # columns of a panel, rows of a line


def in_panels(weight: Weight, scratch: Path | None = None) -> Weight:
    """A weight as the kernels expect it of a session whose weights lie in panels.

    Args:
        weight: int8 ``[depth, columns]`` of ``MatMulIntegerToFloat``, or uint8 ``[columns, blocks,
            block_size / 2]`` of ``MatMulNBits``, two values to a byte.
        scratch: a folder on whose disk the result lies, in a file without a name; ``None``: in memory.

    Returns:
        As many bytes of the same dtype and shape, laid out as ``[columns / 16, depth / 4, 16, 4]``, or
        ``[columns / 16, depth / 8, 16, 4]`` with the first four of eight values in the low halves of their
        bytes; as it was, where it does not fill its panels or has 4096 bytes at most.
    """
    if weight.size <= INLINE_BYTES:
        return weight
    lines = _lines_of_4_bits(weight) if weight.ndim == 3 else _lines_of_8_bits(weight)
    if lines is None:
        return weight
    # Mapped, so that the system has the memory back once ONNX Runtime has taken its copy: of what is
    # freed, the C library keeps blocks of this size for the next ones.
    if scratch is None:
        memory = mmap.mmap(-1, weight.size)
    else:
        import tempfile  # seldom needed, and slow to load

        with tempfile.TemporaryFile(dir=scratch) as file:
            file.truncate(weight.size)
            memory = mmap.mmap(file.fileno(), weight.size)
    panels: Any = np.frombuffer(memory, weight.dtype)
    panels.reshape(lines.shape)[:] = lines
    laid_out: Weight = panels.reshape(weight.shape)
    return laid_out


def panels_of(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """A view ``[columns / 16, depth / 4, 16, 4]`` of a weight ``[depth, columns]`` that fills its panels."""
    depth, columns = weight.shape
    lines = weight.reshape(depth // _GROUP, _GROUP, columns // _LANES, _LANES)
    return lines.transpose(2, 0, 3, 1)


def _lines_of_8_bits(weight: NDArray[np.int8]) -> NDArray[np.int8] | None:
    """Its panels; ``None`` where they are not full."""
    depth, columns = weight.shape
    return None if depth % _GROUP or columns % _LANES else panels_of(weight)


def _lines_of_4_bits(weight: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """``[columns / 16, depth / 8, 16, 4]``; ``None`` where panels are not full."""
    columns = weight.shape[0]
    if columns % _LANES:
        return None
    pairs = weight.reshape(columns // _LANES, _LANES, -1, _GROUP).transpose(0, 2, 1, 3)
    lines = np.empty(pairs.shape, np.uint8)
    for half in (0, 1):  # bytes 0 and 1 hold values 0 to 3, bytes 2 and 3 hold 4 to 7
        first, second = pairs[..., half], pairs[..., half + 2]
        lines[..., 2 * half] = (first & 15) | (second << 4)
        lines[..., 2 * half + 1] = (first >> 4) | (second & 0xF0)
    return lines
