"""Sets of page images are read in ViDoRe's layouts and from plain files, and what is wrong in one is named."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from embedge.bench.errors import BenchError
from embedge.bench.measure.eval_files import read_eval
from embedge.bench.measure.texts import limited
from tests.helpers.pictures import picture


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(8, 12, number)).save(stream, "PNG")
    return stream.getvalue()


PAGES = [png(number) for number in range(5)]


def table(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file


def vidore_rows() -> list[dict[str, Any]]:
    """Two queries of one page, two others, and a page that nobody asks for."""
    asked = [("q0", 0), ("q1", 0), ("q2", 1), ("q3", 2), (None, 3)]
    return [
        {
            "query": query,
            "image": {"bytes": PAGES[page], "path": f"{page}.png"},
            "image_filename": f"images/{page}.png",
            "answer": "unread",
        }
        for query, page in asked
    ]


def test_a_file_of_vidores_first_version_has_queries_and_pages_that_nobody_asks_for(
    tmp_path: Path,
) -> None:
    found = read_eval(table(tmp_path / "docs.parquet", vidore_rows()))

    assert (found.name, found.metric, found.modality) == ("docs", "ndcg@10", "image")
    assert found.roles == ("query", "document")
    assert found.first == ("q0", "q1", "q2", "q3")
    assert found.second == (PAGES[0], PAGES[0], PAGES[1], PAGES[2])
    assert found.others == (PAGES[3],)
    assert len(limited(found, 3).second) == 3


@pytest.mark.parametrize("inside", ["", "data"])
def test_shards_of_the_split_test_are_read_together(inside: str, tmp_path: Path) -> None:
    rows = vidore_rows()
    table(tmp_path / "docs" / inside / "test-00000-of-00002.parquet", rows[:2])
    table(tmp_path / "docs" / inside / "test-00001-of-00002.parquet", rows[2:])
    table(tmp_path / "docs" / inside / "train-00000-of-00001.parquet", rows[:1])

    assert read_eval(tmp_path / "docs").first == ("q0", "q1", "q2", "q3")


def vidore2(folder: Path, separator: str = "-", **changes: Any) -> Path:
    """Five pages, three queries, one of them with two pages of different gain."""
    corpus = [
        {f"corpus{separator}id": number, "image": {"bytes": page, "path": None}, "markdown": "x"}
        for number, page in enumerate(PAGES)
    ]
    queries = [{f"query{separator}id": n, "query": f"query {n}"} for n in range(3)]
    judged = [(0, 0, 2), (0, 1, 1), (1, 2, 1), (2, 3, 1), (2, 4, 0)]
    qrels = [
        {f"query{separator}id": q, f"corpus{separator}id": page, "score": score}
        for q, page, score in judged
    ]
    parts: dict[str, Any] = {
        "corpus": corpus,
        "queries": queries,
        "qrels": qrels,
    } | changes
    for part, rows in parts.items():
        table(folder / part / "test-00000-of-00001.parquet", rows)
    return folder


@pytest.mark.parametrize("separator", ["-", "_"])
def test_folders_of_vidores_later_versions_have_gains(separator: str, tmp_path: Path) -> None:
    found = read_eval(vidore2(tmp_path / "reports", separator))

    assert (found.name, found.modality) == ("reports", "image")
    assert found.first == ("query 0", "query 0", "query 1", "query 2")
    assert found.second == (PAGES[0], PAGES[1], PAGES[2], PAGES[3])
    assert found.gains == (2.0, 1.0, 1.0, 1.0)
    assert found.others == (PAGES[4],)


@pytest.mark.parametrize("column", ["image", "image_filename"])
def test_paths_start_at_the_files_folder(column: str, tmp_path: Path) -> None:
    rows = []
    for number, page in enumerate(PAGES[:3]):
        (tmp_path / f"{number}.png").write_bytes(page)
        rows.append({"query": f"q{number}", column: f"{number}.png"})
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))

    found = read_eval(tmp_path / "mine.jsonl")

    assert found.second == tuple(tmp_path / f"{number}.png" for number in range(3))
    assert found.modality == "image"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"bytes": b"no image", "path": None}}, r"row 1: image: expected an image file"),
        ({"image": {"bytes": None, "path": "none.png"}}, r"row 1: image: no such file, .*none\.png"),
        ({"image_filename": "images/2.png"}, r"row 4: image_filename 'images/2\.png' names another image"),
        ({"query": None, "passage": "a"}, r"has both passage and image; expected one of them"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_of_pages_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = vidore_rows()
    rows = [rows[0] | change, *({**dict.fromkeys(change), **row} for row in rows[1:])]

    with pytest.raises(BenchError, match=message):
        read_eval(table(tmp_path / "docs.parquet", rows))


def test_too_few_queries_and_a_set_without_queries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="expected at least 3 different queries, found 2"):
        read_eval(table(tmp_path / "few.parquet", [*vidore_rows()[:2], *vidore_rows()[4:]]))
    rows = [{"text": "a", "image": PAGES[0]}] * 3
    with pytest.raises(BenchError, match="expected the columns query and image, lacks query"):
        read_eval(table(tmp_path / "other.parquet", rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qrels": [{"query-id": 9, "corpus-id": 0, "score": 1}]}, r"row 1: query-id '9' is not in .*queries"),
        ({"qrels": [{"query-id": 0, "corpus-id": 9, "score": 1}]}, r"row 1: corpus-id '9' is not in .*corpus"),
        ({"qrels": [{"query-id": 0, "score": 1}]}, r"row 1: expected the column corpus-id or corpus_id, lacks it"),
        ({"queries": [{"query-id": 0, "query": "a"}] * 2}, r"query-id '0' stands in .*row 1 too"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_folder_of_pages_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BenchError, match=message):
        read_eval(vidore2(tmp_path / "reports", **changes))


def test_a_folder_without_a_part_and_one_of_several_splits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a" / "corpus").mkdir(parents=True)
    with pytest.raises(BenchError, match="corpus: expected Parquet files, as SPLIT-00000-of-00001"):
        read_eval(tmp_path / "a")
    for split in ("train", "validation"):
        table(tmp_path / "b" / f"{split}-00000-of-00001.parquet", vidore_rows())
    with pytest.raises(BenchError, match="of one split, or of one called test, found train, val"):
        read_eval(tmp_path / "b")
