"""ONNX models of one node, for probes; written as protobuf by hand, as the runtime has no onnx package."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.onnx_model import FLOAT, INT8, INT32, INT64, UINT8

__all__ = ["one_node_model"]

_ELEM_TYPES = {"float32": FLOAT, "uint8": UINT8, "int8": INT8, "int32": INT32, "int64": INT64}
_IR_VERSION, _OPSET = 8, 13
_A_FLOAT, _AN_INT = 1, 2  # AttributeProto.AttributeType


def one_node_model(
    op_type: bytes,
    *,
    inputs: Mapping[bytes, tuple[int, ...]],
    weights: Mapping[bytes, NDArray[Any]],
    output: tuple[int, ...],
    domain: bytes = b"",
    outputs: int = 1,
    attributes: Mapping[bytes, float] | None = None,
) -> bytes:
    """A serialized ModelProto of one node, whose first output is the model's, ``y``.

    Args:
        op_type: of the node.
        inputs: element type and last dimensions of each input of the model, behind any number of rows.
        weights: float32, uint8, int8, int32 or int64 constants; the node takes them behind the inputs.
        output: element type and last dimensions of the output.
        domain: of the operator; at version 1, where it is not ONNX's own.
        outputs: how many the node has.
        attributes: integers and floats, by name.
    """
    made = [b"y", *(b"y%d" % number for number in range(1, outputs))]
    node = _message(
        *((1, name) for name in (*inputs, *weights)),
        *((2, name) for name in made),
        (4, op_type),
        *((5, _attribute(name, value)) for name, value in (attributes or {}).items()),
        (7, domain),
    )
    graph = _message(
        (1, node),
        (2, b"probe"),
        *((5, _tensor(name, value)) for name, value in weights.items()),
        *((11, _value_info(name, *of)) for name, of in inputs.items()),
        (12, _value_info(b"y", *output)),
    )
    opsets = [(8, _message((1, b""), (2, _OPSET)))]
    if domain:
        opsets.append((8, _message((1, domain), (2, 1))))
    return _message((1, _IR_VERSION), (7, graph), *opsets)


def _attribute(name: bytes, value: float) -> bytes:
    """AttributeProto of an integer or a float."""
    if isinstance(value, int):
        return _message((1, name), (3, value), (20, _AN_INT))
    return _message((1, name), (2, value), (20, _A_FLOAT))


def _tensor(name: bytes, value: NDArray[Any]) -> bytes:
    """TensorProto with raw data."""
    return _message(
        *((1, size) for size in value.shape),
        (2, _ELEM_TYPES[value.dtype.name]),
        (8, name),
        (9, np.ascontiguousarray(value).tobytes()),
    )


def _value_info(name: bytes, elem_type: int, *last: int) -> bytes:
    """ValueInfoProto of a tensor ``[rows, …]``."""
    shape = _message((1, _message((2, b"rows"))), *((1, _message((1, size))) for size in last))
    tensor_type = _message((1, elem_type), (2, shape))
    return _message((1, name), (2, _message((1, tensor_type))))


def _message(*fields: tuple[int, bytes | float]) -> bytes:
    """Protobuf fields in order: an integer as a varint, a float as four bytes, bytes with their length."""
    encoded = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            encoded += _varint(number << 3) + _varint(value)
        elif isinstance(value, float):
            encoded += _varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            encoded += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(encoded)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    value %= 1 << 64  # a negative one as its two's complement
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
