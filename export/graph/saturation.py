"""What stops a graph where its 8-bit products would be wrong.

ONNX Runtime multiplies uint8 by int8 with ``vpmaddubsw`` on x86-64 without VNNI, which adds two products in
16 bits and saturates, without an error. Such a session computes this graph's vectors far off. So the graph
multiplies numbers whose product is known to be 0 and takes the result as an index into one value: another
number is out of its bounds, and ONNX Runtime ends the run with the name of the node, which says what to do.

In a session that asks for exact products, as embedge's do, and on every other processor the index is 0. The
product is of the operator of the Linears, so whatever computes those is tried. It depends on an input: ONNX
Runtime would compute constants when the session opens, before it has heeded the session's option.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from embedge.export.graph.ops import CONTRIB, OpBuilder
from embedge.export.graph.values import Value
from embedge.runtime.bundle.contract import EXACT_OPTION

__all__ = ["ADVICE", "unless_saturating"]

ADVICE = (
    "8-bit products saturate on this processor, and vectors would be wrong: open the session with the option "
    f"{EXACT_OPTION}=1, or export with --portable"
)
_MOST = np.full(8, 255)
# Pairs of products: 255 · (127 + 127) does not fit 16 bits, the others do; without saturation their sum is 0.
_PAIRS = np.array([127, 127, -127, 0, -127, 0, 0, 0])


def unless_saturating(g: OpBuilder, value: Value, lengths: Value) -> Value:
    """``value`` as it is; where products saturate, the run fails with :data:`ADVICE`.

    Args:
        g: the graph.
        value: float32, what an output gives.
        lengths: int64 ``[batch]``, what depends on an input.
    """
    return g.op("Add", value, g.once(ADVICE, lambda: _nothing(g, lengths)))


def _nothing(g: OpBuilder, lengths: Value) -> Value:
    """float32 ``[1]``, 0."""
    zero, one = g.const([0], "int64"), g.const([1], "int64")
    some = g.op("Cast", g.op("Slice", lengths, zero, one, zero), to=TensorProto.UINT8)
    most = g.op("Max", some, g.const(_MOST[None], "uint8"))  # of any number 255, but not constant
    scale = g.const(1.0)
    product = g.op(
        "MatMulIntegerToFloat",
        *(most, g.const(_PAIRS[:, None], "int8"), scale, scale),
        domain=CONTRIB,
    )
    index = g.op("Cast", g.op("Squeeze", product, zero), to=TensorProto.INT32)
    return g.op("Gather", g.const([0.0]), index, name=ADVICE, axis=0)
