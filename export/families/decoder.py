"""Llama, Mistral, Qwen2 and Qwen3 used as embedders, and EuroBERT: they normalize before each block.

Attention is causal where config.json does not say ``"is_causal": false``, which transformers 5 reads: then a token
sees all others, in a layer with a window those that are at most ``sliding_window`` tokens away on either side.
EuroBERT (Boizard et al., arXiv 2503.05500) and ``llama_bidirec`` are Llama without a causal mask, pplx-embed-v1 and
voyage-4-nano are Qwen3 without one.

A checkpoint may have a multi-vector head beside the decoder, as jina-embeddings-v4 has: the Linear
``multi_vector_projector``, its width in config.json's ``multi_vector_projector_dim``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from embedge.export.families.base import HEAD_ROOTS, Family
from embedge.export.families.known_keys import KEYS
from embedge.export.families.ropes import rope_of
from embedge.export.graph.architecture import Architecture, Attention, Layer, Mlp, Span
from embedge.export.graph.rotary import Rope
from embedge.export.graph.values import LinearRef
from embedge.export.source.sentence_transformers import SentenceSettings
from embedge.export.weights.tensors import NormRef

_MERGED_V5 = (
    "If it is one task of jina-embeddings-v5-text, merged, name its folder as it is published, "
    "jina-embeddings-v5-text-{}-TASK, by which its pooling and prompts are known"
)


class Decoder(Family):
    """Rotary positions, RMSNorm, grouped-query attention and a gated MLP.

    Attributes:
        biases: whether Linears have one, by their kind, or the key of config.json that says it.
        head_norms: whether every query and key head is normalized.
        default_theta: ``rope_theta`` where config.json has none; ``None``: it has to say.
        reads_is_causal: whether ``is_causal`` decides the mask; where it does not, ``causal`` does.
        causal: whether a token sees those before it alone.
    """

    roots: ClassVar[tuple[str, ...]] = (
        *("embed_tokens", "layers", "norm", "multi_vector_projector"),
        *HEAD_ROOTS,
    )
    biases: ClassVar[Mapping[str, bool | str]] = {"qkv": False, "o": False, "mlp": False}
    head_norms: ClassVar[bool] = False
    default_theta: ClassVar[float | None] = 10000.0
    reads_is_causal: ClassVar[bool] = True
    causal: bool = True

    @classmethod
    def guessed_pooling(cls, config: Mapping[str, Any]) -> str | None:
        """As sentence-transformers: the last token, of what was saved as a causal language model."""
        classes = config.get("architectures") or [""]
        causal = config.get("is_causal", True) is True if cls.reads_is_causal else cls.causal
        return "lasttoken" if causal and str(classes[0]).endswith("ForCausalLM") else None

    def declare(self) -> Architecture:
        self.heads = self.integer("num_attention_heads")
        grouped = self.config.get("num_key_value_heads") is not None
        self.kv_heads = self.integer("num_key_value_heads") if grouped else self.heads
        self.divides(self.kv_heads, self.heads, "num_key_value_heads and num_attention_heads")
        if self.reads_is_causal:
            self.causal = self.flag("is_causal", default=True)
        given = self.config.get("head_dim")
        self.rope = self.read_rope(
            self.integer("head_dim") if given else self.hidden_size // self.heads
        )
        dim = self.multi_vector_dim()
        return Architecture(
            hidden_size=self.hidden_size,
            max_length=self.max_length,
            token_table="embed_tokens",
            layers=tuple(
                Layer(self._attention(f"layers.{i}.", self._span(i)), self._mlp(f"layers.{i}."))
                for i in range(self.num_layers)
            ),
            final_norm=self._norm("norm"),
            token_head=None if dim is None else LinearRef("multi_vector_projector"),
            multi_vector_dim=dim,
        )

    def read_rope(self, head_size: int) -> Rope:
        """Rotary positions of all layers."""
        return rope_of(self, head_size, self.default_theta)

    def multi_vector_dim(self) -> int | None:
        """Width of the multi-vector head, ``None`` without one."""
        key = "multi_vector_projector_dim"
        return None if self.config.get(key) is None else self.integer(key)

    def slides_by_rule(self, index: int, listed: bool | None) -> bool:
        """Whether a layer attends to a window, by the keys beside ``layer_types``.

        Args:
            index: of the layer.
            listed: whether ``layer_types`` says so, ``None`` without it.
        """
        return False

    def _span(self, index: int) -> Span:
        listed = self.slides()
        slides = self.slides_by_rule(index, None if listed is None else listed[index])
        if listed is not None and listed[index] != slides:
            kind = "sliding_attention" if slides else "full_attention"
            other = f"{kind!r} for layer {index} by the other settings"
            raise self.unsupported("layer_types", self.config["layer_types"], other)
        window = self.integer("sliding_window") if slides else self.max_length
        # the number counts the token itself in transformers' causal masks, not in its others
        reach = window - 1 if self.causal else window
        return Span(reach=reach if reach < self.max_length - 1 else None, causal=self.causal)

    def _attention(self, p: str, span: Span) -> Attention:
        return Attention(
            linears=[self._linear(f"{p}self_attn.{n}_proj", "qkv") for n in "qkv"],
            out=self._linear(f"{p}self_attn.o_proj", "o"),
            input_norm=self._norm(f"{p}input_layernorm"),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.rope.head_size,
            span=span,
            rope=self.rope,
            query_norm=self._norm(f"{p}self_attn.q_norm") if self.head_norms else None,
            key_norm=self._norm(f"{p}self_attn.k_norm") if self.head_norms else None,
        )

    def _mlp(self, p: str) -> Mlp:
        return Mlp(
            linears=[self._linear(f"{p}mlp.{n}_proj", "mlp") for n in ("gate", "up")],
            out=self._linear(f"{p}mlp.down_proj", "mlp"),
            input_norm=self._norm(f"{p}post_attention_layernorm"),
            inner="intermediate_size",
            activation=self.activation("hidden_act", "silu"),
        )

    def _linear(self, name: str, kind: str) -> LinearRef:
        bias = self.biases[kind]
        has_bias = self.config.get(bias) is True if isinstance(bias, str) else bias
        return LinearRef(name, has_bias=has_bias)

    def _norm(self, name: str) -> NormRef:
        return NormRef(name=name, epsilon=self.number("rms_norm_eps", 1e-6), rms=True)


class Llama(Decoder):
    """Llama 1 to 3."""

    model_types: ClassVar[tuple[str, ...]] = ("llama",)
    examples: ClassVar = {"llama": "HuggingFaceTB/SmolLM2-135M"}
    biases: ClassVar = {"qkv": "attention_bias", "o": "attention_bias", "mlp": "mlp_bias"}


class LlamaBidirectional(Llama):
    """``llama_bidirec``, NVIDIA's embedding models: Llama without a causal mask, by its published code."""

    model_types = ("llama_bidirec",)
    examples: ClassVar = {"llama_bidirec": "nvidia/llama-nemotron-embed-1b-v2"}
    reads_is_causal = False
    causal = False

    @classmethod
    def completed(cls, settings: SentenceSettings, config: Mapping[str, Any]) -> SentenceSettings:
        # no modules.json: the published class's own ``pooling`` is "avg"
        return settings if settings.pooling else replace(settings, pooling="mean")


