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

__all__ = [
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

_lock = threading.Lock()
_known: dict[bool, bool] = {}


def keep_products_exact(options: Any) -> None:
    """Asks ONNX Runtime, in a session's options, for exact integer products where they saturate."""
    if saturates_u8s8(asked=False):
        options.add_session_config_entry(*_EXACT)


def saturates_u8s8(*, asked: bool = True) -> bool:
    """Whether integer products of ONNX Runtime saturate here; found out once per process.

    Args:
        asked: in sessions that were asked for exact products.
    """
    with _lock:
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
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if asked:
        options.add_session_config_entry(*_EXACT)
    session = onnxruntime.InferenceSession(
        probe_model(), options, providers=["CPUExecutionProvider"]
    )
    exact = _DEPTH * _LEFT * _RIGHT
    for rows in _ROWS:
        left = np.full((rows, _DEPTH), _LEFT, np.uint8)
        (product,) = session.run(None, {"a": left})
        if not (product == exact).all():
            return True
    return False


def probe_model() -> bytes:
    """ONNX model ``y = MatMulInteger(a, w)`` of uint8 ``a [rows, 64]`` and a constant int8 ``w``.

    Written as protobuf by hand: the runtime does not depend on the onnx package.
    """
    uint8, int8, int32 = 2, 3, 6  # TensorProto.DataType
    weight = _message(
        (1, _varint(_DEPTH)),  # dims
        (1, _varint(_COLUMNS)),
        (2, _varint(int8)),  # data_type
        (8, b"w"),  # name
        (9, bytes([_RIGHT]) * (_DEPTH * _COLUMNS)),  # raw_data
    )
    node = _message((1, b"a"), (1, b"w"), (2, b"y"), (4, b"MatMulInteger"))
    graph = _message(
        (1, node),
        (2, b"probe"),
        (5, weight),
        (11, _value_info(b"a", uint8, _DEPTH)),
        (12, _value_info(b"y", int32, _COLUMNS)),
    )
    opset = _message((1, b""), (2, _varint(13)))
    return _message((1, _varint(8)), (7, graph), (8, opset))  # ir_version 8


def _value_info(name: bytes, elem_type: int, columns: int) -> bytes:
    """ValueInfoProto of a tensor ``[rows, columns]``."""
    shape = _message((1, _message((2, b"rows"))), (1, _message((1, _varint(columns)))))
    tensor_type = _message((1, _varint(elem_type)), (2, shape))
    return _message((1, name), (2, _message((1, tensor_type))))


class _Number(bytes):
    """An encoded varint, to tell it from the bytes of a string or message."""


def _varint(value: int) -> _Number:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return _Number(encoded)


def _message(*fields: tuple[int, bytes]) -> bytes:
    """Protobuf fields in order: a varint, or bytes with their length."""
    encoded = bytearray()
    for number, value in fields:
        if isinstance(value, _Number):
            encoded += _varint(number << 3) + value
        else:
            encoded += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(encoded)
