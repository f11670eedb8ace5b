"""A transformer block: attention and an MLP on a residual stream, as :mod:`.architecture` describes them.

Linears that share an input are asked for together. What a scale may be folded into, and which bias passes attention
as it is, are said here too, for the precisions that use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from embedge.export.graph.architecture import Attention, Layer, Mlp, Sublayer, TokenGate
from embedge.export.graph.attention import Seen, attention
from embedge.export.graph.builder import Graph
from embedge.export.graph.rotary import Rotary, rotate
from embedge.export.graph.values import Value
from embedge.export.weights.tensors import NormRef


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
    first: Value | None = None,
) -> Value:
    """The stream after a layer, float32 ``[batch, tokens, width]``.

    Args:
        g: the graph.
        layer: what is written.
        hidden: the stream before it.
        seen: which keys are seen.
        rotary: positions of queries and keys.
        regrouped: the order of rows within attention, where it is another; ``seen`` and ``rotary`` are in it.
        first: the states before the first layer, for a layer with a third sublayer.
    """
    y, bias = _attention(g, layer.attention, hidden, seen, rotary, regrouped)
    hidden = _added(g, layer.attention, hidden, y, bias)
    hidden = _added(g, layer.mlp, hidden, *_mlp(g, layer.mlp, hidden))
    if layer.token_gate is not None:
        assert first is not None
        y, bias = _token_gate(g, layer.token_gate, hidden, first)
        hidden = _added(g, layer.token_gate, hidden, y, bias)
    return hidden if layer.scale is None else g.op("Mul", hidden, g.param(layer.scale))


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
    pair: Iterable[Value] = _queries_and_keys(g, spec, q, k)  # each is written as it is taken
    if not spec.moves_value_bias:
        pair = list(pair)  # both before the values, as earlier versions did: see TransformerGraph
        v = g.add(v, g.bias(v))
    if spec.value_epsilon is not None:
        ones = g.const(np.ones(spec.head_size))
        v = _normed_heads(g, spec, v, ones, spec.value_epsilon, spec.kv_heads)
    if rotary is not None:
        heads = (spec.heads, spec.kv_heads)
        pair = (rotate(g, x, rotary, count) for x, count in zip(pair, heads, strict=True))
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
            y = _normed_heads(g, spec, y, g.param(norm.weight), norm.epsilon, heads)
        yield y


def _normed_heads(
    g: Graph, spec: Attention, x: Value, gamma: Value, epsilon: float, heads: int
) -> Value:
    """RMSNorm of each head of ``[batch, tokens, heads · head_size]``."""
    x = g.op("Reshape", x, g.const([0, 0, heads, spec.head_size], "int64"))
    x = g.rms_norm(x, gamma, epsilon)
    return g.op("Reshape", x, g.const([0, 0, heads * spec.head_size], "int64"))


def _mlp(g: Graph, spec: Mlp, hidden: Value) -> tuple[Value, Value | None]:
    """What the sublayer adds to the stream, and the bias that belongs to it."""
    x = _input(g, spec, hidden)
    if len(spec.linears) == 1:
        [y] = g.linears(x, spec.linears)
        y = g.activation(y, spec.activation)
    else:
        gate, up = spec.linears
        y = g.gated(x, gate, up, spec.activation)
    [y] = g.linears(y, [spec.out])
    return y, g.bias(y)


def _token_gate(
    g: Graph, spec: TokenGate, hidden: Value, first: Value
) -> tuple[Value, Value | None]:
    """What the sublayer adds to the stream, and the bias that belongs to it."""
    [part] = g.linears(first, [spec.token_linear])
    part = normalized(g, g.add(part, g.bias(part)), spec.token_norm)
    [gate] = g.linears(_input(g, spec, hidden), spec.linears)
    factors = g.activation(gate, spec.activation), part
    y = g.op("Mul", *factors)
    y.factors = factors
    [y] = g.linears(y, [spec.out])
    return y, g.bias(y)


def _input(g: Graph, part: Sublayer, x: Value) -> Value:
    return x if part.input_norm is None else normalized(g, x, part.input_norm)


def _added(g: Graph, part: Sublayer, hidden: Value, y: Value, bias: Value | None) -> Value:
    """The stream after a sublayer."""
    if part.output_norm is not None:
        y, bias = normalized(g, y if bias is None else g.add(y, bias), part.output_norm), None
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
