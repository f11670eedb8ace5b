"""Embedding tables in blocks: error bounds and the sizes of blocks."""

from __future__ import annotations

import numpy as np
import pytest

from embedge.quant import embedding_tables, int4

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("width", "bits", "size"),
    [
        (384, 8, 128),
        (320, 8, 64),
        (96, 8, 32),
        (48, 8, 16),
        (20, 8, None),
        (384, 4, 32),
        (48, 4, 16),
        (20, 4, None),
    ],
)
def test_the_largest_block_that_divides_a_row_is_taken(
    width: int, bits: int, size: int | None
) -> None:
    assert embedding_tables.block_size_for(width, bits) == size


def test_8_bit_rows_are_within_half_a_step() -> None:
    table = (RNG.normal(0, 1, (50, 64)) * np.exp(RNG.normal(0, 2, (50, 1)))).astype(np.float32)
    values, scales, zeros = embedding_tables.quantize_table(table.__getitem__, table.shape, 8, 32)
    restored = (values.reshape(50, 2, 32).astype(np.float32) - zeros[..., None]) * scales[..., None]
    error = np.abs(restored.reshape(50, 64) - table)
    # the zero point is rounded too: half a step more at the ends of the range
    assert (error <= np.repeat(scales, 32, axis=1) * 1.001).all()


def test_4_bit_rows_are_those_of_the_error_minimising_grid() -> None:
    table = RNG.normal(0, 1, (30, 64)).astype(np.float32)
    values, scales, zeros = embedding_tables.quantize_table(table.__getitem__, table.shape, 4, 32)
    parts = table.reshape(30, 2, 32)
    grid = int4.block_grid(parts)
    assert np.array_equal(scales, grid[0])
    assert np.array_equal(zeros, grid[1])
    assert np.array_equal(values.reshape(30, 2, 32), int4.quantize(parts, *grid))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_of_zeros_stays_zero(bits: int) -> None:
    values, scales, zeros = embedding_tables.quantize_table(
        np.zeros((2, 32), np.float32).__getitem__, (2, 32), bits, 32
    )
    assert np.array_equal(values, np.repeat(zeros, 32, axis=1))
    assert np.isfinite(scales).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_steps_that_bound_memory_do_not_show(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = RNG.normal(0, 1, (23, 32)).astype(np.float32)
    whole = embedding_tables.quantize_table(table.__getitem__, table.shape, bits, 16)
    monkeypatch.setattr(embedding_tables, "_CHUNK_ROWS_ELEMENTS", 160)
    for expected, found in zip(
        whole,
        embedding_tables.quantize_table(table.__getitem__, table.shape, bits, 16),
        strict=True,
    ):
        np.testing.assert_array_equal(expected, found)
