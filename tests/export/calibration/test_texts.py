"""Calibration texts: the packaged ones, the user's, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedge.export.calibration.texts import packaged_texts, read_texts
from embedge.runtime.errors import EmbedgeValueError


def written(folder: Path, name: str, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return folder / name


def test_the_packaged_texts_are_many_and_of_many_lengths() -> None:
    texts = packaged_texts()
    assert len(texts) > 50
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) < 60
    assert max(map(len, texts)) > 400


def test_a_text_file_has_a_text_per_line_without_blank_ones(tmp_path: Path) -> None:
    file = written(tmp_path, "texts.txt", "one\r\n\n  \ntwo words\n{not json\n")
    assert read_texts(file) == ["one", "two words", "{not json"]


@pytest.mark.parametrize("ending", ["jsonl", "ndjson"])
def test_json_lines_are_objects_with_text_or_strings(tmp_path: Path, ending: str) -> None:
    file = written(tmp_path, f"texts.{ending}", '{"text": "a\\nb", "id": 1}\n"plain"\n')
    assert read_texts(file) == ["a\nb", "plain"]


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path: Path) -> None:
    file = written(tmp_path, "texts.jsonl", '{"text": "a\u2028b\u0085c"}\n')
    assert read_texts(file) == ["a\u2028b\u0085c"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_texts(written(tmp_path, "texts.jsonl", '\ufeff{"text": "a"}\n')) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n \n", "at least one text"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("broken.jsonl", '{"text": "a"}\n{"text"', "line 2: expected JSON"),
        ("other.jsonl", '{"content": "a"}', "line 1: expected a string or an object"),
        ("number.jsonl", '{"text": 5}', "line 1: expected a string or an object"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[-6:] else "",
)
def test_what_is_no_text_is_refused_by_file_and_line(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    file = written(tmp_path, name, content)
    with pytest.raises(EmbedgeValueError, match=message) as caught:
        read_texts(file)
    assert name in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EmbedgeValueError, match=r"nowhere\.txt"):
        read_texts(tmp_path / "nowhere.txt")
