"""What graphs of integer products repeat in every layer, as ONNX functions of the domain ``embedge``.

A function's body is the chain of nodes itself, so any ONNX Runtime opens such a graph: it inlines the
functions and runs what was there before. Where embedge's own kernels are registered (``runtime/kernels/native``),
each function is one operator with the same result, which passes over memory once; ``silu`` and attention
round otherwise. (ONNX IR, "Functions"; onnx/docs/IR.md.)

    QuantizeRows(x, step, zero_points)             values, scale: ``scale = max|x| · step`` of a row,
                                                   ``values = round(x / scale) + zero_points``
    QuantizeRowsAbove(x, floor, step, zero_points) the same with ``scale = max(max x, floor) · step``
    QuantizeRotated(x, y, rotation, blocks, step, zero_points)
                                                   as ``QuantizeRows`` of ``x · y``, each block of whose rows
                                                   is multiplied by ``rotation`` before; ``blocks`` is the
                                                   shape of a row in blocks
    QuantizeRotatedAndProduct(…)                   and ``x · y``, where something else reads it
    QuantizeRotatedSwiGLU(…), …AndProduct(…)       the same of ``silu(x) · y``
    MatMulIntegerToFloatAdd(…, other, …)           the product of ``com.microsoft`` plus, or minus, a tensor:
    MatMulIntegerToFloatSub(…, other, …)           a bias, a residual, or another product
    CausalAttention(q, k, v, lengths, total)       ``GroupQueryAttention`` of whole texts: nothing is cached,
                                                   padding comes last, rotary positions are done
    PaddedAttention(q, k, v, lengths)              ``Attention`` of ONNX to the tokens before the padding
    FullAttention(q, k, v)                         ``MultiHeadAttention`` to all tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import onnx
from onnx import FunctionProto, NodeProto, TensorProto, helper

from embedge.export.graph.ops import CONTRIB, names_read

__all__ = ["DOMAIN", "VERSION", "functions_of", "with_functions"]

DOMAIN, VERSION = "embedge", 1
_PRODUCT = "MatMulIntegerToFloat"


class _Attention(NamedTuple):
    """An attention of ONNX Runtime, as exports write it, that a function stands for.

    Attributes:
        function: its name.
        domain: of ONNX Runtime's operator.
        inputs: of the operator, where exports give them.
        outputs: how many it has.
        attributes: of the function, and the operator's.
        fixed: the operator's others.
    """

    function: str
    domain: str
    inputs: tuple[str, ...]
    outputs: int
    attributes: Mapping[str, str]
    fixed: Mapping[str, Any]


_ATTENTIONS = {
    "GroupQueryAttention": _Attention(
        "CausalAttention",
        CONTRIB,
        ("q", "k", "v", "", "", "lengths", "total"),
        3,
        {name: name for name in ("num_heads", "kv_num_heads", "local_window_size")},
        {},
    ),
    "Attention": _Attention(
        "PaddedAttention",
        "",
        ("q", "k", "v", "", "", "", "lengths"),
        1,
        {"num_heads": "q_num_heads", "kv_num_heads": "kv_num_heads"},
        {"is_causal": 0, "softmax_precision": TensorProto.FLOAT},
    ),
    "MultiHeadAttention": _Attention(
        "FullAttention", CONTRIB, ("q", "k", "v"), 1, {"num_heads": "num_heads"}, {}
    ),
}


def with_functions(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """Some nodes in their order, the chains among them replaced by calls of functions.

    Args:
        nodes: of a graph without those that no output needs.
    """
    chains = _Chains(list(nodes))
    for node in chains.nodes:
        if node.op_type == "QuantizeLinear":
            chains.quantize_rows(node)
    for node in chains.nodes:
        if node.op_type in ("Add", "Sub"):
            chains.product_and(node)
        elif node.op_type in _ATTENTIONS:
            chains.attention(node, _ATTENTIONS[node.op_type])
    return list(chains.result())


def functions_of(nodes: Iterable[NodeProto], opset: int) -> list[FunctionProto]:
    """Definitions of the functions that some nodes call, by name.

    Args:
        nodes: from :func:`with_functions`.
        opset: version of ONNX's own operators.
    """
    called = {node.op_type for node in nodes if node.domain == DOMAIN}
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(CONTRIB, 1)]
    definitions = []
    for name in sorted(called):
        inputs, outputs, attributes, body = _DEFINITIONS[name]
        definitions.append(
            helper.make_function(DOMAIN, name, inputs, outputs, body, imports, attributes)
        )
    return definitions


@dataclass
class _Chains:
    """Nodes of a graph, by what they make and by who reads it."""

    nodes: list[NodeProto]
    _replaced: dict[str, NodeProto | None] = field(default_factory=dict)  # by a node's first output

    def __post_init__(self) -> None:
        self._makers = {output: node for node in self.nodes for output in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in names_read(node):
                self._readers.setdefault(name, []).append(node)

    def result(self) -> Iterator[NodeProto]:
        for node in self.nodes:
            kept = self._replaced.get(node.output[0], node)
            if kept is not None:
                yield kept

    def quantize_rows(self, last: NodeProto) -> bool:
        """``QuantizeLinear(x, peak · step, zero_points)`` of rows, with the peak above a floor or of |x|."""
        if len(last.input) != 3 or (width := _block_size(last)) is None:
            return False
        x, scale, zero_points = last.input
        scaled = self._made(scale, "Mul")
        if scaled is None:
            return False
        peak, step = scaled.input
        above = self._made(peak, "Max")
        highest = self._made(above.input[0] if above else peak, "ReduceMax")
        magnitude = self._made(highest.input[0], "Abs") if highest and not above else None
        source = magnitude or (highest if above else None)
        if highest is None or source is None or source.input[0] != x:
            return False
        name, arguments = "QuantizeRows", [x, step, zero_points]
        if above is not None:
            name, arguments = "QuantizeRowsAbove", [x, above.input[1], step, zero_points]
        between = [node for node in (scaled, above, highest, magnitude) if node is not None]
        outputs = [last.output[0], scale]
        if above is None and self._quantize_rotated(last, between, arguments, outputs, width):
            return True
        return self._replace(last, between, name, arguments, outputs, width=width)

    def _quantize_rotated(
        self,
        last: NodeProto,
        rows: list[NodeProto],
        arguments: list[str],
        outputs: list[str],
        width: int,
    ) -> bool:
        """The same of a product that was reshaped to blocks, multiplied by a matrix and reshaped back."""
        joined = self._made(arguments[0], "Reshape")
        rotated = self._made(joined.input[0], "MatMul") if joined else None
        blocks = self._made(rotated.input[0], "Reshape") if rotated else None
        product = self._made(blocks.input[0], "Mul") if blocks else None
        if not (joined and rotated and blocks and product):
            return False
        (x, y), suffix = product.input, ""
        if len(self._readers[product.output[0]]) > 1:
            outputs, suffix = [*outputs, product.output[0]], "AndProduct"
        rest = [rotated.input[1], blocks.input[1], *arguments[1:]]
        between = [product, blocks, rotated, joined, *rows]
        gate = self._made(x, "QuickGelu")
        if gate is not None and helper.get_node_attr_value(gate, "alpha") == 1:
            called, given = f"QuantizeRotatedSwiGLU{suffix}", [gate.input[0], y, *rest]
            if self._replace(last, [gate, *between], called, given, outputs, width=width):
                return True
        called = f"QuantizeRotated{suffix}"
        return self._replace(last, between, called, [x, y, *rest], outputs, width=width)

    def product_and(self, last: NodeProto) -> bool:
        """A product that nothing reads but an ``Add`` or ``Sub``; of two, the later one."""
        sides = [(side, self._made(name, _PRODUCT)) for side, name in enumerate(last.input)]
        found = [
            (side, made) for side, made in sides if made and (last.op_type == "Add" or not side)
        ]
        for side, product in sorted(found, key=lambda pair: self._position(pair[1]), reverse=True):
            a, b, a_scale, b_scale, *zero_point = product.input
            arguments = [a, b, a_scale, b_scale, last.input[1 - side], *zero_point]
            name = f"{_PRODUCT}{last.op_type}"
            if self._replace(last, [product], name, arguments, [last.output[0]]):
                return True
        return False

    def attention(self, node: NodeProto, kind: _Attention) -> None:
        """Attention over the tokens themselves: no keys and values from before are read, none are made.

        Exports write it with keys and values of as many tokens and of heads as large as the queries', and
        causal attention with full lengths, which is all that the kernels do.
        """
        given = [*node.input, *[""] * (len(kind.inputs) - len(node.input))]
        if node.domain != kind.domain or [bool(name) for name in given] != [
            bool(name) for name in kind.inputs
        ]:
            return
        if any(self._readers.get(name) for name in node.output[1:]):
            return
        found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        wanted: dict[str, Any] = {"scale": found.pop("scale", 0)}
        for name, theirs in kind.attributes.items():
            wanted[name] = found.pop(theirs, -1 if theirs == "local_window_size" else 0)
        # a zero means something else to ONNX Runtime than what it says
        if found == kind.fixed and all(wanted.values()):
            operands = [name for name in given if name]
            self._replace(node, [], kind.function, operands, [node.output[0]], **wanted)

    def _replace(
        self,
        last: NodeProto,
        between: list[NodeProto],
        name: str,
        arguments: list[str],
        outputs: list[str],
        **attributes: Any,
    ) -> bool:
        """Puts a call in the place of some nodes, unless others read what is made between them."""
        chain = {id(node) for node in [*between, last]}
        for node in [*between, last]:
            inside = node.output[0] not in outputs
            if inside and any(
                id(reader) not in chain for reader in self._readers.get(node.output[0], [])
            ):
                return False
        label = between[0].name if name.startswith(_PRODUCT) else last.name
        call = helper.make_node(name, arguments, outputs, name=label, domain=DOMAIN, **attributes)
        self._replaced |= {node.output[0]: None for node in between}
        self._replaced[last.output[0]] = call
        return True

    def _made(self, name: str, op_type: str) -> NodeProto | None:
        """The node that makes a value, if it is of a type and still stands."""
        node = self._makers.get(name)
        if node is None or node.op_type != op_type or node.output[0] in self._replaced:
            return None
        return node

    def _position(self, node: NodeProto) -> int:
        return next(i for i, other in enumerate(self.nodes) if other is node)


def _block_size(node: NodeProto) -> int | None:
    found = [a.i for a in node.attribute if a.name == "block_size"]
    return found[0] if found and found[0] > 0 else None


def _node(
    op_type: str, inputs: str, output: str, *, domain: str = "", **attributes: Any
) -> NodeProto:
    return helper.make_node(op_type, inputs.split(" "), [output], domain=domain, **attributes)


def _integers(output: str, *values: int) -> NodeProto:
    return helper.make_node("Constant", [], [output], value_ints=list(values))


def _quantized(inputs: str, output: str) -> NodeProto:
    node = _node("QuantizeLinear", inputs, output, axis=-1)
    _attributed(node, "block_size", onnx.AttributeProto.INT, "width")
    return node


def _product_and(op_type: str) -> list[NodeProto]:
    product = _node(_PRODUCT, "a b a_scale b_scale a_zero_point", "product", domain=CONTRIB)
    return [product, _node(op_type, "product other", "y")]


def _rows(x: str) -> list[NodeProto]:
    return [
        _integers("last", -1),
        _node("Abs", x, "magnitude"),
        _node("ReduceMax", "magnitude last", "peak", keepdims=1),
        _node("Mul", "peak step", "scale"),
        _quantized(f"{x} scale zero_points", "values"),
    ]


def _rotated(*, gated: bool) -> list[NodeProto]:
    gate = [_node("QuickGelu", "x", "gate", domain=CONTRIB, alpha=1.0)] if gated else []
    return [
        *gate,
        _node("Mul", "gate y" if gated else "x y", "product"),
        _node("Reshape", "product blocks", "parts"),
        _node("MatMul", "parts rotation", "rotated"),
        _integers("whole", 0, 0, -1),
        _node("Reshape", "rotated whole", "rows"),
        *_rows("rows"),
    ]


def _attributed(
    node: NodeProto, name: str, kind: onnx.AttributeProto.AttributeType, given: str | None = None
) -> None:
    """Gives a node of a body an attribute of the function's call, of another name where one is given."""
    node.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=given or name, type=kind))


