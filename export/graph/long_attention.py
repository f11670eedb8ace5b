"""Attention of encoders over long texts, whose memory grows with the tokens and not with their square.

Graphs of models that take long texts hold two ways and take one as they run (``If``):

* Everything to everything: ``MultiHeadAttention`` without a mask, which ONNX Runtime computes block by
  block on the CPU (FlashAttention, Dao et al., arXiv 2205.14135). It takes no mask, so it serves batches
  without padding; the runtime pads no row from there on, so which way a row goes does not depend on its
  batch. From 512 tokens on it is 1.0 to 1.3 times as fast as
  ``Attention``, below 256 it is slower (lab note 34).
* A window: the tokens are cut into blocks as wide as the window reaches, and a block sees itself and its
  two neighbours (Longformer's sliding chunks, Beltagy et al., arXiv 2004.05150), where there are more than
  eight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from embedge.export.graph.builder import Graph
from embedge.export.graph.values import Value
from embedge.runtime.bundle.contract import LONG_TOKENS

FLASH_TOKENS = LONG_TOKENS  # from there on the runtime pads no row
FEWEST_BLOCKS = 8
LOWEST = -1e9  # added to the scores of tokens that are not seen


def is_flash(g: Graph, *, tokens: str, lengths: str) -> Value:
    """Whether the batch is long and has no padding, as a bool scalar.

    Args:
        g: the graph.
        tokens: int64 scalar, padded tokens of the batch.
        lengths: int64 ``[batch]``, tokens from there on are padding.
    """
    shortest = g.op("ReduceMin", lengths, g.const([0], "int64"), keepdims=0)
    return g.op(
        "And",
        g.op("Equal", shortest, tokens),
        g.op("GreaterOrEqual", tokens, g.const(FLASH_TOKENS, "int64")),
    )


@dataclass(frozen=True, kw_only=True)
class Window:
    """Sliding-window attention in blocks; all values but ``reach`` are names in the graph.

    Attributes:
        reach: tokens seen on either side.
        is_long: bool scalar: whether blocks pay.
        tokens: int64 scalar, padded tokens of the batch.
        mask: float32, added to the scores: ``[batch · blocks, 1, reach, 3 · reach]`` where ``is_long``, else
            ``[batch or 1, 1, tokens, tokens]``.
    """

    reach: int
    is_long: str
    tokens: str
    mask: str


def window_of(
    g: Graph, *, reach: int, tokens: str, lengths: str, short_mask: Callable[[], Value]
) -> Window:
    """What the layers of a window share.

    Args:
        g: the graph.
        reach: tokens seen on either side.
        tokens: int64 scalar, padded tokens of the batch.
        lengths: int64 ``[batch]``, tokens from there on are padding.
        short_mask: the mask of a short batch, float32 ``[batch or 1, 1, tokens, tokens]``.
    """
    is_long = g.op("Greater", tokens, g.const(FEWEST_BLOCKS * reach, "int64"))
    mask = g.choose(is_long, lambda: _block_mask(g, reach, tokens, lengths), short_mask)
    return Window(reach=reach, is_long=is_long, tokens=tokens, mask=mask)


def distances(g: Graph, tokens: str) -> Value:
    """int64 ``[tokens, tokens]``: position of the key less that of the query."""
    steps = g.op("Range", g.const(0, "int64"), tokens, g.const(1, "int64"))
    rows = g.op("Unsqueeze", steps, g.const([1], "int64"))
    return g.op("Sub", g.op("Unsqueeze", steps, g.const([0], "int64")), rows)


def band(g: Graph, tokens: str, *, before: int, after: int) -> Value:
    """Additive float32 mask ``[1, 1, tokens, tokens]``: 0 for ``before`` keys and ``after`` behind."""
    distance = distances(g, tokens)
    seen = g.op(
        "And",
        g.op("GreaterOrEqual", distance, g.const(-before, "int64")),
        g.op("LessOrEqual", distance, g.const(after, "int64")),
    )
    mask = g.op("Where", seen, g.const(0.0), g.const(LOWEST))
    return g.op("Unsqueeze", mask, g.const([0, 1], "int64"))


def padding_mask(g: Graph) -> Value:
    """Additive float32 mask ``[batch, 1, 1, tokens]``: 0 for a text's own tokens."""
    real = g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
    hidden = g.op("Mul", g.op("Sub", real, g.const(1.0)), g.const(-LOWEST))
    return g.op("Unsqueeze", hidden, g.const([1, 2], "int64"))


