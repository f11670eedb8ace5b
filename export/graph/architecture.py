"""What a transformer is, as its family declares it; ``transformer.py`` writes the graph.

A layer is two sublayers, attention and an MLP, on a residual stream ``h``::

    x = input_norm(h)      pre-norm models
    h = h + sublayer(x)
    h = sum_norm(h)        post-norm models

Nothing here reads a tensor or writes a node. The shapes that ``config.json`` implies and the residual
streams that may be rotated follow from the declaration.

What families that are not here yet would declare (all have token table, layers, final or sum norms):

=======================  ==========================================================================
EuroBERT, jina v5 nano   Llama's layers with ``Span()``; v5 small is Qwen3 as it is
bidirectional decoders   Qwen3's, Llama's or Mistral's layers with ``Span()``
jina v3                  BERT's layers, fused q/k/v, a :class:`Rope` in place of the position table
nomic-bert               jina v3's with ``gate``; both layouts of names
gte, new                 nomic-bert's with up and gate as rows of one tensor; NTK in ``rotary.py``
DistilBERT               BERT's layers under other names
granite R2, mmBERT       ModernBERT as it is
EmbeddingGemma           new: ``output_norm`` of a sublayer (before the addition), ``1 + w`` norms, score
                         scale, embedding scale. There: spans, head sizes and ropes by layer, q/k norms
EmbeddingGemma 2         new besides: a norm of values, a third sublayer (per-layer input), layer scalar
jina-bert v2             new: ALiBi, another bias by relative position
Qwen3-VL                 new: interleaved ``sections``, features that are added to early layers
nomic v2-moe             new: a sublayer with experts
=======================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import TensorProto

from embedge.export.graph.rotary import Rope
from embedge.export.graph.values import LinearRef, ScaleSink
from embedge.export.source.config import Shape
from embedge.export.weights.rotated import ResidualStream, TableNorm

Input = tuple[int, list[int | str]]  # ONNX element type and axes
TOKENS: list[int | str] = ["batch", "tokens"]


@dataclass(frozen=True, kw_only=True)
class NormRef:
    """LayerNorm, or RMSNorm with ``rms``, by the canonical name of its module."""

    name: str
    epsilon: float
    rms: bool = False
    has_bias: bool = False

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str | None:
        return f"{self.name}.bias" if self.has_bias else None


@dataclass(frozen=True, kw_only=True)
class Span:
    """The tokens that a token attends to, itself included.

    Attributes:
        before: how many before it, ``None`` for all.
        after: how many behind it, ``None`` for all; 0 is causal attention.
    """

    before: int | None = None
    after: int | None = None

    @property
    def causal(self) -> bool:
        return self.after == 0


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """See the module's description."""

    input_norm: NormRef | None = None
    sum_norm: NormRef | None = None


@dataclass(frozen=True, kw_only=True)
class Attention(Sublayer):
    """Multi-head attention, grouped where ``kv_heads`` are fewer than ``heads``.

    Attributes:
        query: the Linear of the queries; it may be rows of a fused tensor, as the next two.
        key: that of the keys.
        value: that of the values.
        out: the Linear behind attention.
        heads: query heads.
        kv_heads: key and value heads.
        head_size: channels of a head.
        span: what a token attends to.
        rope: rotary positions of queries and keys.
        query_norm: RMSNorm of every query head.
        key_norm: RMSNorm of every key head.
    """

    query: LinearRef
    key: LinearRef
    value: LinearRef
    out: LinearRef
    heads: int
    kv_heads: int
    head_size: int
    span: Span = Span()
    rope: Rope | None = None
    query_norm: NormRef | None = None
    key_norm: NormRef | None = None

    @property
    def linears(self) -> tuple[LinearRef, LinearRef, LinearRef]:
        """Those that read the sublayer's input."""
        return self.query, self.key, self.value

    @property
    def output(self) -> LinearRef:
        """The Linear that writes the stream."""
        return self.out

    @property
    def sink(self) -> ScaleSink:
        """What takes a scale of the mixed values."""
        repeats = self.heads // self.kv_heads
        groups = (self.kv_heads, repeats, self.head_size) if repeats > 1 else None
        return ScaleSink(linear=self.value, groups=groups)

    @property
    def moves_value_bias(self) -> bool:
        """Whether the value bias is added behind the output projection, as rows of softmax sum to 1."""
        return self.heads == self.kv_heads and not self.span.causal


