"""ModernBERT: an encoder that normalizes before each block, rotary, with local attention layers.

Source: Warner et al., arXiv 2412.13663, and transformers' ``ModernBertModel``.
"""

from __future__ import annotations

from typing import ClassVar

from embedge.export.families.base import HEAD_ROOTS, HEADS, Family
from embedge.export.families.ropes import checked_rope
from embedge.export.graph.architecture import Architecture, Attention, Layer, Mlp, Span
from embedge.export.graph.rotary import Rope
from embedge.export.graph.values import LinearRef, rows_of
from embedge.export.source.config import number
from embedge.export.weights.tensors import NormRef


class ModernBert(Family):
    """ModernBERT's alternating global and sliding-window attention."""

    model_types = ("modernbert",)
    examples: ClassVar = {"modernbert": "nomic-ai/modernbert-embed-base"}
    roots = ("embeddings", "layers", "final_norm", "head", "decoder", *HEAD_ROOTS)
    ignored = ("head.", "decoder.", *HEADS)

    def declare(self) -> Architecture:
        self.heads = self.integer("num_attention_heads")
        self.divides(self.heads, self.hidden_size, "num_attention_heads and hidden_size")
        local = self._local_layers()
        reach = self.integer("local_attention", 128) // 2
        if self.config.get("sliding_window", reach) != reach:
            expected = f"{reach}, half of local_attention"
            raise self.unsupported("sliding_window", self.config["sliding_window"], expected)
        self.check_length(self.integer("max_position_embeddings", 8192))
        ropes = self._ropes(self.hidden_size // self.heads)
        spans = {"global": Span(), "local": Span(reach=reach)}
        kinds = ["local" if is_local else "global" for is_local in local]
        return Architecture(
            hidden_size=self.hidden_size,
            max_length=self.max_length,
            token_table="embeddings.tok_embeddings",
            embedding_norm=self._norm("embeddings.norm"),
            layers=tuple(
                Layer(self._attention(i, spans[kind], ropes[kind]), self._mlp(i))
                for i, kind in enumerate(kinds)
            ),
            final_norm=self._norm("final_norm"),
        )

    def _attention(self, index: int, span: Span, rope: Rope) -> Attention:
        p, has_bias = f"layers.{index}.", self.config.get("attention_bias") is True
        return Attention(
            linears=rows_of(f"{p}attn.Wqkv", *[self.hidden_size] * 3, has_bias=has_bias),
            out=LinearRef(f"{p}attn.Wo", has_bias=has_bias),
            # the first layer reads the embedding norm directly
            input_norm=self._norm(f"{p}attn_norm") if index else None,
            heads=self.heads,
            kv_heads=self.heads,
            head_size=rope.head_size,
            span=span,
            rope=rope,
        )

    def _mlp(self, index: int) -> Mlp:
        p, has_bias = f"layers.{index}.", self.config.get("mlp_bias") is True
        inner = self.integer("intermediate_size")
        return Mlp(
            linears=rows_of(f"{p}mlp.Wi", inner, inner, has_bias=has_bias),
            out=LinearRef(f"{p}mlp.Wo", has_bias=has_bias),
            input_norm=self._norm(f"{p}mlp_norm"),
            inner=inner,
            activation=self.activation("hidden_activation", "gelu"),
        )

    def _norm(self, name: str) -> NormRef:
        has_bias = self.config.get("norm_bias") is True
        return NormRef(name=name, epsilon=self.number("norm_eps", 1e-5), has_bias=has_bias)

    def _local_layers(self) -> list[bool]:
        """By layer, whether it attends to its neighbours alone."""
        every = self.integer("global_attn_every_n_layers", 3)
        by_rule = [bool(index % every) for index in range(self.num_layers)]
        listed = self.slides()
        if listed not in (None, by_rule) and "global_attn_every_n_layers" in self.config:
            expected = f"a global layer every {every}, as it says too"
            raise self.unsupported("layer_types", self.config["layer_types"], expected)
        return listed or by_rule

    def _ropes(self, head_size: int) -> dict[str, Rope]:
        """Rotary positions by kind of layer."""
        if self.config.get("rope_scaling"):
            raise self.unsupported("rope_scaling", self.config["rope_scaling"], "none")
        nested = self.config.get("rope_parameters") or {}
        names = {"global": "full_attention", "local": "sliding_attention"}
        if not isinstance(nested, dict) or set(nested) - set(names.values()):
            raise self.unsupported(
                "rope_parameters", nested, f"settings for {', '.join(names.values())}"
            )
        early = {
            k: self.config[f"{k}_rope_theta"] for k in names if f"{k}_rope_theta" in self.config
        }
        if self.config.get("rope_theta", early.get("global")) != early.get("global"):
            raise self.unsupported(
                "rope_theta", self.config["rope_theta"], "global_rope_theta's value"
            )
        theta = self.number("global_rope_theta", 160000.0)
        thetas = {"global": theta, "local": 10000.0}
        if "local" in early:  # null means the global one
            thetas["local"] = theta if early["local"] is None else self.number("local_rope_theta")
        ropes = {}
        for kind, name in names.items():
            rope = checked_rope(nested.get(name) or {}, f"rope_parameters.{name}")
            key = f"rope_parameters.{name}.rope_theta"
            if kind in early and rope.get("rope_theta", thetas[kind]) != thetas[kind]:
                raise self.unsupported(key, rope["rope_theta"], f"{kind}_rope_theta {early[kind]}")
            theta = number(rope, "rope_theta", thetas[kind])
            ropes[kind] = Rope(
                name=f"rotary.{kind}", head_size=head_size, theta=theta, scaling=rope
            )
        return ropes
