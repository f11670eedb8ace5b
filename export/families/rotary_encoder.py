"""Encoders that normalize after each block and have rotary positions: what nomic-bert, GTE and jina v3 share.

Canonical names are those of transformers 5's modules, and of adapters that were trained on them. Files have the
published names, also where transformers 5 saves them, and fused tensors, whose rows are read as tensors of their own.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from embedge.export.families.base import HEAD_ROOTS, HEADS, Family
from embedge.export.families.ropes import rope_of
from embedge.export.graph.architecture import Architecture, Attention, Layer, Mlp
from embedge.export.graph.rotary import Rope
from embedge.export.graph.values import LinearRef
from embedge.export.weights.tensors import NormRef

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def ends(old: str, new: str) -> dict[str, str]:
    """A module's other name, as :attr:`Family.renamed` has it."""
    return {f"{old}.{what}": f"{new}.{what}" for what in ("weight", "bias")}


NORMS = {**ends("norm1", "post_attention_layernorm"), **ends("norm2", "post_mlp_layernorm")}


class RotaryEncoder(Family):
    """Attention, sum, LayerNorm, MLP, sum, LayerNorm.

    Attributes:
        default_epsilon: ``layer_norm_eps`` where config.json has none.
    """

    roots: ClassVar[tuple[str, ...]] = ("embeddings", "layers", *HEAD_ROOTS)
    ignored: ClassVar[tuple[str, ...]] = (*HEADS, "embeddings.position_ids")
    default_epsilon: ClassVar[float] = 1e-12

    def declare(self) -> Architecture:
        heads = self.integer("num_attention_heads")
        self.divides(heads, self.hidden_size, "num_attention_heads and hidden_size")
        self.check_length(self.integer("max_position_embeddings"))
        rope = self.read_rope(self.hidden_size // heads)
        types = self.integer("type_vocab_size", minimum=0) > 0
        return Architecture(
            hidden_size=self.hidden_size,
            max_length=self.max_length,
            token_table="embeddings.word_embeddings",
            type_table="embeddings.token_type_embeddings" if types else None,
            embedding_norm=self.norm("embeddings.LayerNorm"),
            layers=tuple(
                Layer(self._attention(f"layers.{i}.", heads, rope), self.mlp(f"layers.{i}."))
                for i in range(self.num_layers)
            ),
        )

    def read_rope(self, head_size: int) -> Rope:
        """Rotary positions of all layers."""
        return rope_of(self, head_size, self.theta())

    @abstractmethod
    def theta(self) -> float:
        """``rope_theta`` where config.json has none."""

    @abstractmethod
    def mlp(self, p: str) -> Mlp:
        """The MLP of the layer whose names begin with ``p``."""

    def attention_bias(self) -> bool:
        """Whether the Linears of attention have one."""
        return True

    def norm(self, name: str) -> NormRef:
        """LayerNorm of that name."""
        epsilon = self.number("layer_norm_eps", self.default_epsilon)
        return NormRef(name=name, epsilon=epsilon, has_bias=True)

    def _attention(self, p: str, heads: int, rope: Rope) -> Attention:
        has_bias = self.attention_bias()
        q, k, v, out = (LinearRef(f"{p}self_attn.{n}_proj", has_bias=has_bias) for n in "qkvo")
        return Attention(
            linears=[q, k, v],
            out=out,
            sum_norm=self.norm(f"{p}post_attention_layernorm"),
            heads=heads,
            kv_heads=heads,
            head_size=rope.head_size,
            rope=rope,
        )
