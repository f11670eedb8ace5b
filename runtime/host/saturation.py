"""Does ONNX Runtime multiply uint8 by int8 exactly on this processor?

Without VNNI (or AMX, or Arm's dot products) it takes an instruction that adds pairs of products in 16
bits: 2 · 255 · 127 does not fit, and vectors are spoiled in silence. Its option
``session.x64quantprecision`` turns int8 weights into uint8 when a session opens. Those matmuls widen
first: exact, slower, and the weights are held twice. So sessions ask for it only where matmuls saturate.

What a kernel does is asked of ONNX Runtime itself, by a matmul whose result is known, rather than
guessed from the processor's name.
"""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from embedge.runtime.bundle.contract import EXACT_OPTION
from embedge.runtime.bundle.onnx_model import INT32, UINT8
from embedge.runtime.errors import InferenceError
from embedge.runtime.host.fork import no_fork
from embedge.runtime.host.onnxruntime import load_onnxruntime, open_session
from embedge.runtime.host.probe_models import ProbeNode, model_of_nodes
from embedge.runtime.host.processor import instruction_sets

__all__ = [
    "ask_for_exact_matmuls",
    "describe_processor",
    "keep_matmuls_exact",
    "probe_model",
    "require_exact_matmuls",
    "saturates_u8s8",
]

_DEPTH, _COLUMNS = 64, 32
_LEFT, _RIGHT = 255, 127  # the largest uint8 and int8: a pair gives 64770, above 32767
_ROWS = (1, 5)  # one row may take a kernel of its own
_INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512bw", "avx2", "i8mm", "asimddp")

_probing = threading.Lock()
_known: list[bool] = []


def keep_matmuls_exact(options: Any) -> None:
    """Asks ONNX Runtime, in a session's options, for exact integer matmuls where they saturate."""
    if saturates_u8s8():
        ask_for_exact_matmuls(options)


def ask_for_exact_matmuls(options: Any) -> None:
    """Asks for exact integer matmuls on any processor; where they are exact, they stay the same."""
    options.add_session_config_entry(EXACT_OPTION, "1")


def saturates_u8s8() -> bool:
    """Whether u8×s8 matmuls saturate in a session that does not ask for exact ones.

    Tried once per process.
    """
    with no_fork(), _probing:
        if not _known:
            _known.append(_probe())
        return _known[0]


def require_exact_matmuls() -> None:
    """Refuse a host where 8-bit matmuls saturate even in a session that asks for exact ones.

    Tried once per process, and only where they saturate unasked. No such host is known.

    Raises:
        InferenceError: vectors of 8-bit matmuls would be wrong.
    """
    if saturates_u8s8() and _saturates_when_asked():
        raise InferenceError(
            f"8-bit matmuls saturate on this processor ({platform.machine()}), also where ONNX Runtime "
            f"{load_onnxruntime().__version__} is asked for exact ones; take precision='fp32', or another "
            "version of ONNX Runtime"
        )


def describe_processor() -> str:
    """What the processor has for 8-bit matmuls, and how they run on it: a line for people."""
    flags = instruction_sets()
    found = [name for name in _INSTRUCTIONS if name in flags]
    name = ", ".join(found) or platform.machine() or "unknown"
    if saturates_u8s8():
        return f"{name}; u8×s8 matmuls of ONNX Runtime saturate, and are kept exact"
    return f"{name}; 8-bit matmuls are exact"


def probe_model() -> bytes:
    """ONNX model ``y = MatMulInteger(a, w)`` of uint8 ``a [rows, 64]`` and a constant int8 ``w``."""
    weight = np.full((_DEPTH, _COLUMNS), _RIGHT, np.int8)
    node = ProbeNode(op_type="MatMulInteger", inputs=["a", "w"], outputs={"y": (INT32, _COLUMNS)})
    return model_of_nodes([node], inputs={"a": (UINT8, _DEPTH)}, weights={"w": weight})


@functools.cache
def _saturates_when_asked() -> bool:
    with no_fork():
        return _probe(ask_for_exact_matmuls)


def _probe(configure: Callable[[Any], None] = lambda options: None) -> bool:
    options = load_onnxruntime().SessionOptions()
    configure(options)
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = open_session(probe_model(), options, ["CPUExecutionProvider"])
    exact = _DEPTH * _LEFT * _RIGHT
    for rows in _ROWS:
        left = np.full((rows, _DEPTH), _LEFT, np.uint8)
        (result,) = session.run(None, {"a": left})
        if not (result == exact).all():
            return True
    return False
