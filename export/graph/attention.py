"""Scaled dot-product attention by the operator that is fastest for what is asked."""

from __future__ import annotations

from typing import Any

from onnx import TensorProto

from embedge.export.errors import CheckpointError
from embedge.export.graph.builder import Graph
from embedge.export.graph.ops import CONTRIB
from embedge.export.graph.scheme import Target
from embedge.export.graph.values import Value


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
) -> Value:
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
    target = g.scheme.target
    on_cuda = target is Target.CUDA  # whose kernels are of float16
    if on_cuda:
        q, k, v = (g.op("Cast", t, to=TensorProto.FLOAT16) for t in (q, k, v))
    grouped = causal and bool(tokens) and head_size % 8 == 0
    if on_cuda and causal and not grouped:
        raise CheckpointError(
            f"config.json: heads have {head_size} channels, and ONNX Runtime's causal attention on GPUs "
            "takes multiples of 8; export for the CPU: precisions int8, int4 or fp32"
        )
    if target is not Target.ONNX and grouped and tokens:
        y = _causal_attention(g, q, k, v, heads, kv_heads, scale, window, tokens)
    elif on_cuda or (target is Target.CPU and not (causal or mask or lengths)):
        y = _full_attention(g, q, k, v, heads, scale, lengths, mask)
    else:

        def plain() -> Value:
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

        def in_pieces() -> Value:
            return _full_attention(g, q, k, v, heads, scale, None, None)

        y = g.choose(flash, in_pieces, plain) if flash else plain()
    return g.op("Cast", y, to=TensorProto.FLOAT) if on_cuda else y


def _full_attention(
    g: Graph,
    q: str,
    k: str,
    v: str,
    heads: int,
    scale: float,
    lengths: str | None,
    mask: str | None,
) -> Value:
    """``MultiHeadAttention``, over keys up to ``lengths`` and with ``mask`` where they are given."""
    padding = bias = ""
    if lengths:
        rows = lengths
        padding = g.once(f"int32.{rows}", lambda: g.op("Cast", rows, to=TensorProto.INT32))
    if mask:
        bias = g.once(f"half.{mask}", lambda: _half_mask(g, mask))
    return g.op(
        "MultiHeadAttention",
        *_without_trailing_blanks(q, k, v, "", padding, bias),
        domain=CONTRIB,
        num_heads=heads,
        scale=scale,
    )


def _half_mask(g: Graph, mask: str) -> Value:
    # -1e9 would become -inf, and a padded row that sees only padding NaN, which spreads
    return g.op("Cast", g.op("Max", mask, g.const(-3e4)), to=TensorProto.FLOAT16)


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
) -> Value:
    """``GroupQueryAttention`` over a prompt: every row counts as full, padding comes last."""

    def full_lengths() -> Value:
        last = g.op("Sub", tokens, g.const(1, "int64"))
        lengths = g.op("Expand", last, g.op("Shape", q, start=0, end=1))
        return g.op("Cast", lengths, to=TensorProto.INT32)

    lengths = g.once("causal.lengths", full_lengths)
    total = g.once("causal.total", lambda: g.op("Cast", tokens, to=TensorProto.INT32))
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
