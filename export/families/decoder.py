"""Llama, Mistral, Qwen2 and Qwen3 used as embedders: causal decoders that normalize before each block.

Attention is causal, as in the published embedding models of these families. Rows are padded on the
right, so a real token never sees padding and no mask is needed.

A checkpoint may have a multi-vector head beside the decoder, as jina-embeddings-v4 has: the Linear
``multi_vector_projector``, its width in config.json's ``multi_vector_projector_dim``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from onnx import TensorProto

from embedge.export.errors import CheckpointError
from embedge.export.families.base import HEADS, Family
from embedge.export.graph.attention import attention
from embedge.export.graph.builder import Graph
from embedge.export.graph.rotary import (
    checked_rope,
    position_ids,
    rotary_inputs,
    rotary_tables,
    rotate,
)
from embedge.export.graph.values import LinearRef, ScaleSink, Value
from embedge.export.schemes.floats import Float32Scheme
from embedge.export.source.config import Shape, number
from embedge.export.weights.rotated import ResidualStream


class Decoder(Family):
    """Decoders with rotary positions, RMSNorm, grouped-query attention and a gated MLP."""

    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")
    roots: ClassVar[tuple[str, ...]] = (
        *("embed_tokens", "layers", "norm", "multi_vector_projector"),
        *(head.rstrip(".") for head in HEADS),
    )
    ignored: ClassVar[tuple[str, ...]] = HEADS
    default_pooling: ClassVar[str | None] = "lasttoken"
    default_theta: ClassVar[float] = 10000.0

    def check(self) -> None:
        self.heads = self._int("num_attention_heads")
        grouped = self.config.get("num_key_value_heads") is not None
        self.kv_heads = self._int("num_key_value_heads") if grouped else self.heads
        self._divides(self.kv_heads, self.heads, "num_key_value_heads and num_attention_heads")
        self.head_size = self._int("head_dim") if self.config.get("head_dim") else 0
        self.head_size = self.head_size or self.hidden_size // self.heads
        self.epsilon = self._float("rms_norm_eps", 1e-6)
        self.activation = self._activation("hidden_act", "silu")
        self.rope = self._rope()
        self.theta = (
            number(self.rope, "rope_theta")
            if "rope_theta" in self.rope
            else self._float("rope_theta", self.default_theta)
        )
        self.windows = [self._window(i) for i in range(self.num_layers)]
        if self.config.get("multi_vector_projector_dim") is not None:
            self.multi_vector_dim = self._int("multi_vector_projector_dim")

    def _rope(self) -> dict[str, Any]:
        """``rope_scaling``, or ``rope_parameters`` as transformers 5 writes it, with its theta."""
        found = {
            k: self.config[k] for k in ("rope_scaling", "rope_parameters") if self.config.get(k)
        }
        key, rope = next(iter(found.items()), ("rope_scaling", {}))
        if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
            raise self._unsupported(key, rope, "one set of numbers for all layers")
        if any(other != rope for other in found.values()):
            raise self._unsupported(
                "rope_parameters", found["rope_parameters"], "rope_scaling's value"
            )
        theta = self.config.get("rope_theta")
        if theta is not None and rope.get("rope_theta", theta) != theta:
            raise self._unsupported(f"{key}.rope_theta", rope["rope_theta"], f"rope_theta {theta}")
        rope = checked_rope(rope, key)
        if "yarn" in (rope.get("rope_type"), rope.get("type")):
            original = rope.get("original_max_position_embeddings")
            original = original or self._int("max_position_embeddings")
            rope = {**rope, "original_max_position_embeddings": original}
        return rope

    def _window(self, index: int) -> int | None:
        """Tokens a token of this layer sees, itself included, or ``None`` for all before it."""
        kind = self.config["model_type"]
        types = self._layer_types()
        window = None if kind == "llama" else self.config.get("sliding_window")
        if kind not in ("llama", "mistral"):  # Qwen's rule
            slides = index >= self._int("max_window_layers", minimum=0)
            slides = slides if types is None else types[index] == "sliding_attention"
            if not self.config.get("use_sliding_window") or not slides:
                window = None
        expected = "full_attention" if window is None else "sliding_attention"
        if types is not None and types[index] != expected:
            other = f"{expected!r} for layer {index} by the other settings"
            raise self._unsupported("layer_types", types, other)
        if window is None:
            return None
        window = self._int("sliding_window")
        return window if window < self.max_length else None

    def _layer_types(self) -> list[str] | None:
        """``layer_types`` of the configuration, one per layer."""
        types = self.config.get("layer_types")
        known = ("full_attention", "sliding_attention")
        if types is None:
            return None
        listed = types if isinstance(types, list) else []
        if len(listed) != self.num_layers or any(kind not in known for kind in listed):
            raise self._unsupported(
                "layer_types", types, f"{self.num_layers} of {', '.join(known)}"
            )
        return [str(kind) for kind in listed]

    def check_tensors(self, names: Iterable[str]) -> None:
        kind = self.config["model_type"]
        outer = self.config.get("attention_bias") is True if kind in ("llama", "qwen3") else False
        biases = {"o_proj": outer, **dict.fromkeys(("q_proj", "k_proj", "v_proj"), outer)}
        if kind not in ("llama", "mistral", "qwen3"):  # Qwen2's
            biases |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), True)
        inner = self.config.get("mlp_bias") is True and kind == "llama"
        biases |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), inner)
        for name in (n for n in names if n.startswith("layers.")):
            *_, module, what = ("", "", *name.split("."))
            known = biases.get(module, True) if what == "bias" else True
            if not known or (module in ("q_norm", "k_norm") and kind != "qwen3"):
                raise CheckpointError(
                    f"{name}: expected no such tensor by config.json ({kind}, attention_bias "
                    f"{self.config.get('attention_bias')!r}, mlp_bias {self.config.get('mlp_bias')!r}), "
                    "so that transformers leaves it out; correct config.json, or delete the tensor"
                )

    def shapes(self) -> dict[str, Shape]:
        width, inner = self.hidden_size, "intermediate_size"
        rows, kv_rows = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "embed_tokens": (None, width),
            **dict.fromkeys(("norm", "input_layernorm", "post_attention_layernorm"), (width,)),
            **dict.fromkeys(("q_norm", "k_norm"), (self.head_size,)),
            "q_proj": (rows, width),
            **dict.fromkeys(("k_proj", "v_proj"), (kv_rows, width)),
            "o_proj": (width, rows),
            **dict.fromkeys(("gate_proj", "up_proj"), (inner, width)),
            "down_proj": (width, inner),
            "multi_vector_projector": (self.multi_vector_dim, width),
        }

    def streams(self) -> tuple[ResidualStream, ...]:
        readers: dict[str, str] = {}
        writers: list[str] = []
        for index in range(self.num_layers):
            p = f"layers.{index}."
            readers |= {f"{p}self_attn.{n}_proj": f"{p}input_layernorm.weight" for n in "qkv"}
            after = f"{p}post_attention_layernorm.weight"
            readers |= {f"{p}mlp.gate_proj": after, f"{p}mlp.up_proj": after}
            writers += [f"{p}self_attn.o_proj", f"{p}mlp.down_proj"]
        if self.multi_vector_dim is not None:
            readers["multi_vector_projector"] = "norm.weight"
        stream = ResidualStream(
            width=self.hidden_size,
            tables=("embed_tokens.weight",),
            writers=writers,
            readers=readers,
            output="norm.weight",
        )
        return (stream,)

    def context(self, g: Graph) -> dict[str, str]:
        tokens = self.tokens(g)
        context = {"lengths": self.lengths(g), "tokens": tokens, **self.rotary(g, tokens)}
        for window in {w for w in self.windows if w}:
            context[f"mask{window}"] = causal_window(g, tokens, window)
        return context

    def rotary(self, g: Graph, tokens: str) -> dict[str, str]:
        """What :meth:`_rotate` needs: ``cos``, ``sin`` and, for tables by position, ``positions``."""
        tables = rotary_tables(self.head_size, self.theta, self.max_length, self.rope)
        detail = f"{self.theta}|{self.rope}|{self.max_length}"
        cos, sin = rotary_inputs(g, "rotary", tables, detail)
        return {"cos": cos, "sin": sin, "positions": position_ids(g, tokens)}

    def embed(self, g: Graph, context: dict[str, str]) -> Value:
        return g.embedding("embed_tokens.weight", "input_ids")

    def layer(self, g: Graph, context: dict[str, str], index: int, hidden: Value) -> Value:
        p = f"layers.{index}."
        x = g.norm(hidden, f"{p}input_layernorm.weight", None, self.epsilon, rms=True)
        query, key, value = (LinearRef(f"{p}self_attn.{n}_proj") for n in "qkv")
        q, k, v = g.linears(x, [query, key, value])
        q = self._head_norm(g, g.add(q, g.bias(q)), f"{p}self_attn.q_norm.weight", self.heads)
        k = self._head_norm(g, g.add(k, g.bias(k)), f"{p}self_attn.k_norm.weight", self.kv_heads)
        v = g.add(v, g.bias(v))
        window = self.windows[index]
        mixed = attention(
            g,
            self._rotate(g, context, q, self.heads),
            self._rotate(g, context, k, self.kv_heads),
            v,
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=self.head_size**-0.5,
            mask=context[f"mask{window}"] if window else None,
            causal=True,
            window=window,
            tokens=context["tokens"],
            head_size=self.head_size,
        )
        out = LinearRef(f"{p}self_attn.o_proj")
        groups = (self.kv_heads, self.heads // self.kv_heads, self.head_size)
        [y] = g.linears(mixed, [out], sink=ScaleSink(linear=value, groups=groups))
        norm = f"{p}post_attention_layernorm.weight"
        x, hidden = g.add_norm(y, hidden, norm, None, self.epsilon, rms=True, linear_bias=g.bias(y))
        gate, up, down = (LinearRef(f"{p}mlp.{n}_proj") for n in ("gate", "up", "down"))
        y = g.gated(x, gate, up, self.activation)
        [y] = g.linears(y, [down])
        return g.add(g.add(y, g.bias(y)), hidden)

    def final(self, g: Graph, context: dict[str, str], hidden: Value) -> Value:
        return g.norm(hidden, "norm.weight", None, self.epsilon, rms=True)

    def token_embeddings(self, g: Graph, hidden: str) -> Value:
        """float32 ``[batch, tokens, multi_vector_dim]``, rows of length 1, padding of length 0."""
        head = LinearRef("multi_vector_projector")
        y = g.op("MatMul", hidden, Float32Scheme().matrix(g, head))
        y.linear = head
        y = g.add(y, g.bias(y))
        norm = g.op("ReduceL2", y, g.const([-1], "int64"), keepdims=1)
        y = g.op("Div", y, g.op("Max", norm, g.const(1e-12)))
        real = g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
        return g.op("Mul", y, g.op("Unsqueeze", real, g.const([2], "int64")))

    def _rotate(self, g: Graph, context: dict[str, str], x: str, heads: int) -> Value:
        return rotate(g, x, context["cos"], context["sin"], context.get("positions"), heads)

    def _head_norm(self, g: Graph, x: Value, weight: str, heads: int) -> Value:
        """Qwen3's RMSNorm of each query and key head; other models have no such weights."""
        if self.config["model_type"] != "qwen3":
            return x
        split = g.op("Reshape", x, g.const([0, 0, heads, self.head_size], "int64"))
        y = g.rms_norm(split, g.param(weight), self.epsilon)
        return g.op("Reshape", y, g.const([0, 0, heads * self.head_size], "int64"))


def causal_window(g: Graph, tokens: str, window: int) -> str:
    """Additive float32 mask ``[1, 1, tokens, tokens]``: a token sees itself and ``window - 1`` before."""
    return band(g, tokens, lowest=-(window - 1), highest=0)


def band(g: Graph, tokens: str, *, lowest: int, highest: int) -> str:
    """Additive float32 mask ``[1, 1, tokens, tokens]``: 0 for ``lowest ≤ key - query ≤ highest``."""
    steps = g.op("Range", g.const(0, "int64"), tokens, g.const(1, "int64"))
    rows = g.op("Unsqueeze", steps, g.const([1], "int64"))
    distance = g.op("Sub", g.op("Unsqueeze", steps, g.const([0], "int64")), rows)
    seen = g.op(
        "And",
        g.op("GreaterOrEqual", distance, g.const(lowest, "int64")),
        g.op("LessOrEqual", distance, g.const(highest, "int64")),
    )
    mask = g.op("Where", seen, g.const(0.0), g.const(np.float32(-1e9)))
    return g.op("Unsqueeze", mask, g.const([0, 1], "int64"))
