"""The whole graph of a task: the family's layers, then pooling, Dense layers and normalization."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from embedge.export.families import Family
from embedge.export.graph.builder import CONTRIB, IR_VERSION, Graph, TensorSpec
from embedge.export.graph.fused_ops import DOMAIN, VERSION, functions_of, with_functions
from embedge.export.graph.scheme import Scheme, digest
from embedge.export.source.dense import DenseLayer
from embedge.export.weights.rotated import RotatedWeights
from embedge.export.weights.tensors import Weights
from embedge.runtime.bundle.contract import UNPACKED

_DENSE_ACTIVATIONS = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid"}


def task_graph(
    family: Family,
    weights: Weights,
    scheme: Scheme,
    *,
    pooling: str,
    dense: tuple[DenseLayer, ...],
    normalize: bool,
) -> Graph:
    """Write the graph from token ids to ``embedding`` float32 ``[batch, dim]``.

    A family with a head for it also gives ``token_embeddings`` ``[batch, tokens, multi_vector_dim]``.

    Args:
        family: the model.
        weights: the task's tensors.
        scheme: the precision.
        pooling: "mean", "cls" or "lasttoken".
        dense: layers after pooling, in order, run in float32.
        normalize: whether vectors end with length 1.
    """
    g = Graph(weights=weights, scheme=scheme)
    family.declare_inputs(g)
    context = family.context(g)
    hidden = family.embed(g, context)
    for index in range(family.num_layers):
        hidden = family.layer(g, context, index, hidden)
    hidden = family.final(g, context, hidden)
    embedding(g, family, context, hidden, pooling=pooling, dense=dense, normalize=normalize)
    if family.multi_vector_dim is not None:
        rows = family.token_embeddings(g, hidden)
        axes: list[int | str] = ["batch", "tokens", family.multi_vector_dim]
        g.output(rows, "token_embeddings", TensorProto.FLOAT, axes)
    g.prune()
    return g


def embedding(
    g: Graph,
    family: Family,
    context: dict[str, str],
    hidden: str,
    *,
    pooling: str,
    dense: tuple[DenseLayer, ...],
    normalize: bool,
) -> None:
    """Declare the output ``embedding`` of the model's last states ``hidden``; see :func:`task_graph`."""
    x = pool(g, hidden, context["lengths"], pooling, family.pool_mask)
    if isinstance(g.weights, RotatedWeights) and (norm := g.weights.output) is not None:
        # pooling is linear: a vector instead of every token
        x = rotated_back(g, g.weights, norm, x)
    for index, layer in enumerate(dense):
        x = apply_dense(g, x, layer, f"dense.{index}")
    if normalize:
        x = unit_length(g, x)
    width = dense[-1].out_features if dense else family.hidden_size
    g.output(x, "embedding", TensorProto.FLOAT, ["batch", width])


def pool(g: Graph, hidden: str, lengths: str, pooling: str, mask: str = "attention_mask") -> str:
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


def rotated_back(g: Graph, weights: RotatedWeights, norm: str, x: str) -> str:
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

    def factor(name: str, matrix: NDArray[np.float32]) -> str:
        return g.computed(f"unrotation.{name}", matrix.shape, lambda: matrix, detail="1")

    def shaped(y: str, *shape: int) -> str:
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


def apply_dense(g: Graph, x: str, layer: DenseLayer, name: str) -> str:
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


def unit_length(g: Graph, x: str) -> str:
    """``x / max(‖x‖, 1e-12)``, torch's ``normalize``."""
    norm = g.op("ReduceL2", x, g.const([-1], "int64"), keepdims=1)
    return g.op("Div", x, g.op("Max", norm, g.const(1e-12)))


def to_model(
    g: Graph, initializers: list[TensorProto], name: str, notes: Mapping[str, str]
) -> onnx.ModelProto:
    """Put a pruned graph and its initializers into an ONNX model."""
    constants = sorted(g.constants.values(), key=lambda c: c.name)
    unpacked = [_unpacked(spec) for u in g.unpacked.values() for spec in u.specs]
    nodes = with_functions(g.nodes) if g.scheme.functions else g.nodes
    functions = functions_of(nodes, g.scheme.opset)
    graph = helper.make_graph(
        nodes, name, g.inputs, g.outputs, initializer=[*constants, *initializers, *unpacked]
    )
    domains = {"": g.scheme.opset, CONTRIB: 1, **({DOMAIN: VERSION} if functions else {})}
    model = helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid(*domain) for domain in domains.items()],
        ir_version=IR_VERSION,
        producer_name="embedge",
    )
    helper.set_model_props(model, dict(notes))
    return model


def _unpacked(spec: TensorSpec) -> TensorProto:
    """An initializer that the runtime gives when it opens the graph."""
    tensor = TensorProto(name=spec.name, data_type=spec.elem_type, dims=spec.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", UNPACKED), ("offset", "0"), ("length", str(spec.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor
