"""Widths and depths of published embedding models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Size:
    """Widths and depths.

    Attributes:
        hidden: channels of the residual stream.
        inner: of the MLP.
        layers: in number.
        heads: query heads.
        kv_heads: key heads.
        head_size: channels of a head.
        vocabulary: rows of the token table.
        positions: most tokens of a text.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Linears of a Llama-like layer: name, then out and in features."""
        rows, kv_rows = self.heads * self.head_size, self.kv_heads * self.head_size
        sizes = {
            "self_attn.q_proj": (rows, self.hidden),
            "self_attn.k_proj": (kv_rows, self.hidden),
            "self_attn.v_proj": (kv_rows, self.hidden),
            "self_attn.o_proj": (self.hidden, rows),
        }
        sizes |= {f"mlp.{name}_proj": (self.inner, self.hidden) for name in ("gate", "up")}
        return sizes | {"mlp.down_proj": (self.hidden, self.inner)}


SIZES = {
    "v5-nano": Size(
        hidden=768,
        inner=3072,
        layers=12,
        heads=12,
        kv_heads=12,
        head_size=64,
        vocabulary=128256,
        positions=8192,
    ),
    "v5-small": Size(
        hidden=1024,
        inner=3072,
        layers=28,
        heads=16,
        kv_heads=8,
        head_size=128,
        vocabulary=151936,
        positions=32768,
    ),
    "embeddinggemma": Size(
        hidden=768,
        inner=1152,
        layers=24,
        heads=3,
        kv_heads=1,
        head_size=256,
        vocabulary=262144,
        positions=2048,
    ),
    "nomic": Size(
        hidden=768,
        inner=3072,
        layers=12,
        heads=12,
        kv_heads=12,
        head_size=64,
        vocabulary=30528,
        positions=8192,
    ),
}
