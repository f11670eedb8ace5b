"""embedge's own kernels for integer products, where they were built and the processor has what they need.

The library of ``runtime/kernels/native`` takes the place of ONNX Runtime's kernels for ``MatMulIntegerToFloat`` and
``MatMulNBits`` in a session, and runs the functions of its graphs (:mod:`embedge.export.graph.fused_ops`) as one
operator each. 8-bit products and quantized rows are the same to the bit; at 4 bits the same integers are
multiplied, and the blocks' sums are added in another order; attention and ``silu`` round otherwise. It is
compiled when embedge is installed and a C compiler is at hand; without it, on other processors and where
``EMBEDGE_KERNELS=onnxruntime`` is set, sessions are ONNX Runtime's alone, which inlines the functions.

Products read weights in panels of 16 columns. The kernels lay them out themselves from a bundle's tensors,
unless the session says that they lie in panels already: :func:`in_panels`, for weights that are made when a
session opens, and in prepared graphs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.contract import INLINE_BYTES
from embedge.runtime.errors import EmbedgeValueError, warn
from embedge.runtime.host.fork import no_fork
from embedge.runtime.host.onnxruntime import load_onnxruntime
from embedge.runtime.host.processor import has_amx

__all__ = [
    "OPERATORS",
    "PANELS",
    "describe_kernels",
    "in_panels",
    "kernel_library",
    "own_kernels",
    "use_own_kernels",
]

Weight = TypeVar("Weight", bound=NDArray[Any])

PANELS = "16 x 4 of 8 bits, 16 x 8 of 4 bits"  # the layout of panels, as prepared graphs record it
OPERATORS = (
    "2"  # changes with what the library runs: graphs that were prepared with another do not open
)
_SWITCH, _OFF, _ON = "EMBEDGE_KERNELS", "onnxruntime", "embedge"
_LANES, _GROUP = 16, 4  # columns of a panel, rows of a line


def own_kernels() -> bool:
    """Whether graphs of integer products run with embedge's kernels on this processor."""
    return kernel_library() is not None


def kernel_library() -> str | None:
    """The library's file; ``None``: ONNX Runtime's kernels are used."""
    return _find()[0]


def describe_kernels() -> str:
    """Whose kernels run integer products here, and why: a line for people."""
    return _find()[1]


@functools.cache
def _find() -> tuple[str | None, str]:
    """The library, found and tried once per process, and what :func:`describe_kernels` says of it.

    With AMX, ONNX Runtime multiplies tiles of 8 bits, which these kernels do not; what the 4-bit one would be
    worth there was not measured.
    """
    from embedge.runtime.kernels import self_check

    theirs = "ONNX Runtime's"
    asked = os.environ.get(_SWITCH) or _ON
    if asked not in (_ON, _OFF):
        raise EmbedgeValueError(f"{_SWITCH}: expected {_ON} or {_OFF}, found {asked!r}")
    if asked == _OFF:
        return None, f"{theirs}: {_SWITCH}={_OFF} is set"
    if has_amx():
        return None, f"{theirs}, which use AMX"
    load_onnxruntime()
    found = importlib.util.find_spec("embedge.runtime.kernels._native")
    if found is None or found.origin is None:
        return (
            None,
            f"{theirs}: embedge's own are for Linux on x86-64, and take a C compiler to install",
        )
    file = found.origin
    try:
        with no_fork():
            runs_here = ctypes.CDLL(file).embedge_kernels_run_here()
        if not runs_here:
            return (
                None,
                f"{theirs}: embedge's own take AVX512-VNNI, which the processor does not have",
            )
        if self_check.is_right(file):
            return file, "embedge's own"
        problem = "it computes wrong values"
    except Exception as error:  # ONNX Runtime's errors have no common base
        problem = " ".join(str(error).split())
    warn(
        f"{file}: not used: {problem}; ONNX Runtime's own kernels run instead, slower; install embedge "
        f"again, or set {_SWITCH}={_OFF} to keep it out"
    )
    return None, f"{theirs}: {problem} ({file})"


def use_own_kernels(options: Any, *, panels: bool = False) -> None:
    """Lets the session that is opened with some options run embedge's kernels, if there are any.

    Args:
        options: of the session.
        panels: whether its weights lie in panels, see :func:`in_panels`.
    """
    library = kernel_library()
    if library is not None:
        register(options, library, panels=panels)


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
        with tempfile.TemporaryFile(dir=scratch) as file:
            file.truncate(weight.size)
            memory = mmap.mmap(file.fileno(), weight.size)
    panels: Any = np.frombuffer(memory, weight.dtype)
    panels.reshape(lines.shape)[:] = lines
    laid_out: Weight = panels.reshape(weight.shape)
    return laid_out


def _lines_of_8_bits(weight: NDArray[np.int8]) -> NDArray[np.int8] | None:
    """A view ``[columns / 16, depth / 4, 16, 4]``; ``None`` where panels are not full."""
    depth, columns = weight.shape
    if depth % _GROUP or columns % _LANES:
        return None
    lines = weight.reshape(depth // _GROUP, _GROUP, columns // _LANES, _LANES)
    return lines.transpose(2, 0, 3, 1)


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


def register(options: Any, library: str, *, panels: bool) -> None:
    """:func:`use_own_kernels` of a library that is given."""
    options.add_session_config_entry("embedge.weights", "panels" if panels else "rows")
    with no_fork():  # the system's loader has locks of its own
        options.register_custom_ops_library(library)
