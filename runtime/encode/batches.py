"""Which sequences run together, and how they are padded. A sequence is a text or an image.

The limits come from :mod:`embedge.runtime.encode.batch_size`, where the call does not say.

Rules:
    * Longest first, so that a batch that does not fit into memory fails at once.
    * A batch has at most ``batch_size`` sequences and ``max_batch_tokens`` padded tokens (longest ×
      sequences), but always one sequence.
    * A batch ends where it would hold more padding than a further run costs. Long sequences get
      none: a graph may take another operator for them where a batch has no padding, one whose
      memory does not grow with the square of the tokens, and that must not depend on the batch.
    * Where batches run at the same time, there are as many as run at once, or twice as many, …, of
      about the same size, if there are enough sequences.
    * Padding is on the right. Batch × tokens is made a multiple of ``row_multiple`` by more tokens,
      or, where those would go past the model's limit, by filling sequences of one token, last.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.contract import LONG_TOKENS
from embedge.runtime.bundle.manifest import POOL_MASK
from embedge.runtime.encode.sequences import ImageTokens, TokenIds, TokenSequence

__all__ = ["pad_batch", "plan_batches"]


Ints = NDArray[np.int64]
Inputs = dict[str, NDArray[np.int64] | NDArray[np.float32]]


def plan_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_batch_tokens: int,
    concurrency: int = 1,
    max_padding: int | None = None,
) -> list[NDArray[np.intp]]:
    """Indices of the sequences of each batch, the largest first; every index once.

    Args:
        lengths: tokens of each sequence.
        batch_size: most sequences of a batch.
        max_batch_tokens: most padded tokens of a batch of more than one sequence.
        concurrency: batches that run at the same time.
        max_padding: most tokens of padding in a batch, ``None``: any number. Of sequences from 512
            tokens on it is 0.
    """
    if 1 < concurrency <= len(lengths):
        total = sum(lengths)
        needed = max(-(-total // max_batch_tokens), -(-len(lengths) // batch_size))
        share = -(-total // _round_up(needed, concurrency))
        # The longest one may end up on top of the share, or equal ones would leave a rest.
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
    sequences: Sequence[TokenSequence],
    *,
    input_names: Sequence[str],
    pad_token_id: int,
    row_multiple: int,
    max_length: int,
    hidden_size: int = 0,
) -> Inputs:
    """The graph's inputs by name for some sequences, each of at least one token.

    Args:
        sequences: texts and images.
        input_names: the inputs wanted, of those that a manifest may list.
        pad_token_id: the id that fills sequences.
        row_multiple: batch × tokens is a multiple of this.
        max_length: most tokens a sequence may have.
        hidden_size: width of an image feature, for graphs that take images.
    """
    shape = _padded_shape(
        len(sequences), max(map(len, sequences)), row_multiple=row_multiple, max_length=max_length
    )
    ids = np.full(shape, pad_token_id, np.int64)
    mask = np.zeros(shape, np.int64)
    mask[len(sequences) :, 0] = 1  # none without a token: its pooling would divide by zero
    for index, sequence in enumerate(sequences):
        ids[index, : len(sequence)] = sequence.ids
        mask[index, : len(sequence)][: sequence.attended] = 1
    everything: Inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in input_names:
        everything["token_type_ids"] = _token_types(sequences, shape)
    if POOL_MASK in input_names:
        everything[POOL_MASK] = _pooled(sequences, mask)
    if "image_features" in input_names:
        everything |= _image_inputs(sequences, mask, hidden_size)
    return {name: everything[name] for name in input_names}


def _token_types(sequences: Sequence[TokenSequence], shape: tuple[int, int]) -> Ints:
    types = np.zeros(shape, np.int64)
    for index, sequence in enumerate(sequences):
        if isinstance(sequence, TokenIds):
            types[index, : len(sequence)] = sequence.type_ids
    return types


def _pooled(sequences: Sequence[TokenSequence], mask: Ints) -> Ints:
    pooled = mask.copy()
    for index, sequence in enumerate(sequences):
        if isinstance(sequence, ImageTokens):
            pooled[index, : len(sequence)] = sequence.layout.pooled
        else:
            pooled[index, : sequence.unpooled] = 0
    return pooled


def _image_inputs(sequences: Sequence[TokenSequence], mask: Ints, hidden_size: int) -> Inputs:
    """What graphs of models with images take besides, for texts as well.

    Args:
        sequences: texts and images.
        mask: int64 ``[batch, tokens]``.
        hidden_size: width of an image feature.
    """
    tokens = mask.shape[1]
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int64), (3, *mask.shape)).copy()
    features = [np.zeros((0, hidden_size), np.float32)]
    replaced = [np.zeros((0, 2), np.int64)]  # index in the batch, index of the token
    for index, sequence in enumerate(sequences):
        if isinstance(sequence, ImageTokens):
            layout = sequence.layout
            positions[:, index, : len(sequence)] = layout.positions
            features.append(sequence.features)
            replaced.append(np.stack([np.full_like(layout.features, index), layout.features], 1))
    return {
        "position_ids": positions,
        "image_features": np.concatenate(features),
        "image_positions": np.concatenate(replaced),
    }


def _padded_shape(
    batch: int, tokens: int, *, row_multiple: int, max_length: int
) -> tuple[int, int]:
    """``(batch, tokens)`` of at least the given size whose product is a multiple."""
    # The padding of a long sequence must not depend on how many there are.
    step = row_multiple if tokens >= LONG_TOKENS else row_multiple // gcd(batch, row_multiple)
    padded = _round_up(tokens, step)
    if padded <= max(max_length, tokens):
        return batch, padded
    return _round_up(batch, row_multiple // gcd(tokens, row_multiple)), tokens


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
