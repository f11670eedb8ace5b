from __future__ import annotations

import numpy as np
import pytest

from embedge.runtime._batching import pad_batch, plan_batches
from embedge.runtime._tokenize import TokenIds

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def tokens(count: int, first: int = 10) -> TokenIds:
    ids = np.arange(first, first + count)
    return TokenIds(ids, np.ones_like(ids), False)


def test_every_text_is_in_one_batch_longest_first() -> None:
    lengths = [3, 9, 1, 9, 5]
    batches = plan_batches(lengths, batch_size=2, max_batch_tokens=1000)
    assert [list(batch) for batch in batches] == [[1, 3], [4, 0], [2]]


def test_no_text_gives_no_batch() -> None:
    assert plan_batches([], batch_size=2, max_batch_tokens=10) == []


@pytest.mark.parametrize(("limit", "sizes"), [(20, [2, 2, 1]), (9, [1, 1, 1, 1, 1]), (1, [1] * 5)])
def test_padded_tokens_bound_a_batch_but_never_empty_it(limit: int, sizes: list[int]) -> None:
    batches = plan_batches([9, 9, 9, 9, 9], batch_size=32, max_batch_tokens=limit)
    assert [len(batch) for batch in batches] == sizes


def test_rows_are_padded_on_the_right() -> None:
    batch = pad_batch(
        [tokens(3), tokens(1, 50)],
        input_names=INPUTS,
        pad_token_id=7,
        row_multiple=1,
        max_length=16,
    )
    assert batch.inputs["input_ids"].tolist() == [[10, 11, 12], [50, 7, 7]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.inputs["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {array.dtype for array in batch.inputs.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    ("rows", "length", "multiple", "shape"),
    [
        (1, 4, 1, (1, 4)),
        (1, 4, 2, (1, 4)),
        (1, 5, 2, (1, 6)),
        (2, 5, 2, (2, 5)),
        (3, 5, 4, (3, 8)),
        (6, 5, 4, (6, 6)),
        (1, 7, 2, (2, 7)),  # a column more would pass the limit of 7: a row instead
        (3, 7, 4, (4, 7)),
    ],
)
def test_batch_times_tokens_is_a_multiple_within_the_limit(
    rows: int, length: int, multiple: int, shape: tuple[int, int]
) -> None:
    limit = 7 if length == 7 else 16
    batch = pad_batch(
        [tokens(length)] * rows,
        input_names=INPUTS,
        pad_token_id=0,
        row_multiple=multiple,
        max_length=limit,
    )
    mask = batch.inputs["attention_mask"]
    assert mask.shape == shape
    assert batch.texts == rows
    assert mask[:rows].sum() == rows * length
    assert (mask[rows:].sum(axis=1) == 1).all()  # no row without a token
