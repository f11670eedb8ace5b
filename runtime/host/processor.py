"""Does this processor add u8×s8 products without saturating?

Without VNNI (or AMX, or Arm's dot products) ONNX Runtime multiplies uint8 by int8 with an
instruction that adds pairs of products in 16 bits: 2 · 255 · 127 does not fit, and vectors are
spoiled in silence. Its option ``session.x64quantprecision`` makes it turn int8 weights into uint8
ones when a session opens, whose products are widened first: exact, slower, and the weights are
held twice. So sessions are opened with it where products were seen to saturate, and only there.

What a kernel does is asked of ONNX Runtime itself, by a product whose exact result is known, rather
than guessed from the processor's name.
"""

from __future__ import annotations

import functools
import platform
import threading
from pathlib import Path
from typing import Any

import numpy as np

from embedge.runtime.host.fork import no_fork
from embedge.runtime.host.onnxruntime import load_onnxruntime, open_session
from embedge.runtime.host.probe_models import INT32, UINT8, one_node_model

__all__ = [
    "ask_for_exact_products",
    "describe_processor",
    "has_amx",
    "keep_products_exact",
    "probe_model",
    "saturates_u8s8",
]

_DEPTH, _COLUMNS = 64, 32
_LEFT, _RIGHT = 255, 127  # the largest uint8 and int8: a pair gives 64770, above 32767
_ROWS = (1, 5)  # one row may take a kernel of its own
_INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512bw", "avx2", "i8mm", "asimddp")

_EXACT = ("session.x64quantprecision", "1")

_probing = threading.Lock()
_known: dict[bool, bool] = {}


def keep_products_exact(options: Any) -> None:
    """Asks ONNX Runtime, in a session's options, for exact integer products where they saturate."""
    if saturates_u8s8(asked=False):
        ask_for_exact_products(options)


def ask_for_exact_products(options: Any) -> None:
    """Asks for exact integer products on any processor; where they are exact, they stay the same."""
    options.add_session_config_entry(*_EXACT)


def saturates_u8s8(*, asked: bool = True) -> bool:
    """Whether integer products of ONNX Runtime saturate here; found out once per process.

    Args:
        asked: in sessions that were asked for exact products.
    """
    with no_fork(), _probing:
        if asked not in _known:
            _known[asked] = _probe(asked)
        return _known[asked]


def describe_processor() -> str:
    """What the processor has for 8-bit products, and what becomes of them: a line for people."""
    flags = _flags()
    found = [name for name in _INSTRUCTIONS if name in flags]
    name = ", ".join(found) or platform.machine() or "unknown"
    if not saturates_u8s8(asked=False):
        return f"{name}; 8-bit products are exact"
    if not saturates_u8s8():
        return f"{name}; u8×s8 products saturate, so u8×u8 ones are used: exact, slower"
    return f"{name}; 8-bit products saturate, so 7-bit activations are used: less precise"


def has_amx() -> bool:
    """Whether the processor multiplies tiles of 8-bit integers."""
    return "amx_int8" in _flags()


@functools.cache
def _flags() -> frozenset[str]:
    """Names of the processor's instruction sets, as Linux has them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return frozenset()
    return frozenset(word for line in text.splitlines() if ":" in line for word in line.split())


def _probe(asked: bool) -> bool:
    options = load_onnxruntime().SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if asked:
        ask_for_exact_products(options)
    session = open_session(probe_model(), options, ["CPUExecutionProvider"])
    exact = _DEPTH * _LEFT * _RIGHT
    for rows in _ROWS:
        left = np.full((rows, _DEPTH), _LEFT, np.uint8)
        (product,) = session.run(None, {"a": left})
        if not (product == exact).all():
            return True
    return False


def probe_model() -> bytes:
    """ONNX model ``y = MatMulInteger(a, w)`` of uint8 ``a [rows, 64]`` and a constant int8 ``w``."""
    weight = np.full((_DEPTH, _COLUMNS), _RIGHT, np.int8)
    return one_node_model(
        b"MatMulInteger",
        inputs={b"a": (UINT8, _DEPTH)},
        weights={b"w": weight},
        output=(INT32, _COLUMNS),
    )