def _attention(op_type: str) -> tuple[list[str], list[str], list[str], list[NodeProto]]:
    kind = _ATTENTIONS[op_type]
    outputs = ["y", *(f"unused_{number}" for number in range(1, kind.outputs))]
    node = helper.make_node(op_type, kind.inputs, outputs, domain=kind.domain, **kind.fixed)
    for name, theirs in kind.attributes.items():
        _attributed(node, theirs, onnx.AttributeProto.INT, name)
    _attributed(node, "scale", onnx.AttributeProto.FLOAT)
    return [name for name in kind.inputs if name], ["y"], [*kind.attributes, "scale"], [node]


_PRODUCT_INPUTS = ["a", "b", "a_scale", "b_scale", "other", "a_zero_point"]
_ROWS_ABOVE = [
    _integers("last", -1),
    _node("ReduceMax", "x last", "highest", keepdims=1),
    _node("Max", "highest floor", "peak"),
    _node("Mul", "peak step", "scale"),
    _quantized("x scale zero_points", "values"),
]
_ROTATED_INPUTS = ["x", "y", "rotation", "blocks", "step", "zero_points"]

_Definition = tuple[list[str], list[str], list[str], list[NodeProto]]
_DEFINITIONS: dict[str, _Definition] = {  # inputs, outputs, attributes, body
    "QuantizeRows": (["x", "step", "zero_points"], ["values", "scale"], ["width"], _rows("x")),
    "QuantizeRowsAbove": (
        ["x", "floor", "step", "zero_points"],
        ["values", "scale"],
        ["width"],
        _ROWS_ABOVE,
    ),
    **{
        f"QuantizeRotated{kind}{suffix}": (
            _ROTATED_INPUTS,
            ["values", "scale", *read],
            ["width"],
            _rotated(gated=bool(kind)),
        )
        for kind in ("", "SwiGLU")
        for suffix, read in (("", ()), ("AndProduct", ("product",)))
    },
    f"{_PRODUCT}Add": (_PRODUCT_INPUTS, ["y"], [], _product_and("Add")),
    f"{_PRODUCT}Sub": (_PRODUCT_INPUTS, ["y"], [], _product_and("Sub")),
    **{kind.function: _attention(op_type) for op_type, kind in _ATTENTIONS.items()},
}
