"""embedge's own kernels for integer matmuls, where they were built and the processor has what they need.

The library of ``runtime/kernels/native`` takes the place of ONNX Runtime's kernels for ``MatMulIntegerToFloat`` and
``MatMulNBits`` in a session. It runs the functions of embedge's graphs as one operator each.
    * 8-bit matmuls and quantized rows are the same to the bit.
    * At 4 bits the same integers are multiplied; the blocks' sums are added in another order.
    * Attention and ``silu`` round otherwise.

The precisions that use it, on the CPU, are int8, int4 and int4-unpacked: ``INTEGER_PRECISIONS`` of
:mod:`embedge.runtime.bundle.contract`. The others run on ONNX Runtime's kernels.

It is compiled when embedge is installed and a C compiler is at hand. One text of each operator runs with AVX512-VNNI,
AVX-VNNI or AVX2, the best that the processor has; ``EMBEDGE_KERNELS=avx2`` and the like choose one, for tests and
comparisons. Without the library, on other processors and under ``EMBEDGE_KERNELS=onnxruntime``, sessions are ONNX
Runtime's alone, which inlines the functions.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, NamedTuple

from embedge.runtime.errors import EmbedgeValueError, warn
from embedge.runtime.host.onnxruntime import load_onnxruntime
from embedge.runtime.host.processor import has_amx
from embedge.runtime.kernels import self_check
from embedge.runtime.kernels.register import INSTRUCTION_SETS, choose, register

__all__ = [
    "describe_kernels",
    "kernel_instructions",
    "kernel_library",
    "own_kernels",
    "use_own_kernels",
]

_SWITCH, _OFF, _ON = "EMBEDGE_KERNELS", "onnxruntime", "embedge"
_THEIRS = "ONNX Runtime's"


def own_kernels() -> bool:
    """Whether graphs of integer matmuls run with embedge's kernels on this processor."""
    return kernel_library() is not None


def kernel_library() -> str | None:
    """The library's file; ``None``: ONNX Runtime's kernels are used."""
    return _find().library


def kernel_instructions() -> str | None:
    """The instruction set of the kernels, such as "avx2"; ``None``: ONNX Runtime's kernels are used."""
    return _find().instructions


def describe_kernels() -> str:
    """Whose kernels run integer matmuls here, and why: a line for people."""
    return _find().description


class _Found(NamedTuple):
    """Whose kernels there are."""

    description: str
    library: str | None = None
    instructions: str | None = None


@functools.cache
def _find() -> _Found:
    """The library, found and tried once per process.

    With AMX, ONNX Runtime multiplies tiles of 8 bits, which these kernels do not; what the 4-bit one would be
    worth there was not measured.
    """
    asked = _asked()
    if asked == _OFF:
        return _Found(f"{_THEIRS}: {_SWITCH}={_OFF} is set")
    if asked == _ON and has_amx():
        return _Found(f"{_THEIRS}, which use AMX")
    load_onnxruntime()
    found = importlib.util.find_spec("embedge.runtime.kernels._native")
    if found is None or found.origin is None:
        reason = "embedge's own are for x86-64, and take a C compiler to install"
        return _missing(asked, reason)
    file = found.origin
    try:
        instructions = choose(file, None if asked == _ON else asked)
        if instructions is None:
            needed = "avx2" if asked == _ON else asked
            return _missing(asked, f"the processor does not have the instructions of {needed}")
        if self_check.is_right(file):
            return _Found(f"embedge's own, with {instructions}", file, instructions)
        problem = "it computes wrong values"
    except EmbedgeValueError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no common base
        problem = " ".join(str(error).split())
    warn(
        f"{file}: not used: {problem}; ONNX Runtime's own kernels run instead, slower; install embedge "
        f"again, or set {_SWITCH}={_OFF} to keep it out"
    )
    return _Found(f"{_THEIRS}: {problem} ({file})")


def _asked() -> str:
    """What the environment asks for.

    Raises:
        EmbedgeValueError: it is not known.
    """
    asked = os.environ.get(_SWITCH) or _ON
    if asked not in (_ON, _OFF, *INSTRUCTION_SETS):
        *others, last = (_ON, _OFF, *INSTRUCTION_SETS)
        raise EmbedgeValueError(
            f"{_SWITCH}: expected {', '.join(others)} or {last}, found {asked!r}"
        )
    return asked


def _missing(asked: str, reason: str) -> _Found:
    """Without kernels that nobody asked for by name; those are an error.

    Raises:
        EmbedgeValueError: an instruction set was asked for.
    """
    if asked in INSTRUCTION_SETS:
        raise EmbedgeValueError(
            f"{_SWITCH}={asked}: {reason}; unset it, or take {_SWITCH}={_OFF} for ONNX Runtime's kernels"
        )
    return _Found(f"{_THEIRS}: {reason}")


def use_own_kernels(options: Any, *, panels: bool = False) -> None:
    """Lets the session that is opened with some options run embedge's kernels, if there are any.

    Args:
        options: of the session.
        panels: whether its weights lie in panels, see :mod:`embedge.runtime.kernels.repack`.
    """
    library = kernel_library()
    if library is not None:
        register(options, library, panels=panels)
