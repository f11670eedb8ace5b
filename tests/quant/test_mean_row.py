"""What the rows of an embedding table have in common."""

from __future__ import annotations

import numpy as np
import pytest

from embedge.quant import embedding_tables


@pytest.mark.parametrize("rows", [1, 7, 5000])
def test_the_mean_row_is_that_of_all_rows_a_few_at_a_time(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_tables, "_CHUNK_ROWS_ELEMENTS", 32 * 64)
    table = np.random.default_rng(0).normal(3, 1, (rows, 32)).astype(np.float32)
    found = embedding_tables.mean_row(table.__getitem__, table.shape)
    assert found.dtype == np.float32
    assert np.abs(found - table.astype(np.float64).mean(axis=0)).max() < 1e-6
