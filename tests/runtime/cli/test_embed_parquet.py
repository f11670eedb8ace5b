"""``embedge embed`` reads and writes Parquet; pyarrow itself writes the inputs and reads the outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder
from embedge.runtime.cli.main import main
from embedge.runtime.tables import parquet_output
from embedge.runtime.tables.parquet_input import ParquetInput
from tests.helpers.command import Capture, SetStdin, error_line, vectors_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"w{i % 60} w{i % 7}" if i % 11 else "" for i in range(100)]


def write(path: Path, rows: int = 100, *, group: int = 30, kind: Any = None, **columns: Any) -> str:
    table = pa.table(
        {
            "id": pa.array(range(rows), pa.int64()),
            "text": pa.array(TEXTS[:rows], kind or pa.string()),
            "at": pa.array(
                [1_700_000_000_123_456_789 + i for i in range(rows)], pa.timestamp("ns")
            ),
            "tags": pa.array([["a", None][: i % 3] for i in range(rows)], pa.list_(pa.string())),
            **columns,
        }
    )
    pq.write_table(table, path, row_group_size=group)
    return str(path)


def vectors_in(path: Path) -> np.ndarray[Any, Any]:
    column = pq.read_table(path).column("embedding").combine_chunks()
    size = column.type.list_size
    array: np.ndarray[Any, Any] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
    return array


KINDS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_parquet_becomes_parquet_with_its_columns_vectors_and_fingerprint(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr("embedge.runtime.cli.embed._CHUNK_TEXTS", 16)
    monkeypatch.setattr(parquet_output, "_GROUP_BYTES", 40 * 8 * 4)
    source = write(tmp_path / "in.parquet", kind=kind)
    out = tmp_path / "out.parquet"
    call = ["embed", str(bundle.path), "--input", source, "--output", str(out), "--batch-size", "4"]
    assert main(call) == 0
    table, before = pq.read_table(out), pq.read_table(source)
    assert table.column_names == ["id", "at", "tags", "embedding"]
    for name in ("id", "at", "tags"):
        assert table.schema.field(name).type == before.schema.field(name).type
        assert table.column(name).equals(before.column(name))
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 8)
    model = Embedder(bundle.path)
    np.testing.assert_allclose(vectors_in(out), model.encode(TEXTS), atol=1e-6, rtol=0)
    metadata = pq.read_metadata(out).metadata
    assert metadata[b"embedge.fingerprint"].decode() == model.fingerprint()
    assert json.loads(metadata[b"embedge.fingerprint_parts"]) == model.fingerprint_parts()
    groups = pq.read_metadata(out).num_row_groups
    rows = [pq.read_metadata(out).row_group(i).num_rows for i in range(groups)]
    assert sum(rows) == 100
    for end, count in zip(
        np.cumsum(rows)[:-1], rows[:-1], strict=True
    ):  # chunks of 16 that reach the bytes
        first = int(end) - count
        assert (
            table.slice(first, count - 16).nbytes < 40 * 8 * 4 <= table.slice(first, count).nbytes
        )


def test_columns_are_chosen_and_halves_are_rounded(bundle: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", body=pa.array(TEXTS), embedding=pa.array(range(100)))
    out = tmp_path / "out.parquet"
    call = ["embed", str(bundle.path), "--input", source, "--output", str(out)]
    assert (
        main([*call, "--column", "body", "--keep", "tags", "id", "--output-format", "float16"]) == 0
    )
    table = pq.read_table(out)
    assert table.column_names == ["id", "tags", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 8)
    expected = Embedder(bundle.path).encode(TEXTS).astype(np.float16)
    np.testing.assert_allclose(vectors_in(out), expected, atol=1e-3, rtol=0)
    assert main([*call, "--keep", "--output-format", "float16"]) == 0
    assert pq.read_table(out).column_names == ["embedding"]
    assert pq.read_metadata(out).num_rows == 100


def test_a_float16_too_large_is_refused() -> None:
    vectors = np.array([[1.0, 70_000.0]], np.float32)
    with pytest.raises(Exception, match=r"output rows 7 to 7: .* found 70000; write float32"):
        parquet_output.as_dtype(vectors, "float16", 7)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(bundle: Any, tmp_path: Path, rows: int) -> None:
    source = write(tmp_path / "in.parquet", rows)
    out = tmp_path / "out.parquet"
    assert main(["embed", str(bundle.path), "--input", source, "--output", str(out)]) == 0
    table = pq.read_table(out)
    assert table.num_rows == rows
    assert table.column_names == ["id", "at", "tags", "embedding"]


def test_to_jsonl_and_what_json_has_no_form_for(
    bundle: Any, tmp_path: Path, capsys: Capture
) -> None:
    source = write(tmp_path / "in.parquet", 3)
    assert main(["embed", str(bundle.path), "--input", source, "--keep", "id", "tags"]) == 0
    out = capsys.readouterr().out
    assert [json.loads(line)["tags"] for line in out.splitlines()] == [[], ["a"], ["a", None]]
    np.testing.assert_allclose(
        vectors_of(out), Embedder(bundle.path).encode(TEXTS[:3]), atol=1e-6, rtol=0
    )
    assert main(["embed", str(bundle.path), "--input", source]) == 1
    assert "expected columns that JSON has a form for, found type " in error_line(capsys)
    source = write(tmp_path / "in.parquet", 1, x=pa.array([float("nan")]))
    assert main(["embed", str(bundle.path), "--input", source, "--keep", "x"]) == 1
    assert "found Out of range float values are not JSON compliant" in error_line(capsys)


def test_jsonl_and_csv_become_parquet(bundle: Any, tmp_path: Path, stdin: SetStdin) -> None:
    out = tmp_path / "out.parquet"
    call = ["embed", str(bundle.path), "--output", str(out)]
    stdin(b'{"id": 1, "text": "w1", "x": [0.5]}\n{"text": "w2", "id": null, "x": []}\n')
    assert main([*call, "--field", "text"]) == 0
    assert pq.read_table(out).drop_columns("embedding").to_pylist() == [
        {"id": 1, "x": [0.5]},
        {"id": None, "x": []},
    ]
    (tmp_path / "in.csv").write_bytes(b"id,text\n1,w1\n,w2\n")
    assert main([*call, "--input", str(tmp_path / "in.csv")]) == 0
    assert pq.read_table(out).column("id").to_pylist() == ["1", ""]
    stdin(b"w1\nw2\n")
    assert main(call) == 0
    np.testing.assert_array_equal(vectors_in(out), Embedder(bundle.path).encode(["w1", "w2"]))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"id": "x", "text": "w2"}', "a Parquet column has one type; choose columns with --keep"),
        ('{"nr": 1, "text": "w2"}', "output row 2: expected the columns of the first rows (id)"),
    ],
)
def test_rows_of_jsonl_that_are_of_another_kind_are_refused(
    bundle: Any,
    tmp_path: Path,
    stdin: SetStdin,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    second: str,
    message: str,
) -> None:
    monkeypatch.setattr("embedge.runtime.cli.embed._CHUNK_TEXTS", 1)
    stdin(f'{{"id": 1, "text": "w1"}}\n{second}\n'.encode())
    out = tmp_path / "out.parquet"
    call = ["embed", str(bundle.path), "--field", "text", "--output", str(out)]
    assert main([*call, "--batch-size", "1"]) == 1
    assert message in error_line(capsys)
    assert not out.exists()


def _numbers(path: Path) -> None:
    write(path, text=pa.array(range(100)))


def _binary(path: Path) -> None:
    write(path, text=pa.array([b"w1"] * 100))


def _null(path: Path) -> None:
    write(path, text=pa.array([*TEXTS[:77], None, *TEXTS[78:]]))


def _null_without_statistics(path: Path) -> None:
    table = pa.table({"text": [*TEXTS[:77], None, *TEXTS[78:]]})
    pq.write_table(table, path, row_group_size=30, write_statistics=False)


def _no_column(path: Path) -> None:
    pq.write_table(pa.table({"body": TEXTS, "nr": range(100)}), path)


def _twice(path: Path) -> None:
    pq.write_table(pa.table([pa.array(TEXTS)] * 2, names=["text", "text"]), path)


def _not_utf8(path: Path) -> None:
    data = pa.array([b"w1", b"w\xff"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, data.buffers())
    pq.write_table(pa.table({"text": text}), path, write_statistics=False)


def _cut(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-20])


def _other_bytes(path: Path) -> None:
    path.write_bytes(b"no parquet at all")


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (_numbers, 2, "column 'text': expected strings, found int64; columns of texts there: none"),
        (_binary, 2, "column 'text': expected strings, found binary"),
        (_null, 1, "row 78: expected a text, found null; fill such rows or leave them out"),
        (_null_without_statistics, 1, "row 78: expected a text, found null"),
        (
            _no_column,
            2,
            "expected one column 'text', found no such column; columns of texts there: body",
        ),
        (_twice, 2, "expected one column 'text', found 2 of that name"),
        (_not_utf8, 1, "row 2: expected UTF-8, found other bytes"),
        (_cut, 1, "expected a whole Parquet file; write it anew, or name another"),
        (_other_bytes, 1, "expected a whole Parquet file; write it anew, or name another"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_left(
    bundle: Any, tmp_path: Path, capsys: Capture, damage: Any, code: int, message: str
) -> None:
    source = tmp_path / "in.parquet"
    damage(source)
    folder = tmp_path / "out"
    folder.mkdir()
    call = ["embed", str(bundle.path), "--input", str(source), "--output", str(folder / "v.npy")]
    assert main(call) == code
    line = error_line(capsys)
    assert f"--input {source}" in line
    assert message in line
    assert list(folder.iterdir()) == []


def test_a_null_is_found_before_anything_is_embedded(
    bundle: Any, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode = Embedder.encode

    def counted(self: Embedder, texts: Any, **options: Any) -> Any:
        calls.append(len(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(Embedder, "encode", counted)
    monkeypatch.setattr("embedge.runtime.cli.embed._CHUNK_TEXTS", 8)
    _null(tmp_path / "in.parquet")
    call = ["embed", str(bundle.path), "--input", str(tmp_path / "in.parquet")]
    assert main([*call, "--batch-size", "8"]) == 1
    assert "row 78: expected a text, found null" in error_line(capsys)
    assert sum(calls) == 0


@pytest.mark.slow
def test_a_large_row_group_is_read_in_pieces(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{i:0200d}" for i in range(100_000)]})
    pq.write_table(
        table,
        tmp_path / "in.parquet",
        row_group_size=100_000,
        compression="none",
        use_dictionary=False,
    )
    del table
    source = ParquetInput(tmp_path / "in.parquet", "text")
    before = pa.total_allocated_bytes()
    rows, most = 0, 0
    for chunk in source.chunks(rows=1000, characters=1_000_000):
        rows += len(chunk.texts)
        most = max(most, pa.total_allocated_bytes() - before)
    assert rows == 100_000
    assert most < 6_000_000  # of 20 MB


def test_without_pyarrow_it_says_how_to_get_it(
    bundle: Any, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, stdin: SetStdin
) -> None:
    source = write(tmp_path / "in.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["embed", str(bundle.path), "--input", source]) == 1
    line = error_line(capsys)
    assert "Parquet needs pyarrow, which cannot be imported" in line
    assert "run `pip install " in line
    assert "pyarrow" in line.partition("run `")[2]


def test_expect_takes_a_file_with_vectors(bundle: Any, tmp_path: Path, capsys: Capture) -> None:
    source, out = write(tmp_path / "in.parquet"), tmp_path / "out.parquet"
    call = ["embed", str(bundle.path), "--input", source, "--output", str(out)]
    assert main(call) == 0
    assert main([*call, "--expect", str(out)]) == 0
    assert main([*call, "--truncate-dim", "4", "--expect", str(out)]) == 1
    assert "dim: 8 stored, 4 here" in error_line(capsys)
    assert main([*call, "--expect", source]) == 1
    assert "expected embedge.fingerprint in the file's metadata, found none" in error_line(capsys)


def test_errors_of_a_text_name_its_row(bundle: Any, tmp_path: Path, capsys: Capture) -> None:
    source = write(tmp_path / "in.parquet", text=pa.array([*TEXTS[:99], "w1 " * 20]))
    assert main(["embed", str(bundle.path), "--input", source, "--on-truncate", "error"]) == 1
    assert "input row 100 is longer than 16 tok" in error_line(capsys)


def test_parquet_goes_through_a_pipe(bundle: Any, stdin: SetStdin, capsysbinary: Any) -> None:
    stdin(b"w1\nw2\n")
    assert main(["embed", str(bundle.path), "--format", "parquet"]) == 0
    table = pq.read_table(pa.BufferReader(capsysbinary.readouterr().out))
    assert table.column("embedding").to_pylist()[1] == pytest.approx(
        Embedder(bundle.path).encode("w2")
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_has_a_vector_a_token(
    with_images: Any, tmp_path: Path, stdin: SetStdin, dtype: str
) -> None:
    texts = ["w1", "w2 w3", "", "w4 w5 w6 w7"]
    stdin("".join(f"{text}\n" for text in texts).encode())
    out = tmp_path / "out.parquet"
    call = ["embed", str(with_images.path), "--task", "code", "--multi-vector"]
    call += ["--output-format", dtype]
    assert main([*call, "--output", str(out)]) == 0
    table = pq.read_table(out)
    assert table.schema.field("embedding").type == pa.list_(pa.list_(getattr(pa, dtype)(), 4))
    model = Embedder(with_images.path, task="code")
    expected = model.encode(texts, multi_vector=True)
    for found, vectors in zip(table.column("embedding").to_pylist(), expected, strict=True):
        np.testing.assert_allclose(np.array(found), vectors, atol=2e-3, rtol=0)
    fingerprint = pq.read_metadata(out).metadata[b"embedge.fingerprint"].decode()
    assert fingerprint == model.fingerprint(multi_vector=True, output_format=dtype)
    stdin(b"")
    assert main([*call, "--output", str(out)]) == 0
    assert pq.read_table(out).num_rows == 0


def test_nan_of_parquet_is_no_csv(bundle: Any, tmp_path: Path, capsys: Capture) -> None:
    source = write(tmp_path / "in.parquet", 2, x=[1.0, float("nan")])
    call = ["embed", str(bundle.path), "--input", source, "--keep", "x"]
    assert main([*call, "--output", str(tmp_path / "v.csv")]) == 1
    assert "output row 2: column 'x': expected columns that JSON has a form for" in error_line(
        capsys
    )
    assert not (tmp_path / "v.csv").exists()


def test_an_embedding_of_csv_gives_its_place_to_the_vector(bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("embedding,id,text\nold,1,w1\n")
    out = tmp_path / "out.parquet"
    call = ["embed", str(bundle.path), "--input", str(tmp_path / "in.csv"), "--output", str(out)]
    assert main(call) == 0
    assert pq.read_table(out).column_names == ["id", "embedding"]


def test_other_columns_count_towards_a_row_group(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedge.runtime.cli.embed._CHUNK_TEXTS", 4)
    monkeypatch.setattr(parquet_output, "_GROUP_BYTES", 50_000)
    source = write(tmp_path / "in.parquet", 20, long=["x" * 10_000] * 20)
    out = tmp_path / "out.parquet"
    call = ["embed", str(bundle.path), "--input", source, "--output", str(out)]
    assert main([*call, "--batch-size", "4"]) == 0
    found = pq.read_metadata(out)
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [8, 8, 4]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"x": 1}, {"x": 2**64 - 1}], "output row 2: column 'x': "),
        ([{"x": 2**64}], "output row 1: column 'x': "),
        ([{"x": "a"}, {"x": "\ud800"}], "output row 2: column 'x': "),
        ([{"x\ud800": 1}], "output row 1: expected columns' names that UTF-8 has"),
        ([{"x": None}, {"x": {}}], "output row 2: column 'x': expected values that Parquet has"),
        ([{"x": [{"y": {}}]}], "output row 1: column 'x': expected values that Parquet has"),
        ([{"x": "a"}, {"x": 1}], "output row 2: column 'x': "),
    ],
)
@pytest.mark.parametrize("chunk", [1, 16])
def test_what_parquet_has_no_form_for_is_named_at_once(
    bundle: Any,
    tmp_path: Path,
    stdin: SetStdin,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    message: str,
    chunk: int,
) -> None:
    monkeypatch.setattr("embedge.runtime.cli.embed._CHUNK_TEXTS", chunk)
    stdin("".join(json.dumps({**row, "text": "w1"}) + "\n" for row in rows).encode())
    call = ["embed", str(bundle.path), "--field", "text", "--output", str(tmp_path / "v.parquet")]
    assert main([*call, "--batch-size", str(chunk)]) == 1
    line = error_line(capsys)
    assert "embedge: error: output row" in line
    assert "unexpected" not in line
    if chunk == 16:
        assert message in line
    assert not (tmp_path / "v.parquet").exists()


def test_a_column_of_nulls_becomes_one_of_strings(
    bundle: Any, tmp_path: Path, stdin: SetStdin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedge.runtime.cli.embed._CHUNK_TEXTS", 1)
    rows: list[dict[str, Any]] = [{"x": None, "y": []}, {"x": "a", "y": ["b"]}]
    stdin("".join(json.dumps({**row, "text": "w1"}) + "\n" for row in rows).encode())
    out = tmp_path / "v.parquet"
    call = ["embed", str(bundle.path), "--field", "text", "--output", str(out)]
    assert main([*call, "--batch-size", "1"]) == 0
    assert pq.read_table(out, columns=["x", "y"]).to_pylist() == rows
