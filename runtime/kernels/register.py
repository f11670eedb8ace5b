"""Registers the library of embedge's kernels in a session."""

from __future__ import annotations

import ctypes
from typing import Any

from embedge.runtime.host.fork import no_fork

__all__ = ["INSTRUCTION_SETS", "OPERATORS", "choose", "register", "uses_bfloat16"]

INSTRUCTION_SETS = ("avx512-vnni", "avx-vnni", "avx2")  # of the kernels, the best first

# Changes with what the library runs: graphs that were prepared with another do not open.
OPERATORS = "3"


def choose(library: str, instruction_set: str | None = None) -> str | None:
    """Chooses the instruction set of the kernels in sessions that open from now on, in the whole process.

    Args:
        library: the library's file.
        instruction_set: one of :data:`INSTRUCTION_SETS`; ``None``: the best that the processor has.

    Returns:
        The set; ``None`` if the processor does not have it, and nothing changes.
    """
    with no_fork():  # the system's loader has locks of its own
        function = ctypes.CDLL(library).embedge_kernels_choose
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_char_p]
    chosen: bytes | None = function(instruction_set.encode() if instruction_set else None)
    return chosen.decode() if chosen else None


def uses_bfloat16(library: str) -> bool:
    """Whether the attention of a library's chosen instruction set multiplies bfloat16.

    What the processor has does not say: another set may have been chosen, or the compiler may not know bfloat16.
    """
    with no_fork():
        return bool(ctypes.CDLL(library).embedge_kernels_use_bfloat16())


def register(options: Any, library: str, *, panels: bool) -> None:
    """Lets the session that is opened with some options run the kernels of a library.

    Args:
        options: of the session.
        library: the library's file.
        panels: whether its weights lie in panels, see :mod:`embedge.runtime.kernels.repack`.
    """
    options.add_session_config_entry("embedge.weights", "panels" if panels else "rows")
    with no_fork():  # the system's loader has locks of its own
        options.register_custom_ops_library(library)
