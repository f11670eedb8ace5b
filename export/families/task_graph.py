"""The whole graph of a task: the family's layers, then pooling, Dense layers and normalization."""

from __future__ import annotations

from onnx import TensorProto

from embedge.export.families.base import Family
from embedge.export.graph.builder import Graph
from embedge.export.graph.pooling import apply_dense, pool, rotated_back, unit_length
from embedge.export.graph.scheme import Scheme
from embedge.export.source.dense import DenseLayer
from embedge.export.weights.rotated import RotatedWeights
from embedge.export.weights.tensors import Weights


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
