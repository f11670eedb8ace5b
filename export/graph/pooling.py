"""From token states to a vector: pooling, Dense layers, normalization."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from embedge.export.graph.initializers import digest
from embedge.export.graph.ops import CONTRIB, OpBuilder
from embedge.export.graph.values import FloatArray, Value
from embedge.export.source.dense import DenseLayer
from embedge.export.weights.rotated import RotatedWeights

_DENSE_ACTIVATIONS = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid"}


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """What poolings are taken over; all values but ``skips`` are names in the graph.

    Attributes:
        tokens: int64 scalar, padded tokens of the batch.
        lengths: int64 ``[batch]``, tokens from there on are padding.
        mask: int64 ``[batch, tokens]``, 1 for a token that is pooled.
        skips: whether ``mask`` leaves out tokens at the start of texts, perhaps all of one.
    """

    tokens: str
    lengths: str
    mask: str = "attention_mask"
    skips: bool = False


def poolings(pooling: str | None) -> list[str | None]:
    """The single poolings of ``"cls+max"``, whose vectors are concatenated in this order; one ``None``."""
    return [None] if pooling is None else [*pooling.split("+")]


def pool(g: OpBuilder, hidden: str, pooling: str, of: Pooled) -> Value:
    """One vector a text from float32 ``[batch, tokens, hidden]``, as sentence-transformers pools.

    A text none of whose tokens is pooled gets zeros, with ``cls`` its first state.

    Source: sentence-transformers' ``Pooling``.

    Args:
        g: the graph.
        hidden: the states.
        pooling: names joined by "+".
        of: what is pooled.
    """
    parts = [_pool_by(g, hidden, name, of) for name in pooling.split("+")]
    return parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=-1)


def _pool_by(g: OpBuilder, hidden: str, pooling: str, of: Pooled) -> Value:
    if pooling == "cls":
        return _first(g, hidden, of)
    if pooling == "lasttoken":
        return _last(g, hidden, of)
    weights = g.op("Cast", of.mask, to=TensorProto.FLOAT)
    if pooling == "max":
        return _largest(g, hidden, weights, of)
    if pooling == "weightedmean":
        places = g.op("Cast", _positions(g, of, first=1), to=TensorProto.FLOAT)
        weights = g.op("Mul", weights, places)
    row = g.op("Unsqueeze", weights, g.const([1], "int64"))
    total = g.op("Squeeze", g.op("MatMul", row, hidden), g.const([1], "int64"))
    # of ones and zeros ReduceL2 is the root of their number
    count = "ReduceL2" if pooling == "mean_sqrt_len_tokens" else "ReduceSum"
    divisor = g.op(count, weights, g.const([1], "int64"), keepdims=1)
    return g.op("Div", total, g.op("Max", divisor, g.const(1e-9)))


def _first(g: OpBuilder, hidden: str, of: Pooled) -> Value:
    """The state of the first pooled token, of the first of all where none is."""
    zero = g.const(0, "int64")
    if not of.skips:
        return g.op("Gather", hidden, zero, axis=1)
    is_pooled = g.op("Greater", of.mask, zero)
    places = g.op("Where", is_pooled, _positions(g, of), of.tokens)
    first = g.op("ReduceMin", places, g.const([1], "int64"), keepdims=1)
    first = g.op("Where", g.op("Less", first, of.tokens), first, zero)
    return g.op("GatherND", hidden, first, batch_dims=1)


def _last(g: OpBuilder, hidden: str, of: Pooled) -> Value:
    """The state of the last token, zeros where it is not pooled."""
    last = g.op("Sub", of.lengths, g.const(1, "int64"))
    index = g.op("Unsqueeze", last, g.const([1], "int64"))
    state = g.op("GatherND", hidden, index, batch_dims=1)
    return g.op("Mul", state, _any_pooled(g, of)) if of.skips else state


def _largest(g: OpBuilder, hidden: str, weights: str, of: Pooled) -> Value:
    """The largest value of each channel, zeros where no token is pooled."""
    is_pooled = g.op("Greater", g.op("Unsqueeze", weights, g.const([2], "int64")), g.const(0.0))
    states = g.op("Where", is_pooled, hidden, g.const(np.finfo(np.float32).min))
    largest = g.op("ReduceMax", states, g.const([1], "int64"), keepdims=0)
    if not of.skips:
        return largest
    return g.op("Where", g.op("Greater", _any_pooled(g, of), g.const(0.0)), largest, g.const(0.0))


def _any_pooled(g: OpBuilder, of: Pooled) -> Value:
    """float32 ``[batch, 1]``: 1 where a token is pooled."""
    found = g.op("ReduceMax", of.mask, g.const([1], "int64"), keepdims=1)
    return g.op("Cast", found, to=TensorProto.FLOAT)


def _positions(g: OpBuilder, of: Pooled, first: int = 0) -> Value:
    """int64 ``[tokens]``, which count from ``first``."""
    start, step = g.const(first, "int64"), g.const(1, "int64")
    end = g.op("Add", of.tokens, start) if first else of.tokens
    return g.op("Range", start, end, step)


def rotated_back(
    g: OpBuilder, weights: RotatedWeights, norm: str, x: str, *, by_token: bool = False
) -> Value:
    """States of a rotated stream in the model's own axes, the norm's weights applied.

    The matrix is signs, a Kronecker product and, where means are kept, signs and a reflection; they are a
    hundredth of its size.

    Args:
        g: the graph.
        weights: the task's tensors.
        norm: weight of the norm that made the states.
        x: float32 ``[batch, width]`` or, with ``by_token``, ``[batch, tokens, width]``.
        by_token: whether there is a state a token.
    """
    rotation = weights.rotation(norm)
    odd, first, second = rotation.factors
    shape = g.op("Shape", x) if by_token else ""

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
    y = g.op("Mul", shaped(y, rotation.width), scale)
    return g.op("Reshape", y, shape) if by_token else y


def apply_dense(g: OpBuilder, x: str, layer: DenseLayer, name: str) -> Value:
    """A sentence-transformers Dense layer."""
    y = _times(g, x, layer.weight, f"{name}.weight")
    if layer.bias is not None:
        y = g.op("Add", y, g.const(layer.bias))
    y = _activated(g, y, layer)
    if layer.residual is None:
        return y
    return g.op("Add", y, _times(g, x, layer.residual, f"{name}.residual"))


def _times(g: OpBuilder, x: str, weight: FloatArray, name: str) -> Value:
    matrix = np.ascontiguousarray(weight.T)
    return g.op("MatMul", x, g.computed(name, matrix.shape, lambda: matrix, detail=digest(weight)))


def _activated(g: OpBuilder, x: Value, layer: DenseLayer) -> Value:
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
