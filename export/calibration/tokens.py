"""From calibration texts to batches of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_TOKENS_PER_TEXT = 256
_BATCH_TOKENS = 1024
_STATE_BYTES = 96 * 1024 * 1024  # of calibration states held between layers


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Right-padded calibration tokens, int64 ``[batch, tokens]`` each."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]

    def feeds(self, names: Iterable[str]) -> dict[str, NDArray[np.int64]]:
        """The graph inputs of the given names."""
        values = {"input_ids": self.ids, "attention_mask": self.mask}
        values["token_type_ids"] = np.zeros_like(self.ids)
        return {name: values[name] for name in names}


def token_batches(ids: Sequence[Sequence[int]], pad: int, hidden_size: int) -> list[TokenBatch]:
    """Sort texts by length and pad them to batches, as many as memory for their states allows.

    Args:
        ids: token ids of every calibration text.
        pad: id that fills rows on the right.
        hidden_size: width of a token's state, float32.
    """
    budget = _STATE_BYTES // (4 * hidden_size)
    kept: list[Sequence[int]] = []
    for text in ids:
        if not text:
            continue
        if sum(map(len, kept)) + len(text) > budget and kept:
            break
        kept.append(text[:MAX_TOKENS_PER_TEXT])
    batches: list[list[Sequence[int]]] = []
    for text in sorted(kept, key=len):
        if not batches or (len(batches[-1]) + 1) * len(text) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(text)
    return [_padded(batch, pad) for batch in batches]


def _padded(texts: Sequence[Sequence[int]], pad: int) -> TokenBatch:
    shape = len(texts), max(map(len, texts))
    ids, mask = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return TokenBatch(ids=ids, mask=mask)
