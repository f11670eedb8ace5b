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

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from embedge.runtime.bundle.contract import INLINE_BYTES, UNPACKED
from embedge.runtime.bundle.files import GRAPH_BYTES, read_regular_file
from embedge.runtime.bundle.onnx_model import (
    FLOAT,
    FLOAT16,
    INT8,
    INT64,
    UINT8,
    Attribute,
    ExternalData,
    Function,
    Graph,
    Model,
    Node,
    StoredTensor,
    ValueType,
    read_model,
)
from embedge.runtime.bundle.operators import (
    CONTRIB,
    EMBEDGE,
    FUNCTIONS,
    OPERATORS,
    OPSETS,
    Branch,
    Kind,
    Operator,
)
from embedge.runtime.errors import BundleError

__all__ = [
    "MAPS_OUTPUTS",
    "TASK_INPUTS",
    "TASK_OUTPUTS",
    "VISION_INPUTS",
    "VISION_OUTPUTS",
    "CheckedGraph",
    "check_graph",
]

ValueTypes: TypeAlias = Mapping[str, ValueType]
Initializers: TypeAlias = Mapping[str, StoredTensor]

VISION_INPUTS: ValueTypes = {
    "pixel_values": (FLOAT, 3),
    "rotary_cos": (FLOAT, 3),
    "rotary_sin": (FLOAT, 3),
    "window_index": (INT64, 2),
    "window_lengths": (INT64, 1),
    "window_restore": (INT64, 1),
}
VISION_OUTPUTS: ValueTypes = {"image_features": (FLOAT, 3)}
TASK_INPUTS: ValueTypes = {
    "input_ids": (INT64, 2),
    "attention_mask": (INT64, 2),
    "token_type_ids": (INT64, 2),
    "position_ids": (INT64, 3),
    "pool_mask": (INT64, 2),
    "image_features": (FLOAT, 2),
    "image_positions": (INT64, 2),
}
MAPS_OUTPUTS: ValueTypes = {"embeddings": (FLOAT, 3)}
TASK_OUTPUTS: ValueTypes = {"embedding": (FLOAT, 2), "token_embeddings": (FLOAT, 3)}


class CheckedGraph(NamedTuple):
    """What a graph that passed holds.

    Attributes:
        initializers: by name.
        matmul_weights: those that integer matmuls read and that lie beside the graph: int8 ``[depth,
            columns]``, or uint8 ``[columns, blocks, block_size / 2]`` with two values to a byte.
        token_rows: rows of the table that token ids are looked up in; ``None`` if there is no such table.
        functions: names of embedge's functions that it calls.
    """

    initializers: Initializers
    matmul_weights: Initializers
    token_rows: int | None
    functions: frozenset[str]

    @property
    def made(self) -> Initializers:
        """Those initializers that are unpacked when the graph opens."""
        return {
            n: t for n, t in self.initializers.items() if t.place and t.place.location == UNPACKED
        }

    @property
    def places(self) -> list[ExternalData]:
        """Where the other initializers that do not lie in the graph do."""
        places = (tensor.place for tensor in self.initializers.values())
        return [place for place in places if place and place.location != UNPACKED]


def check_graph(file: Path, *, inputs: ValueTypes, outputs: ValueTypes) -> CheckedGraph:
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
        model = read_model(data)
        _check_operators(model)
        graph = model.graph
        _check_inputs(graph.inputs, inputs)
        _check_types("output", graph.outputs, outputs)
        _check_values(graph, set())
        _check_operands(graph)
        functions = frozenset(f.name for f in model.functions)
        weights, rows = _matmul_weights(graph), _token_rows(graph)
        return CheckedGraph(graph.initializers, weights, rows, functions)
    except (ValueError, IndexError, RecursionError) as error:
        raise BundleError(
            f"{file}: not a graph that embedge runs: {error}; `embedge inspect --verify` checks the "
            "bundle's files, export it again if they are whole"
        ) from error


