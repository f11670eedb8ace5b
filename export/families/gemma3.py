"""Gemma 3's text model, causal or not: EmbeddingGemma 300m and its relatives.

Every sublayer has a norm before it and a norm of its result; norms multiply by ``1 + weight``. Most layers attend
to a window and have rotary positions of their own.

Source: transformers' ``Gemma3TextModel``; Vera et al., arXiv 2509.20354.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

from embedge.export.families.base import HEAD_ROOTS, Family
from embedge.export.families.ropes import ropes_by_layer_type
from embedge.export.graph.architecture import Architecture, Attention, Layer, Mlp, Span
from embedge.export.graph.rotary import Rope
from embedge.export.graph.values import LinearRef
from embedge.export.weights.tensors import NormRef
from embedge.runtime.errors import EmbedgeWarning

_EVERY = 6  # transformers' default: a layer of so many attends to all tokens


class GemmaLayers(Family):
    """The layers of Gemma's text models."""

    def declared_attention(
        self, p: str, span: Span, rope: Rope, *, kv_heads: int, scale: float
    ) -> Attention:
        """The attention of a layer.

        Args:
            p: what its tensors' names begin with.
            span: what a token attends to.
            rope: rotary positions, whose heads are the layer's.
            kv_heads: key and value heads.
            scale: of the scores.
        """
        has_bias = self.config.get("attention_bias") is True
        names = [f"{p}self_attn.{n}_proj" for n in "qkvo"]
        *linears, out = (LinearRef(name, has_bias=has_bias) for name in names)
        return Attention(
            linears=linears,
            out=out,
            input_norm=self.norm(f"{p}input_layernorm"),
            output_norm=self.norm(f"{p}post_attention_layernorm"),
            heads=self.integer("num_attention_heads"),
            kv_heads=kv_heads,
            head_size=rope.head_size,
            span=span,
            rope=rope,
            query_norm=self.norm(f"{p}self_attn.q_norm"),
            key_norm=self.norm(f"{p}self_attn.k_norm"),
            scale=scale,
        )

    def mlp(self, p: str) -> Mlp:
        """The MLP of a layer."""
        return Mlp(
            linears=[LinearRef(f"{p}mlp.{n}_proj", has_bias=False) for n in ("gate", "up")],
            out=LinearRef(f"{p}mlp.down_proj", has_bias=False),
            input_norm=self.norm(f"{p}pre_feedforward_layernorm"),
            output_norm=self.norm(f"{p}post_feedforward_layernorm"),
            inner="intermediate_size",
            activation=self.gate_activation,
        )

    def norm(self, name: str) -> NormRef:
        """A norm by its module."""
        return NormRef(name=name, epsilon=self.epsilon, rms=True)

    @property
    def epsilon(self) -> float:
        """Of all norms."""
        return self.number("rms_norm_eps", 1e-6)

    @property
    def gate_activation(self) -> str:
        """Of all gates, by its transformers name."""
        return self.activation("hidden_activation", "gelu_pytorch_tanh")


class Gemma3(GemmaLayers):
    """Gemma 3 without images."""

    model_types: ClassVar[tuple[str, ...]] = ("gemma3_text",)
    examples: ClassVar[Mapping[str, str]] = {"gemma3_text": "google/embeddinggemma-300m"}
    fits_half = False
    roots: ClassVar[tuple[str, ...]] = ("embed_tokens", "layers", "norm", *HEAD_ROOTS)

    def declare(self) -> Architecture:
        self.heads = self.integer("num_attention_heads")
        self.kv_heads = self.integer("num_key_value_heads")
        self.divides(self.kv_heads, self.heads, "num_key_value_heads and num_attention_heads")
        types = self.layer_types(_EVERY)
        size = self.integer("head_dim")
        ropes = ropes_by_layer_type(
            self,
            dict.fromkeys(types, size),
            thetas={
                "full_attention": ("rope_theta", 1_000_000.0),
                "sliding_attention": ("rope_local_base_freq", 10_000.0),
            },
        )
        spans = {kind: self._span(kind) for kind in set(types)}
        self._tell_halved(types)
        return Architecture(
            hidden_size=self.hidden_size,
            max_length=self.max_length,
            token_table="embed_tokens",
            embedding_scale=self.hidden_size**0.5,
            norm_offset=1.0,
            layers=tuple(
                Layer(
                    self._attention(f"layers.{i}.", spans[kind], ropes[kind]),
                    self.mlp(f"layers.{i}."),
                )
                for i, kind in enumerate(types)
            ),
            final_norm=self.norm("norm"),
        )

    def _tell_halved(self, types: list[str]) -> None:
        """Warn of a window that transformers 4 halved as it saved the model: it and its successor halve it again."""
        window = self.config.get("sliding_window")
        both = self.config.get("use_bidirectional_attention") is True
        if (
            both
            and "sliding_attention" in types
            and isinstance(window, int)
            and window > 1
            and window % 2
        ):
            warnings.warn(
                f"config.json: sliding_window is {window}, odd as transformers 4 leaves it, which halves it each time "
                f"it saves a model that sees both sides. Tokens see {window // 2} to either side, as transformers "
                f"loads this file; if the model was trained with {window - 1}, write {2 * (window - 1)} there",
                EmbedgeWarning,
                stacklevel=6,
            )

    def _span(self, kind: str) -> Span:
        """What a kind of layers attends to; ``sliding_window`` counts both sides where attention has two."""
        both = self.config.get("use_bidirectional_attention")
        if both not in (None, True, False):
            raise self.unsupported("use_bidirectional_attention", both, "true or false")
        if kind == "full_attention":
            return Span(causal=not both)
        # transformers counts half of it to either side, itself included: 0 is what version 5 saves of 1
        window = self.integer("sliding_window", minimum=0 if both else 1)
        reach = window // 2 if both else window - 1
        return Span(reach=reach if reach < self.max_length - 1 else None, causal=not both)

    def _attention(self, p: str, span: Span, rope: Rope) -> Attention:
        scale = self.positive("query_pre_attn_scalar") ** -0.5
        return self.declared_attention(p, span, rope, kv_heads=self.kv_heads, scale=scale)
