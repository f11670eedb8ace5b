"""BERT, RoBERTa, XLM-RoBERTa, MPNet and DistilBERT: encoders that normalize after each block.

Source: Devlin et al., arXiv 1810.04805, and transformers' ``BertModel``; Song et al., arXiv 2004.09297, and
``MPNetModel``; Sanh et al., arXiv 1910.01108, and ``DistilBertModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from embedge.export.families.base import HEAD_ROOTS, HEADS, Family
from embedge.export.graph.architecture import Architecture, Attention, Layer, Mlp
from embedge.export.graph.values import LinearRef
from embedge.export.weights.tensors import NormRef

_DISTIL_HEADS = ("vocab_layer_norm", "vocab_projector", "vocab_transform")


class Bert(Family):
    """BERT and its relatives with absolute positions."""

    model_types: ClassVar[tuple[str, ...]] = ("bert", "roberta", "xlm-roberta", "camembert")
    examples: ClassVar[Mapping[str, str]] = {
        "bert": "sentence-transformers/all-MiniLM-L6-v2",
        "roberta": "sentence-transformers/all-distilroberta-v1",
        "xlm-roberta": "intfloat/multilingual-e5-base",
        "camembert": "dangvantuan/sentence-camembert-base",
    }
    roots: ClassVar[tuple[str, ...]] = ("embeddings", "encoder", *HEAD_ROOTS)
    ignored: ClassVar[tuple[str, ...]] = (*HEADS, "embeddings.position_ids")
    renamed: ClassVar = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

    qkv: ClassVar = ("attention.self.query", "attention.self.key", "attention.self.value")
    attention_out, attention_norm = "attention.output.dense", "attention.output.LayerNorm"
    mlp_in, mlp_out, mlp_norm = "intermediate.dense", "output.dense", "output.LayerNorm"
    layer_list, inner_key, activation_key = "encoder.layer", "intermediate_size", "hidden_act"

    def declare(self) -> Architecture:
        if self.config.get("position_embedding_type", "absolute") != "absolute":
            kind = self.config["position_embedding_type"]
            raise self.unsupported("position_embedding_type", kind, "'absolute'")
        first = self.first_position()
        self.check_length(self.integer("max_position_embeddings") - first)
        return Architecture(
            hidden_size=self.hidden_size,
            max_length=self.max_length,
            token_table="embeddings.word_embeddings",
            position_table="embeddings.position_embeddings",
            first_position=first,
            type_table="embeddings.token_type_embeddings" if self.has_types() else None,
            embedding_norm=self._norm("embeddings.LayerNorm"),
            layers=tuple(self._layer(f"{self.layer_list}.{i}.") for i in range(self.num_layers)),
        )

    def first_position(self) -> int:
        """Row of a text's first position: RoBERTa counts from the padding token's id."""
        if self.config["model_type"] == "bert":
            return 0
        padding = (
            1
            if self.config.get("pad_token_id") is None
            else self.integer("pad_token_id", minimum=0)
        )
        return padding + 1

    def has_types(self) -> bool:
        """Whether there is a table of token types."""
        return self.integer("type_vocab_size", 0, minimum=0) > 0

    def _layer(self, p: str) -> Layer:
        heads = self.integer("num_attention_heads")
        self.divides(heads, self.hidden_size, "num_attention_heads and hidden_size")
        attention = Attention(
            linears=[LinearRef(p + name) for name in self.qkv],
            out=LinearRef(p + self.attention_out),
            sum_norm=self._norm(p + self.attention_norm),
            heads=heads,
            kv_heads=heads,
            head_size=self.hidden_size // heads,
        )
        mlp = Mlp(
            linears=[LinearRef(p + self.mlp_in)],
            out=LinearRef(p + self.mlp_out),
            sum_norm=self._norm(p + self.mlp_norm),
            inner=self.inner_key,
            activation=self.activation(self.activation_key, "gelu"),
        )
        return Layer(attention, mlp)

    def _norm(self, name: str) -> NormRef:
        return NormRef(name=name, epsilon=self.number("layer_norm_eps", 1e-12), has_bias=True)


class MPNet(Bert):
    """MPNet: BERT's blocks with a bias by relative position, shared by all layers."""

    model_types = ("mpnet",)
    examples: ClassVar = {"mpnet": "sentence-transformers/all-mpnet-base-v2"}
    qkv: ClassVar = ("attention.attn.q", "attention.attn.k", "attention.attn.v")
    attention_out, attention_norm = "attention.attn.o", "attention.LayerNorm"

    def declare(self) -> Architecture:
        return replace(super().declare(), relative_bias="encoder.relative_attention_bias")

    def first_position(self) -> int:
        return 2  # transformers' MPNet has it fixed, whatever the padding token

    def has_types(self) -> bool:
        return False


class DistilBert(Bert):
    """DistilBERT: BERT's blocks under other names, without token types."""

    model_types = ("distilbert",)
    examples: ClassVar = {"distilbert": "sentence-transformers/msmarco-distilbert-base-v4"}
    roots = ("embeddings", "transformer", *HEAD_ROOTS, "pre_classifier", *_DISTIL_HEADS)
    ignored = (*Bert.ignored, "pre_classifier.", *(f"{head}." for head in _DISTIL_HEADS))
    aliases: ClassVar = {
        "dim": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
    }
    qkv: ClassVar = ("attention.q_lin", "attention.k_lin", "attention.v_lin")
    attention_out, attention_norm = "attention.out_lin", "sa_layer_norm"
    mlp_in, mlp_out, mlp_norm = "ffn.lin1", "ffn.lin2", "output_layer_norm"
    layer_list, inner_key, activation_key = "transformer.layer", "hidden_dim", "activation"

    def first_position(self) -> int:
        return 0

    def has_types(self) -> bool:
        return False
