"""Does this processor add u8×s8 products without saturating?

Without VNNI (or AMX, or Arm's dot products) ONNX Runtime multiplies uint8 by int8 with an
instruction that adds pairs of products in 16 bits: 2 · 255 · 127 does not fit, and vectors are
spoiled in silence. What a kernel does is asked of ONNX Runtime itself, by a product whose exact
result is known, rather than guessed from the processor's name.
"""

from __future__ import annotations

import threading

import numpy as np

__all__ = ["probe_model", "saturates_u8s8"]

_DEPTH, _COLUMNS = 64, 32
_LEFT, _RIGHT = 255, 127  # the largest uint8 and int8: a pair gives 64770, above 32767
_ROWS = (1, 5)  # one row takes a kernel of its own

_lock = threading.Lock()
_known: list[bool] = []


def saturates_u8s8() -> bool:
    """Whether integer products of ONNX Runtime saturate here; asked once per process."""
    with _lock:
        if not _known:
            _known.append(_probe())
        return _known[0]


def _probe() -> bool:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
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
