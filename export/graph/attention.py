"""Scaled dot-product attention by the operator that is fastest for what is asked.

Where the scheme allows it, causal attention becomes ``GroupQueryAttention`` and attention without
lengths or mask ``MultiHeadAttention``, ONNX Runtime's operators whose memory does not grow with the square
of the tokens. On CUDA these two do everything. Whatever else is asked for is ONNX's ``Attention``, whose
memory does grow so. On the CPU they are calls of functions (``fused_ops.py``) but between branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from onnx import TensorProto

from embedge.export.errors import CheckpointError
from embedge.export.graph.architecture import Architecture, Attention, Span
from embedge.export.graph.builder import Graph
from embedge.export.graph.long_attention import (
    FEWEST_BLOCKS,
    FLASH_TOKENS,
    Window,
    band,
    in_blocks,
    is_flash,
    padding_mask,
    window_of,
)
from embedge.export.graph.ops import CONTRIB, DOMAIN
from embedge.export.graph.relative_bias import relative_bias
from embedge.export.graph.scheme import Target
from embedge.export.graph.values import Value


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What tells the layers of one :class:`Span` which keys they see; all are values in the graph.

    Attributes:
        tokens: int64 scalar, padded tokens of the batch; needed where attention is causal.
        lengths: int64 ``[batch]``, keys from there on are padding.
        mask: float32 ``[batch or 1, heads or 1, tokens, tokens]`` added to the scores.
        flash: bool scalar: where true, no row has padding, and ``MultiHeadAttention`` runs.
        window: attention in blocks, where there is a long text; ``mask`` is the same as the window's.
    """

    tokens: str = ""
    lengths: str = ""
    mask: str = ""
    flash: str = ""
    window: Window | None = None


def seen_by(g: Graph, model: Architecture, span: Span, *, tokens: str, lengths: str) -> Seen:
    """Write what the layers of a span share.

    Args:
        g: the graph.
        model: the model.
        span: what a token attends to.
        tokens: int64 scalar, padded tokens of the batch.
        lengths: int64 ``[batch]``, tokens from there on are padding.
    """
    reach = span.reach
    if span.causal:
        # rows are padded on the right, so that a real token never sees padding
        mask = "" if reach is None else band(g, tokens, before=reach, after=0)
        return Seen(tokens=tokens, mask=mask)
    if reach is None:
        if model.relative_bias is not None:
            bias = relative_bias(g, f"{model.relative_bias}.weight", tokens, model.max_length)
            return Seen(mask=g.op("Add", bias, padding_mask(g)))
        long = g.scheme.target is Target.CPU and model.max_length > FLASH_TOKENS
        flash = is_flash(g, tokens=tokens, lengths=lengths) if long else ""
        return Seen(lengths=lengths, flash=flash)

    def whole_mask() -> Value:
        padding = padding_mask(g)
        return g.op("Add", band(g, tokens, before=reach, after=reach), padding)

    if g.scheme.target is Target.CUDA or not 0 < FEWEST_BLOCKS * reach < model.max_length:
        return Seen(mask=whole_mask())
    window = window_of(g, reach=reach, tokens=tokens, lengths=lengths, short_mask=whole_mask)
    return Seen(mask=window.mask, window=window)


def attention(g: Graph, spec: Attention, seen: Seen, q: str, k: str, v: str) -> Value:
    """Attention over ``[batch, tokens, heads · head_size]`` values.

    Args:
        g: the graph.
        spec: heads and their sizes; ``GroupQueryAttention`` takes sizes that are multiples of 8.
        seen: which keys are seen.
        q: queries.
        k: keys, ``kv_heads`` of them.
        v: values, ``kv_heads`` of them.

    Raises:
        CheckpointError: no operator of the CUDA provider takes such heads.
    """
    attend, window = partial(_attend, g, spec, seen), seen.window
    if window is None:
        return attend(q, k, v)
    widths = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    return g.choose(
        window.is_long,
        lambda: in_blocks(g, q, k, v, window, widths, attend),
        lambda: attend(q, k, v),
    )


def _attend(g: Graph, spec: Attention, seen: Seen, q: str, k: str, v: str) -> Value:
    target, causal = g.scheme.target, spec.span.causal
    on_cuda = target is Target.CUDA  # whose kernels are of float16
    if on_cuda:
        q, k, v = (g.op("Cast", t, to=TensorProto.FLOAT16) for t in (q, k, v))
    grouped = causal and spec.head_size % 8 == 0
    if on_cuda and causal and not grouped:
        raise CheckpointError(
            f"config.json: heads have {spec.head_size} channels, and ONNX Runtime's causal attention on "
            "GPUs takes multiples of 8; export for the CPU: precisions int8, int4 or fp32"
        )
    if target is not Target.ONNX and grouped:
        y = _group_query_attention(g, spec, seen.tokens, q, k, v)
    elif on_cuda:
        y = _multi_head_attention(g, spec, seen, q, k, v)
    elif target is Target.CPU and not (causal or seen.mask):
        y = _unmasked_attention(g, spec, seen, q, k, v)
    else:
        y = _onnx_attention(g, spec, seen, q, k, v)
    return g.op("Cast", y, to=TensorProto.FLOAT) if on_cuda else y


