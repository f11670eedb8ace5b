"""Chains of nodes that int8 graphs repeat in every layer, as ONNX functions of the domain ``embedge``.

A function's body is the chain itself, so any ONNX Runtime opens such a graph: it inlines the functions and
runs what was there before. Where embedge's own kernels are registered (``runtime/native``), each function is
one operator with the same result, which passes over memory once. (ONNX IR, "Functions";
onnx/docs/IR.md.)

    QuantizeRows(x, step, zero_points)             values, scale: ``scale = max|x| · step`` of a row,
                                                   ``values = round(x / scale) + zero_points``
    QuantizeRowsAbove(x, floor, step, zero_points) the same with ``scale = max(max x, floor) · step``
    QuantizeHalves(x, y, step)                     of ``p = x · y`` each half of a row between its bounds,
                                                   ``values = round((p - low) / scale)``: values of each,
                                                   scale of each, ``low [..., 2]``
    QuantizeHalvesAndProduct(x, y, step)           the same and ``p``, where something else reads it
    MatMulIntegerToFloatAdd(…, other, …)           the product of ``com.microsoft`` plus, or minus, a tensor:
    MatMulIntegerToFloatSub(…, other, …)           a bias, a residual, or another product
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import FunctionProto, NodeProto, helper

from embedge.export._graph import CONTRIB, names_read

__all__ = ["DOMAIN", "VERSION", "functions_of", "with_functions"]

DOMAIN, VERSION = "embedge", 1
_PRODUCT = "MatMulIntegerToFloat"


def with_functions(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """Some nodes in their order, the chains among them replaced by calls of functions.

    Args:
        nodes: of a graph without those that no output needs.
    """
    chains = _Chains(list(nodes))
    for node in chains.nodes:
        if node.op_type == "QuantizeLinear" and not chains.quantize_rows(node):
            chains.quantize_halves(node)
    for node in chains.nodes:
        if node.op_type in ("Add", "Sub"):
            chains.product_and(node)
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
        return self._replace(last, between, name, arguments, [last.output[0], scale], width=width)

    def quantize_halves(self, last: NodeProto) -> bool:
        """``QuantizeLinear(x · y - low, (high - low) · step)`` of two parts, which are taken apart behind."""
        if len(last.input) != 2 or (width := _block_size(last)) is None:
            return False
        shifted, scaled = self._made(last.input[0], "Sub"), self._made(last.input[1], "Mul")
        if shifted is None or scaled is None:
            return False
        parts = self._made(shifted.input[0], "Reshape")
        lowest = self._made(shifted.input[1], "ReduceMin")
        spread = self._made(scaled.input[0], "Sub")
        if parts is None or lowest is None or spread is None:
            return False
        highest = self._made(spread.input[0], "ReduceMax")
        product = self._made(parts.input[0], "Mul")
        taken = [self._reading(name, "Gather") for name in (last.output[0], scaled.output[0])]
        low = self._reading(lowest.output[0], "Squeeze")
        if highest is None or product is None or len(low) != 1 or any(len(t) != 2 for t in taken):
            return False
        gathers = [node for pair in taken for node in pair]
        name, outputs = "QuantizeHalves", [node.output[0] for node in [*gathers, low[0]]]
        if len(self._readers[product.output[0]]) > 1:
            name = "QuantizeHalvesAndProduct"
            outputs.append(product.output[0])
        between = [product, parts, lowest, highest, spread, scaled, shifted, low[0], *gathers]
        arguments = [*product.input, scaled.input[1]]
        return self._replace(last, between, name, arguments, outputs, width=width)

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

    def _reading(self, name: str, op_type: str) -> list[NodeProto]:
        """The nodes of a type that read a value."""
        return [node for node in self._readers.get(name, []) if node.op_type == op_type]

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
    node.attribute.append(
        onnx.AttributeProto(name="block_size", ref_attr_name="width", type=onnx.AttributeProto.INT)
    )
    return node


def _product_and(op_type: str) -> list[NodeProto]:
    product = _node(_PRODUCT, "a b a_scale b_scale a_zero_point", "product", domain=CONTRIB)
    return [product, _node(op_type, "product other", "y")]


def _halves() -> list[NodeProto]:
    nodes = [
        _integers("last", -1),
        _node("Mul", "x y", "product"),
        helper.make_node("Constant", [], ["parts"], value_ints=[0, 0, 2, -1]),
        _node("Reshape", "product parts", "halves"),
        _node("ReduceMin", "halves last", "least", keepdims=1),
        _node("ReduceMax", "halves last", "largest", keepdims=1),
        _node("Sub", "largest least", "spread"),
        _node("Mul", "spread step", "scale"),
        _node("Sub", "halves least", "shifted"),
        _quantized("shifted scale", "values"),
        _node("Squeeze", "least last", "low"),
    ]
    for number, half in enumerate(("first", "second")):
        nodes.append(helper.make_node("Constant", [], [f"{half}_number"], value_int=number))
        nodes.append(_node("Gather", f"values {half}_number", half, axis=2))
        nodes.append(_node("Gather", f"scale {half}_number", f"{half}_scale", axis=2))
    return nodes


_PRODUCT_INPUTS = ["a", "b", "a_scale", "b_scale", "other", "a_zero_point"]
_ROWS = [
    _integers("last", -1),
    _node("Abs", "x", "magnitude"),
    _node("ReduceMax", "magnitude last", "peak", keepdims=1),
    _node("Mul", "peak step", "scale"),
    _quantized("x scale zero_points", "values"),
]
_ROWS_ABOVE = [
    _integers("last", -1),
    _node("ReduceMax", "x last", "highest", keepdims=1),
    _node("Max", "highest floor", "peak"),
    _node("Mul", "peak step", "scale"),
    _quantized("x scale zero_points", "values"),
]
_HALVES_INPUTS = ["x", "y", "step"]
_HALVES_OUTPUTS = ["first", "second", "first_scale", "second_scale", "low"]

_Definition = tuple[list[str], list[str], list[str], list[NodeProto]]
_DEFINITIONS: dict[str, _Definition] = {  # inputs, outputs, attributes, body
    "QuantizeRows": (["x", "step", "zero_points"], ["values", "scale"], ["width"], _ROWS),
    "QuantizeRowsAbove": (
        ["x", "floor", "step", "zero_points"],
        ["values", "scale"],
        ["width"],
        _ROWS_ABOVE,
    ),
    "QuantizeHalves": (_HALVES_INPUTS, _HALVES_OUTPUTS, ["width"], _halves()),
    "QuantizeHalvesAndProduct": (
        _HALVES_INPUTS,
        [*_HALVES_OUTPUTS, "product"],
        ["width"],
        _halves(),
    ),
    f"{_PRODUCT}Add": (_PRODUCT_INPUTS, ["y"], [], _product_and("Add")),
    f"{_PRODUCT}Sub": (_PRODUCT_INPUTS, ["y"], [], _product_and("Sub")),
}
