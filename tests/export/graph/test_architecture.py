"""A block computes what its declaration says, whatever fields are combined; families pick from these."""

from __future__ import annotations

from dataclasses import replace
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export.calibration.weight_session import WeightSession
from embedge.export.graph.architecture import (
    Architecture,
    Attention,
    Layer,
    Mlp,
    Span,
    TokenGate,
    layer_shapes,
)
from embedge.export.graph.builder import Graph
from embedge.export.graph.rotary import Rope
from embedge.export.graph.transformer import TransformerGraph
from embedge.export.graph.values import LinearRef, rows_of
from embedge.export.schemes.floats import Float32Scheme
from embedge.export.weights.tensors import BASE, NormRef

WIDTH, SIZE, INNER, TOKENS, VOCAB = 24, 6, 20, 9, 11
LENGTHS = (TOKENS, 5)
ROPE = Rope(head_size=SIZE, theta=100.0, scaling={})
ERF = np.vectorize(erf)


class Stored:
    """Random tensors of the shapes that an architecture implies."""

    def __init__(self, model: Architecture) -> None:
        draw = np.random.default_rng(0)
        self.tensors: dict[str, NDArray[np.float32]] = {}
        for name, shape in model.shapes().items():
            full = [VOCAB if axis is None else int(axis) for axis in shape]
            scale = 1.5 / full[-1] ** 0.5 if len(full) > 1 else 1.0
            self.tensors[f"{name}.weight"] = (draw.normal(size=full) * scale).astype(np.float32)
            self.tensors[f"{name}.bias"] = (draw.normal(size=full[0]) / 2).astype(np.float32)
        for number, layer in enumerate(model.layers, 2):
            if layer.scale is not None:
                self.tensors[layer.scale] = np.array([number / 4], np.float32)

    def has(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def version(self, name: str) -> str:
        return BASE

    def absorbed(self, norm: str) -> bool:
        return False

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        return self.tensors[name][rows or slice(None)].copy()

    # -- the same by hand, of one text [tokens, width], in float64 ------------------------------------

    def linear(self, x: NDArray[Any], linear: LinearRef) -> NDArray[Any]:
        return x @ linear.read(self).T + linear.read_bias(self)

    def norm(self, x: NDArray[Any], norm: NormRef | None) -> NDArray[Any]:
        if norm is None:
            return x
        x = x if norm.rms else x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + norm.epsilon)
        return x * self.tensors[norm.weight] + (self.tensors[norm.bias] if norm.bias else 0)

    def attention(self, x: NDArray[Any], spec: Attention) -> NDArray[Any]:
        q, k, v = (
            self.linear(x, linear).reshape(len(x), -1, SIZE).swapaxes(0, 1)
            for linear in spec.linears
        )
        q, k = self.norm(q, spec.query_norm), self.norm(k, spec.key_norm)
        if spec.value_epsilon is not None:
            v = v / np.sqrt(np.square(v).mean(-1, keepdims=True) + spec.value_epsilon)
        if spec.rope is not None:
            q, k = turned(q), turned(k)
        k, v = (np.repeat(t, spec.heads // spec.kv_heads, axis=0) for t in (k, v))
        distance = np.arange(len(x))[None, :] - np.arange(len(x))[:, None]
        reach = np.inf if spec.span.reach is None else spec.span.reach
        seen = (np.abs(distance) <= reach) & ((distance <= 0) | (not spec.span.causal))
        scores = np.where(seen, q @ k.swapaxes(1, 2) * spec.score_scale, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return self.linear((shares @ v).swapaxes(0, 1).reshape(len(x), -1), spec.out)

    def mlp(self, x: NDArray[Any], spec: Mlp) -> NDArray[Any]:
        first, *rest = (self.linear(x, linear) for linear in spec.linears)
        y = first * 0.5 * (1 + ERF(first / 2**0.5))
        return self.linear(y * rest[0] if rest else y, spec.out)

    def token_gate(self, x: NDArray[Any], first: NDArray[Any], spec: TokenGate) -> NDArray[Any]:
        part = self.norm(self.linear(first, spec.token_linear), spec.token_norm)
        y = self.linear(x, spec.linears[0])
        y = y * 0.5 * (1 + ERF(y / 2**0.5))
        return self.norm(self.linear(y * part, spec.out), spec.output_norm)

    def states(self, ids: NDArray[np.int64], model: Architecture) -> NDArray[Any]:
        h = self.norm(self.tensors["tokens.weight"][ids].astype(np.float64), model.embedding_norm)
        first = h
        for layer in model.layers:
            attention, mlp = layer.attention, layer.mlp
            y = self.attention(self.norm(h, attention.input_norm), attention)
            h = self.norm(h + self.norm(y, attention.output_norm), attention.sum_norm)
            y = self.mlp(self.norm(h, mlp.input_norm), mlp)
            h = self.norm(h + self.norm(y, mlp.output_norm), mlp.sum_norm)
            if layer.token_gate is not None:
                h = h + self.token_gate(h, first, layer.token_gate)
            if layer.scale is not None:
                h = h * self.tensors[layer.scale]
        return self.norm(h, model.final_norm)


def turned(x: NDArray[Any]) -> NDArray[Any]:
    """Rotary positions of ``[heads, tokens, size]``, halves against halves."""
    angles = np.arange(x.shape[1])[:, None] * 100.0 ** (-np.arange(0, SIZE, 2) / SIZE)
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rms(name: str) -> NormRef:
    return NormRef(name=name, epsilon=1e-6, rms=True)


def declared(
    *, post: bool = False, gate: bool = True, kv_heads: int = 4, **attention: Any
) -> Architecture:
    """Two layers that normalize before (RMSNorm) or behind (LayerNorm, with biases)."""

    def norms(name: str) -> dict[str, NormRef]:
        after = NormRef(name=name, epsilon=1e-5, has_bias=True)
        return {"sum_norm": after} if post else {"input_norm": rms(name)}

    layers = tuple(
        Layer(
            Attention(
                linears=rows_of(f"{p}qkv", 4 * SIZE, kv_heads * SIZE, kv_heads * SIZE),
                out=LinearRef(f"{p}o"),
                heads=4,
                kv_heads=kv_heads,
                head_size=SIZE,
                **{**norms(f"{p}norm1"), **attention},
            ),
            Mlp(
                # up before gate in the tensor, gate first in the declaration
                linears=rows_of(f"{p}up_gate", INNER, INNER)[::-1]
                if gate
                else [LinearRef(f"{p}up")],
                out=LinearRef(f"{p}down"),
                inner=INNER,
                activation="gelu",
                **norms(f"{p}norm2"),
            ),
        )
        for p in ("0.", "1.")
    )
    return Architecture(
        hidden_size=WIDTH,
        max_length=TOKENS,
        token_table="tokens",
        layers=layers,
        embedding_norm=NormRef(name="first", epsilon=1e-5, has_bias=True) if post else None,
        final_norm=None if post else rms("last"),
    )


def with_token_gates(model: Architecture) -> Architecture:
    """The same with a third sublayer, norms of what is added, and a number behind each layer."""
    layers = []
    for i, layer in enumerate(model.layers):
        attention = replace(layer.attention, output_norm=rms(f"{i}.norm3"))
        mlp = replace(layer.mlp, output_norm=rms(f"{i}.norm4"))
        gate = TokenGate(
            linears=[LinearRef(f"{i}.gate")],
            out=LinearRef(f"{i}.from_gate"),
            output_norm=rms(f"{i}.norm5"),
            token_linear=LinearRef("parts", i * INNER, (i + 1) * INNER),
            token_norm=rms("parts_norm"),
            token_scale=0.5,
            activation="gelu",
        )
        layers.append(Layer(attention, mlp, gate, scale=f"{i}.scale"))
    return replace(model, layers=tuple(layers))


MODELS = {
    "BERT without positions": declared(post=True, gate=False),
    "jina v3": declared(post=True, gate=False, rope=ROPE),
    "nomic-bert, gte": declared(post=True, rope=ROPE),
    "EuroBERT": declared(rope=ROPE),
    "bidirectional Qwen3": declared(
        rope=ROPE, kv_heads=2, query_norm=rms("q_norm"), key_norm=rms("k_norm")
    ),
    "Llama": declared(rope=ROPE, kv_heads=2, span=Span(causal=True)),
    "Mistral": declared(rope=ROPE, kv_heads=1, span=Span(reach=2, causal=True)),
    "a window on either side": declared(rope=ROPE, span=Span(reach=2)),
    "EmbeddingGemma 2": with_token_gates(
        declared(rope=ROPE, kv_heads=2, value_epsilon=1e-6, scale=1.0)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_declaration_computes_what_it_says(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    weights = Stored(model)
    g = Graph(weights=weights, scheme=Float32Scheme())
    transformer = TransformerGraph(g, model)
    hidden = transformer.embed()
    for index in range(len(model.layers)):
        hidden = transformer.layer(index, hidden)
    g.output(transformer.final(hidden), "states", TensorProto.FLOAT, [])
    ids = np.random.default_rng(1).integers(0, VOCAB, (len(LENGTHS), TOKENS))
    mask = (np.arange(TOKENS) < np.array(LENGTHS)[:, None]).astype(np.int64)
    session = WeightSession(g, tmp_path)
    [found] = session.run({"input_ids": ids, "attention_mask": mask})
    for row, length in enumerate(LENGTHS):
        expected = weights.states(ids[row, :length], model)
        np.testing.assert_allclose(found[row, :length], expected, rtol=1e-4, atol=1e-4)


def test_a_fused_tensor_ends_where_its_last_linear_ends() -> None:
    shapes = layer_shapes(declared(kv_heads=2).layers, WIDTH)
    assert shapes["0.qkv"] == (8 * SIZE, WIDTH)
    assert shapes["0.up_gate"] == (2 * INNER, WIDTH)
    assert shapes["1.o"] == (WIDTH, 4 * SIZE) and shapes["1.down"] == (WIDTH, INNER)


def test_a_token_gate_scales_its_linear_and_keeps_the_stream_as_it_is() -> None:
    model = MODELS["EmbeddingGemma 2"]
    assert (
        model.adjustments()["parts.weight"].scale == model.adjustments()["parts.bias"].scale == 0.5
    )
    assert model.shapes()["parts"] == (2 * INNER, WIDTH) and model.shapes()["1.scale"] == (1,)
    assert model.streams() == ()


def test_a_stream_is_rotated_where_norms_without_biases_come_before() -> None:
    [stream] = declared().streams()
    assert stream.tables == ("tokens.weight",) and stream.output == "last.weight"
    assert stream.readers["1.qkv"] == "1.norm1.weight"
    assert list(stream.writers) == ["0.o", "0.down", "1.o", "1.down"]
    post = declared(post=True)
    assert post.streams() == () == replace(post, final_norm=rms("last")).streams()
    biased = NormRef(name="last", epsilon=1e-6, has_bias=True)
    assert replace(declared(), final_norm=biased).streams() == ()