def _matmul_weights(graph: Graph) -> Initializers:
    found = {}
    for node in graph.nodes:
        if _OPERANDS.get((node.domain, node.op_type)) not in (_check_blocks, _check_matmul):
            continue
        name = node.inputs[1]
        tensor = graph.initializers[name]
        if tensor.place is not None:
            found[name] = tensor
        elif tensor.nbytes > INLINE_BYTES:
            raise ValueError(f"weight {name} of {tensor.nbytes} bytes lies in it, not beside it")
    return found


def _token_rows(graph: Graph) -> int | None:
    tables = [
        graph.initializers[node.inputs[0]].shape[0]
        for node in graph.nodes
        if node.op_type in ("Gather", "GatherBlockQuantized")
        and node.inputs[1] == "input_ids"
        and node.inputs[0] in graph.initializers
        and graph.initializers[node.inputs[0]].shape
        and not node.value("axis")
    ]
    return min(tables, default=None)


# -- operators, functions and attributes --------------------------------------------------------------


def _check_operators(model: Model) -> None:
    for domain, version in model.opsets.items():
        if version not in OPSETS.get(domain, ()):
            raise ValueError(f"version {version} of the operators {domain!r} is not known")
    for function in model.functions:
        _check_function(function)
    _check_nodes(model.graph.nodes, FUNCTIONS, nested=False)


def _check_function(function: Function) -> None:
    known = FUNCTIONS.get((function.domain, function.name))
    if known is None:
        raise ValueError(f"the function {function.name!r} of {function.domain!r} is not known")
    if (len(function.inputs), len(function.outputs)) != (*known.inputs, known.outputs):
        raise ValueError(f"the function {function.name} has other inputs or outputs")
    if set(function.attributes) != set(known.attributes):
        raise ValueError(f"the function {function.name} has other attributes")
    _check_nodes(function.nodes, {}, nested=True)


def _check_nodes(
    nodes: Sequence[Node], functions: Mapping[tuple[str, str], Operator], *, nested: bool
) -> None:
    """Nodes are of known operators.

    Args:
        nodes: of a graph, a branch or a function.
        functions: that they may call: none within a function.
        nested: whether they may hold no branches.
    """
    for node in nodes:
        key = (node.domain, node.op_type)
        known = OPERATORS.get(key) or functions.get(key)
        if known is None or (nested and key == ("", "If")):
            raise ValueError(
                f"the operator {node.op_type[:80]!r} of {node.domain[:80] or 'ONNX'!r} is not known"
            )
        if len(node.inputs) not in known.inputs or len(node.outputs) != known.outputs:
            raise ValueError(
                f"{node.op_type} {node.outputs[:1]} has {len(node.inputs)} inputs and "
                f"{len(node.outputs)} outputs"
            )
        for name, attribute in node.attributes.items():
            if name not in known.attributes:
                raise ValueError(f"the attribute {name[:80]!r} of {node.op_type} is not known")
            _check_attribute(
                attribute, known.attributes[name], f"{name} of {node.op_type}", bool(functions)
            )
        missing = set(known.needed) - set(node.attributes)
        if missing:
            raise ValueError(
                f"{node.op_type} {node.outputs[:1]} lacks {', '.join(sorted(missing))}"
            )
        for branch in node.branches:
            _check_nodes(branch.nodes, functions, nested=True)


def _check_attribute(attribute: Attribute, kind: Kind, name: str, in_graph: bool) -> None:
    """An attribute has a value of its kind, or that of the function around it."""
    if attribute.type != kind.attribute_type:
        raise ValueError(f"the attribute {name} has another type")
    value = attribute.value
    if value is None and in_graph:
        raise ValueError(f"the attribute {name} is that of no function")
    if value is None or isinstance(value, Graph) or isinstance(kind, Branch):
        return
    for number in value if isinstance(value, list) else [value]:
        if not kind.least <= number <= kind.most:
            raise ValueError(f"{name} is {number}")


# -- inputs, outputs and values -----------------------------------------------------------------------


