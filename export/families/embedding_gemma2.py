"""EmbeddingGemma 2's text model: bidirectional, with heads of another size in the layers that see all.

A layer has a third sublayer, gated by what the token's own table row gives for that layer (per-layer embeddings),
and its states are multiplied by a number. The last Linear is behind pooling, once a text: a mean is linear.

Towers for images and audio, which a checkpoint may hold, are left out.

Source: transformers 5's ``EmbeddingGemma2TextModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from embedge.export.families.base import HEAD_ROOTS, HEADS
from embedge.export.families.gemma3 import GemmaLayers
from embedge.export.families.ropes import ropes_by_layer_type
from embedge.export.graph.architecture import (
    Architecture,
    Attention,
    Layer,
    Span,
    TokenGate,
)
from embedge.export.graph.rotary import Rope
from embedge.export.graph.values import LinearRef

_TOWERS = ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
_PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")
_FULL = "full_attention"


class _Heads(NamedTuple):
    """Heads of a type of layers: their size, and how many keys and values have."""

    size: int
    kv_heads: int


class EmbeddingGemma2(GemmaLayers):
    """EmbeddingGemma 2 for texts."""

    model_types: ClassVar[tuple[str, ...]] = ("embedding_gemma2", "embedding_gemma2_text")
    examples: ClassVar[Mapping[str, str]] = dict.fromkeys(model_types, "google/embeddinggemma-2")
    fits_half = False
    roots: ClassVar[tuple[str, ...]] = (
        *("embed_tokens", "layers", "norm", "ple", "embedding_projection"),
        *_TOWERS,
        *HEAD_ROOTS,
    )
    ignored: ClassVar[tuple[str, ...]] = (*(f"{name}." for name in _TOWERS), *HEADS)

    def declare(self) -> Architecture:
        self.heads = self.integer("num_attention_heads")
        types = self._layer_types()
        heads = self._heads(types)
        ropes = ropes_by_layer_type(
            self,
            {kind: found.size for kind, found in heads.items()},
            thetas={"full_attention": ("", 1_000_000.0), "sliding_attention": ("", 10_000.0)},
        )
        return Architecture(
            hidden_size=self.hidden_size,
            max_length=self.max_length,
            token_table="embed_tokens",
            embedding_scale=self.hidden_size**0.5,
            token_aliases=self._token_aliases(),
            layers=tuple(
                Layer(
                    self._attention(f"layers.{i}.", self._span(kind), heads[kind], ropes[kind]),
                    self.mlp(f"layers.{i}."),
                    self._token_gate(i),
                    scale=f"layers.{i}.layer_scalar",
                )
                for i, kind in enumerate(types)
            ),
            final_norm=self.norm("norm"),
            state_projection=LinearRef("embedding_projection", has_bias=False),
            state_dim=self.integer("embedding_dim"),
        )

    def left_out(self) -> str:
        towers = {"vision_config": "images", "audio_config": "audio"}
        return " and ".join(what for key, what in towers.items() if self.config.get(key))

    def _layer_types(self) -> list[str]:
        """The types of layers, the last of which sees all."""
        types = self.layer_types(6)
        if self.config.get("layer_types") is None:
            types[-1] = _FULL
        if types[-1] != _FULL:
            listed = self.config["layer_types"]
            raise self.unsupported("layer_types", listed, f"{_FULL} for the last layer")
        return types

    def _heads(self, types: list[str]) -> dict[str, _Heads]:
        """The heads of each type of layers."""
        found: dict[str, _Heads] = {}
        for index, (kind, own) in enumerate(zip(types, self._own_heads(types), strict=True)):
            heads = _Heads(
                size=own.get("head_dim", self.integer("head_dim")),
                kv_heads=own.get("num_key_value_heads", self.integer("num_key_value_heads")),
            )
            self.divides(heads.kv_heads, self.heads, "num_key_value_heads and num_attention_heads")
            if found.setdefault(kind, heads) != heads:
                given = self.config.get("per_layer_config")
                expected = f"the same heads in layer {index} as in those before of type {kind}"
                raise self.unsupported("per_layer_config", given, expected)
        return found

    def _own_heads(self, types: list[str]) -> list[dict[str, int]]:
        """By layer, what it has in place of ``head_dim`` and ``num_key_value_heads``."""
        if "per_layer_config" not in self.config:
            own = {
                "head_dim": self.integer("global_head_dim", 512),
                "num_key_value_heads": self.integer("num_global_key_value_heads", 1),
            }
            return [own if kind == _FULL else {} for kind in types]
        given = self.config["per_layer_config"] or {}
        layers: list[dict[str, int]] = [{} for _ in types]
        for key, settings in given.items() if isinstance(given, dict) else [("", given)]:
            is_layer = key.isdecimal() and int(key) < len(layers) and isinstance(settings, dict)
            if not is_layer or not all(_is_size(settings, name) for name in settings):
                expected = f"head_dim and num_key_value_heads of the layers 0 to {len(layers) - 1}"
                raise self.unsupported("per_layer_config", given, expected)
            layers[int(key)] = settings
        return layers

    def _token_aliases(self) -> dict[int, int]:
        """What stands for images and sounds has the padding token's state in a text."""
        if self.config["model_type"] != self.model_types[0]:
            return {}
        tokens = [self.integer(key, minimum=0) for key in _PLACEHOLDERS]
        return dict.fromkeys(tokens, self.integer("pad_token_id", minimum=0))

    def _span(self, kind: str) -> Span:
        if kind == _FULL:
            return Span()
        reach = self.integer("sliding_window", minimum=0)
        return Span(reach=reach if reach < self.max_length - 1 else None)

    def _attention(self, p: str, span: Span, heads: _Heads, rope: Rope) -> Attention:
        attention = self.declared_attention(p, span, rope, kv_heads=heads.kv_heads, scale=1.0)
        return replace(attention, value_epsilon=self.epsilon)

    def _token_gate(self, index: int) -> TokenGate:
        p, size = f"layers.{index}.ple_block.", self.integer("hidden_size_per_layer_input")
        name, start = "ple.per_layer_model_projection", index * size
        return TokenGate(
            linears=[LinearRef(f"{p}per_layer_input_gate", has_bias=False)],
            out=LinearRef(f"{p}per_layer_projection", has_bias=False),
            output_norm=self.norm(f"{p}post_per_layer_input_norm"),
            token_linear=LinearRef(name, start, start + size, has_bias=False),
            token_norm=self.norm("ple.per_layer_projection_norm"),
            token_scale=self.hidden_size**-0.5,
            activation=self.gate_activation,
        )


def _is_size(settings: Mapping[str, Any], name: str) -> bool:
    """Whether a setting of a layer is one of its heads, and a positive integer."""
    value = settings[name]
    return name in ("head_dim", "num_key_value_heads") and type(value) is int and value > 0
