"""Writes the graph of an :class:`Architecture`, from token ids to token states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from embedge.export.graph.architecture import Architecture, Attention, Layer, Mlp, NormRef, Sublayer
from embedge.export.graph.attention import Seen, attention, seen_by
from embedge.export.graph.builder import Graph
from embedge.export.graph.rotary import Rotary, rotary, rotate
from embedge.export.graph.values import Value


class TransformerGraph:
    """A model's graph under construction; the steps are :meth:`embed`, every :meth:`layer`, :meth:`final`.

    Layers are steps of their own because calibration runs them one at a time.

    Attributes:
        g: the graph.
        model: what is written.
        tokens: int64 scalar, padded tokens of the batch.
        lengths: int64 ``[batch]``, attended tokens of each row; rows are padded on the right.

    Args:
        g: an empty graph; it gets the model's inputs and what layers share.
        model: what is written.
    """

    def __init__(self, g: Graph, model: Architecture) -> None:
        self.g, self.model = g, model
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
        x = g.add(g.embedding(model.token_table.weight, "input_ids"), positions)
        if model.type_table is not None:
            x = g.add(x, g.op("Gather", g.param(model.type_table.weight), "token_type_ids"))
        norm = model.embedding_norm
        if norm is not None and not g.weights.absorbed(norm.weight):
            x = normalized(g, x, norm)
        if model.images:
            x = g.op("ScatterND", x, "image_positions", "image_features")
        return x

    def _positions(self) -> Value | None:
        """float32 ``[tokens, hidden]`` of the position table."""
        g, model = self.g, self.model
        if model.position_table is None:
            return None
        name, first = model.position_table.weight, model.first_position
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
        return block(self.g, layer, hidden, self._seen[layer.attention.span], turned)

    def final(self, hidden: Value) -> Value:
        """Token states as the model returns them."""
        norm = self.model.final_norm
        return hidden if norm is None else normalized(self.g, hidden, norm)

    def token_embeddings(self, hidden: Value) -> Value:
        """float32 ``[batch, tokens, multi_vector_dim]``, rows of length 1, padding of length 0."""
        g = self.g
        assert self.model.token_head is not None
        head, _ = self.model.token_head
        matrix = g.computed(
            head.weight,
            (head.in_features(g.weights), head.out_features(g.weights)),
            lambda: np.ascontiguousarray(head.read(g.weights).T),
            head.weight,
            key=head.key(g.weights, "fp32"),
        )
        y = g.op("MatMul", hidden, matrix)
        y.linear = head
        y = g.add(y, g.bias(y))
        norm = g.op("ReduceL2", y, g.const([-1], "int64"), keepdims=1)
        y = g.op("Div", y, g.op("Max", norm, g.const(1e-12)))
        real = g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
        return g.op("Mul", y, g.op("Unsqueeze", real, g.const([2], "int64")))


@dataclass(frozen=True, kw_only=True)
class Regrouped:
    """Another order of a graph's rows within attention: groups that attend among themselves.

    Attributes:
        name: of the order.
        index: int64 ``[groups, rows]``: the rows of every group.
        restore: int64 ``[rows]``: where each row went.
    """

    name: str
    index: str
    restore: str

    def apart(self, g: Graph, x: str, width: int) -> Value:
        """``[batch, tokens, width]`` as ``[groups, rows, width]``."""
        return g.op("Gather", g.op("Reshape", x, g.const([-1, width], "int64")), self.index)

    def together(self, g: Graph, x: str, width: int, like: str) -> Value:
        """``[groups, rows, width]`` in the order and shape of ``like``."""
        flat = g.op("Reshape", x, g.const([-1, width], "int64"))
        return g.op("Reshape", g.op("Gather", flat, self.restore), g.op("Shape", like))


def block(
    g: Graph,
    layer: Layer,
    hidden: Value,
    seen: Seen,
    rotary: Rotary | None = None,
    regrouped: Regrouped | None = None,
) -> Value:
    """The stream after a layer, float32 ``[batch, tokens, width]``.

    Args:
        g: the graph.
        layer: what is written.
        hidden: the stream before it.
        seen: which keys are seen.
        rotary: positions of queries and keys.
        regrouped: the order of rows within attention, where it is another; ``seen`` and ``rotary`` are in it.
    """
    y, bias = _attention(g, layer.attention, hidden, seen, rotary, regrouped)
    hidden = _added(g, layer.attention, hidden, y, bias)
    return _added(g, layer.mlp, hidden, *_mlp(g, layer.mlp, hidden))


def _attention(
    g: Graph,
    spec: Attention,
    hidden: Value,
    seen: Seen,
    rotary: Rotary | None,
    regrouped: Regrouped | None,
) -> tuple[Value, Value | None]:
    """What the sublayer adds to the stream, and the bias that belongs to it."""
    width = spec.heads * spec.head_size
    x, order = hidden, ""
    if regrouped is not None:
        x, order = regrouped.apart(g, x, width), regrouped.name
    q, k, v = g.linears(_input(g, spec, x), spec.linears, rows=order)
    pair: Iterable[Value] = _queries_and_keys(g, spec, q, k)
    if not spec.moves_value_bias:
        pair = list(pair)  # both before the values, as in earlier versions: see TransformerGraph
        v = g.add(v, g.bias(v))
    if rotary is not None:
        heads = iter((spec.heads, spec.kv_heads))
        pair = (rotate(g, x, rotary, next(heads)) for x in pair)
    q, k = pair
    mixed = attention(g, spec, seen, q, k, v)
    if regrouped is not None:
        mixed = regrouped.together(g, mixed, width, hidden)
    [y] = g.linears(mixed, [spec.out], sink=spec.sink)
    return y, g.bias(y, upstream=v if spec.moves_value_bias else None)


def _queries_and_keys(g: Graph, spec: Attention, q: Value, k: Value) -> Iterator[Value]:
    """Queries and keys with their biases and norms."""
    if spec.rope is None and spec.key_norm is None:
        g.drop_bias(k)  # softmax ignores what is the same for all keys
        yield g.add(q, g.bias(q))
        yield k
        return
    parts = ((q, spec.query_norm, spec.heads), (k, spec.key_norm, spec.kv_heads))
    for x, norm, heads in parts:
        y = g.add(x, g.bias(x))
        if norm is not None:
            y = g.op("Reshape", y, g.const([0, 0, heads, spec.head_size], "int64"))
            y = g.rms_norm(y, g.param(norm.weight), norm.epsilon)
            y = g.op("Reshape", y, g.const([0, 0, heads * spec.head_size], "int64"))
        yield y


def _mlp(g: Graph, spec: Mlp, hidden: Value) -> tuple[Value, Value | None]:
    """What the sublayer adds to the stream, and the bias that belongs to it."""
    x = _input(g, spec, hidden)
    if spec.gate is None:
        [y] = g.linears(x, [spec.up])
        y = g.activation(y, spec.activation)
    else:
        y = g.gated(x, spec.gate, spec.up, spec.activation)
    [y] = g.linears(y, [spec.down])
    return y, g.bias(y)


def _input(g: Graph, part: Sublayer, x: Value) -> Value:
    return x if part.input_norm is None else normalized(g, x, part.input_norm)


def _added(g: Graph, part: Sublayer, hidden: Value, y: Value, bias: Value | None) -> Value:
    """The stream after a sublayer."""
    if bias is not None:
        shifted = g.scheme.shifted_norm(g, hidden, bias)
        if shifted is None:
            y = g.add(y, bias)
        else:
            hidden = shifted
    total = g.add(y, hidden)
    return total if part.sum_norm is None else normalized(g, total, part.sum_norm)


def normalized(g: Graph, x: str, norm: NormRef) -> Value:
    """The norm of ``x`` over its last axis."""
    return g.norm(x, norm.weight, norm.bias, norm.epsilon, rms=norm.rms)
