"""What holds of every plan of batches, and of every padded batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedge.runtime.bundle.contract import LONG_TOKENS
from embedge.runtime.encode.batches import pad_batch, plan_batches
from embedge.runtime.encode.sequences import TokenIds

checked = settings(derandomize=True, deadline=None, max_examples=80, database=None)

LENGTHS = st.lists(st.one_of(st.integers(0, 40), st.integers(500, 530)), max_size=60)
LIMITS: dict[str, Any] = {
    "batch_size": st.integers(1, 20),
    "max_batch_tokens": st.integers(1, 2000),
    "concurrency": st.integers(1, 9),
    "max_padding": st.none() | st.integers(0, 60),
}


def plan(lengths: list[int], limits: dict[str, Any]) -> list[list[int]]:
    return [batch.tolist() for batch in plan_batches(lengths, **limits)]


@pytest.mark.slow
@checked
@given(lengths=LENGTHS, limits=st.fixed_dictionaries(LIMITS))
def test_every_index_is_in_one_batch(lengths: list[int], limits: dict[str, Any]) -> None:
    batches = plan(lengths, limits)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@pytest.mark.slow
@checked
@given(lengths=LENGTHS, limits=st.fixed_dictionaries(LIMITS))
def test_batches_keep_every_limit_or_are_one_sequence(
    lengths: list[int], limits: dict[str, Any]
) -> None:
    for batch in plan(lengths, limits):
        sizes = [max(1, lengths[index]) for index in batch]
        assert len(batch) <= limits["batch_size"]
        assert len(batch) == 1 or max(sizes) * len(batch) <= limits["max_batch_tokens"]
        if limits["max_padding"] is not None:
            padding = max(sizes) * len(batch) - sum(sizes)
            assert padding <= (0 if max(sizes) >= LONG_TOKENS else limits["max_padding"])


@pytest.mark.slow
@checked
@given(lengths=LENGTHS, limits=st.fixed_dictionaries(LIMITS))
def test_the_longest_come_first_and_equals_keep_their_order(
    lengths: list[int], limits: dict[str, Any]
) -> None:
    order = [index for batch in plan(lengths, limits) for index in batch]
    assert order == sorted(order, key=lambda index: (-max(1, lengths[index]), index))


@pytest.mark.slow
@checked
@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(510, 520)), min_size=1, max_size=12),
    multiple=st.integers(1, 8),
    room=st.integers(0, 9),
)
def test_padding_makes_the_multiple_and_leaves_every_token(
    lengths: list[int], multiple: int, room: int
) -> None:
    sequences = [
        TokenIds(np.arange(1, length + 1), np.ones(length, np.int64), False) for length in lengths
    ]
    inputs = pad_batch(
        sequences,
        input_names=("input_ids", "attention_mask", "token_type_ids"),
        pad_token_id=0,
        row_multiple=multiple,
        max_length=max(lengths) + room,
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    batch, tokens = ids.shape
    assert batch * tokens % multiple == 0
    assert tokens <= max(lengths) + max(room, 0)
    assert batch < len(lengths) + multiple and tokens < max(lengths) + multiple
    for index, length in enumerate(lengths):
        assert ids[index].tolist() == [*range(1, length + 1), *[0] * (tokens - length)]
        assert mask[index].tolist() == [1] * length + [0] * (tokens - length)
    assert mask[len(lengths) :].sum(axis=1).tolist() == [1] * (batch - len(lengths))
