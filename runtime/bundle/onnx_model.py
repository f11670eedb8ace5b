"""ONNX models, read without the onnx package: the fields that `embedge export` writes, and no others.

Numbers of fields are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto. Whether operators,
attributes and shapes fit each other is not looked at here (:mod:`embedge.runtime.bundle.graph_check`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from embedge.runtime.bundle.names import is_path
from embedge.runtime.bundle.protobuf import Message, spec
from embedge.runtime.bundle.schema import MOST_BYTES, Record, Within, record

__all__ = [
    "BOOL",
    "FLOAT",
    "FLOAT16",
    "INT8",
    "INT32",
    "INT64",
    "UINT8",
    "Attribute",
    "ExternalData",
    "Function",
    "Graph",
    "Model",
    "Node",
    "StoredTensor",
    "ValueType",
    "read_initializer",
    "read_model",
]

FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16 = 1, 2, 3, 6, 7, 9, 10  # TensorProto.DataType
_DTYPES: Mapping[int, np.dtype[Any]] = {
    FLOAT: np.dtype("float32"),
    UINT8: np.dtype("uint8"),
    INT8: np.dtype("int8"),
    INT32: np.dtype("int32"),
    INT64: np.dtype("int64"),
    BOOL: np.dtype("bool"),
    FLOAT16: np.dtype("float16"),
}
_EXTERNAL = 1  # TensorProto.DataLocation
_VALUE_FIELDS = {
    1: 2,
    2: 3,
    5: 6,
    7: 8,
}  # of a float, an integer, a graph and integers, by AttributeType
_MOST = (1 << 31) - 1
_MOST_RANK, _MOST_NODES = 8, 200_000

_Item = TypeVar("_Item")
ValueType: TypeAlias = tuple[int, int]  # element type and rank

_MODEL = spec(numbers=(1, 5), data=(2, 3, 4, 6, 7, 8, 14, 25), many=(8, 14, 25))
_GRAPH = spec(data=(1, 2, 5, 10, 11, 12), many=(1, 5, 11, 12))
_NODE = spec(data=(1, 2, 3, 4, 5, 6, 7), many=(1, 2, 5))
_ATTRIBUTE = spec(numbers=(3, 8, 20), floats=(2,), data=(1, 4, 6, 13, 21), many=(8,))
_TENSOR = spec(numbers=(1, 2, 14), data=(8, 9, 12, 13), many=(1, 13))
_FUNCTION = spec(data=(1, 4, 5, 6, 7, 8, 9, 10), many=(4, 5, 6, 7, 9))
_OPSET = spec(numbers=(2,), data=(1,))
_VALUE = spec(data=(1, 2, 3))
_TYPE = spec(data=(1,))
_TENSOR_TYPE = spec(numbers=(1,), data=(2,))
_SHAPE = spec(data=(1,), many=(1,))
_DIMENSION = spec(numbers=(1,), data=(2,))
_ENTRY = spec(data=(1, 2))


@record
class ExternalData(Record):
    """Where a tensor's bytes lie: ``location`` is relative to the folder of the graph."""

    location: str
    offset: Annotated[int, Within(0, MOST_BYTES)]
    length: Annotated[int, Within(0, MOST_BYTES)]


class StoredTensor(NamedTuple):
    """An initializer: its element type, shape, and where its bytes lie (``None``: in the graph)."""

    elem_type: int
    shape: tuple[int, ...]
    place: ExternalData | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its elements."""
        return _DTYPES[self.elem_type]

    @property
    def nbytes(self) -> int:
        """Bytes of its shape."""
        return prod(self.shape) * self.dtype.itemsize


class Attribute(NamedTuple):
    """An attribute of a node.

    Attributes:
        type: an ``AttributeProto.AttributeType``.
        value: ``None``: that of an attribute of the function which the node is in.
    """

    type: int
    value: float | list[int] | Graph | None


class Node(NamedTuple):
    """An operator with the names of its inputs and outputs, and its attributes by name."""

    domain: str
    op_type: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Attribute]

    def __str__(self) -> str:
        return f"node {self.outputs[0] if self.outputs else ''!r} ({self.op_type})"

    @property
    def branches(self) -> list[Graph]:
        """The graphs among its attributes."""
        return [a.value for a in self.attributes.values() if isinstance(a.value, Graph)]

    def value(self, name: str) -> float | list[int] | Graph | None:
        """An attribute's value; ``None`` where it has none."""
        return self.attributes[name].value if name in self.attributes else None

    def size(self, name: str) -> int:
        """An attribute that is a whole number from 1 on."""
        value = self.value(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self} has {name} of {value!r}, expected a whole number from 1")
        return value


class Graph(NamedTuple):
    """Nodes in their order; inputs, outputs and initializers by name."""

    nodes: Sequence[Node]
    inputs: Mapping[str, ValueType]
    outputs: Mapping[str, ValueType]
    initializers: Mapping[str, StoredTensor]


class Function(NamedTuple):
    """An operator that is made of others: the names of what it takes and gives, and its nodes."""

    domain: str
    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Sequence[str]
    nodes: Sequence[Node]


class Model(NamedTuple):
    """A graph, the functions that it may call, and the version of each domain of operators."""

    opsets: Mapping[str, int]
    functions: Sequence[Function]
    graph: Graph


def read_model(data: bytes) -> Model:
    """The model in the bytes of an ONNX file.

    Raises:
        ValueError: it is none, or has other fields than exports write.
        IndexError: it is cut.
        RecursionError: it is nested too deeply.
    """
    model = Message(data, _MODEL)
    opsets = _by_name(
        ((entry.text(1), entry.number(2)) for entry in model.messages(8, _OPSET)), "domain"
    )
    graphs, reader = list(model.messages(7, _GRAPH)), _Reader()
    if not graphs:
        raise ValueError("it holds no graph")
    functions = [reader.function(message) for message in model.messages(25, _FUNCTION)]
    return Model(opsets, functions, reader.graph(graphs[0]))