def _unmasked_attention(g: Graph, spec: Attention, seen: Seen, q: str, k: str, v: str) -> Value:
    """To all tokens, or to those before the padding."""
    if seen.flash:
        whole = Seen()
        return g.choose(
            seen.flash,
            lambda: _multi_head_attention(g, spec, whole, q, k, v),
            lambda: _onnx_attention(g, spec, seen, q, k, v),
        )
    sizes: dict[str, Any] = {"num_heads": spec.heads, "scale": spec.score_scale}
    if not seen.lengths:
        k, v = (_head_for_each_query(g, spec, x) for x in (k, v))
        return g.op("FullAttention", q, k, v, domain=DOMAIN, **sizes)
    sizes["kv_num_heads"] = spec.kv_heads
    return g.op("PaddedAttention", q, k, v, seen.lengths, domain=DOMAIN, **sizes)


def _onnx_attention(g: Graph, spec: Attention, seen: Seen, q: str, k: str, v: str) -> Value:
    return g.op(
        "Attention",
        *_without_trailing_blanks(q, k, v, seen.mask, "", "", seen.lengths),
        q_num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
        scale=spec.score_scale,
        is_causal=int(spec.span.causal and not seen.mask),
        softmax_precision=TensorProto.FLOAT,
    )


def _multi_head_attention(g: Graph, spec: Attention, seen: Seen, q: str, k: str, v: str) -> Value:
    k, v = (_head_for_each_query(g, spec, x) for x in (k, v))
    lengths, mask = seen.lengths, seen.mask
    padding = bias = ""
    if lengths:
        padding = g.once(f"int32.{lengths}", lambda: g.op("Cast", lengths, to=TensorProto.INT32))
    if mask:
        bias = g.once(f"half.{mask}", lambda: _half_mask(g, mask))
    return g.op(
        "MultiHeadAttention",
        *_without_trailing_blanks(q, k, v, "", padding, bias),
        domain=CONTRIB,
        num_heads=spec.heads,
        scale=spec.score_scale,
    )


def _head_for_each_query(g: Graph, spec: Attention, x: str) -> str:
    """Keys or values whose heads are repeated for the query heads that share them, where they do."""
    repeats = spec.heads // spec.kv_heads
    if repeats == 1:
        return x
    x = g.op("Reshape", x, g.const([0, 0, spec.kv_heads, 1, spec.head_size], "int64"))
    x = g.op("Expand", x, g.const([1, 1, 1, repeats, 1], "int64"))
    return g.op("Reshape", x, g.const([0, 0, spec.heads * spec.head_size], "int64"))


def _half_mask(g: Graph, mask: str) -> Value:
    # -1e9 would become -inf, and a padded row that sees only padding NaN, which spreads
    return g.op("Cast", g.op("Max", mask, g.const(-3e4)), to=TensorProto.FLOAT16)


def _group_query_attention(g: Graph, spec: Attention, tokens: str, q: str, k: str, v: str) -> Value:
    """Attention over a prompt: every row counts as full, padding comes last."""

    def whole_rows() -> Value:
        last = g.op("Sub", tokens, g.const(1, "int64"))
        lengths = g.op("Expand", last, g.op("Shape", q, start=0, end=1))
        return g.op("Cast", lengths, to=TensorProto.INT32)

    lengths = g.once("causal.lengths", whole_rows)
    total = g.once("causal.total", lambda: g.op("Cast", tokens, to=TensorProto.INT32))
    reach = spec.span.reach
    options: dict[str, Any] = {
        "num_heads": spec.heads,
        "kv_num_heads": spec.kv_heads,
        "scale": spec.score_scale,
    }
    if g.scheme.target is Target.CPU:  # the attributes of a function are all given
        options["local_window_size"] = -1 if reach is None else reach + 1
        return g.op("CausalAttention", q, k, v, lengths, total, domain=DOMAIN, **options)
    if reach is not None:
        options["local_window_size"] = reach + 1
    arguments = (q, k, v, "", "", lengths, total)
    return g.op_n("GroupQueryAttention", 3, *arguments, domain=CONTRIB, **options)[0]


def _without_trailing_blanks(*arguments: str) -> list[str]:
    """Inputs of a node up to the last that is given."""
    last = max(number for number, name in enumerate(arguments) if name)
    return list(arguments[: last + 1])
