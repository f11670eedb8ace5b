"""Labelled sets are read in the forms that people have them in, and a bad one is named with what is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from embedge.bench.errors import BenchError
from embedge.bench.measure.eval_files import read_eval
from embedge.bench.measure.texts import limited


def jsonl(file: Path, rows: Sequence[object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


PAIRS: list[tuple[Any, ...]] = [
    ("a plane", "an aircraft", 4.5),
    ('say "hi", then', "greet", 3),
    ("a", "b", 0),
]


def csv_text(separator: str) -> str:
    quoted = [[f'"{t.replace(chr(34), chr(34) * 2)}"' for t in pair[:2]] for pair in PAIRS]
    lines = [
        separator.join([*texts, str(pair[2])]) for texts, pair in zip(quoted, PAIRS, strict=True)
    ]
    return "\n".join([separator.join(("sentence1", "sentence2", "score")), *lines]) + "\n"


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_graded_pairs_are_read_from_every_kind_of_file(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"sts.{ending}"
    rows: list[dict[str, Any]] = [
        dict(zip(("sentence1", "sentence2", "score"), pair, strict=True)) for pair in PAIRS
    ]
    if ending == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        rows = [row | {"score": float(row["score"])} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif ending == "jsonl":
        jsonl(file, rows)
    else:
        file.write_text(csv_text("," if ending == "csv" else "\t"), encoding="utf-8-sig")

    found = read_eval(file)

    assert (found.name, found.metric) == ("sts", "spearman")
    assert found.first == tuple(pair[0] for pair in PAIRS)
    assert found.second == tuple(pair[1] for pair in PAIRS)
    assert found.scores == (4.5, 3.0, 0.0)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """Four documents, three queries with a relevant one, one query without, in the layout of BEIR's archives."""
    folder = tmp_path / "tiny"
    corpus = [
        {"_id": "d1", "title": "Snow", "text": "falls in winter"},
        {"_id": "d2", "title": "", "text": "rain falls"},
        {"_id": "d3", "text": "sun shines", "metadata": {}},
        {"_id": "d4", "title": "Unasked", "text": "for"},
    ]
    jsonl(folder / "corpus.jsonl", corpus)
    jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(1, 5)])
    lines = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t1", "q2\td2\t1", "q3\td3\t1"]
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("\n".join([*lines, "q4\td1\t0", ""]))
    return folder


def test_a_beir_folder_keeps_titles_gains_and_documents_that_nobody_asks_for(beir: Path) -> None:
    found = read_eval(beir)

    assert (found.name, found.metric) == ("tiny", "ndcg@10")
    assert found.first == ("query 1", "query 1", "query 2", "query 3")
    assert found.second == ("Snow falls in winter", "rain falls", "rain falls", "sun shines")
    assert found.gains == (2.0, 1.0, 1.0, 1.0)
    assert found.others == ("Unasked for",)
    assert limited(found, 2).gains is not None


def test_another_split_of_a_beir_folder_is_named_by_its_file(beir: Path) -> None:
    (beir / "qrels" / "test.tsv").rename(beir / "qrels" / "dev.tsv")
    (beir / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n")

    with pytest.raises(
        BenchError, match=r"expected test\.tsv or one .*found dev\.tsv, train\.tsv; name one"
    ):
        read_eval(beir)
    assert read_eval(beir / "qrels" / "dev.tsv").name == "tiny-dev"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("qrels/test.tsv", "q1\td1\t1\n", "test.tsv: expected relevant documents"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td9\t1\n",
         r"test\.tsv:2: corpus-id 'd9' is not in .*corpus\.jsonl"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\n",
         r"test\.tsv:2: expected the columns query-id, corpus-id, score with a header, lacks score"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\tgood\n",
         r"test\.tsv:2: score: expected a number, found 'good'"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\n", "of at least 3 queries, found 1"),
        ("corpus.jsonl", '{"_id": "d1"}', r"corpus\.jsonl:1: expected the keys _id and text, lacks text"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}',
         r"corpus\.jsonl:2: _id 'd1' stands twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_beir_folder_is_named(
    file: str, text: str, message: str, beir: Path
) -> None:
    (beir / file).write_text(text)

    with pytest.raises(BenchError, match=message):
        read_eval(beir)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", r"a\.txt: expected a file that ends in \.jsonl, \.csv, \.tsv, \.parquet, with columns"),
        ("a.csv", "x,y\n" + "1,2\n" * 3, "a.csv: expected columns query and passage.*; found the columns x, y"),
        ("a.csv", "text1,text2,score\na,b,1\na,b,high\na,b,2\n", r"a\.csv:3: score: expected a number, found 'high'"),
        ("a.csv", "text1,text2,score\na,b,1\na,b,c,1\na,b,2\n", r"a\.csv:3: expected 3 columns .* found more"),
        ("a.csv", "text1,text2,score\na,b,1\na,b\na,b,2\n", r"a\.csv:3: expected the keys text1, text2, score, lacks"),
        ("a.csv", "query,passage\na,b\n", "expected at least 3 rows, found 1"),
        ("a.parquet", "no parquet", "a.parquet: expected a Parquet file"),
        ("a.jsonl", '{"query": "a", "image": "b"}\n' * 3, r"a\.jsonl:1: image: no such file, .*b; paths start at"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    file = tmp_path / name
    file.write_text(text)

    with pytest.raises(BenchError, match=message):
        read_eval(file)


def test_a_missing_path_and_a_folder_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"none\.csv: cannot be read: "):
        read_eval(tmp_path / "none.csv")
    with pytest.raises(BenchError, match=r"it has no corpus\.jsonl and no queries\.jsonl"):
        read_eval(tmp_path)


# -- mteb ------------------------------------------------------------------------------------------

needs_mteb = pytest.mark.skipif(find_spec("mteb") is None, reason="mteb is not installed")


@needs_mteb
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_tasks_of_mteb_are_read_as_mteb_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    import mteb
    from datasets import Dataset
    from mteb.abstasks.sts import AbsTaskSTS

    from tests.bench.test_mteb_scores import local_task, metadata_of

    class Pairs(AbsTaskSTS):
        metadata = metadata_of(
            name="LocalPairs",
            type="STS",
            category="t2t",
            modalities=["text"],
            main_score="cosine_spearman",
        )

        def load_data(self, **options: Any) -> None:
            rows = [dict(zip(("sentence1", "sentence2", "score"), p, strict=True)) for p in PAIRS]
            rows = [row | {"score": float(row["score"])} for row in rows]
            self.dataset = {"test": Dataset.from_list(rows)}

    documents = {f"d{i}": f"text {i}" for i in range(5)}
    tasks = {
        "LocalRetrieval": local_task(documents, {f"d{i}": f"query {i}" for i in range(4)}),
        "LocalPairs": Pairs(),
    }
    monkeypatch.setattr(mteb, "get_task", lambda name: tasks[name])

    retrieval, pairs = (read_eval(Path(f"mteb:{name}")) for name in tasks)

    assert retrieval.first == tuple(f"query {i}" for i in range(4))
    assert (retrieval.second[0], retrieval.others) == ("text 0", ("text 4",))
    assert pairs.scores == (4.5, 3.0, 0.0)
    assert pairs.name == "LocalPairs"
    with pytest.raises(
        BenchError, match="mteb:LocalRetrieval/nb: expected one of the subsets default"
    ):
        read_eval(Path("mteb:LocalRetrieval/nb"))
    with pytest.raises(BenchError, match="mteb:Poetry: mteb has no such task"):
        read_eval(Path("mteb:Poetry"))
