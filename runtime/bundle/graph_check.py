"""Whether a graph is one that `embedge export` could have written, before ONNX Runtime gets it.

ONNX Runtime trusts a model in places: some attributes and shapes that fit nothing end the process instead of
being refused. So a graph has to have

    * fields that ONNX knows and exports write, each as often as it may occur;
    * operators, functions, attributes and domains of a list, attributes within their ranges, all of those
      that an operator needs, and as many inputs and outputs as exports give them;
    * initializers of a known type, whose bytes are as many as their shape says;
    * every value made once, before it is read, and none of them a second time in the branches of an ``If``;
    * the inputs and outputs of the bundle's format, by name, type and rank;
    * constants where an operator's kernel takes its weights to be some, of the shapes that attributes say.

What this cannot see, for example shapes that depend on the texts, ONNX Runtime and the kernels check as they
run. A prepared graph holds other operators and is not checked here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from embedge.runtime.bundle.files import GRAPH_BYTES, read_regular_file
from embedge.runtime.bundle.names import is_path
from embedge.runtime.bundle.onnx_reader import (
    BYTES,
    FIXED32,
    VARINT,
    ExternalData,
    all_fields,
    varint,
)
from embedge.runtime.errors import BundleError

__all__ = [
    "TASK_INPUTS",
    "TASK_OUTPUTS",
    "VISION_INPUTS",
    "VISION_OUTPUTS",
    "CheckedGraph",
    "StoredTensor",
    "check_graph",
]

CONTRIB, EMBEDGE = "com.microsoft", "embedge"
_OPSETS = {"": range(20, 25), CONTRIB: range(1, 2), EMBEDGE: range(1, 2)}
_MOST = (1 << 31) - 1
_MOST_HEADS, _MOST_RANK, _MOST_NODES = 4096, 8, 200_000

FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16 = 1, 2, 3, 6, 7, 9, 10  # TensorProto.DataType
ITEM_BYTES = {FLOAT: 4, UINT8: 1, INT8: 1, INT32: 4, INT64: 8, BOOL: 1, FLOAT16: 2}
_EXTERNAL = 1  # TensorProto.DataLocation

_Item = TypeVar("_Item")
Wanted: TypeAlias = Mapping[str, tuple[int, int]]  # element type and rank, by name

VISION_INPUTS: Wanted = {
    "pixel_values": (FLOAT, 3),
    "rotary_cos": (FLOAT, 3),
    "rotary_sin": (FLOAT, 3),
    "window_index": (INT64, 2),
    "window_lengths": (INT64, 1),
    "window_restore": (INT64, 1),
}
VISION_OUTPUTS: Wanted = {"image_features": (FLOAT, 3)}
TASK_INPUTS: Wanted = {
    "input_ids": (INT64, 2),
    "attention_mask": (INT64, 2),
    "token_type_ids": (INT64, 2),
    "position_ids": (INT64, 3),
    "pool_mask": (INT64, 2),
    "image_features": (FLOAT, 2),
    "image_positions": (INT64, 2),
}
TASK_OUTPUTS: Wanted = {"embedding": (FLOAT, 2), "token_embeddings": (FLOAT, 3)}

# -- messages: number of a field, how it is encoded, and whether it may be repeated -------------------

_ONE, _MANY = False, True
_Spec: TypeAlias = Mapping[int, tuple[int, bool]]
_MODEL: _Spec = {
    1: (VARINT, _ONE),
    **dict.fromkeys((2, 3, 4, 6, 7), (BYTES, _ONE)),
    5: (VARINT, _ONE),
    **dict.fromkeys((8, 14, 25), (BYTES, _MANY)),
}
_GRAPH: _Spec = {
    **dict.fromkeys((2, 10), (BYTES, _ONE)),
    **dict.fromkeys((1, 5, 11, 12), (BYTES, _MANY)),
}
_NODE: _Spec = {
    **dict.fromkeys((3, 4, 6, 7), (BYTES, _ONE)),
    **dict.fromkeys((1, 2, 5), (BYTES, _MANY)),
}
_ATTRIBUTE: _Spec = {
    **dict.fromkeys((1, 4, 6, 13, 21), (BYTES, _ONE)),
    2: (FIXED32, _ONE),
    **dict.fromkeys((3, 20), (VARINT, _ONE)),
    8: (VARINT, _MANY),
}
_TENSOR: _Spec = {
    1: (VARINT, _MANY),
    **dict.fromkeys((2, 14), (VARINT, _ONE)),
    **dict.fromkeys((8, 9, 12), (BYTES, _ONE)),
    13: (BYTES, _MANY),
}
_FUNCTION: _Spec = {
    **dict.fromkeys((1, 8, 10), (BYTES, _ONE)),
    **dict.fromkeys((4, 5, 6, 7, 9), (BYTES, _MANY)),
}
_OPSET: _Spec = {1: (BYTES, _ONE), 2: (VARINT, _ONE)}
_VALUE: _Spec = dict.fromkeys((1, 2, 3), (BYTES, _ONE))
_TYPE: _Spec = {1: (BYTES, _ONE)}
_TENSOR_TYPE: _Spec = {1: (VARINT, _ONE), 2: (BYTES, _ONE)}
_SHAPE: _Spec = {1: (BYTES, _MANY)}
_DIMENSION: _Spec = {1: (VARINT, _ONE), 2: (BYTES, _ONE)}
_ENTRY: _Spec = dict.fromkeys((1, 2), (BYTES, _ONE))

# -- operators ----------------------------------------------------------------------------------------


class Whole(NamedTuple):
    """A whole number within bounds, or a list of them."""

    least: int
    most: int
    many: bool = False


class Real(NamedTuple):
    """A finite number within bounds."""

    least: float
    most: float


class Branch(NamedTuple):
    """A graph without inputs."""


_Kind: TypeAlias = Whole | Real | Branch
_AXIS, _HEADS, _FLAG = Whole(-_MOST_RANK, _MOST_RANK), Whole(1, _MOST_HEADS), Whole(0, 1)
_SCALE, _EPSILON = Real(0, 1e6), Real(0, 1)
_WINDOW = Whole(-1, _MOST)
_WIDTH = Whole(1, _MOST)
_BLOCK = Whole(16, 4096)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """How often an operator takes and gives values, and its attributes.

    Attributes:
        inputs: how many it may have.
        outputs: how many it may have.
        attributes: by name.
        needed: those of the attributes that may not be left out.
    """

    inputs: Collection[int]
    outputs: Collection[int] = (1,)
    attributes: Mapping[str, _Kind] = field(default_factory=dict)
    needed: Collection[str] = ()


def _alike(names: str, *inputs: int, **attributes: _Kind) -> dict[tuple[str, str], Operator]:
    return {("", n): Operator(inputs=inputs, attributes=attributes) for n in names.split()}


_GATED = {
    ("embedge", f"QuantizeRotated{gated}{product}"): Operator(
        inputs=(6,), outputs=(2 + bool(product),), attributes={"width": _WIDTH}
    )
    for gated in ("", "SwiGLU")
    for product in ("", "AndProduct")
}
OPERATORS: Mapping[tuple[str, str], Operator] = {
    **_alike("Abs Cos Identity Relu Sigmoid Sin Tanh", 1),
    **_alike("Add And Div Equal Expand Greater GreaterOrEqual Less LessOrEqual MatMul Mul Sub", 2),
    **_alike("Max Pad Reshape Squeeze Unsqueeze", 2),
    **_alike("Range ScatterND Where", 3),
    **_alike("Slice", 4),
    **_alike("Cast", 1, to=Whole(1, FLOAT16)),
    **_alike("Concat", 1, 2, 3, 4, axis=_AXIS),
    **_alike("Gather", 2, axis=_AXIS),
    **_alike("GatherND", 2, batch_dims=Whole(0, 2)),
    **_alike("ReduceL2 ReduceMax ReduceMin ReduceSum", 2, keepdims=_FLAG),
    **_alike("Transpose", 1, perm=Whole(0, _MOST_RANK, many=True)),
    ("", "Attention"): Operator(
        inputs=range(3, 8),
        attributes={
            "is_causal": _FLAG,
            "q_num_heads": _HEADS,
            "kv_num_heads": _HEADS,
            "scale": _SCALE,
            "softmax_precision": Whole(FLOAT, FLOAT),
        },
    ),
    ("", "Constant"): Operator(
        inputs=(0,), attributes={"value_ints": Whole(-_MOST, _MOST, many=True)}
    ),
    ("", "If"): Operator(
        inputs=(1,), attributes={"then_branch": Branch(), "else_branch": Branch()}
    ),
    ("", "LayerNormalization"): Operator(
        inputs=(2, 3), attributes={"axis": Whole(-1, -1), "epsilon": _EPSILON}
    ),
    **_alike(
        "RMSNormalization SimplifiedLayerNormalization", 2, axis=Whole(-1, -1), epsilon=_EPSILON
    ),
    ("", "QuantizeLinear"): Operator(
        inputs=(3,),
        attributes={"axis": _AXIS, "block_size": _WIDTH},
    ),
    ("", "RotaryEmbedding"): Operator(
        inputs=(3, 4), attributes={"interleaved": Whole(0, 0), "num_heads": _HEADS}
    ),
    ("", "Shape"): Operator(inputs=(1,), attributes={"start": _AXIS, "end": _AXIS}),
    (CONTRIB, "FastGelu"): Operator(inputs=(1,)),
    (CONTRIB, "Gelu"): Operator(inputs=(1,)),
    (CONTRIB, "QuickGelu"): Operator(inputs=(1,), attributes={"alpha": Real(-100, 100)}),
    (CONTRIB, "GatherBlockQuantized"): Operator(
        inputs=(4,),
        attributes={
            "bits": Whole(4, 8),
            "block_size": _BLOCK,
            "gather_axis": Whole(0, 0),
            "quantize_axis": Whole(1, 1),
        },
        needed=("bits", "block_size", "quantize_axis"),
    ),
    (CONTRIB, "GroupQueryAttention"): Operator(
        inputs=(7,),
        outputs=(3,),
        attributes={
            "num_heads": _HEADS,
            "kv_num_heads": _HEADS,
            "local_window_size": _WINDOW,
            "scale": _SCALE,
        },
    ),
    (CONTRIB, "MatMulIntegerToFloat"): Operator(inputs=(4, 5)),
    (CONTRIB, "MatMulNBits"): Operator(
        inputs=(3, 4),
        attributes={
            "K": _WIDTH,
            "N": _WIDTH,
            "accuracy_level": Whole(0, 4),
            "bits": Whole(4, 4),
            "block_size": _BLOCK,
        },
        needed=("K", "N", "bits", "block_size"),
    ),
    (CONTRIB, "MultiHeadAttention"): Operator(
        inputs=range(3, 7),
        attributes={"num_heads": _HEADS, "scale": _SCALE},
    ),
    (CONTRIB, "RotaryEmbedding"): Operator(
        inputs=(4,), attributes={"interleaved": Whole(0, 0), "num_heads": _HEADS}
    ),
}
FUNCTIONS: Mapping[tuple[str, str], Operator] = {
    **_GATED,
    (EMBEDGE, "QuantizeRows"): Operator(inputs=(3,), outputs=(2,), attributes={"width": _WIDTH}),
    (EMBEDGE, "QuantizeRowsAbove"): Operator(
        inputs=(4,), outputs=(2,), attributes={"width": _WIDTH}
    ),
    (EMBEDGE, "MatMulIntegerToFloatAdd"): Operator(inputs=(6,)),
    (EMBEDGE, "MatMulIntegerToFloatSub"): Operator(inputs=(6,)),
    (EMBEDGE, "CausalAttention"): Operator(
        inputs=(5,),
        attributes={
            "num_heads": _HEADS,
            "kv_num_heads": _HEADS,
            "local_window_size": _WINDOW,
            "scale": _SCALE,
        },
    ),
    (EMBEDGE, "PaddedAttention"): Operator(
        inputs=(4,), attributes={"num_heads": _HEADS, "kv_num_heads": _HEADS, "scale": _SCALE}
    ),
    (EMBEDGE, "FullAttention"): Operator(
        inputs=(3,), attributes={"num_heads": _HEADS, "scale": _SCALE}
    ),
}


# -- what a graph holds -------------------------------------------------------------------------------


class StoredTensor(NamedTuple):
    """An initializer: its element type, shape, and where its bytes lie (``None``: in the graph)."""

    elem_type: int
    shape: tuple[int, ...]
    place: ExternalData | None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.elem_type]


class CheckedGraph(NamedTuple):
    """What a graph that passed holds.

    Attributes:
        initializers: by name.
        token_rows: rows of the table that token ids are looked up in; ``None`` if there is no such table.
    """

    initializers: Mapping[str, StoredTensor]
    token_rows: int | None


class _Node(NamedTuple):
    domain: str
    op_type: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, float | Sequence[int] | None]
    branches: Sequence[_Graph]

    def __str__(self) -> str:
        return f"node {self.outputs[0] if self.outputs else ''!r} ({self.op_type})"

    def size(self, name: str) -> int:
        """An attribute that is a whole number from 1 on."""
        value = self.attributes.get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self} has {name} of {value!r}, expected a whole number from 1")
        return value


class _Graph(NamedTuple):
    nodes: Sequence[_Node]
    inputs: Mapping[str, tuple[int, int]]  # element type and rank
    outputs: Mapping[str, tuple[int, int]]
    initializers: Mapping[str, StoredTensor]


def check_graph(file: Path, *, inputs: Wanted, outputs: Wanted) -> CheckedGraph:
    """What a graph holds, if `embedge export` could have written it.

    Args:
        file: the graph.
        inputs: element type and rank of what it has to take, by name.
        outputs: likewise of what is asked of it, where it gives that.

    Raises:
        BundleError: if the file cannot be read, or the graph breaks a rule of this module.
    """
    try:
        data = read_regular_file(file, GRAPH_BYTES)
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror or error}") from error
    try:
        graph = _Reader(data).model()
        _check_inputs(graph.inputs, inputs)
        _check_types("output", graph.outputs, outputs)
        _check_values(graph, set())
        _check_operands(graph)
    except (ValueError, IndexError, RecursionError) as error:
        raise BundleError(
            f"{file}: not a graph that embedge runs: {error}; `embedge inspect --verify` checks the "
            "bundle's files, export it again if they are whole"
        ) from error
    return CheckedGraph(graph.initializers, _token_rows(graph))


def _token_rows(graph: _Graph) -> int | None:
    tables = [
        graph.initializers[node.inputs[0]].shape[0]
        for node in graph.nodes
        if node.op_type in ("Gather", "GatherBlockQuantized")
        and node.inputs[1] == "input_ids"
        and node.inputs[0] in graph.initializers
        and graph.initializers[node.inputs[0]].shape
        and not node.attributes.get("axis")
    ]
    return min(tables, default=None)


class _Reader:
    """The messages of an ONNX model; whatever is not as described above is a ``ValueError``."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._nodes = 0

    def model(self) -> _Graph:
        found = self._message((0, len(self._data)), _MODEL)
        for span in found.get(8, ()):
            entry = self._message(span, _OPSET)
            domain, version = self._text(entry, 1), self._number(entry, 2)
            if version not in _OPSETS.get(domain, ()):
                raise ValueError(f"version {version} of the operators {domain!r} is not known")
        for span in found.get(25, ()):
            self._function(span)
        if len(found.get(7, ())) != 1:
            raise ValueError("it holds no graph")
        return self._graph(found[7][0], FUNCTIONS, nested=False)

    def _function(self, span: tuple[int, int]) -> None:
        found = self._message(span, _FUNCTION)
        key = (self._text(found, 10), self._text(found, 1))
        if key not in FUNCTIONS:
            raise ValueError(f"the function {key[1]!r} of {key[0]!r} is not known")
        known = FUNCTIONS[key]
        if (len(found.get(4, ())), len(found.get(5, ()))) != (*known.inputs, *known.outputs):
            raise ValueError(f"the function {key[1]} has other inputs or outputs")
        if {self._string(name) for name in found.get(6, ())} != set(known.attributes):
            raise ValueError(f"the function {key[1]} has other attributes")
        for node in found.get(7, ()):
            self._node(node, {}, nested=True)

    def _graph(
        self, span: tuple[int, int], functions: Mapping[tuple[str, str], Operator], *, nested: bool
    ) -> _Graph:
        found = self._message(span, _GRAPH)
        return _Graph(
            [self._node(node, functions, nested=nested) for node in found.get(1, ())],
            _by_name(self._value(value) for value in found.get(11, ())),
            _by_name(self._value(value) for value in found.get(12, ())),
            _by_name(self._tensor(tensor) for tensor in found.get(5, ())),
        )

    def _node(
        self,
        span: tuple[int, int],
        functions: Mapping[tuple[str, str], Operator],
        *,
        nested: bool,
    ) -> _Node:
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise ValueError(f"it has more than {_MOST_NODES} nodes")
        found = self._message(span, _NODE)
        key = (self._text(found, 7), self._text(found, 4))
        known = OPERATORS.get(key) or functions.get(key)
        if known is None or (nested and key == ("", "If")):
            raise ValueError(
                f"the operator {key[1][:80]!r} of {key[0][:80] or 'ONNX'!r} is not known"
            )
        inputs = [self._string(name) for name in found.get(1, ())]
        outputs = [self._string(name) for name in found.get(2, ())]
        if len(inputs) not in known.inputs or len(outputs) not in known.outputs:
            raise ValueError(
                f"{key[1]} {outputs[:1]} has {len(inputs)} inputs and {len(outputs)} outputs"
            )
        attributes: dict[str, float | Sequence[int] | None] = {}
        branches = []
        for at in found.get(5, ()):
            name, value = self._attribute(at, key[1], known.attributes, functions)
            if name in attributes:
                raise ValueError(f"{key[1]} has {name} twice")
            attributes[name] = value if not isinstance(value, _Graph) else None
            if isinstance(value, _Graph):
                branches.append(value)
        needed = known.attributes if key in FUNCTIONS else known.needed
        missing = set(needed) - set(attributes)
        if missing:
            raise ValueError(f"{key[1]} {outputs[:1]} lacks {', '.join(sorted(missing))}")
        return _Node(*key, inputs, outputs, attributes, branches)

    def _attribute(
        self,
        span: tuple[int, int],
        op_type: str,
        known: Mapping[str, _Kind],
        functions: Mapping[tuple[str, str], Operator],
    ) -> tuple[str, float | Sequence[int] | _Graph | None]:
        """Name and value of an attribute; ``None`` is one of the function that the node is in."""
        found = self._message(span, _ATTRIBUTE)
        name = self._text(found, 1)
        kind = known.get(name)
        if kind is None:
            raise ValueError(f"the attribute {name[:80]!r} of {op_type} is not known")
        type_, fields = _ATTRIBUTE_FIELDS[type(kind), isinstance(kind, Whole) and kind.many]
        given = set(found) & {2, 3, 4, 6, 8}
        if self._number(found, 20) != type_ or given - {fields}:
            raise ValueError(f"the attribute {name} of {op_type} has another type")
        if 21 in found:
            if functions or given or not self._text(found, 21):
                raise ValueError(f"the attribute {name} of {op_type} is that of no function")
            return name, None
        if isinstance(kind, Branch):
            return name, self._graph(found[6][0], functions, nested=True)
        values = found.get(fields, [0])
        for value in values:
            if not kind.least <= value <= kind.most:
                raise ValueError(f"{name} of {op_type} is {value}")
        return name, values if isinstance(kind, Whole) and kind.many else values[0]

    def _tensor(self, span: tuple[int, int]) -> tuple[str, StoredTensor]:
        found = self._message(span, _TENSOR)
        name, elem_type = self._text(found, 8), self._number(found, 2)
        shape = tuple(found.get(1, ()))
        if elem_type not in ITEM_BYTES:
            raise ValueError(f"initializer {name!r} has the unknown type {elem_type}")
        if len(shape) > _MOST_RANK or any(not 0 <= n <= _MOST for n in shape):
            raise ValueError(f"initializer {name!r} has the shape {list(shape)}")
        place = self._place(found.get(13, ())) if self._number(found, 14) == _EXTERNAL else None
        if (place is None) == (13 in found) or (place is None) != (9 in found):
            raise ValueError(f"initializer {name!r} lies neither in the graph nor beside it")
        tensor = StoredTensor(elem_type, shape, place)
        size = place.length if place else found[9][0][1] - found[9][0][0]
        if size != tensor.nbytes:
            raise ValueError(
                f"initializer {name!r} of the shape {list(shape)} has {size} bytes, not {tensor.nbytes}"
            )
        return name, tensor

    def _place(self, spans: Sequence[tuple[int, int]]) -> ExternalData:
        entries: dict[str, str] = {}
        for span in spans:
            entry = self._message(span, _ENTRY)
            entries[self._text(entry, 1)] = self._text(entry, 2)
        if set(entries) != {"location", "offset", "length"} or len(spans) != len(entries):
            raise ValueError(
                f"an initializer lies at {sorted(entries)}, not at a location, offset and length"
            )
        for name in ("offset", "length"):
            if not (
                entries[name].isascii() and entries[name].isdecimal() and len(entries[name]) < 19
            ):
                raise ValueError(f"an initializer has the {name} {entries[name][:40]!r}")
        if not is_path(entries["location"]):
            raise ValueError(
                f"an initializer lies at {entries['location'][:80]!r}, which may lie outside the bundle"
            )
        offset, length = int(entries["offset"]), int(entries["length"])
        return ExternalData(location=entries["location"], offset=offset, length=length)

    def _value(self, span: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """Name, element type and rank of an input or output."""
        found = self._message(span, _VALUE)
        kind = self._message(self._only(found, 2), _TYPE)
        tensor = self._message(self._only(kind, 1), _TENSOR_TYPE)
        if 2 not in tensor:  # as the outputs of a branch
            return self._text(found, 1), (self._number(tensor, 1), -1)
        shape = self._message(tensor[2][0], _SHAPE)
        for dimension in shape.get(1, ()):
            size = self._message(dimension, _DIMENSION).get(1, [1])[0]
            if not 1 <= size <= _MOST:
                raise ValueError(f"a dimension of {self._text(found, 1)!r} is {size}")
        return self._text(found, 1), (self._number(tensor, 1), len(shape.get(1, ())))

    # -- fields ---

    def _message(self, span: tuple[int, int], known: _Spec) -> dict[int, list[Any]]:
        """A message's fields by number: numbers, floats, or the spans of what has a length."""
        found: dict[int, list[Any]] = {}
        data = self._data
        for number, kind, at, end in all_fields(data, *span):
            expected, many = known.get(number, (None, False))
            if kind == BYTES and expected == VARINT and many:  # packed
                found.setdefault(number, []).extend(self._packed(at, end))
                continue
            if kind != expected or (number in found and not many):
                raise ValueError(f"a message has the unknown field {number}, or has it twice")
            value: Any = (at, end)
            if kind == VARINT:
                value = _signed(varint(data, at)[0])
            elif kind == FIXED32:
                (value,) = struct.unpack_from("<f", data, at)
            found.setdefault(number, []).append(value)
        return found

    def _packed(self, at: int, end: int) -> Iterator[int]:
        while at < end:
            value, at = varint(self._data, at)
            yield _signed(value)
        if at != end:
            raise ValueError("a packed list of numbers is cut")

    def _string(self, span: tuple[int, int]) -> str:
        return str(self._data[slice(*span)], "utf-8")

    def _text(self, found: Mapping[int, list[Any]], number: int) -> str:
        return self._string(found[number][0]) if number in found else ""

    def _number(self, found: Mapping[int, list[Any]], number: int) -> int:
        value: int = found.get(number, [0])[0]
        return value

    def _only(self, found: Mapping[int, list[Any]], number: int) -> tuple[int, int]:
        if number not in found:
            raise ValueError("an input or output is no tensor")
        span: tuple[int, int] = found[number][0]
        return span


def _by_name(pairs: Iterable[tuple[str, _Item]]) -> dict[str, _Item]:
    found: dict[str, _Item] = {}
    for name, item in pairs:
        if name in found:
            raise ValueError(f"the value {name!r} is made twice")
        found[name] = item
    return found


# AttributeProto: type and field of a kind, and of a list of it.
_ATTRIBUTE_FIELDS = {
    (Real, False): (1, 2),
    (Whole, False): (2, 3),
    (Branch, False): (5, 6),
    (Whole, True): (7, 8),
}


def _signed(value: int) -> int:
    """A varint as the int64 that it stands for."""
    return value - (1 << 64) if value >> 63 else value


# -- rules about the whole ----------------------------------------------------------------------------


def _check_inputs(found: Wanted, wanted: Wanted) -> None:
    if found.keys() != wanted.keys():
        raise ValueError(
            f"expected inputs {', '.join(sorted(wanted))}, found {', '.join(sorted(found)) or 'none'}"
        )
    _check_types("input", found, wanted)


def _check_types(what: str, found: Wanted, wanted: Wanted) -> None:
    for name in found.keys() & wanted.keys():
        if found[name] != wanted[name]:
            raise ValueError(
                f"{what} {name}: expected {wanted[name][1]} dimensions of type {wanted[name][0]}, found "
                f"{found[name][1]} of {found[name][0]}"
            )


def _check_values(graph: _Graph, outer: set[str]) -> None:
    """Every value is made once, before anything reads it."""
    if outer and (graph.inputs or graph.initializers):
        raise ValueError("a branch has inputs or initializers of its own")
    known = set(outer)
    for name in (*graph.inputs, *graph.initializers):
        if not name or name in known:
            raise ValueError(f"the value {name!r} is made twice")
        known.add(name)
    for node in graph.nodes:
        for name in node.inputs:
            if name and name not in known:
                raise ValueError(f"{node} reads {name!r}, which nothing makes before it")
        for branch in node.branches:
            _check_values(branch, known)
        for name in filter(None, node.outputs):
            if name in known:
                raise ValueError(f"the value {name!r} is made twice")
            known.add(name)
    for name in graph.outputs:
        if name not in known or name in graph.inputs:
            raise ValueError(f"nothing makes the output {name!r}")


def _check_operands(graph: _Graph) -> None:
    """Constants that operators take have the shapes that their attributes say."""
    for node in graph.nodes:
        check = _OPERANDS.get((node.domain, node.op_type))
        if check is not None:
            check(node, graph.initializers)


def _constant(node: _Node, place: int, graph: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """The initializer that an operator takes; ``None`` where it takes nothing there."""
    name = node.inputs[place] if place < len(node.inputs) else ""
    if name and name not in graph:
        raise ValueError(f"{node} reads {name!r}, which is no constant")
    return graph[name] if name else None


def _expect(
    node: _Node,
    place: int,
    graph: Mapping[str, StoredTensor],
    types: Collection[int],
    *shapes: tuple[int, ...],
) -> StoredTensor:
    """A constant of one of some types, and of one of some shapes if any are given."""
    found = _constant(node, place, graph)
    if found is None:
        raise ValueError(f"{node} takes nothing as its input {place}")
    if found.elem_type not in types or (shapes and found.shape not in shapes):
        raise ValueError(
            f"{node} reads {node.inputs[place]!r} of type {found.elem_type} and the shape {list(found.shape)}"
        )
    return found


_FLOATS = (FLOAT, FLOAT16)


def _check_blocks(node: _Node, graph: Mapping[str, StoredTensor]) -> None:
    """MatMulNBits."""
    depth, columns, block = (node.size(name) for name in ("K", "N", "block_size"))
    blocks = -(-depth // block)
    _expect(node, 1, graph, [UINT8], (columns, blocks, block // 2))
    _expect(node, 2, graph, _FLOATS, (columns, blocks), (columns * blocks,))
    if _constant(node, 3, graph):
        bytes_ = -(-blocks // 2)
        _expect(node, 3, graph, [UINT8], (columns, bytes_), (columns * bytes_,))


def _check_product(node: _Node, graph: Mapping[str, StoredTensor]) -> None:
    """MatMulIntegerToFloat, alone or with what is added."""
    depth, columns, *more = (*_expect(node, 1, graph, [INT8]).shape, 0, 0)
    if len(more) != 2 or not depth or not columns:
        raise ValueError(f"{node} has a weight without two dimensions")
    _expect(node, 3, graph, [FLOAT], (), (1,), (columns,))


def _check_table(node: _Node, graph: Mapping[str, StoredTensor]) -> None:
    """GatherBlockQuantized."""
    bits, block = (node.size(name) for name in ("bits", "block_size"))
    if bits not in (4, 8):
        raise ValueError(f"{node} has values of {bits} bits")
    rows, width, *more = (*_expect(node, 0, graph, [UINT8]).shape, 0, 0)
    if len(more) != 2 or not rows or not width:
        raise ValueError(f"{node} has a table without two dimensions")
    per_byte = 8 // bits
    blocks = -(-width * per_byte // block)
    _expect(node, 2, graph, _FLOATS, (rows, blocks))
    _expect(node, 3, graph, [UINT8], (rows, -(-blocks // per_byte)))


def _check_norm(node: _Node, graph: Mapping[str, StoredTensor]) -> None:
    """LayerNormalization and those of root mean squares."""
    weight = _expect(node, 1, graph, _FLOATS)
    if len(weight.shape) != 1 or not weight.shape[0]:
        raise ValueError(f"{node} has a weight of the shape {list(weight.shape)}")
    if _constant(node, 2, graph):
        _expect(node, 2, graph, [weight.elem_type], weight.shape)


_OPERANDS: Mapping[tuple[str, str], Callable[[_Node, Mapping[str, StoredTensor]], None]] = {
    (CONTRIB, "MatMulNBits"): _check_blocks,
    (CONTRIB, "MatMulIntegerToFloat"): _check_product,
    (EMBEDGE, "MatMulIntegerToFloatAdd"): _check_product,
    (EMBEDGE, "MatMulIntegerToFloatSub"): _check_product,
    (CONTRIB, "GatherBlockQuantized"): _check_table,
    ("", "LayerNormalization"): _check_norm,
    ("", "RMSNormalization"): _check_norm,
    ("", "SimplifiedLayerNormalization"): _check_norm,
}
