"""What graphs of integer products repeat in every layer, as ONNX functions of the domain ``embedge``.

A function's body is a chain of ONNX Runtime's own nodes, so any ONNX Runtime opens such a graph: it inlines
the functions. Where embedge's own kernels are registered (``runtime/kernels/native``),
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

from collections.abc import Iterable
from typing import Any, NamedTuple

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from embedge.export.graph.ops import CONTRIB, DOMAIN

__all__ = ["functions_of"]


class Function(NamedTuple):
    """What a function takes and gives, and the nodes that it stands for.

    Attributes:
        inputs: names, separated by spaces.
        outputs: the same.
        attributes: the same.
        body: nodes over these names.
    """

    inputs: str
    outputs: str
    attributes: str
    body: list[NodeProto]


def functions_of(nodes: Iterable[NodeProto], opset: int) -> list[FunctionProto]:
    """Definitions of the functions that some nodes call, by name.

    Args:
        nodes: of a graph.
        opset: version of ONNX's own operators.
    """
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(CONTRIB, 1)]
    definitions = []
    for name in sorted({node.op_type for node in nodes if node.domain == DOMAIN}):
        inputs, outputs, attributes, body = FUNCTIONS[name]
        definitions.append(
            helper.make_function(
                DOMAIN, name, inputs.split(), outputs.split(), body, imports, attributes.split()
            )
        )
    return definitions


def _node(
    op_type: str, inputs: str, outputs: str, *, domain: str = "", given: str = "", **fixed: Any
) -> NodeProto:
    """A node of a body.

    Args:
        op_type: its operator.
        inputs: names, each followed by a space but the last; between two spaces none is given.
        outputs: names.
        domain: of the operator.
        given: attributes that the function's call gives, as ``operator's=function's`` where they differ.
        fixed: the other attributes.
    """
    node = helper.make_node(op_type, inputs.split(" "), outputs.split(), domain=domain, **fixed)
    for pair in given.split():
        name, _, of_call = pair.partition("=")
        kind = AttributeProto.FLOAT if name == "scale" else AttributeProto.INT
        node.attribute.append(AttributeProto(name=name, ref_attr_name=of_call or name, type=kind))
    return node


def _integers(output: str, *values: int) -> NodeProto:
    return helper.make_node("Constant", [], [output], value_ints=list(values))


def _quantized(x: str) -> list[NodeProto]:
    return [
        _node("Mul", "peak step", "scale"),
        _node(
            "QuantizeLinear", f"{x} scale zero_points", "values", axis=-1, given="block_size=width"
        ),
    ]


def _rows(x: str) -> list[NodeProto]:
    return [
        _integers("last", -1),
        _node("Abs", x, "magnitude"),
        _node("ReduceMax", "magnitude last", "peak", keepdims=1),
        *_quantized(x),
    ]


_ROWS_ABOVE = [
    _integers("last", -1),
    _node("ReduceMax", "x last", "highest", keepdims=1),
    _node("Max", "highest floor", "peak"),
    *_quantized("x"),
]


def _rotated(*, gated: bool, outputs: str) -> Function:
    gate = [_node("QuickGelu", "x", "gate", domain=CONTRIB, alpha=1.0)] if gated else []
    body = [
        *gate,
        _node("Mul", "gate y" if gated else "x y", "product"),
        _node("Reshape", "product blocks", "parts"),
        _node("MatMul", "parts rotation", "rotated"),
        _integers("whole", 0, 0, -1),
        _node("Reshape", "rotated whole", "rows"),
        *_rows("rows"),
    ]
    return Function("x y rotation blocks step zero_points", outputs, "width", body)


def _matmul_and(op_type: str) -> Function:
    matmul = _node(
        "MatMulIntegerToFloat", "a b a_scale b_scale a_zero_point", "product", domain=CONTRIB
    )
    body = [matmul, _node(op_type, "product other", "y")]
    return Function("a b a_scale b_scale other a_zero_point", "y", "", body)


_ATTENTIONS = {
    "CausalAttention": Function(
        "q k v lengths total",
        "y",
        "num_heads kv_num_heads local_window_size scale",
        [
            _node(
                "GroupQueryAttention",
                "q k v   lengths total",
                "y unused_1 unused_2",
                domain=CONTRIB,
                given="num_heads kv_num_heads local_window_size scale",
            )
        ],
    ),
    "PaddedAttention": Function(
        "q k v lengths",
        "y",
        "num_heads kv_num_heads scale",
        [
            _node(
                "Attention",
                "q k v    lengths",
                "y",
                given="q_num_heads=num_heads kv_num_heads scale",
                is_causal=0,
                softmax_precision=TensorProto.FLOAT,
            )
        ],
    ),
    "FullAttention": Function(
        "q k v",
        "y",
        "num_heads scale",
        [_node("MultiHeadAttention", "q k v", "y", domain=CONTRIB, given="num_heads scale")],
    ),
}

FUNCTIONS: dict[str, Function] = {
    "QuantizeRows": Function("x step zero_points", "values scale", "width", _rows("x")),
    "QuantizeRowsAbove": Function("x floor step zero_points", "values scale", "width", _ROWS_ABOVE),
    "QuantizeRotated": _rotated(gated=False, outputs="values scale"),
    "QuantizeRotatedAndProduct": _rotated(gated=False, outputs="values scale product"),
    "QuantizeRotatedSwiGLU": _rotated(gated=True, outputs="values scale"),
    "QuantizeRotatedSwiGLUAndProduct": _rotated(gated=True, outputs="values scale product"),
    "MatMulIntegerToFloatAdd": _matmul_and("Add"),
    "MatMulIntegerToFloatSub": _matmul_and("Sub"),
    **_ATTENTIONS,
}
