"""Texts and labelled sets are read as they are, and a bad row is named with its line."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from embedge.bench.errors import BenchError
from embedge.bench.measure.eval_files import read_eval
from embedge.bench.measure.texts import Text, default_texts, limited, read_texts


def write(file: Path, rows: list[object]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def runs(text: Text) -> set[tuple[str, ...]]:
    """Return every run of twelve words, or the whole of a shorter text."""
    words = re.findall(r"\w+", text.text)
    return {tuple(words[i : i + 12]) for i in range(max(1, len(words) - 11))}


def test_the_default_texts_are_500_different_ones_of_several_kinds() -> None:
    texts = default_texts()

    kinds = Counter(text.kind for text in texts)
    assert len({text.text for text in texts}) >= 500
    assert len(kinds) >= 5
    assert min(kinds.values()) >= 30


def test_no_default_text_shares_twelve_words_with_a_calibration_text() -> None:
    import embedge.export.calibration

    folder = Path(embedge.export.calibration.__file__).parent / "data"
    calibration = {run for f in folder.glob("*.jsonl") for t in read_texts(f) for run in runs(t)}

    assert calibration
    assert [text.text for text in default_texts() if runs(text) & calibration] == []


def test_a_text_file_has_one_text_a_line(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("\n".join([*(f"text {i}" for i in range(12)), "", "text 3"]))

    assert [text.text for text in read_texts(file)] == [f"text {i}" for i in range(12)]


def test_too_few_texts_for_ten_neighbours_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("one\ntwo\n")

    with pytest.raises(BenchError, match="at least 12 different texts, found 2"):
        read_texts(file)


def test_queries_and_graded_pairs_are_told_apart(tmp_path: Path) -> None:
    queries = write(tmp_path / "q.jsonl", [{"query": f"q{i}", "passage": "p"} for i in range(3)])
    pairs = write(
        tmp_path / "p.jsonl", [{"text1": "a", "text2": "b", "score": i} for i in range(3)]
    )

    assert (read_eval(queries).metric, read_eval(queries).roles) == (
        "ndcg@10",
        ("query", "document"),
    )
    assert (read_eval(pairs).metric, read_eval(pairs).scores) == ("spearman", (0.0, 1.0, 2.0))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q"}, ":3: expected the keys query, passage, lacks passage"),
        ([1], ":3: expected a JSON object, found list"),
    ],
    ids=["missing key", "no object"],
)
def test_a_bad_row_is_named_with_its_line(row: object, message: str, tmp_path: Path) -> None:
    good = {"query": "q", "passage": "p"}
    file = write(tmp_path / "q.jsonl", [good, good, row, good])

    with pytest.raises(BenchError, match=message):
        read_eval(file)


def test_a_subset_is_the_same_every_time_and_keeps_rows_together(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", [{"query": f"q{i}", "passage": f"p{i}"} for i in range(30)])

    first, second = (limited(read_eval(file), 10) for _ in range(2))

    assert first == second
    assert len(first.first) == 10
    assert [q[1:] for q in first.first] == [p[1:] for p in map(str, first.second)]
