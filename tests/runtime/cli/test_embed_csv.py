"""``embedge embed`` reads and writes CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder
from embedge.runtime.cli import csv_input
from embedge.runtime.cli.main import main
from tests.helpers.command import Capture, SetStdin, error_line, vectors_of

BOM = b"\xef\xbb\xbf"
MORE = ["--input-format", "csv"]


def test_rows_become_vectors_in_their_order_and_keep_the_other_columns(
    bundle: Any, tmp_path: Path, capsys: Capture
) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(
        BOM + b'id,text,"odd, name"\r\n7,"w1, w2",a\r\n8,"w3\nw4 ""w5""",\r\n,,"b\r\nc"\r\n9,42,d'
    )
    assert main(["embed", str(bundle.path), "--input", str(source)]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["id"], row["odd, name"]) for row in rows] == [
        ("7", "a"),
        ("8", ""),
        ("", "b\r\nc"),
        ("9", "d"),
    ]
    assert all(list(row) == ["id", "odd, name", "embedding"] for row in rows)
    expected = Embedder(bundle.path).encode(["w1, w2", 'w3\nw4 "w5"', "", "42"])
    np.testing.assert_allclose(vectors_of(out), expected, atol=1e-6, rtol=0)


def test_csv_out_has_a_vector_in_one_field(
    bundle: Any, tmp_path: Path, stdin: SetStdin, capsys: Capture
) -> None:
    stdin(
        b'{"id": 1, "text": "w1", "tags": ["a,b"]}\n{"id": null, "text": "w2", "tags": "x\\ny"}\n'
    )
    out = tmp_path / "out.csv"
    call = ["embed", str(bundle.path), "--field", "text", "--output", str(out)]
    assert main(call) == 0
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["tags"]) for row in rows] == [("1", '["a,b"]'), ("", "x\ny")]
    found = np.array([json.loads(row["embedding"]) for row in rows], np.float32)
    np.testing.assert_array_equal(found, Embedder(bundle.path).encode(["w1", "w2"]))


def test_no_row_is_a_line_with_the_columns(bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"id,text\n")
    call = ["embed", str(bundle.path), "--input", str(tmp_path / "in.csv")]
    assert main([*call, "--output", str(tmp_path / "out.csv")]) == 0
    assert (tmp_path / "out.csv").read_bytes() == b"id,embedding\n"


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (b"", [], "input line 1: expected the columns' names, found none"),
        (b"\n", [], "input line 1: expected the columns' names, found none"),
        (b"id,body\n1,w1\n", [], "expected one column 'text', found 0; columns there: id, body"),
        (b"id,body\n1,w1\n", ["--column", "bod"], "expected one column 'bod', found 0"),
        (b"id,text\n1,w1\n", ["--keep", "nr"], "expected one column 'nr', found 0"),
        (b"text,text\nw1,w2\n", [], "expected one column 'text', found 2"),
        (b"id,id,text\n1,2,w1\n", [], "expected each column once, found id more than once"),
        (b'id,text\n1,"w1\nw2"\n2,w3,w4\n', [], "input line 4: expected 2 fields, found 3"),
        (b"id,text\n1,w1\n2\n", [], "input line 3: expected 2 fields, found 1"),
        (b"text\nw1\n\nw2\n", [], "input line 3: expected 1 field, found a blank line"),
        (b'id,text\n1,"w1\n2,w2\n', [], "input line 2: expected CSV, found a quote that never"),
        (b'id,text\n1,"w1"w2\n', [], "input line 2: expected CSV, found ',' expected after '\"'"),
        (b"id,text\r1,w1\r", [], "input line 1: expected CSV, found new-line character"),
        (b"id,text\n1,w\x001\n", [], "input line 2: expected UTF-8 text, found a NUL character"),
        ("id,text\n1,w1\n".encode("utf-16"), [], "input line 1: expected UTF-8 text, found a NUL"),
        (b"id,text\n1,w1\n2,w\xe9\n", [], "input line 3: not UTF-8 (invalid continuation byte"),
        (b'id,text\n1,"w1\nw\xff"\n', [], "input line 3: not UTF-8 (invalid start byte"),
        (b"id,text\n1," + b"w" * 200 + b"\n", [], "input line 2: expected CSV, found field larger"),
    ],
    ids=[
        *("empty", "blank", "no text", "no column", "none to keep", "two texts", "doubled"),
        *("more fields", "fewer", "blank row", "open quote", "after quote", "CR", "NUL", "UTF-16"),
        *("Latin 1", "inside quotes", "long"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_left(
    bundle: Any,
    tmp_path: Path,
    stdin: SetStdin,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    data: bytes,
    arguments: list[str],
    message: str,
) -> None:
    before = csv.field_size_limit()
    monkeypatch.setattr(csv_input, "_FIELD_CHARACTERS", 100)
    stdin(data)
    folder = tmp_path / "out"
    folder.mkdir()
    call = ["embed", str(bundle.path), *MORE, "--output", str(folder / "v.csv"), *arguments]
    assert main(call) == 1
    assert message in error_line(capsys)
    assert list(folder.iterdir()) == []
    assert csv.field_size_limit() == before


def test_blank_lines_at_the_end_are_no_rows_and_a_long_text_is_read(
    bundle: Any, stdin: SetStdin, capsys: Capture
) -> None:
    text = "w1 " * 100_000  # more than the csv module takes by itself
    stdin(b"text\n" + text.encode() + b"\n\n\r\n")
    assert main(["embed", str(bundle.path), *MORE, "--on-truncate", "ignore"]) == 0
    expected = Embedder(bundle.path).encode([text], on_truncate="ignore")
    np.testing.assert_array_equal(vectors_of(capsys.readouterr().out), expected)


def test_rows_with_other_columns_than_the_first_are_refused(
    bundle: Any, tmp_path: Path, stdin: SetStdin, capsys: Capture
) -> None:
    stdin(b'{"id": 1, "text": "w1"}\n{"nr": 2, "text": "w2"}\n')
    call = ["embed", str(bundle.path), "--field", "text", "--format", "csv"]
    assert main([*call, "--output", str(tmp_path / "v")]) == 1
    assert "output row 2: expected the columns of the first row (id), found nr" in error_line(
        capsys
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--column", "text"], "--column is for CSV and Parquet, and the input is lines"),
        (["--field", "a", "--column", "b"], "--field is for JSONL, --column for CSV and Parquet"),
        (["--field", "a", *MORE], "--field is for JSONL; leave out --input-format csv"),
        (["--keep", "id"], "--keep: lines have nothing to keep beside their text"),
        (["--input-format", "parquet"], "--input -: Parquet is read from its end"),
        (["--shard", "1/2"], "--shard: the input is read twice, which a pipe cannot be"),
        (["--resume"], "--resume: the input is read twice, which a pipe cannot be"),
        (["--shard", "0/2"], "--shard 0/2: expected i/n with i from 1 to n"),
        (["--shard", "3/2"], "--shard 3/2: expected i/n with i from 1 to n"),
        (["--shard", "half"], "--shard half: expected i/n with i from 1 to n"),
        ([*MORE, "--format", "npy", "--keep", "id"], "--keep: .npy has vectors alone"),
        (["--resume", "--input", "in"], "--resume: the output is made in parts beside its file"),
        (["--resume", "--input", "in", "--output", "v", "--images"], "--resume: whether images"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(
    bundle: Any, stdin: SetStdin, capsys: Capture, arguments: list[str], message: str
) -> None:
    stdin(b"")
    assert main(["embed", str(bundle.path), *arguments]) == 2
    assert message in error_line(capsys)
