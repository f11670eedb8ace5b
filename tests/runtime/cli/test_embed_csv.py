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
        (["--field", "a", "--keep", "a"], "columns to keep: expected others than 'a'"),
        (
            ["--input-format", "jsonl", "--column", "b"],
            "--column is for CSV and Parquet, and the input is jsonl; give --field",
        ),
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


def test_fields_with_line_breaks_of_any_kind_are_quoted(bundle: Any, tmp_path: Path) -> None:
    rows = [{"a\rb": "x\ry", "n": "\r", "text": "w1"}, {"a\rb": "x\r\ny", "n": "\n", "text": "w2"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = ["embed", str(bundle.path), "--input", str(tmp_path / "in.jsonl")]
    for name, more in (("out.csv", []), ("parts.csv", ["--resume"])):
        assert main([*call, "--output", str(tmp_path / name), *more]) == 0
    data = (tmp_path / "out.csv").read_bytes()
    assert data.startswith(b'"a\rb",n,embedding\n"x\ry","\r","[')
    assert (tmp_path / "parts.csv").read_bytes() == data
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [(row["a\rb"], row["n"]) for row in found] == [("x\ry", "\r"), ("x\r\ny", "\n")]


@pytest.mark.parametrize("end", ["csv", "jsonl"])
def test_an_embedding_of_csv_gives_its_place_to_the_vector(
    bundle: Any, tmp_path: Path, end: str
) -> None:
    (tmp_path / "in.csv").write_text("embedding,id,text\nold,1,w1\n")
    out = tmp_path / f"out.{end}"
    call = ["embed", str(bundle.path), "--input", str(tmp_path / "in.csv"), "--output", str(out)]
    assert main(call) == 0
    if end == "csv":
        assert out.read_text().startswith('id,embedding\n1,"[')
    assert "old" not in out.read_text()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": "\ud800"}, "output row 1: expected text that UTF-8 has, found half of a surrogate"),
        ({"x\udfff": 1}, "output row 0: expected text that UTF-8 has"),
    ],
)
def test_what_csv_has_no_form_for_is_named(
    bundle: Any,
    tmp_path: Path,
    stdin: SetStdin,
    capsys: Capture,
    row: dict[str, Any],
    message: str,
) -> None:
    stdin(json.dumps({**row, "text": "w1"}).encode())
    call = ["embed", str(bundle.path), "--field", "text", "--format", "csv"]
    assert main([*call, "--output", str(tmp_path / "v")]) == 1
    assert message in error_line(capsys)
    assert list(tmp_path.glob("v*")) == []


@pytest.mark.parametrize("name", ["in.jsonl", "in.NDJSON"])
def test_a_name_says_that_lines_are_json(bundle: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"id": 1, "text": "w1"}\n')
    out = tmp_path / "OUT.CSV"
    call = ["embed", str(bundle.path), "--input", str(tmp_path / name), "--output", str(out)]
    assert main(call) == 0
    assert out.read_text().startswith('id,embedding\n1,"[')


def test_a_name_in_capitals_says_csv(bundle: Any, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "DATA.CSV").write_text("id,text\n1,w1\n")
    assert main(["embed", str(bundle.path), "--input", str(tmp_path / "DATA.CSV")]) == 0
    assert capsys.readouterr().out.startswith('{"id": "1", "embedding": ')


@pytest.mark.parametrize("end", ["json", "tsv", "csv.gz", "jsonl.zst", "GZ"])
def test_names_of_other_formats_are_refused(
    bundle: Any, tmp_path: Path, capsys: Capture, end: str
) -> None:
    source = tmp_path / f"in.{end}"
    source.write_text("w1\n")
    assert main(["embed", str(bundle.path), "--input", str(source)]) == 2
    assert f"found a name that ends in .{end.rpartition('.')[2].lower()}" in error_line(capsys)
    call = ["embed", str(bundle.path), "--input", str(source), "--input-format", "lines"]
    assert main(call) == 0


@pytest.mark.parametrize("name", ["text", "embedding"])
@pytest.mark.parametrize("end", ["csv", "jsonl", "parquet"])
def test_what_is_not_written_cannot_be_kept(
    bundle: Any, tmp_path: Path, capsys: Capture, name: str, end: str
) -> None:
    source = tmp_path / f"in.{end}"
    source.write_text("")
    call = ["embed", str(bundle.path), "--input", str(source), "--keep", name]
    assert main(call) == 2
    assert f"columns to keep: expected others than {name!r}" in error_line(capsys)