def _block_mask(g: Graph, reach: int, tokens: str, lengths: str) -> Value:
    """float32 ``[batch · blocks, 1, reach, 3 · reach]``: 0 where a token of a block is seen."""
    keys = np.arange(3 * reach) - reach  # relative to the block's first token
    distance = keys[None, :] - np.arange(reach)[:, None]
    near = np.where(np.abs(distance) <= reach, 0, LOWEST)
    zero, one = g.const(0, "int64"), g.const(1, "int64")
    width = g.const(reach, "int64")
    blocks = g.op("Range", zero, _blocks(g, reach, tokens), one)
    starts = g.op("Unsqueeze", g.op("Mul", blocks, width), g.const([1], "int64"))
    positions = g.op(
        "Unsqueeze", g.op("Add", starts, g.const(keys, "int64")), g.const([0], "int64")
    )
    ends = g.op("Unsqueeze", lengths, g.const([1, 2], "int64"))
    real = g.op(
        "And", g.op("GreaterOrEqual", positions, zero), g.op("Less", positions, ends)
    )  # [batch, blocks, 3 · reach]
    real = g.op("Reshape", real, g.const([-1, 1, 1, 3 * reach], "int64"))
    return g.op("Where", real, g.const(near, np.float32), g.const(LOWEST))


def _blocks(g: Graph, reach: int, tokens: str) -> Value:
    """int64 scalar: blocks of ``reach`` tokens, the last one filled up."""
    return g.op("Div", g.op("Add", tokens, g.const(reach - 1, "int64")), g.const(reach, "int64"))


def in_blocks(
    g: Graph,
    q: str,
    k: str,
    v: str,
    window: Window,
    widths: tuple[int, int],
    attend: Callable[..., Value],
) -> Value:
    """Attention of every block of queries to three blocks of keys, of the queries' shape.

    Args:
        g: the graph.
        q: queries, ``[batch, tokens, width]``.
        k: keys, likewise.
        v: values, likewise.
        window: see :class:`Window`.
        widths: channels of all query heads, and of all key heads.
        attend: attention of queries, keys and values, under the window's mask.
    """
    reach, (width, kv_width) = window.reach, widths
    one = g.const([1], "int64")
    whole = g.op("Mul", _blocks(g, reach, window.tokens), g.const(reach, "int64"))
    fill = g.op("Unsqueeze", g.op("Sub", whole, window.tokens), g.const([0], "int64"))
    before, none = g.const([0, 0, 0, 0], "int64"), g.const([0], "int64")
    q_pads = g.op("Concat", before, fill, none, axis=0)
    sides = g.op("Add", fill, g.const([reach], "int64"))
    kv_pads = g.op("Concat", g.const([0, reach, 0, 0], "int64"), sides, none, axis=0)
    end = g.op("Unsqueeze", whole, g.const([0], "int64"))

    def neighbours(x: str) -> Value:
        padded = g.op("Pad", x, kv_pads)
        parts = []
        for shift in (0, reach, 2 * reach):
            start = g.const([shift], "int64")
            part = g.op("Slice", padded, start, g.op("Add", start, end), one)
            parts.append(g.op("Reshape", part, g.const([-1, reach, kv_width], "int64")))
        return g.op("Concat", *parts, axis=1)

    queries = g.op("Reshape", g.op("Pad", q, q_pads), g.const([-1, reach, width], "int64"))
    y = attend(queries, neighbours(k), neighbours(v))
    rows = g.op("Shape", q, start=0, end=1)
    shape = g.op("Concat", rows, end, g.const([width], "int64"), axis=0)
    y = g.op("Reshape", y, shape)
    last = g.op("Unsqueeze", window.tokens, g.const([0], "int64"))
    return g.op("Slice", y, none, last, one)
