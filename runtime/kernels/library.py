"""embedge's own kernels for integer matmuls, where they were built and the processor has what they need.

The library of ``runtime/kernels/native`` takes the place of ONNX Runtime's kernels for ``MatMulIntegerToFloat`` and
``MatMulNBits`` in a session. It runs the functions of embedge's graphs as one operator each.
    * 8-bit matmuls and quantized rows are the same to the bit.
    * At 4 bits the same integers are multiplied; the blocks' sums are added in another order.
    * Attention and ``silu`` round otherwise.

The precisions that use it, on the CPU, are int8, int4 and int4-unpacked: ``INTEGER_PRECISIONS`` of
:mod:`embedge.runtime.bundle.contract`. The others run on ONNX Runtime's kernels.

It is compiled when embedge is installed and a C compiler is at hand. Without it, on other processors and under
``EMBEDGE_KERNELS=onnxruntime``, sessions are ONNX Runtime's alone, which inlines the functions.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from typing import Any

from embedge.runtime.errors import EmbedgeValueError, warn
from embedge.runtime.host.fork import no_fork
from embedge.runtime.host.onnxruntime import load_onnxruntime
from embedge.runtime.host.processor import has_amx
from embedge.runtime.kernels import self_check
from embedge.runtime.kernels.register import register

__all__ = ["describe_kernels", "kernel_library", "own_kernels", "use_own_kernels"]

_SWITCH, _OFF, _ON = "EMBEDGE_KERNELS", "onnxruntime", "embedge"


def own_kernels() -> bool:
    """Whether graphs of integer matmuls run with embedge's kernels on this processor."""
    return kernel_library() is not None


def kernel_library() -> str | None:
    """The library's file; ``None``: ONNX Runtime's kernels are used."""
    return _find()[0]


def describe_kernels() -> str:
    """Whose kernels run integer matmuls here, and why: a line for people."""
    return _find()[1]


@functools.cache
def _find() -> tuple[str | None, str]:
    """The library, found and tried once per process, and what :func:`describe_kernels` says of it.

    With AMX, ONNX Runtime multiplies tiles of 8 bits, which these kernels do not; what the 4-bit one would be
    worth there was not measured.
    """
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
        panels: whether its weights lie in panels, see :mod:`embedge.runtime.kernels.repack`.
    """
    library = kernel_library()
    if library is not None:
        register(options, library, panels=panels)