class EuroBert(Llama):
    """EuroBERT, as published and as transformers 5 has it."""

    model_types: ClassVar[tuple[str, ...]] = ("eurobert",)
    examples: ClassVar = {"eurobert": "EuroBERT/EuroBERT-210m"}
    pooling_hint = _MERGED_V5.format("nano")
    default_theta = None  # 10,000 in transformers' class, 250,000 in the published code
    reads_is_causal = False
    causal = False


class Mistral(Decoder):
    """Mistral, with a window in all layers."""

    model_types = ("mistral",)
    examples: ClassVar = {"mistral": "intfloat/e5-mistral-7b-instruct"}

    def slides_by_rule(self, index: int, listed: bool | None) -> bool:
        return self.config.get("sliding_window") is not None


class Qwen2(Decoder):
    """Qwen2, with a window in upper layers."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2",)
    examples: ClassVar[Mapping[str, str]] = {"qwen2": "jinaai/jina-code-embeddings-0.5b"}
    biases: ClassVar[Mapping[str, bool | str]] = {"qkv": True, "o": False, "mlp": False}

    def slides_by_rule(self, index: int, listed: bool | None) -> bool:
        upper = index >= self.integer("max_window_layers", minimum=0)
        used = (
            self.config.get("use_sliding_window") and self.config.get("sliding_window") is not None
        )
        return bool(used) and (upper if listed is None else listed)


class Qwen3(Qwen2):
    """Qwen3: a norm of every head, biases only where config.json says so."""

    model_types = ("qwen3",)
    examples: ClassVar = {"qwen3": "Qwen/Qwen3-Embedding-0.6B"}
    pooling_hint = _MERGED_V5.format("small")
    biases: ClassVar = {"qkv": "attention_bias", "o": "attention_bias", "mlp": False}
    head_norms = True


class PplxQwen3(Qwen3):
    """pplx-embed-v1: Qwen3 without a causal mask, vectors of whole numbers, by its published code."""

    model_types = ("bidirectional_pplx_qwen3",)
    examples: ClassVar = {"bidirectional_pplx_qwen3": "perplexity-ai/pplx-embed-v1-0.6b"}
    reads_is_causal = False
    causal = False


class Voyage4(Qwen3):
    """voyage-4-nano: Qwen3 without a causal mask, states projected to vectors, by its published code."""

    model_types = ("voyage_4",)
    examples: ClassVar = {"voyage_4": "voyageai/voyage-4-nano"}
    roots = (*Qwen3.roots, "linear")
    reads_is_causal = False
    causal = False

    @classmethod
    def serves(cls, config: Mapping[str, Any], name: str) -> bool:
        """Whether its code is named, as the model goes by Qwen3's ``model_type``."""
        code = config.get("auto_map")
        named = code.get("AutoModel") if isinstance(code, dict) else None
        return config.get("model_type") == "qwen3" and str(named) in KEYS["voyage_4"].code

    @classmethod
    def completed(cls, settings: SentenceSettings, config: Mapping[str, Any]) -> SentenceSettings:
        sizes = tuple(n for n in (256, 512, 1024, 2048) if n <= _labels(config))
        return replace(settings, matryoshka_dims=settings.matryoshka_dims or sizes)

    def declare(self) -> Architecture:
        width = _labels(self.config)
        if width < 1:
            raise self.unsupported("num_labels", self.config.get("num_labels"), "a vector's width")
        projection = LinearRef("linear", has_bias=False)
        return replace(super().declare(), state_projection=projection, state_dim=width)


def _labels(config: Mapping[str, Any]) -> int:
    """``num_labels``, which transformers also writes as a name for each; 0 where there is none."""
    count = config.get("num_labels", len(config.get("id2label") or ()))
    return count if type(count) is int else 0
