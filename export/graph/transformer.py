"""Writes the graph of an :class:`Architecture`, from token ids to token states."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from embedge.export.graph.architecture import Architecture
from embedge.export.graph.attention import seen_by
from embedge.export.graph.block import block, normalized
from embedge.export.graph.builder import Graph
from embedge.export.graph.rotary import rotary
from embedge.export.graph.values import LinearRef, Value


class TransformerGraph:
    """A model's graph under construction; the steps are :meth:`embed`, every :meth:`layer`, :meth:`final`.

    Layers are steps of their own because calibration runs them one at a time.

    Attributes:
        g: the graph.
        model: what is written.
        tokens: int64 scalar, padded tokens of the batch.
        lengths: int64 ``[batch]``, attended tokens of each row; rows are padded on the right.
        first: float32 ``[batch, tokens, hidden]``, the states before the first layer, once they are there.

    Args:
        g: an empty graph; it gets the model's inputs and what layers share.
        model: what is written.
    """

    def __init__(self, g: Graph, model: Architecture) -> None:
        self.g, self.model = g, model
        self.first: Value | None = None
        for name, (elem_type, axes) in model.inputs.items():
            g.input(name, elem_type, axes)
        # Names of nodes carry their number. Models without a position table have these two the other way
        # round in bundles of earlier versions, to which tasks are added only where the graph's hash agrees.
        if model.position_table is not None:
            self.lengths = self._count_lengths()
            self.tokens = self._count_tokens()
        else:
            self.tokens = self._count_tokens()
            self.lengths = self._count_lengths()
        attentions = [layer.attention for layer in model.layers]
        ropes = {spec.rope.name: spec.rope for spec in attentions if spec.rope is not None}
        self._rotary = {
            name: rotary(g, rope, self.tokens, model.max_length, images=model.images)
            for name, rope in ropes.items()
        }
        self._seen = {
            span: seen_by(g, model, span, tokens=self.tokens, lengths=self.lengths)
            for span in dict.fromkeys(spec.span for spec in attentions)
        }

    def _count_lengths(self) -> Value:
        return self.g.op("ReduceSum", "attention_mask", self.g.const([1], "int64"), keepdims=0)

    def _count_tokens(self) -> Value:
        shape = self.g.op("Shape", "attention_mask")
        return self.g.op("Gather", shape, self.g.const(1, "int64"), axis=0)

    def embed(self) -> Value:
        """Token states before the first layer, float32 ``[batch, tokens, hidden]``."""
        g, model = self.g, self.model
        positions = self._positions()
        x = g.add(g.embedding(f"{model.token_table}.weight", self._ids()), positions)
        if model.type_table is not None:
            x = g.add(x, g.op("Gather", g.param(f"{model.type_table}.weight"), "token_type_ids"))
        norm = model.embedding_norm
        if norm is not None and not g.weights.absorbed(norm.weight):
            x = normalized(g, x, norm)
        if model.images:
            x = g.op("ScatterND", x, "image_positions", "image_features")
        self.first = x
        return x

    def _ids(self) -> str:
        """int64 ``[batch, tokens]``: the rows of the token table."""
        g, ids = self.g, "input_ids"
        for token, other in self.model.token_aliases.items():
            same = g.op("Equal", "input_ids", g.const(token, "int64"))
            ids = g.op("Where", same, g.const(other, "int64"), ids)
        return ids

    def _positions(self) -> Value | None:
        """float32 ``[tokens, hidden]`` of the position table."""
        g, model = self.g, self.model
        if model.position_table is None:
            return None
        name, first = f"{model.position_table}.weight", model.first_position
        rows = g.computed(
            name,
            (model.max_length, model.hidden_size),
            lambda: np.ascontiguousarray(g.weights.read(name)[first : first + model.max_length]),
            name,
            detail=f"rows {first}+{model.max_length}",
        )
        end = g.op("Unsqueeze", self.tokens, g.const([0], "int64"))
        return g.op("Slice", rows, g.const([0], "int64"), end, g.const([0], "int64"))

    def layer(self, index: int, hidden: Value) -> Value:
        """Token states after layer ``index``."""
        layer = self.model.layers[index]
        rope = layer.attention.rope
        turned = None if rope is None else self._rotary[rope.name]
        seen = self._seen[layer.attention.span]
        return block(self.g, layer, hidden, seen, turned, first=self.first)

    def final(self, hidden: Value) -> Value:
        """Token states as the model returns them."""
        norm = self.model.final_norm
        return hidden if norm is None else normalized(self.g, hidden, norm)

    def projected(self, x: Value) -> Value:
        """States, or pooled ones, float32 ``[…, hidden]`` through the model's last Linear, if it has one."""
        linear = self.model.state_projection
        return x if linear is None else self._in_float32(x, linear)

    def _in_float32(self, x: Value, linear: LinearRef) -> Value:
        """A Linear and its bias, in float32 at any precision."""
        g = self.g
        matrix = g.computed(
            linear.weight,
            (linear.in_features(g.weights), linear.out_features(g.weights)),
            lambda: np.ascontiguousarray(linear.read(g.weights).T),
            linear.weight,
            key=linear.key(g.weights, "fp32"),
        )
        y = g.op("MatMul", x, matrix)
        y.linear = linear
        return g.add(y, g.bias(y))

    def token_embeddings(self, hidden: Value) -> Value:
        """float32 ``[batch, tokens, multi_vector_dim]``, rows of length 1, padding of length 0."""
        g, head = self.g, self.model.token_head
        assert head is not None
        y = self._in_float32(hidden, head)
        norm = g.op("ReduceL2", y, g.const([-1], "int64"), keepdims=1)
        y = g.op("Div", y, g.op("Max", norm, g.const(1e-12)))
        real = g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
        return g.op("Mul", y, g.op("Unsqueeze", real, g.const([2], "int64")))