@dataclass(frozen=True, kw_only=True)
class Mlp(Sublayer):
    """``down(activation(up(x)))``, or ``down(activation(gate(x)) · up(x))`` with a gate.

    Attributes:
        up: the Linear to the inner width; it may be rows of a fused tensor, as ``gate``.
        down: the Linear back.
        gate: see above.
        inner: the inner width, or the key of config.json that may say it.
        activation: by its transformers name.
    """

    up: LinearRef
    down: LinearRef
    gate: LinearRef | None = None
    inner: int | str
    activation: str

    @property
    def linears(self) -> tuple[LinearRef, ...]:
        """Those that read the sublayer's input."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def output(self) -> LinearRef:
        """The Linear that writes the stream."""
        return self.down


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A transformer block."""

    attention: Attention
    mlp: Mlp

    @property
    def sublayers(self) -> tuple[Attention, Mlp]:
        return self.attention, self.mlp


@dataclass(frozen=True, kw_only=True)
class Table:
    """An embedding table, by its module, with its rows where config.json says them."""

    name: str
    rows: int | None = None

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model from token ids to token states.

    Attributes:
        hidden_size: channels of a token state.
        max_length: most tokens of a text.
        layers: in order.
        token_table: a row per token.
        position_table: a row per position, added to the token's, or ``None``.
        first_position: row of a text's first token there.
        type_table: a row per token type, likewise.
        relative_bias: a table of score biases by relative position and head, T5's buckets.
        embedding_norm: norm of the sum of tables.
        final_norm: norm after the last layer.
        token_head: a Linear to vectors of single tokens, and their width.
        feature_writer: the Linear of a vision tower whose features take the places of tokens.
        images: whether the graph has the inputs for that.
    """

    hidden_size: int
    max_length: int
    layers: tuple[Layer, ...]
    token_table: Table
    position_table: Table | None = None
    first_position: int = 0
    type_table: Table | None = None
    relative_bias: Table | None = None
    embedding_norm: NormRef | None = None
    final_norm: NormRef | None = None
    token_head: tuple[LinearRef, int] | None = None
    feature_writer: LinearRef | None = None
    images: bool = False

    @property
    def inputs(self) -> dict[str, Input]:
        """The graph's inputs by name, in order; ``ARCHITECTURE.md`` describes those for images."""
        found: dict[str, Input] = dict.fromkeys(
            ("input_ids", "attention_mask"), (TensorProto.INT64, TOKENS)
        )
        if self.type_table is not None:
            found["token_type_ids"] = TensorProto.INT64, TOKENS
        if self.images:
            found["position_ids"] = TensorProto.INT64, [3, *TOKENS]
            found["pool_mask"] = TensorProto.INT64, TOKENS
            found["image_features"] = TensorProto.FLOAT, ["image_tokens", self.hidden_size]
            found["image_positions"] = TensorProto.INT64, ["image_tokens", 2]
        return found

    @property
    def pool_mask(self) -> str:
        """The input that says which tokens a mean is taken over."""
        return "pool_mask" if self.images else "attention_mask"

    @property
    def multi_vector_dim(self) -> int | None:
        """Width of the vectors of single tokens, ``None`` without a head for them."""
        return None if self.token_head is None else self.token_head[1]

    def with_images(self) -> Architecture:
        """The same model with the inputs for images."""
        return replace(self, images=True)

    def text_only(self) -> Architecture:
        """The same model with token ids as its only inputs."""
        return replace(self, images=False)

    def linears(self) -> Iterator[LinearRef]:
        """All Linears of the layers."""
        for part in (part for layer in self.layers for part in layer.sublayers):
            yield from (*part.linears, part.output)

    def shapes(self) -> dict[str, Shape]:
        """Shapes of the modules' weights by canonical name, as far as config.json says them."""
        width = self.hidden_size
        found = layer_shapes(self.layers, width)
        for table in (self.token_table, self.position_table, self.type_table):
            if table is not None:
                found[table.name] = (table.rows, width)
        for norm in (self.embedding_norm, self.final_norm):
            if norm is not None:
                found[norm.name] = (width,)
        if self.relative_bias is not None:
            found[self.relative_bias.name] = (
                self.relative_bias.rows,
                self.layers[0].attention.heads,
            )
        if self.token_head is not None:
            head, dim = self.token_head
            found[head.name] = (dim, width)
        return found

    def streams(self) -> tuple[ResidualStream, ...]:
        """The residual stream, if it may be rotated: not where norms follow the sum, or have biases."""
        parts = [part for layer in self.layers for part in layer.sublayers]
        norms = [norm for norm in (self.embedding_norm, self.final_norm) if norm is not None]
        norms += [part.input_norm for part in parts if part.input_norm is not None]
        if self.final_norm is None or any(norm.has_bias for norm in norms):
            return ()
        stream = residual_stream(
            self.layers,
            self.hidden_size,
            writers=[] if self.feature_writer is None else [self.feature_writer],
            readers={} if self.token_head is None else {self.token_head[0]: self.final_norm},
        )
        table_norm = None
        if self.embedding_norm is not None:
            table_norm = TableNorm(
                weight=self.embedding_norm.weight, epsilon=self.embedding_norm.epsilon
            )
        stream = replace(
            stream,
            tables=(self.token_table.weight,),
            table_norm=table_norm,
            output=self.final_norm.weight,
            centred=not self.final_norm.rms,
        )
        return (stream,)