class _Reader:
    """Reads what holds nodes, and counts them."""

    def __init__(self) -> None:
        self._nodes = 0

    def function(self, message: Message) -> Function:
        inputs, outputs, attributes = (list(message.texts(field)) for field in (4, 5, 6))
        nodes = [self._node(node) for node in message.messages(7, _NODE)]
        return Function(message.text(10), message.text(1), inputs, outputs, attributes, nodes)

    def graph(self, message: Message) -> Graph:
        return Graph(
            [self._node(node) for node in message.messages(1, _NODE)],
            _by_name(_value(value) for value in message.messages(11, _VALUE)),
            _by_name(_value(value) for value in message.messages(12, _VALUE)),
            _by_name(_tensor(tensor) for tensor in message.messages(5, _TENSOR)),
        )

    def _node(self, message: Message) -> Node:
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise ValueError(f"it has more than {_MOST_NODES} nodes")
        op_type = message.text(4)
        attributes: dict[str, Attribute] = {}
        for found in message.messages(5, _ATTRIBUTE):
            name = found.text(1)
            if name in attributes:
                raise ValueError(f"{op_type} has {name} twice")
            attributes[name] = self._attribute(found, f"{name[:80]} of {op_type[:80]}")
        inputs, outputs = list(message.texts(1)), list(message.texts(2))
        return Node(message.text(7), op_type, inputs, outputs, attributes)

    def _attribute(self, message: Message, name: str) -> Attribute:
        kind = message.number(20)
        field = _VALUE_FIELDS.get(kind)
        given = {other for other in (2, 3, 4, 6, 8) if other in message}
        if field is None or given - {field}:
            raise ValueError(f"the attribute {name} has another type")
        if 21 in message:
            if given or not message.text(21):
                raise ValueError(f"the attribute {name} is that of no function")
            return Attribute(kind, None)
        if field == 6:
            for graph in message.messages(6, _GRAPH):
                return Attribute(kind, self.graph(graph))
            raise ValueError(f"the attribute {name} holds no graph")
        return Attribute(kind, message.numbers(8) if field == 8 else message.number(field))


def read_initializer(data: bytes, start: int, stop: int) -> tuple[str, StoredTensor, bytes | None]:
    """Name, type and place of an initializer, and its bytes where they lie in the graph.

    Args:
        data: the file.
        start: where the initializer begins.
        stop: where it ends.

    Raises:
        ValueError: it is none, or has other fields than exports write.
    """
    message = Message(data, _TENSOR, start, stop)
    name, tensor = _tensor(message)
    inside = message.span(9)
    return name, tensor, data[slice(*inside)] if inside and tensor.place is None else None


def _tensor(message: Message) -> tuple[str, StoredTensor]:
    name, elem_type = message.text(8), message.number(2)
    shape = tuple(message.numbers(1))
    if elem_type not in _DTYPES:
        raise ValueError(f"initializer {name!r} has the unknown type {elem_type}")
    if len(shape) > _MOST_RANK or any(not 0 <= n <= _MOST for n in shape):
        raise ValueError(f"initializer {name!r} has the shape {list(shape)}")
    place = _place(message) if message.number(14) == _EXTERNAL else None
    if (place is None) == (13 in message) or (place is None) != (9 in message):
        raise ValueError(f"initializer {name!r} lies neither in the graph nor beside it")
    tensor = StoredTensor(elem_type, shape, place)
    size = place.length if place else message.size(9)
    if size != tensor.nbytes:
        raise ValueError(
            f"initializer {name!r} of the shape {list(shape)} has {size} bytes, not {tensor.nbytes}"
        )
    return name, tensor


def _place(tensor: Message) -> ExternalData:
    entries = {entry.text(1): entry.text(2) for entry in tensor.messages(13, _ENTRY)}
    if set(entries) != {"location", "offset", "length"} or tensor.count(13) != len(entries):
        raise ValueError(
            f"an initializer lies at {sorted(entries)}, not at a location, offset and length"
        )
    numbers = {}
    for name in ("offset", "length"):
        text = entries[name]
        if not (text.isascii() and text.isdecimal() and len(text) < 19):
            raise ValueError(f"an initializer has the {name} {text[:40]!r}")
        numbers[name] = int(text)
    if not is_path(entries["location"]):
        raise ValueError(
            f"an initializer lies at {entries['location'][:80]!r}, which may lie outside the bundle"
        )
    return ExternalData(location=entries["location"], **numbers)


def _value(message: Message) -> tuple[str, ValueType]:
    """Name, element type and rank of an input or output; the rank is -1 where it has no shape."""
    kind = _only(message.messages(2, _TYPE))
    tensor = _only(kind.messages(1, _TENSOR_TYPE))
    name, elem_type = message.text(1), tensor.number(1)
    for shape in tensor.messages(2, _SHAPE):
        for dimension in shape.messages(1, _DIMENSION):
            if 1 in dimension and not 1 <= dimension.number(1) <= _MOST:
                raise ValueError(f"a dimension of {name!r} is {dimension.number(1)}")
        return name, (elem_type, shape.count(1))
    return name, (elem_type, -1)  # as the outputs of a branch


def _only(messages: Iterable[Message]) -> Message:
    for message in messages:
        return message
    raise ValueError("an input or output is no tensor")


def _by_name(pairs: Iterable[tuple[str, _Item]], what: str = "value") -> dict[str, _Item]:
    found: dict[str, _Item] = {}
    for name, item in pairs:
        if name in found:
            raise ValueError(f"the {what} {name!r} is made twice")
        found[name] = item
    return found
