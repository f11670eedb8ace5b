from __future__ import annotations

import numpy as np
import pytest

from embedge.runtime.encode.batches import pad_batch, plan_batches
from embedge.runtime.encode.sequences import TokenIds

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


def test_long_rows_run_with_their_equals_alone() -> None:
    lengths = [511, 600, 512, 600, 505, 512, 599]
    found = plan_batches(lengths, batch_size=32, max_batch_tokens=10_000, max_padding=32)
    assert [[lengths[i] for i in batch] for batch in found] == [
        [600, 600],
        [599],
        [512, 512],
        [511, 505],
    ]
    padded = plan_batches(lengths, batch_size=32, max_batch_tokens=10_000)
    assert [len(batch) for batch in padded] == [7]


def test_rows_are_padded_on_the_right() -> None:
    batch = pad_batch(
        [tokens(3), tokens(1, 50)],
        input_names=INPUTS,
        pad_token_id=7,
        row_multiple=1,
        max_length=16,
    )
    assert batch["input_ids"].tolist() == [[10, 11, 12], [50, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


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
        (2, 512 + 1, 2, (2, 512 + 2)),  # a long row is padded as if it were alone
    ],
)
def test_batch_times_tokens_is_a_multiple_within_the_limit(
    rows: int, length: int, multiple: int, shape: tuple[int, int]
) -> None:
    limit = 7 if length == 7 else 1000
    batch = pad_batch(
        [tokens(length)] * rows,
        input_names=INPUTS,
        pad_token_id=0,
        row_multiple=multiple,
        max_length=limit,
    )
    mask = batch["attention_mask"]
    assert mask.shape == shape
    assert mask[:rows].sum() == rows * length
    assert (mask[rows:].sum(axis=1) == 1).all()  # no row without a token


@pytest.mark.parametrize(
    ("lengths", "limit", "sizes"),
    [
        ([8] * 6, 512, [3, 3]),  # one batch would leave a thread idle
        ([8] * 3, 512, [2, 1]),
        ([8] * 2, 512, [1, 1]),
        ([8] * 24, 64, [6, 6, 6, 6]),  # three of 8 would leave a thread idle for the third
        ([100, 10], 512, [1, 1]),
        ([90, *[10] * 9], 512, [1, 9]),
        ([8], 512, [1]),
    ],
)
def test_there_are_batches_for_every_thread(
    lengths: list[int], limit: int, sizes: list[int]
) -> None:
    batches = plan_batches(lengths, batch_size=32, max_batch_tokens=limit, concurrency=2)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))


def test_fewer_texts_than_threads_run_as_one_batch() -> None:
    assert len(plan_batches([8] * 3, batch_size=32, max_batch_tokens=512, concurrency=4)) == 1


@pytest.mark.parametrize("concurrency", [1, 2, 7])
def test_threads_keep_to_both_limits(concurrency: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 40, size=300).tolist()
    batches = plan_batches(lengths, batch_size=9, max_batch_tokens=100, concurrency=concurrency)
    assert sorted(np.concatenate(batches)) == list(range(300))
    for batch in batches:
        assert len(batch) <= 9
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 100


@pytest.mark.parametrize(
    ("most", "batches"),
    [
        (None, [[1, 3, 0, 4, 2]]),
        (100, [[1, 3, 0, 4, 2]]),
        (21, [[1, 3, 0, 4, 2]]),
        (20, [[1, 3, 0, 4], [2]]),
        (8, [[1, 3, 0], [4, 2]]),
        (0, [[1], [3], [0], [4], [2]]),
    ],
)
def test_a_batch_ends_where_padding_would_cost_more(
    most: int | None, batches: list[list[int]]
) -> None:
    lengths = [6, 10, 2, 8, 3]  # in one batch 0, 2, 6, 13 and 21 tokens of padding, row by row
    found = plan_batches(lengths, batch_size=9, max_batch_tokens=1000, max_padding=most)
    assert [list(batch) for batch in found] == batches


def test_equal_lengths_share_batches_without_any_padding() -> None:
    found = plan_batches([5, 3, 5, 3, 5], batch_size=9, max_batch_tokens=1000, max_padding=0)
    assert [list(batch) for batch in found] == [[0, 2, 4], [1, 3]]
