"""Texts of the tiny bundles' words, and their token ids."""

from __future__ import annotations

CLS, SEP, UNK = 2, 3, 1
FIRST_WORD = 4  # id of "w0"
TOLERANCE = 1e-6  # float32 sums of at most 16 tokens in another order


def ids(*words: int) -> list[int]:
    """Ids of the text "w<a> w<b> …" with its special tokens."""
    return [CLS, *(FIRST_WORD + word for word in words), SEP]


def distinct(count: int, words: int) -> list[str]:
    """Texts of some words each, of which no two are the same."""
    rest = "w1 " * (words - 2) if words > 1 else ""
    return [f"{rest}w{i % 60} w{i // 60}" if words > 1 else f"w{i}" for i in range(count)]
