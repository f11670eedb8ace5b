"""Scaled dot-product attention by the operator that is fastest for what is asked."""

from __future__ import annotations

from typing import Any

from onnx import TensorProto

from embedge.export.errors import CheckpointError
from embedge.export.graph.builder import CONTRIB, Graph


def attention(
    g: Graph,
    q: str,
    k: str,
    v: str,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    lengths: str | None = None,
    mask: str | None = None,
    causal: bool = False,
    window: int | None = None,
    tokens: str | None = None,
    head_size: int = 0,
    flash: str | None = None,
) -> str:
    """Scaled dot-product attention over ``[batch, tokens, heads · head_size]`` values.

    Where the scheme allows it, causal attention becomes ``GroupQueryAttention`` and attention without
    lengths or mask ``MultiHeadAttention``, ONNX Runtime's operators whose memory does not grow
    with the square of the tokens. On CUDA these two do everything. Whatever else is asked for is ONNX's
    ``Attention``, whose memory does grow so.

    Args:
        g: the graph.
        q: queries.
        k: keys, ``kv_heads`` of them.
        v: values, ``kv_heads`` of them.
        heads: query heads.
        kv_heads: key and value heads.
        scale: factor of the scores.
        lengths: int64 ``[batch]``, keys from there on are padding.
        mask: float32 ``[batch or 1, heads or 1, tokens, tokens]`` added to the scores.
        causal: no token sees a later one.
        window: where ``causal``, the tokens that a token sees, itself and those before; ``mask``
            says the same to the operators that have no windows.
        tokens: int64 scalar, padded tokens of the batch; needed where ``causal``.
        head_size: channels of a head; ``GroupQueryAttention`` takes multiples of 8.
        flash: bool scalar: where true, no row has padding, and ``MultiHeadAttention`` runs.
    """
    q, k, v = (g.scheme.attention_operand(g, t) for t in (q, k, v))
    grouped = causal and bool(tokens) and head_size % 8 == 0
    if g.scheme.cuda and causal and not grouped:
        raise CheckpointError(
            f"config.json: heads have {head_size} channels, and ONNX Runtime's causal attention on GPUs "
            "takes multiples of 8; export for the CPU: precisions int8, int4 or fp32"
        )
    if g.scheme.fused_attention and grouped and tokens:
        y = _causal_attention(g, q, k, v, heads, kv_heads, scale, window, tokens)
    elif g.scheme.cuda or (g.scheme.fused_attention and not (causal or mask or lengths)):
        y = _full_attention(g, q, k, v, heads, scale, lengths, mask)
    else:

        def plain() -> str:
            arguments = _without_trailing_blanks(q, k, v, mask or "", "", "", lengths or "")
            return g.op(
                "Attention",
                *arguments,
                q_num_heads=heads,
                kv_num_heads=kv_heads,
                scale=scale,
                is_causal=int(causal and not mask),
                softmax_precision=TensorProto.FLOAT,
            )

        def in_pieces() -> str:
            return _full_attention(g, q, k, v, heads, scale, None, None)

        y = g.choose(flash, in_pieces, plain) if flash else plain()
    return g.scheme.attention_result(g, y)


def _full_attention(
    g: Graph,
    q: str,
    k: str,
    v: str,
    heads: int,
    scale: float,
    lengths: str | None,
    mask: str | None,
) -> str:
    """``MultiHeadAttention``, over keys up to ``lengths`` and with ``mask`` where they are given."""
    padding = bias = ""
    if lengths:
        if f"int32.{lengths}" not in g.shared:
            g.shared[f"int32.{lengths}"] = g.op("Cast", lengths, to=TensorProto.INT32)
        padding = g.shared[f"int32.{lengths}"]
    if mask:
        if f"half.{mask}" not in g.shared:
            g.shared[f"half.{mask}"] = g.scheme.attention_mask(g, mask)
        bias = g.shared[f"half.{mask}"]
    return g.op(
        "MultiHeadAttention",
        *_without_trailing_blanks(q, k, v, "", padding, bias),
        domain=CONTRIB,
        num_heads=heads,
        scale=scale,
    )


def _causal_attention(
    g: Graph,
    q: str,
    k: str,
    v: str,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int | None,
    tokens: str,
) -> str:
    """``GroupQueryAttention`` over a prompt: every row counts as full, padding comes last."""
    if "causal.total" not in g.shared:
        last = g.op("Sub", tokens, g.const(1, "int64"))
        rows = g.op("Shape", q, start=0, end=1)
        lengths = g.op("Expand", last, rows)
        g.shared["causal.lengths"] = g.op("Cast", lengths, to=TensorProto.INT32)
        g.shared["causal.total"] = g.op("Cast", tokens, to=TensorProto.INT32)
    lengths, total = g.shared["causal.lengths"], g.shared["causal.total"]
    arguments = [q, k, v, "", "", lengths, total]
    limits: dict[str, Any] = {} if window is None else {"local_window_size": window}
    return g.op_n(
        "GroupQueryAttention",
        3,
        *arguments,
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=scale,
        **limits,
    )[0]


def _without_trailing_blanks(*arguments: str) -> list[str]:
    """Inputs of a node up to the last that is given."""
    last = max(number for number, name in enumerate(arguments) if name)
    return list(arguments[: last + 1])