def residual_stream(
    layers: Iterable[Layer],
    width: int,
    *,
    writers: Sequence[LinearRef] = (),
    readers: Mapping[LinearRef, NormRef] | None = None,
) -> ResidualStream:
    """The stream of some layers.

    Args:
        layers: the layers.
        width: channels of the stream.
        writers: Linears outside of the layers that write it.
        readers: Linears outside of the layers that read it, and the norm between.
    """
    written = [linear.name for linear in writers]
    read = {linear.name: norm.weight for linear, norm in (readers or {}).items()}
    found: dict[str, str | None] = {**read}
    for part in (part for layer in layers for part in layer.sublayers):
        norm = None if part.input_norm is None else part.input_norm.weight
        found |= {linear.name: norm for linear in part.linears}
        written.append(part.output.name)
    return ResidualStream(width=width, writers=written, readers=found)


def layer_shapes(layers: Iterable[Layer], width: int) -> dict[str, Shape]:
    """Shapes of the modules' weights of some layers on a stream of ``width`` channels."""
    found: dict[str, Shape] = {}
    for layer in layers:
        attention, mlp = layer.sublayers
        rows, kv_rows = (n * attention.head_size for n in (attention.heads, attention.kv_heads))
        for linear, size in (
            (attention.query, rows),
            (attention.key, kv_rows),
            (attention.value, kv_rows),
            *((linear, mlp.inner) for linear in mlp.linears),
        ):
            # a fused tensor ends where its last Linear ends
            before = found.get(linear.name, (0,))[0]
            whole = size if linear.stop is None else max(linear.stop, int(before or 0))
            found[linear.name] = (whole, width)
        found[attention.out.name] = (width, rows)
        found[mlp.down.name] = (width, mlp.inner)
        for part in layer.sublayers:
            for norm in (part.input_norm, part.sum_norm):
                if norm is not None:
                    found[norm.name] = (width,)
        for norm in (attention.query_norm, attention.key_norm):
            if norm is not None:
                found[norm.name] = (attention.head_size,)
    return found