def _check_inputs(found: ValueTypes, wanted: ValueTypes) -> None:
    if found.keys() != wanted.keys():
        raise ValueError(
            f"expected inputs {', '.join(sorted(wanted))}, found {', '.join(sorted(found)) or 'none'}"
        )
    _check_types("input", found, wanted)


def _check_types(what: str, found: ValueTypes, wanted: ValueTypes) -> None:
    for name in found.keys() & wanted.keys():
        if found[name] != wanted[name]:
            raise ValueError(
                f"{what} {name}: expected {wanted[name][1]} dimensions of type {wanted[name][0]}, found "
                f"{found[name][1]} of {found[name][0]}"
            )


def _check_values(graph: Graph, outer: set[str]) -> None:
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


# -- constants ---------------------------------------------------------------------------------------


def _check_operands(graph: Graph) -> None:
    """Constants that operators take have the shapes that their attributes say."""
    for node in graph.nodes:
        check = _OPERANDS.get((node.domain, node.op_type))
        if check is not None:
            check(node, graph.initializers)


def _constant(node: Node, place: int, graph: Initializers) -> StoredTensor | None:
    """The initializer that an operator takes; ``None`` where it takes nothing there."""
    name = node.inputs[place] if place < len(node.inputs) else ""
    if name and name not in graph:
        raise ValueError(f"{node} reads {name!r}, which is no constant")
    return graph[name] if name else None


def _expect(
    node: Node,
    place: int,
    graph: Initializers,
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


def _check_blocks(node: Node, graph: Initializers) -> None:
    """MatMulNBits, alone or with a branch."""
    depth, columns, block = (node.size(name) for name in ("K", "N", "block_size"))
    blocks = -(-depth // block)
    _expect(node, 1, graph, [UINT8], (columns, blocks, block // 2))
    _expect(node, 2, graph, _FLOATS, (columns, blocks), (columns * blocks,))
    if _constant(node, 3, graph):
        bytes_ = -(-blocks // 2)
        _expect(node, 3, graph, [UINT8], (columns, bytes_), (columns * bytes_,))


def _check_matmul(node: Node, graph: Initializers) -> None:
    """MatMulIntegerToFloat, alone or with what is added, a branch too."""
    depth, columns, *more = (*_expect(node, 1, graph, [INT8]).shape, 0, 0)
    if len(more) != 2 or not depth or not columns:
        raise ValueError(f"{node} has a weight without two dimensions")
    _expect(node, 3, graph, [FLOAT], (), (1,), (columns,))


def _check_table(node: Node, graph: Initializers) -> None:
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


def _check_norm(node: Node, graph: Initializers) -> None:
    """LayerNormalization and those of root mean squares."""
    weight = _expect(node, 1, graph, _FLOATS)
    if len(weight.shape) != 1 or not weight.shape[0]:
        raise ValueError(f"{node} has a weight of the shape {list(weight.shape)}")
    if _constant(node, 2, graph):
        _expect(node, 2, graph, [weight.elem_type], weight.shape)


_OPERANDS: Mapping[tuple[str, str], Callable[[Node, Initializers], None]] = {
    (CONTRIB, "MatMulNBits"): _check_blocks,
    (CONTRIB, "MatMulIntegerToFloat"): _check_matmul,
    (EMBEDGE, "MatMulIntegerToFloatAdd"): _check_matmul,
    (EMBEDGE, "MatMulIntegerToFloatSub"): _check_matmul,
    (EMBEDGE, "MatMulIntegerToFloatBranch"): _check_matmul,
    (EMBEDGE, "MatMulIntegerToFloatBranchAdd"): _check_matmul,
    (EMBEDGE, "MatMulIntegerToFloatBranchSub"): _check_matmul,
    (EMBEDGE, "MatMulNBitsBranch"): _check_blocks,
    (CONTRIB, "GatherBlockQuantized"): _check_table,
    ("", "LayerNormalization"): _check_norm,
    ("", "RMSNormalization"): _check_norm,
    ("", "SimplifiedLayerNormalization"): _check_norm,
}
