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

A *branch* is a product of low rank beside a Linear's own, ``x · D · U``. Its values, int8 of at most 63 in size so
that no processor saturates, lie in the kernels' panels: an int8 matrix ``[depth, columns]`` as ``[columns / 16,
depth / 4, 16, 4]``. ``depth`` is a multiple of 4, ``columns`` and the rank are multiples of 16.

    BranchRows(values, scale, zero_point, down, down_scale, step, zero_points)
                                                   values, scale: rows of ``x · D``, whose rows ``x`` are integers,
                                                   quantized as ``QuantizeRows`` does; ``width`` is the rank
    MatMulIntegerToFloatBranch(a, b, a_scale, b_scale, a_zero_point, BRANCH)
                                                   the product plus the branch's
    MatMulIntegerToFloatBranchAdd(a, b, a_scale, b_scale, other, a_zero_point, BRANCH), …BranchSub(…)
                                                   the product plus, or minus, ``other``; then plus the branch's
    MatMulNBitsBranch(x, weight, scales, zero_points, BRANCH)
                                                   ``MatMulNBits`` plus the branch's product

``BRANCH`` are five inputs: ``branch_values, branch_scale, branch_zero_point, up, up_scale``. The branch's own zero
point is that of ``BranchRows``, around which its rows lie also where those of ``a`` are bounded below.
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


def _quantized(x: str, prefix: str = "") -> list[NodeProto]:
    scale, values = f"{prefix}scale", f"{prefix}values"
    return [
        _node("Mul", "peak step", scale),
        _node(
            "QuantizeLinear",
            f"{x} {scale} zero_points",
            values,
            axis=-1,
            given="block_size=width",
        ),
    ]


def _rows(x: str, prefix: str = "") -> list[NodeProto]:
    """Nodes that give the values and the scale of rows, under these names behind a prefix."""
    return [
        _integers("last", -1),
        _node("Abs", x, "magnitude"),
        _node("ReduceMax", "magnitude last", "peak", keepdims=1),
        *_quantized(x, prefix),
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


def _integer_product(output: str) -> NodeProto:
    inputs = "a b a_scale b_scale a_zero_point"
    return _node("MatMulIntegerToFloat", inputs, output, domain=CONTRIB)


def _matmul_and(op_type: str) -> Function:
    body = [_integer_product("product"), _node(op_type, "product other", "y")]
    return Function("a b a_scale b_scale other a_zero_point", "y", "", body)


def _from_panels(panels: str, scales: str, matrix: str) -> list[NodeProto]:
    """Nodes that give the matrix ``[depth, columns]`` of panels; ``scales`` has a value for each column."""
    return [
        _node("Transpose", panels, "lines", perm=[1, 3, 0, 2]),  # [depth / 4, 4, columns / 16, 16]
        _integers("rest", -1),
        _node("Shape", scales, "columns"),
        _node("Concat", "rest columns", "shape", axis=0),
        _node("Reshape", "lines shape", matrix),
    ]


_BRANCH = "branch_values branch_scale branch_zero_point up up_scale"


def _with_branch(inputs: str, attributes: str, *product: NodeProto) -> Function:
    """A function whose nodes give ``product``, to which it adds the branch's."""
    branch = _node(
        "MatMulIntegerToFloat",
        "branch_values right branch_scale up_scale branch_zero_point",
        "branch",
        domain=CONTRIB,
    )
    body = [
        *product,
        *_from_panels("up", "up_scale", "right"),
        branch,
        _node("Add", "product branch", "y"),
    ]
    return Function(f"{inputs} {_BRANCH}", "y", attributes, body)


def _matmul_branch_and(op_type: str) -> Function:
    product = _integer_product("own"), _node(op_type, "own other", "product")
    return _with_branch("a b a_scale b_scale other a_zero_point", "", *product)


_BLOCKS = "K N bits block_size accuracy_level"
_BRANCHES = {
    "BranchRows": Function(
        "values scale zero_point down down_scale step zero_points",
        "branch_values branch_scale",
        "width",
        [
            *_from_panels("down", "down_scale", "right"),
            _node(
                "MatMulIntegerToFloat",
                "values right scale down_scale zero_point",
                "product",
                domain=CONTRIB,
            ),
            *_rows("product", "branch_"),
        ],
    ),
    "MatMulIntegerToFloatBranch": _with_branch(
        "a b a_scale b_scale a_zero_point", "", _integer_product("product")
    ),
    "MatMulIntegerToFloatBranchAdd": _matmul_branch_and("Add"),
    "MatMulIntegerToFloatBranchSub": _matmul_branch_and("Sub"),
    "MatMulNBitsBranch": _with_branch(
        "x weight scales zero_points",
        _BLOCKS,
        _node(
            "MatMulNBits", "x weight scales zero_points", "product", domain=CONTRIB, given=_BLOCKS
        ),
    ),
}

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
    **_BRANCHES,
    **_ATTENTIONS,
}
