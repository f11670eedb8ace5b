"""Small ONNX models for probes; written as protobuf by hand, as the runtime has no onnx package."""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.onnx_model import FLOAT, INT8, INT32, INT64, UINT8

__all__ = ["ProbeNode", "ValueType", "model_of_nodes"]

_ELEM_TYPES = {"float32": FLOAT, "uint8": UINT8, "int8": INT8, "int32": INT32, "int64": INT64}
ValueType: TypeAlias = tuple[int, *tuple[int | str, ...]]
_IR_VERSION, _OPSET = 8, 13
_A_FLOAT, _AN_INT = 1, 2  # AttributeProto.AttributeType
_ONE_BYTE = [bytes((value,)) for value in range(0x80)]


class ProbeNode(NamedTuple):
    """A node of a probe.

    Attributes:
        op_type: its operator.
        inputs: names of what it takes.
        outputs: what it gives, as a model's inputs are described.
        domain: of the operator; at version 1, where it is not ONNX's own.
        attributes: integers and floats, by name.
    """

    op_type: str
    inputs: Sequence[str]
    outputs: Mapping[str, ValueType]
    domain: str = ""
    attributes: Mapping[str, float] = {}


def model_of_nodes(
    nodes: Sequence[ProbeNode],
    *,
    inputs: Mapping[str, ValueType],
    weights: Mapping[str, NDArray[Any]],
) -> bytes:
    """A serialized ModelProto, whose outputs are those of its nodes.

    Args:
        nodes: in their order.
        inputs: of the model, by name: element type, and dimensions behind any number of rows; a dimension
            with a name has any size.
        weights: float32, uint8, int8, int32 or int64 constants, by name.
    """
    graph = _message(
        *((1, _node(node)) for node in nodes),
        (2, "probe"),
        *((5, _tensor(name, value)) for name, value in weights.items()),
        *((11, _value_info(name, of)) for name, of in inputs.items()),
        *((12, _value_info(name, of)) for node in nodes for name, of in node.outputs.items()),
    )
    domains = sorted({node.domain for node in nodes} - {""})
    opsets = [(8, _message((1, ""), (2, _OPSET)))]
    opsets += [(8, _message((1, domain), (2, 1))) for domain in domains]
    return _message((1, _IR_VERSION), (7, graph), *opsets)


def _node(node: ProbeNode) -> bytes:
    """NodeProto."""
    return _message(
        *((1, name) for name in node.inputs),
        *((2, name) for name in node.outputs),
        (4, node.op_type),
        *((5, _attribute(name, value)) for name, value in node.attributes.items()),
        (7, node.domain),
    )


def _attribute(name: str, value: float) -> bytes:
    """AttributeProto of an integer or a float."""
    if isinstance(value, int):
        return _message((1, name), (3, value), (20, _AN_INT))
    return _message((1, name), (2, value), (20, _A_FLOAT))


def _tensor(name: str, value: NDArray[Any]) -> bytes:
    """TensorProto with raw data."""
    return _message(
        *((1, size) for size in value.shape),
        (2, _ELEM_TYPES[value.dtype.name]),
        (8, name),
        (9, np.ascontiguousarray(value).tobytes()),
    )


def _value_info(name: str, of: ValueType) -> bytes:
    """ValueInfoProto of a tensor ``[rows, …]``."""
    return _message((1, name), (2, _type(of)))


@functools.cache
def _type(of: ValueType) -> bytes:
    """TypeProto of a tensor ``[rows, …]``."""
    elem_type, *last = of
    sizes = ((1 if isinstance(size, int) else 2, size) for size in ("rows", *last))
    shape = _message(*((1, _message(size)) for size in sizes))
    return _message((1, _message((1, elem_type), (2, shape))))


def _message(*fields: tuple[int, bytes | str | float]) -> bytes:
    """Protobuf fields in order: an integer as a varint, a float as four bytes, bytes with their length."""
    parts: list[bytes] = []
    for number, value in fields:
        if isinstance(value, int):
            parts += (_varint(number << 3), _varint(value))
        elif isinstance(value, float):
            parts += (_varint(number << 3 | 5), struct.pack("<f", value))
        else:
            data = value.encode() if isinstance(value, str) else value
            parts += (_varint(number << 3 | 2), _varint(len(data)), data)
    return b"".join(parts)


def _varint(value: int) -> bytes:
    if 0 <= value < len(_ONE_BYTE):
        return _ONE_BYTE[value]
    encoded = bytearray()
    value %= 1 << 64  # a negative one as its two's complement
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
