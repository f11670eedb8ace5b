"""From token states to a vector: pooling, Dense layers, normalization."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from embedge.export.graph.initializers import digest
from embedge.export.graph.ops import CONTRIB, OpBuilder
from embedge.export.graph.values import FloatArray, Value
from embedge.export.source.dense import DenseLayer
from embedge.export.weights.rotated import RotatedWeights

_DENSE_ACTIVATIONS = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid"}


def pool(
    g: OpBuilder, hidden: str, lengths: str, pooling: str, mask: str = "attention_mask"
) -> Value:
    """One vector per text from ``[batch, tokens, hidden]``; a mean is over the tokens of ``mask``."""
    if pooling == "cls":
        return g.op("Gather", hidden, g.const(0, "int64"), axis=1)
    if pooling == "lasttoken":
        last = g.op("Sub", lengths, g.const(1, "int64"))
        index = g.op("Unsqueeze", last, g.const([1], "int64"))
        return g.op("GatherND", hidden, index, batch_dims=1)
    attended = g.op("Cast", mask, to=TensorProto.FLOAT)
    row = g.op("Unsqueeze", attended, g.const([1], "int64"))
    total = g.op("Squeeze", g.op("MatMul", row, hidden), g.const([1], "int64"))
    count = g.op("ReduceSum", attended, g.const([1], "int64"), keepdims=1)
    return g.op("Div", total, g.op("Max", count, g.const(1e-9)))


def rotated_back(g: OpBuilder, weights: RotatedWeights, norm: str, x: str) -> Value:
    """``[batch, width]`` of a rotated stream in the model's own axes, the norm's weights applied.

    The matrix is signs, a Kronecker product and, where means are kept, signs and a reflection; they are a
    hundredth of its size.

    Args:
        g: the graph.
        weights: the task's tensors.
        norm: weight of the norm that made the states.
        x: the states.
    """
    rotation = weights.rotation(norm)
    odd, first, second = rotation.factors

    def factor(name: str, matrix: FloatArray) -> Value:
        return g.computed(f"unrotation.{name}", matrix.shape, lambda: matrix, detail="1")

    def shaped(y: str, *shape: int) -> Value:
        return g.op("Reshape", y, g.const([-1, *shape], "int64"))

    if rotation.flips is not None and rotation.mirror is not None:
        column = factor("mirror", rotation.mirror[:, None])
        along = g.op("Mul", g.op("MatMul", x, column), factor("mirror.row", rotation.mirror))
        x = g.op("Mul", g.op("Sub", x, along), factor("flips", rotation.flips))
    y = shaped(x, len(odd) * len(first), len(second))
    y = g.op("MatMul", y, factor("second", np.ascontiguousarray(second.T)))
    if len(first) > 1:
        y = g.op(
            "MatMul",
            factor("first", np.ascontiguousarray(first.T)),
            shaped(y, len(first), len(second)),
        )
    if len(odd) > 1:
        y = g.op("MatMul", factor("odd", odd), shaped(y, len(odd), len(first) * len(second)))
    scale = g.computed(
        "unrotation.scale",
        (rotation.width,),
        lambda: rotation.signs * weights.norm_weight(norm),
        norm,
    )
    return g.op("Mul", shaped(y, rotation.width), scale)


def apply_dense(g: OpBuilder, x: str, layer: DenseLayer, name: str) -> Value:
    """A sentence-transformers Dense layer."""
    matrix = np.ascontiguousarray(layer.weight.T)
    weight = g.computed(f"{name}.weight", matrix.shape, lambda: matrix, detail=digest(layer.weight))
    x = g.op("MatMul", x, weight)
    if layer.bias is not None:
        x = g.op("Add", x, g.const(layer.bias))
    if layer.activation == "gelu":
        return g.op("Gelu", x, domain=CONTRIB)
    if layer.activation == "silu":
        return g.op("QuickGelu", x, domain=CONTRIB, alpha=1.0)
    if layer.activation in _DENSE_ACTIVATIONS:
        return g.op(_DENSE_ACTIVATIONS[layer.activation], x)
    if layer.activation != "identity":
        raise AssertionError(f"unknown Dense activation {layer.activation!r} was let through")
    return x


def unit_length(g: OpBuilder, x: str) -> Value:
    """``x / max(‖x‖, 1e-12)``, torch's ``normalize``."""
    norm = g.op("ReduceL2", x, g.const([-1], "int64"), keepdims=1)
    return g.op("Div", x, g.op("Max", norm, g.const(1e-12)))
