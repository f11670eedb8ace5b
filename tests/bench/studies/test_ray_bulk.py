"""The study of Ray finds rows that are lost, doubled or different, and workers to kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("psutil")

from embedge.bench.studies import ray_bulk  # noqa: E402
from embedge.bench.studies.ray_bulk import Difference, compare  # noqa: E402


def write(path: Path, ids: list[int], change: float = 0.0) -> None:
    path.parent.mkdir(exist_ok=True)
    values = np.array([[i, i + change] for i in ids], np.float32).reshape(-1)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), type=pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"id": pa.array(ids, pa.int64()), "embedding": vectors}), path)


@pytest.mark.parametrize(
    ("files", "lost", "doubled"),
    [
        ([[0, 1], [2, 3, 4]], 0, 0),
        ([[3, 4], [], [0, 1, 2]], 0, 0),
        ([[0, 1], [3, 4]], 1, 0),
        ([[0, 1, 1], [1, 2, 3, 4]], 0, 2),
        ([], 5, 0),
    ],
)
def test_rows_are_counted(tmp_path: Path, files: Any, lost: int, doubled: int) -> None:
    write(tmp_path / "whole.parquet", [0, 1, 2, 3, 4])
    (tmp_path / "many").mkdir()
    for number, ids in enumerate(files):
        write(tmp_path / "many" / f"{number}.parquet", ids)
    found = compare(tmp_path / "whole.parquet", tmp_path / "many")
    assert found == Difference(lost=lost, doubled=doubled, largest=0.0)
    assert found.is_fault == bool(lost or doubled)


def test_other_vectors_are_a_fault(tmp_path: Path) -> None:
    write(tmp_path / "whole.parquet", [0, 1])
    write(tmp_path / "many" / "0.parquet", [0, 1], 0.5)
    found = compare(tmp_path / "whole.parquet", tmp_path / "many")
    assert found == Difference(lost=0, doubled=0, largest=0.5)
    assert found.is_fault
    write(tmp_path / "many" / "0.parquet", [0], float("nan"))
    write(tmp_path / "many" / "1.parquet", [1])
    assert compare(tmp_path / "whole.parquet", tmp_path / "many").is_fault


def test_the_files_hold_the_rows_of_the_whole(tmp_path: Path) -> None:
    ray_bulk._write_inputs(tmp_path, 50, 7)
    whole = pq.read_table(tmp_path / "whole.parquet")
    parts = pa.concat_tables([pq.read_table(p) for p in sorted((tmp_path / "in").iterdir())])
    assert parts.equals(whole)
    assert len(set(whole.column("text").to_pylist())) == 50
