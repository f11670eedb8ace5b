"""Which rows run together, and how they are padded. A row is a text or an image.

Rules:
    * Longest first, so that a batch that does not fit into memory fails at once.
    * A batch has at most ``batch_size`` rows and ``max_batch_tokens`` padded tokens (longest ×
      rows), but always one row.
    * A batch ends where its rows would hold more padding than a further run costs. Long rows get
      none: a graph may take another operator for them where a batch has no padding, one whose
      memory does not grow with the square of the tokens, and that must not depend on the batch.
    * Where batches run at the same time, there are as many as lanes, or twice as many, …, of about
      the same size, if there are enough rows.
    * Padding is on the right. Batch × tokens is made a multiple of ``row_multiple`` by token
      columns, or, where those would go past the model's limit, by rows of one token that are
      dropped again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.contract import LONG_TOKENS
from embedge.runtime.encode.tokenizer import TokenIds
from embedge.runtime.images.layout import ImageRow

__all__ = ["ImageTokens", "PaddedBatch", "Row", "pad_batch", "plan_batches"]


Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ImageTokens:
    """One image: its row, and float32 ``[features, hidden]`` from the vision tower."""

    row: ImageRow
    features: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.row.ids)


Row: TypeAlias = TokenIds | ImageTokens


@dataclass(frozen=True)
class PaddedBatch:
    """Inputs of a graph by name, and how many of their rows are not filling."""

    inputs: dict[str, NDArray[np.int64] | NDArray[np.float32]]
    rows: int


def plan_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_batch_tokens: int,
    lanes: int = 1,
    max_padding: int | None = None,
) -> list[NDArray[np.intp]]:
    """Indices of the rows of each batch, the largest first; every index once.

    Args:
        lengths: tokens of each row.
        batch_size: most rows of a batch.
        max_batch_tokens: most padded tokens of a batch of more than one row.
        lanes: batches that run at the same time.
        max_padding: most tokens of a batch that only fill its rows, ``None``: any number. Of rows from
            512 tokens on it is 0.
    """
    if 1 < lanes <= len(lengths):
        total = sum(lengths)
        needed = max(-(-total // max_batch_tokens), -(-len(lengths) // batch_size))
        share = -(-total // _round_up(needed, lanes))
        # The longest row may end up on top of the share, or equal ones would leave a rest.
        max_batch_tokens = min(max_batch_tokens, share + max(lengths) - 1)
    # Stable, so that equal lengths keep their order and a run can be repeated exactly.
    sizes = np.maximum(np.asarray(lengths, np.int64), 1)
    order = np.argsort(-sizes, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = int(sizes[order[start]])
        count = max(1, min(batch_size, max_batch_tokens // longest))
        batch = order[start : start + count]
        if max_padding is not None:
            limit = 0 if longest >= LONG_TOKENS else max_padding
            padding = np.cumsum(longest - sizes[batch])
            batch = batch[: np.searchsorted(padding, limit, side="right")]
        batches.append(batch)
        start += len(batch)
    return batches


def pad_batch(
    rows: Sequence[Row],
    *,
    input_names: Sequence[str],
    pad_token_id: int,
    row_multiple: int,
    max_length: int,
    hidden_size: int = 0,
) -> PaddedBatch:
    """The graph's inputs for some rows, each of at least one token.

    Args:
        rows: texts and images.
        input_names: the inputs wanted, of those that a manifest may list.
        pad_token_id: the id that fills rows.
        row_multiple: batch × tokens is a multiple of this.
        max_length: most tokens a row may have.
        hidden_size: width of an image feature, for graphs that take images.
    """
    shape = _padded_shape(
        len(rows), max(map(len, rows)), row_multiple=row_multiple, max_length=max_length
    )
    ids = np.full(shape, pad_token_id, np.int64)
    mask = np.zeros(shape, np.int64)
    mask[len(rows) :, 0] = 1  # no row without a token: its pooling would divide by zero
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row.row.ids if isinstance(row, ImageTokens) else row.ids
        mask[index, : len(row)] = 1
    everything: dict[str, NDArray[np.int64] | NDArray[np.float32]] = {
        "input_ids": ids,
        "attention_mask": mask,
    }
    if "token_type_ids" in input_names:
        everything["token_type_ids"] = _token_types(rows, shape)
    if "image_features" in input_names:
        everything |= _image_inputs(rows, mask, hidden_size)
    return PaddedBatch({name: everything[name] for name in input_names}, len(rows))


def _token_types(rows: Sequence[Row], shape: tuple[int, int]) -> Ints:
    types = np.zeros(shape, np.int64)
    for index, row in enumerate(rows):
        if isinstance(row, TokenIds):
            types[index, : len(row)] = row.type_ids
    return types


def _image_inputs(
    rows: Sequence[Row], mask: Ints, hidden_size: int
) -> dict[str, NDArray[np.int64] | NDArray[np.float32]]:
    """What graphs of models with images take besides, for texts as well.

    Args:
        rows: texts and images.
        mask: int64 ``[batch, tokens]``.
        hidden_size: width of an image feature.
    """
    tokens = mask.shape[1]
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int64), (3, *mask.shape)).copy()
    pooled = mask.copy()
    features = [np.zeros((0, hidden_size), np.float32)]
    places = [np.zeros((0, 2), np.int64)]
    for index, row in enumerate(rows):
        if isinstance(row, ImageTokens):
            positions[:, index, : len(row)] = row.row.positions
            pooled[index, : len(row)] = row.row.pooled
            features.append(row.features)
            where = row.row.features
            places.append(np.stack([np.full_like(where, index), where], axis=1))
    return {
        "position_ids": positions,
        "pool_mask": pooled,
        "image_features": np.concatenate(features),
        "image_positions": np.concatenate(places),
    }


def _padded_shape(rows: int, tokens: int, *, row_multiple: int, max_length: int) -> tuple[int, int]:
    """``(batch, tokens)`` of at least the given size whose product is a multiple."""
    # the padding of a long row must not depend on how many rows there are
    columns = row_multiple if tokens >= LONG_TOKENS else row_multiple // gcd(rows, row_multiple)
    padded = _round_up(tokens, columns)
    if padded <= max(max_length, tokens):
        return rows, padded
    return _round_up(rows, row_multiple // gcd(tokens, row_multiple)), tokens


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
