"""Which texts run together, and how they are padded.

Rules:
    * Longest first, so that a batch that does not fit into memory fails at once.
    * A batch has at most ``batch_size`` texts and ``max_batch_tokens`` padded tokens (longest ×
      texts), but always one text.
    * Where batches run at the same time, there are as many as lanes, or twice as many, …, of about
      the same size, if there are enough texts.
    * Padding is on the right. Batch × tokens is made a multiple of ``row_multiple`` by token
      columns, or, where those would go past the model's limit, by rows of one token that are
      dropped again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from embedge.runtime._tokenize import TokenIds

__all__ = ["PaddedBatch", "pad_batch", "plan_batches"]


@dataclass(frozen=True)
class PaddedBatch:
    """Inputs of a graph, int64 ``[batch, tokens]`` each, and the number of texts among the rows."""

    inputs: dict[str, NDArray[np.int64]]
    texts: int


def plan_batches(
    lengths: Sequence[int], *, batch_size: int, max_batch_tokens: int, lanes: int = 1
) -> list[NDArray[np.intp]]:
    """Indices of the texts of each batch, the largest first; every index once.

    Args:
        lengths: tokens of each text.
        batch_size: most texts of a batch.
        max_batch_tokens: most padded tokens of a batch of more than one text.
        lanes: batches that run at the same time.
    """
    if 1 < lanes <= len(lengths):
        total = sum(lengths)
        needed = max(-(-total // max_batch_tokens), -(-len(lengths) // batch_size))
        share = -(-total // _round_up(needed, lanes))
        # The longest text may end up on top of the share, or equal ones would leave a rest.
        max_batch_tokens = min(max_batch_tokens, share + max(lengths) - 1)
    # Stable, so that equal lengths keep their order and a run can be repeated exactly.
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        count = max(1, min(batch_size, max_batch_tokens // longest))
        batches.append(order[start : start + count])
        start += count
    return batches


def pad_batch(
    texts: Sequence[TokenIds],
    *,
    input_names: Sequence[str],
    pad_token_id: int,
    row_multiple: int,
    max_length: int,
) -> PaddedBatch:
    """The graph's inputs for some texts, each of at least one token.

    Args:
        texts: token ids of the texts.
        input_names: the inputs wanted, of ``input_ids``, ``attention_mask``, ``token_type_ids``.
        pad_token_id: the id that fills rows.
        row_multiple: batch × tokens is a multiple of this.
        max_length: most tokens a row may have.
    """
    rows, tokens = _padded_shape(
        len(texts), max(map(len, texts)), row_multiple=row_multiple, max_length=max_length
    )
    ids = np.full((rows, tokens), pad_token_id, np.int64)
    mask = np.zeros((rows, tokens), np.int64)
    types = np.zeros((rows, tokens), np.int64)
    mask[len(texts) :, 0] = 1  # no row without a token: its pooling would divide by zero
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text.ids
        mask[row, : len(text)] = 1
        types[row, : len(text)] = text.type_ids
    everything = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return PaddedBatch({name: everything[name] for name in input_names}, len(texts))


def _padded_shape(rows: int, tokens: int, *, row_multiple: int, max_length: int) -> tuple[int, int]:
    """``(batch, tokens)`` of at least the given size whose product is a multiple."""
    padded = _round_up(tokens, row_multiple // gcd(rows, row_multiple))
    if padded <= max(max_length, tokens):
        return rows, padded
    return _round_up(rows, row_multiple // gcd(tokens, row_multiple)), tokens


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
