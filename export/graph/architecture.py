"""What a transformer is, as its family declares it; ``transformer.py`` writes the graph.

A layer is two sublayers, attention and an MLP, on a residual stream ``h``, and perhaps a third::

    x = input_norm(h)          pre-norm models
    h = h + output_norm(sublayer(x))
    h = sum_norm(h)            post-norm models

Nothing here reads a tensor or writes a node. The shapes that ``config.json`` implies and the residual
streams that may be rotated follow from the declaration.

What families that are not here yet would declare:

=======================  ==========================================================================
granite R2, mmBERT       ModernBERT as it is
jina-bert v2             new: ALiBi, another bias by relative position
Qwen3-VL                 new: interleaved ``sections``, features that are added to early layers
nomic v2-moe             new: a sublayer with experts
=======================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from onnx import TensorProto

from embedge.export.graph.rotary import Rope
from embedge.export.graph.values import LinearRef, ScaleSink
from embedge.export.source.config import Shape
from embedge.export.weights.rotated import ResidualStream
from embedge.export.weights.tensors import Adjustment, NormRef

Input = tuple[int, list[int | str]]  # ONNX element type and axes
TOKENS: list[int | str] = ["batch", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """The tokens that a token attends to, itself included.

    Attributes:
        reach: how many on either side, ``None`` for all.
        causal: whether those behind it are left out.
    """

    reach: int | None = None
    causal: bool = False


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """What reads and writes the stream, see the module's description.

    Attributes:
        linears: the Linears that read it, of one fused tensor or of several.
        out: the Linear that writes it.
        input_norm: the norm before ``linears``.
        output_norm: the norm of what ``out`` gives, before the addition.
        sum_norm: the norm behind the addition.
    """

    linears: Sequence[LinearRef]
    out: LinearRef
    input_norm: NormRef | None = None
    output_norm: NormRef | None = None
    sum_norm: NormRef | None = None


@dataclass(frozen=True, kw_only=True)
class Attention(Sublayer):
    """Multi-head attention; its ``linears`` are those of queries, keys and values.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads, each shared by as many query heads.
        head_size: channels of a head.
        span: what a token attends to.
        rope: rotary positions of queries and keys.
        query_norm: RMSNorm of every query head.
        key_norm: RMSNorm of every key head.
        value_epsilon: of an RMSNorm of every value head, which has no weights; ``None`` without one.
        scale: of the scores, ``None`` for 1 / √head_size.
    """

    heads: int
    kv_heads: int
    head_size: int
    span: Span = Span()
    rope: Rope | None = None
    query_norm: NormRef | None = None
    key_norm: NormRef | None = None
    value_epsilon: float | None = None
    scale: float | None = None

    @property
    def score_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return self.head_size**-0.5 if self.scale is None else self.scale

    @property
    def sink(self) -> ScaleSink | None:
        """What takes a scale of the mixed values; a norm of the values would take it away."""
        if self.value_epsilon is not None:
            return None
        repeats = self.heads // self.kv_heads
        groups = (self.kv_heads, repeats, self.head_size) if repeats > 1 else None
        return ScaleSink(linear=self.linears[2], groups=groups)

    @property
    def moves_value_bias(self) -> bool:
        """Whether the value bias is added behind the output projection, as rows of softmax sum to 1."""
        grouped = self.heads != self.kv_heads
        return not (grouped or self.span.causal or self.value_epsilon is not None)


@dataclass(frozen=True, kw_only=True)
class Mlp(Sublayer):
    """``out(activation(up(x)))``, or with ``linears`` gate and up ``out(activation(gate(x)) · up(x))``.

    Attributes:
        inner: the inner width, or the key of config.json that may say it.
        activation: by its transformers name.
    """

    inner: int | str
    activation: str


@dataclass(frozen=True, kw_only=True)
class TokenGate(Sublayer):
    """``out(activation(gate(h)) · token_norm(token_scale · token_linear(e)))``: ``e`` are the first layer's states.

    Its ``linears`` are ``gate`` alone, which has as many rows as ``token_linear``.

    Attributes:
        token_linear: the Linear that reads the states before the first layer, some rows of a tensor.
        token_norm: of what it gives.
        token_scale: a factor of its weight.
        activation: by its transformers name.
    """

    token_linear: LinearRef
    token_norm: NormRef
    token_scale: float
    activation: str


class Layer(NamedTuple):
    """A transformer block.

    Attributes:
        attention: the first sublayer.
        mlp: the second.
        token_gate: the third, where there is one.
        scale: a tensor of one number by which the states behind the layer are multiplied.
    """

    attention: Attention
    mlp: Mlp
    token_gate: TokenGate | None = None
    scale: str | None = None

    @property
    def sublayers(self) -> list[Sublayer]:
        """Those that there are, in order."""
        both: list[Sublayer] = [self.attention, self.mlp]
        return both if self.token_gate is None else [*both, self.token_gate]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model from token ids to token states; tables are named by their modules.

    Attributes:
        hidden_size: channels of a token state.
        max_length: most tokens of a text.
        layers: in order.
        token_table: a row per token.
        position_table: a row per position, added to the token's.
        first_position: row of a text's first token there.
        type_table: a row per token type, added too.
        relative_bias: score biases by T5's buckets of relative positions, a column per head.
        embedding_norm: norm of the sum of tables.
        final_norm: norm after the last layer.
        state_projection: a Linear behind ``final_norm``, by which pooled states become vectors.
        state_dim: width of those.
        token_aliases: tokens that have the state of another one, by their ids.
        token_head: a Linear to vectors of single tokens.
        multi_vector_dim: width of those.
        feature_writer: the Linear of a vision tower whose features take the places of tokens.
        images: whether the graph has the inputs for that.
        skips_prompts: whether pooling leaves out the tokens of a prompt, by an input of the graph.
        norm_offset: added to the weights of all RMSNorms: 1 where checkpoints hold them less 1.
        embedding_scale: what the rows of the token table are multiplied by.
    """

    hidden_size: int
    max_length: int
    layers: tuple[Layer, ...]
    token_table: str
    position_table: str | None = None
    first_position: int = 0
    type_table: str | None = None
    relative_bias: str | None = None
    embedding_norm: NormRef | None = None
    final_norm: NormRef | None = None
    state_projection: LinearRef | None = None
    state_dim: int | None = None
    token_aliases: Mapping[int, int] = field(default_factory=dict)
    token_head: LinearRef | None = None
    multi_vector_dim: int | None = None
    feature_writer: LinearRef | None = None
    images: bool = False
    skips_prompts: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0

    @property
    def inputs(self) -> dict[str, Input]:
        """The graph's inputs by name, in order; ``docs/reference/bundle-format.md`` lists them."""
        ids: Input = TensorProto.INT64, TOKENS
        found = {"input_ids": ids, "attention_mask": ids}
        if self.type_table is not None:
            found["token_type_ids"] = ids
        if self.images:
            found["position_ids"] = TensorProto.INT64, [3, *TOKENS]
            found["pool_mask"] = ids
            found["image_features"] = TensorProto.FLOAT, ["image_tokens", self.hidden_size]
            found["image_positions"] = TensorProto.INT64, ["image_tokens", 2]
        if self.skips_prompts:
            found["pool_mask"] = ids
        return found

    @property
    def pool_mask(self) -> str:
        """The input that says which tokens are pooled."""
        return "pool_mask" if self.images or self.skips_prompts else "attention_mask"

    @property
    def vector_size(self) -> int:
        """Channels of a pooled state behind the model's own Linears."""
        return self.hidden_size if self.state_dim is None else self.state_dim

    @property
    def sublayers(self) -> Iterator[Sublayer]:
        """Those of all layers, in order."""
        return (part for layer in self.layers for part in layer.sublayers)

    @property
    def linears(self) -> Iterator[LinearRef]:
        """All Linears of the model; rows of a fused one by themselves."""
        for part in self.sublayers:
            yield from (*part.linears, part.out)
            if isinstance(part, TokenGate):
                yield part.token_linear
        yield from (one for one in (self.state_projection, self.token_head) if one is not None)

    @property
    def token_gates(self) -> list[TokenGate]:
        """Those of all layers, in order."""
        return [layer.token_gate for layer in self.layers if layer.token_gate is not None]

    @property
    def norms(self) -> Iterator[NormRef]:
        """All norms of the model."""
        for part in self.sublayers:
            found = [part.input_norm, part.output_norm, part.sum_norm]
            if isinstance(part, Attention):
                found += [part.query_norm, part.key_norm]
            if isinstance(part, TokenGate):
                found.append(part.token_norm)
            yield from (norm for norm in found if norm is not None)
        yield from (n for n in (self.embedding_norm, self.final_norm) if n is not None)

    def adjustments(self) -> dict[str, Adjustment]:
        """Tensors that count as another multiple of what a checkpoint holds, plus a number."""
        found = {}
        if self.embedding_scale != 1.0:
            found[f"{self.token_table}.weight"] = Adjustment(scale=self.embedding_scale)
        if self.norm_offset:
            offset = Adjustment(offset=self.norm_offset)
            found |= {norm.weight: offset for norm in self.norms if norm.rms}
        for gate in self.token_gates:
            linear, scale = gate.token_linear, Adjustment(scale=gate.token_scale)
            found |= {linear.weight: scale, linear.bias: scale}
        return found

    def with_images(self) -> Architecture:
        """The same model with the inputs for images."""
        return replace(self, images=True)

    def text_only(self) -> Architecture:
        """The same model with token ids as its only inputs."""
        return replace(self, images=False, skips_prompts=False)

    def skipping_prompts(self) -> Architecture:
        """The same model with an input that says which tokens are pooled."""
        return replace(self, skips_prompts=True)

    def shapes(self) -> dict[str, Shape]:
        """Shapes of the modules' weights by canonical name, as far as config.json says them."""
        width, norms = self.hidden_size, (self.embedding_norm, self.final_norm)
        found: dict[str | None, Shape] = {
            self.token_table: (None, width),
            self.position_table: ("max_position_embeddings", width),
            self.type_table: ("type_vocab_size", width),
            self.relative_bias: ("relative_attention_num_buckets", self.layers[0].attention.heads),
            **{norm.name: (width,) for norm in norms if norm is not None},
        }
        if self.state_projection is not None:
            found[self.state_projection.name] = (self.state_dim, width)
        for gate in self.token_gates:
            found[gate.token_linear.name] = (gate.token_linear.stop, width)  # the last has all rows
        if self.token_head is not None:
            found[self.token_head.name] = (self.multi_vector_dim, width)
        named = {name: shape for name, shape in found.items() if name is not None}
        scales = {layer.scale: (1,) for layer in self.layers if layer.scale is not None}
        return {**named, **layer_shapes(self.layers, width), **scales}

    def streams(self) -> tuple[ResidualStream, ...]:
        """The residual stream, if it may be rotated: not where norms stand elsewhere than before, or have biases."""
        parts, final = list(self.sublayers), self.final_norm
        norms = [self.embedding_norm, final, *(part.input_norm for part in parts)]
        biased = any(norm is not None and norm.has_bias for norm in norms)
        mixed = any(part.sum_norm is not None or part.output_norm is not None for part in parts)
        if final is None or biased or mixed or self.token_gates:
            return ()
        stream = residual_stream(
            self.layers,
            self.hidden_size,
            writers=[] if self.feature_writer is None else [self.feature_writer],
            readers={} if self.token_head is None else {self.token_head: final},
        )
        stream = replace(
            stream,
            tables=(f"{self.token_table}.weight",),
            table_norm=self.embedding_norm,
            output=final.weight,
            centred=not final.rms,
        )
        return (stream,)


