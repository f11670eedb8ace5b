"""BERT, RoBERTa, XLM-RoBERTa and MPNet: encoders that normalize after each block."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from embedge.export.errors import CheckpointError
from embedge.export.families.base import HEADS, Family
from embedge.export.graph.attention import attention
from embedge.export.graph.builder import Graph
from embedge.export.graph.long_attention import FLASH_TOKENS, is_flash
from embedge.export.graph.scheme import Target
from embedge.export.graph.values import LinearRef, ScaleSink, Value
from embedge.export.source.config import Shape


class Bert(Family):
    """BERT and its relatives with absolute positions.

    Source of the architecture: Devlin et al., arXiv 1810.04805, and transformers' ``BertModel``.
    """

    model_types: ClassVar[tuple[str, ...]] = ("bert", "roberta", "xlm-roberta", "camembert")
    roots = ("embeddings", "encoder", *(head.rstrip(".") for head in HEADS))
    ignored = (*HEADS, "embeddings.position_ids")
    renamed: ClassVar = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

    query, key, value = "attention.self.query", "attention.self.key", "attention.self.value"
    attention_out, attention_norm = "attention.output.dense", "attention.output.LayerNorm"
    token_table = "embeddings.word_embeddings.weight"
    position_table = "embeddings.position_embeddings.weight"

    def check(self) -> None:
        self.heads = self._int("num_attention_heads")
        self._divides(self.heads, self.hidden_size, "num_attention_heads and hidden_size")
        self.epsilon = self._float("layer_norm_eps", 1e-12)
        self.activation = self._activation("hidden_act", "gelu")
        kind = self.config.get("position_embedding_type", "absolute")
        if kind != "absolute":
            raise self._unsupported("position_embedding_type", kind, "'absolute'")
        if self.config["model_type"] == "bert":
            self.first_position = 0
        else:  # RoBERTa counts positions from padding_idx + 1
            self.first_position = self._padding_index() + 1
        positions = self._int("max_position_embeddings") - self.first_position
        if self.max_length > positions:
            raise CheckpointError(
                f"max length {self.max_length} exceeds the {positions} positions the model has"
            )
        if self._types():
            self.inputs = ("input_ids", "attention_mask", "token_type_ids")

    def shapes(self) -> dict[str, Shape]:
        width, inner = self.hidden_size, "intermediate_size"
        attention = (self.query, self.key, self.value, self.attention_out)
        return {
            "word_embeddings": (None, width),
            "position_embeddings": (self._int("max_position_embeddings"), width),
            "token_type_embeddings": (self._int("type_vocab_size", 0, minimum=0), width),
            "LayerNorm": (width,),
            **dict.fromkeys(attention, (width, width)),
            "intermediate.dense": (inner, width),
            "output.dense": (width, inner),
        }

    def _padding_index(self) -> int:
        """The id whose position transformers reserves; 1 where config.json does not name it."""
        if self.config.get("pad_token_id") is None:
            return 1
        return self._int("pad_token_id", minimum=0)

    def _types(self) -> bool:
        return self._int("type_vocab_size", 0, minimum=0) > 0

    def context(self, g: Graph) -> dict[str, str]:
        context = {"lengths": self.lengths(g), "tokens": self.tokens(g)}
        if g.scheme.target is Target.CPU and self.max_length > FLASH_TOKENS:
            context["flash"] = is_flash(g, **context)
        return context

    def embed(self, g: Graph, context: dict[str, str]) -> Value:
        name, first = self.position_table, self.first_position
        rows = g.computed(
            name,
            (self.max_length, self.hidden_size),
            lambda: np.ascontiguousarray(g.weights.read(name)[first : first + self.max_length]),
            name,
            detail=f"rows {first}+{self.max_length}",
        )
        end = g.op("Unsqueeze", context["tokens"], g.const([0], "int64"))
        positions = g.op("Slice", rows, g.const([0], "int64"), end, g.const([0], "int64"))
        x = g.embedding("embeddings.word_embeddings.weight", "input_ids")
        x = g.add(x, positions)
        if self._types():
            types = g.param("embeddings.token_type_embeddings.weight")
            x = g.add(x, g.op("Gather", types, "token_type_ids"))
        norm = "embeddings.LayerNorm"
        return g.norm(x, f"{norm}.weight", f"{norm}.bias", self.epsilon)

    def layer(self, g: Graph, context: dict[str, str], index: int, hidden: Value) -> Value:
        p = f"encoder.layer.{index}."
        query, key, value = (LinearRef(p + n) for n in (self.query, self.key, self.value))
        q, k, v = g.linears(hidden, [query, key, value])
        # softmax ignores what is the same for all keys, so the key bias is dropped; its rows sum to 1,
        # so the value bias passes attention unchanged and is added behind the output projection.
        g.drop_bias(k)
        mixed = attention(
            g,
            g.add(q, g.bias(q)),
            k,
            v,
            heads=self.heads,
            kv_heads=self.heads,
            scale=(self.hidden_size // self.heads) ** -0.5,
            lengths=None if "mask" in context else context["lengths"],
            mask=context.get("mask"),
            flash=None if "mask" in context else context.get("flash"),
        )
        out = LinearRef(p + self.attention_out)
        [y] = g.linears(mixed, [out], sink=ScaleSink(linear=value))
        norm = p + self.attention_norm
        x, _ = g.add_norm(
            y,
            hidden,
            f"{norm}.weight",
            f"{norm}.bias",
            self.epsilon,
            linear_bias=g.bias(y, upstream=v),
        )
        up, down = LinearRef(p + "intermediate.dense"), LinearRef(p + "output.dense")
        [y] = g.linears(x, [up])
        y = g.activation(y, self.activation)
        [y] = g.linears(y, [down])
        norm = p + "output.LayerNorm"
        x, _ = g.add_norm(
            y, x, f"{norm}.weight", f"{norm}.bias", self.epsilon, linear_bias=g.bias(y)
        )
        return x


class MPNet(Bert):
    """MPNet: BERT's blocks with a bias by relative position, shared by all layers.

    Source: Song et al., arXiv 2004.09297, and transformers' ``MPNetModel``.
    """

    model_types = ("mpnet",)
    query, key, value = "attention.attn.q", "attention.attn.k", "attention.attn.v"
    attention_out, attention_norm = "attention.attn.o", "attention.LayerNorm"
    bias_table = "encoder.relative_attention_bias.weight"

    def shapes(self) -> dict[str, Shape]:
        buckets = self._int("relative_attention_num_buckets", 32)
        return {**super().shapes(), "relative_attention_bias": (buckets, self.heads)}

    def _padding_index(self) -> int:
        return 1  # transformers' MPNet has it fixed, whatever the padding token

    def _types(self) -> bool:
        return False

    def context(self, g: Graph) -> dict[str, str]:
        context = super().context(g)
        # bias[h, i, j] = table[bucket(j - i), h]: gather one row of biases per distance, then pick.
        buckets = relative_buckets(
            np.arange(-self.max_length + 1, self.max_length),
            self._int("relative_attention_num_buckets", 32),
        )
        by_distance = g.computed(
            f"{self.bias_table}.by_distance",
            (self.heads, len(buckets)),
            lambda: np.ascontiguousarray(g.weights.read(self.bias_table)[buckets].T),
            self.bias_table,
            detail=f"length {self.max_length}",
        )
        zero, one = g.const(0, "int64"), g.const(1, "int64")
        steps = g.op("Range", zero, context["tokens"], one)
        rows = g.op("Unsqueeze", steps, g.const([1], "int64"))
        distance = g.op("Sub", g.op("Unsqueeze", steps, g.const([0], "int64")), rows)
        offset = g.op("Add", distance, g.const(self.max_length - 1, "int64"))
        bias = g.op("Gather", by_distance, offset, axis=1)  # [heads, tokens, tokens]
        seen = g.op("Cast", "attention_mask", to=1)
        hidden = g.op("Mul", g.op("Sub", seen, g.const(1.0)), g.const(1e9))
        hidden = g.op("Unsqueeze", hidden, g.const([1, 2], "int64"))
        context["mask"] = g.op("Add", bias, hidden)  # [batch, heads, tokens, tokens]
        return context


def relative_buckets(distance: NDArray[np.int64], buckets: int) -> NDArray[np.int64]:
    """T5's bidirectional buckets of ``key - query`` distances (transformers' MPNet, distance ≤ 128)."""
    half = buckets // 2
    position = -distance
    result = np.where(position < 0, half, 0)
    position = np.abs(position)
    exact = half // 2
    with np.errstate(divide="ignore"):
        # float32 as in transformers: the logarithm's rounding decides borderline distances
        ratio = np.log(position.astype(np.float32) / np.float32(exact))
        far = exact + ratio / np.float32(np.log(128 / exact)) * np.float32(half - exact)
    far = np.where(position > 0, far, 0).astype(np.int64)
    return result + np.where(position < exact, position, np.minimum(far, half - 1))
