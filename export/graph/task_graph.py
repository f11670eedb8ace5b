"""The whole graph of a task: the transformer, then pooling, Dense layers and normalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx import TensorProto

from embedge.export.graph.architecture import TOKENS, Architecture
from embedge.export.graph.builder import Graph
from embedge.export.graph.pooling import (
    Pooled,
    apply_dense,
    pool,
    poolings,
    rotated_back,
    unit_length,
)
from embedge.export.graph.saturation import unless_saturating
from embedge.export.graph.scheme import Scheme
from embedge.export.graph.transformer import TransformerGraph
from embedge.export.graph.values import FloatArray, Value
from embedge.export.source.dense import DenseLayer
from embedge.export.weights.rotated import RotatedWeights
from embedge.export.weights.tensors import Weights


def task_graph(
    architecture: Architecture,
    weights: Weights,
    scheme: Scheme,
    *,
    pooling: str | None,
    dense: tuple[DenseLayer, ...],
    normalize: bool,
    tanh_int8: bool = False,
    backbone: Weights | None = None,
) -> Graph:
    """Write the graph from token ids to ``embedding`` float32 ``[batch, dim]``.

    A model with a head for it also gives ``token_embeddings`` ``[batch, tokens, multi_vector_dim]``. One of late
    interaction gives ``token_embeddings`` ``[batch, tokens, dim]`` alone, those of padding too: queries are filled
    up with tokens that none attends to.

    Args:
        architecture: the model.
        weights: the task's tensors.
        scheme: the precision.
        pooling: names of sentence-transformers' poolings, joined by "+"; ``None`` for late interaction.
        dense: layers after pooling, or of every token, in order, run in float32.
        normalize: whether vectors end with length 1.
        tanh_int8: whether they end as whole numbers, round(127 · tanh(x)), kept as float32.
        backbone: the tensors that weights of Linears are of, where tasks share them; what differs by task is an
            input then. ``None``: they are the task's own.
    """
    g = Graph(weights=weights, scheme=scheme, backbone=backbone)
    transformer = TransformerGraph(g, architecture)
    hidden = transformer.embed()
    states = [hidden]
    for index in range(len(architecture.layers)):
        hidden = transformer.layer(index, hidden)
        states.append(hidden)
    hidden = transformer.final(hidden)
    if pooling is None:
        token_vectors(transformer, hidden, dense=dense, normalize=normalize)
        g.prune()
        g.states += _kept(g, states)
        return g
    embedding(
        transformer,
        hidden,
        pooling=pooling,
        dense=dense,
        normalize=normalize,
        tanh_int8=tanh_int8,
    )
    if architecture.multi_vector_dim is not None:
        rows = transformer.token_embeddings(hidden)
        _output(transformer, rows, "token_embeddings", [*TOKENS, architecture.multi_vector_dim])
    g.prune()
    g.states += _kept(g, states)
    return g


def _kept(g: Graph, states: Sequence[Value]) -> list[str]:
    """Names of some states in a pruned graph; of one that only scaled norms replace, that of such a norm.

    Constants of int8 inputs are folded into norms, so that those differ from the state by a scale and a shift of
    each channel.
    """
    made = {name for node in g.nodes for name in node.output}
    norms = {node.input[0]: node.output[0] for node in g.nodes if "Normalization" in node.op_type}
    return [
        state if state in made or state.norm is None else norms[state.norm.source]
        for state in states
    ]


def _output(transformer: TransformerGraph, x: Value, name: str, shape: Sequence[int | str]) -> None:
    """Declare a float32 output, which no run gives where 8-bit products would have spoiled it."""
    g = transformer.g
    if g.scheme.saturates:
        x = unless_saturating(g, x, transformer.lengths)
    g.output(x, name, TensorProto.FLOAT, shape)


def embedding(
    transformer: TransformerGraph,
    hidden: Value,
    *,
    pooling: str,
    dense: tuple[DenseLayer, ...],
    normalize: bool,
    tanh_int8: bool = False,
) -> None:
    """Declare the output ``embedding`` of the model's last states ``hidden``; see :func:`task_graph`."""
    g, architecture = transformer.g, transformer.model
    pooled = Pooled(
        tokens=transformer.tokens,
        lengths=transformer.lengths,
        mask=architecture.pool_mask,
        skips=architecture.skips_prompts,
    )
    modes, last = poolings(pooling), architecture.state_projection
    # a pooling that only weighs states commutes with what is linear: done once instead of for every token
    by_token = len(modes) > 1 or modes[0] == "max"
    by_token = by_token or (last is not None and g.weights.has(last.bias))
    if by_token:
        hidden = _in_own_axes(transformer, hidden, by_token=True)
    x = pool(g, hidden, pooling, pooled)
    if not by_token:
        x = _in_own_axes(transformer, x, by_token=False)
    for index, layer in enumerate(dense):
        x = apply_dense(g, x, layer, f"dense.{index}")
    if normalize:
        x = unit_length(g, x)
    if tanh_int8:
        x = g.op("Round", g.op("Mul", g.op("Tanh", x), g.const(127.0)))
    width = dense[-1].out_features if dense else architecture.vector_size * len(modes)
    _output(transformer, x, "embedding", ["batch", width])


def _in_own_axes(transformer: TransformerGraph, x: Value, *, by_token: bool) -> Value:
    """States, or pooled ones, rotated back and through the model's last Linear."""
    g = transformer.g
    if isinstance(g.weights, RotatedWeights) and (norm := g.weights.output) is not None:
        x = rotated_back(g, g.weights, norm, x, by_token=by_token)
    return transformer.projected(x)


def token_vectors(
    transformer: TransformerGraph, hidden: Value, *, dense: tuple[DenseLayer, ...], normalize: bool
) -> None:
    """Declare the output ``token_embeddings`` of late interaction; see :func:`task_graph`."""
    g, x = transformer.g, hidden
    first = dense[0] if dense and transformer.model.state_projection is None else None
    if first is not None and isinstance(g.weights, RotatedWeights) and g.weights.output is not None:
        dense = (_of_rotated(g.weights, g.weights.output, first), *dense[1:])
    else:
        x = _in_own_axes(transformer, x, by_token=True)
    for index, layer in enumerate(dense):
        x = apply_dense(g, x, layer, f"dense.{index}")
    if normalize:
        x = unit_length(g, x)
    width = dense[-1].out_features if dense else transformer.model.vector_size
    _output(transformer, x, "token_embeddings", [*TOKENS, width])


def _of_rotated(weights: RotatedWeights, norm: str, layer: DenseLayer) -> DenseLayer:
    """The layer that makes of a rotated stream's states what ``layer`` makes of the model's own."""
    rotation, scale = weights.rotation(norm), weights.norm_weight(norm)

    def turned(matrix: FloatArray) -> FloatArray:
        return rotation.rows(matrix * scale)

    residual = None if layer.residual is None else turned(layer.residual)
    return replace(layer, weight=turned(layer.weight), residual=residual)