def residual_stream(
    layers: Iterable[Layer],
    width: int,
    *,
    writers: Sequence[LinearRef] = (),
    readers: Mapping[LinearRef, NormRef],
) -> ResidualStream:
    """The stream of some layers.

    Args:
        layers: the layers.
        width: channels of the stream.
        writers: Linears outside of the layers that write it.
        readers: Linears outside of the layers that read it, and the norm between.
    """
    parts = [part for layer in layers for part in layer.sublayers]
    between = {linear: part.input_norm for part in parts for linear in part.linears} | dict(readers)
    return ResidualStream(
        width=width,
        writers=[linear.name for linear in (*writers, *(part.out for part in parts))],
        readers={linear.name: norm.weight if norm else None for linear, norm in between.items()},
    )


def layer_shapes(layers: Iterable[Layer], width: int) -> dict[str, Shape]:
    """Shapes of the modules' weights of some layers on a stream of ``width`` channels."""
    found: dict[str, Shape] = {}
    for layer in layers:
        attention, mlp, gate = layer.attention, layer.mlp, layer.token_gate
        rows, kv_rows = (n * attention.head_size for n in (attention.heads, attention.kv_heads))
        for part, sizes in ((attention, (rows, kv_rows, kv_rows)), (mlp, (mlp.inner, mlp.inner))):
            by_rows = sorted(zip(part.linears, sizes, strict=False), key=lambda p: p[0].start or 0)
            found |= {linear.name: (linear.stop or size, width) for linear, size in by_rows}
            found[part.out.name] = (width, sizes[0])
            norms = (part.input_norm, part.output_norm, part.sum_norm)
            found |= {norm.name: (width,) for norm in norms if norm is not None}
        if gate is not None:
            found |= _gate_shapes(gate, width)
        of_heads = (attention.query_norm, attention.key_norm)
        found |= {norm.name: (attention.head_size,) for norm in of_heads if norm is not None}
    return found


def _gate_shapes(gate: TokenGate, width: int) -> dict[str, Shape]:
    """Shapes of a third sublayer's weights."""
    linear = gate.token_linear
    rows = None if linear.start is None or linear.stop is None else linear.stop - linear.start
    found: dict[str, Shape] = {
        gate.linears[0].name: (rows, width),
        gate.out.name: (width, rows),
        gate.token_norm.name: (rows,),
    }
    norms = (gate.input_norm, gate.output_norm, gate.sum_norm)
    return {**found, **{norm.name: (width,) for norm in norms if norm is not None}}
