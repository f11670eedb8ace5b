"""Labelled sets in the forms that people have them in.

    FILE.jsonl, .csv, .tsv, .parquet    columns query, passage; text1, text2, score; or sentence1, sentence2, score
    FOLDER                              BEIR: corpus.jsonl, queries.jsonl, qrels/*.tsv
    FOLDER/qrels/SPLIT.tsv              BEIR, where there are several splits and none is called test
    FILE with query and image           page images, see page_files.py; also folders of Parquet files
    mteb:NAME, mteb:NAME/SUBSET         a retrieval or STS task of mteb's; data sets come from the hub or its cache

A document of BEIR and mteb is its title and its text with a space between, as their own tools have it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedge.bench.documents import Document
from embedge.bench.errors import BenchError
from embedge.bench.measure.page_files import (
    PAGE_COLUMNS,
    check_page_columns,
    has_pages,
    page_documents,
    parquet_files,
    parquet_rows,
)
from embedge.bench.measure.texts import EvalSet
from embedge.runtime.bundle.files import system_reason
from embedge.runtime.host.install_advice import install_command

__all__ = ["MTEB", "read_eval"]

MTEB = "mteb:"
_PAIRS = (("text1", "text2", "score"), ("sentence1", "sentence2", "score"))
_QUERIES = ("query", "passage")
_FORMS = (
    "columns query and passage, or text1, text2 and score, or sentence1, sentence2 and score, or query and image; "
    "a folder of corpus.jsonl, queries.jsonl and qrels; or mteb:NAME"
)
_LEAST = 3
Rows = Iterator[tuple[str, Mapping[str, Any]]]  # where each stands, for messages


def read_eval(path: Path) -> EvalSet:
    """Return a labelled set.

    Args:
        path: in one of the forms of this module; what its name ends in says which.

    Raises:
        BenchError: unreadable, of none of these forms, or a row lacks a column or has an unusable value.
    """
    name = str(path)
    if name.startswith(MTEB):
        return _mteb_task(name.removeprefix(MTEB))
    if path.is_dir():
        return _folder(path)
    if path.parent.name == "qrels" and (path.parents[1] / "corpus.jsonl").exists():
        return _beir(path.parents[1], path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BenchError(
            f"{path}: expected a file that ends in {', '.join(_READERS)}, with {_FORMS}"
        )
    return _from_rows(path, list(reader(path)))


def _folder(path: Path) -> EvalSet:
    if (path / "corpus").is_dir():
        return _page_corpus(path)
    if files := parquet_files(path):
        return _from_rows(path, [row for file in files for row in parquet_rows(file)])
    return _beir(path, _qrels_of(path))


# -- rows of a file ---------------------------------------------------------------------------------


def _from_rows(path: Path, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> EvalSet:
    if len(rows) < _LEAST:
        raise BenchError(f"{path}: expected at least {_LEAST} rows, found {len(rows)}")
    keys = _keys(path, rows[0][1])
    if keys == PAGE_COLUMNS:
        return _from_page_rows(path, rows)
    for place, row in rows:
        lacking = [key for key in keys if key not in row or row[key] is None]
        if lacking:
            raise BenchError(f"{place}: expected the keys {', '.join(keys)}, lacks {lacking[0]}")
    first, second = (tuple(str(row[key]) for _, row in rows) for key in keys[:2])
    if keys == _QUERIES:
        return EvalSet(name=path.stem, first=first, second=second)
    scores = tuple(_score(place, row[keys[2]]) for place, row in rows)
    return EvalSet(name=path.stem, first=first, second=second, scores=scores)


def _keys(path: Path, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns that a set's first row has."""
    if has_pages(row):
        check_page_columns(path, row)
        return PAGE_COLUMNS
    for keys in (*_PAIRS, _QUERIES):
        if set(keys) <= set(row):
            return keys
    for keys in (*_PAIRS, _QUERIES):  # named by what it has of them
        if set(keys) & set(row) - {"score"}:
            return keys
    raise BenchError(f"{path}: expected {_FORMS}; found the columns {', '.join(map(str, row))}")


def _from_page_rows(path: Path, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> EvalSet:
    """Return a set of queries and pages; a page without a query stands in the way of the others."""
    folder = path if path.is_dir() else path.parent
    pages = page_documents(folder, rows)
    asked = [
        (str(row["query"]), page)
        for (_, row), page in zip(rows, pages, strict=True)
        if row.get("query")
    ]
    if len({query for query, _ in asked}) < _LEAST:
        raise BenchError(
            f"{path}: expected at least {_LEAST} different queries, found {len({q for q, _ in asked})}"
        )
    used = {page for _, page in asked}
    return EvalSet(
        name=path.stem,
        first=tuple(query for query, _ in asked),
        second=tuple(page for _, page in asked),
        others=tuple(dict.fromkeys(page for page in pages if page not in used)),
    )


def _score(place: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BenchError(f"{place}: score: expected a number, found {value!r}")
    return number


def _jsonl(path: Path) -> Rows:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BenchError(f"{place}: expected a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise BenchError(f"{place}: expected a JSON object, found {type(row).__name__}")
        yield place, row


def _delimited(path: Path) -> Rows:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = io.StringIO(_text(path), newline="")
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row:
                raise BenchError(
                    f"{place}: expected {len(reader.fieldnames or ())} columns as in the first line, found more; "
                    "quote texts that hold the separator"
                )
            yield place, row
    except csv.Error as error:
        raise BenchError(f"{path}:{reader.line_num}: {error}") from error


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".csv": _delimited,
    ".tsv": _delimited,
    ".parquet": parquet_rows,
}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BenchError(f"{path}: cannot be read: {system_reason(error)}") from error
    except UnicodeDecodeError as error:
        raise BenchError(f"{path}: expected a UTF-8 text file: {error}") from error


# -- BEIR ------------------------------------------------------------------------------------------


def _qrels_of(folder: Path) -> Path:
    """Return the relevance judgements of a folder: those of the split test, or the only ones."""
    lacking = [name for name in ("corpus.jsonl", "queries.jsonl") if not (folder / name).exists()]
    if lacking:
        raise BenchError(
            f"{folder}: expected a BEIR folder of corpus.jsonl, queries.jsonl and qrels/*.tsv; it has no "
            f"{' and no '.join(lacking)}"
        )
    found = sorted((folder / "qrels").glob("*.tsv"))
    test = [file for file in found if file.stem == "test"]
    if len(test or found) != 1:
        shown = ", ".join(file.name for file in found) or "none"
        raise BenchError(
            f"{folder / 'qrels'}: expected test.tsv or one file of another name, found {shown}; name one, as "
            f"{folder / 'qrels' / 'SPLIT.tsv'}"
        )
    return (test or found)[0]


def _beir(folder: Path, qrels: Path) -> EvalSet:
    corpus = _texts_by_id(folder / "corpus.jsonl")
    queries = _texts_by_id(folder / "queries.jsonl")
    judged = []
    for place, row in _delimited(qrels):
        keys = ("query-id", "corpus-id", "score")
        lacking = [key for key in keys if row.get(key) is None]
        if lacking:
            raise BenchError(
                f"{place}: expected the columns {', '.join(keys)} with a header, lacks {lacking[0]}"
            )
        for kind, known in (("query-id", queries), ("corpus-id", corpus)):
            if row[kind] not in known:
                file = "queries.jsonl" if known is queries else "corpus.jsonl"
                raise BenchError(f"{place}: {kind} {row[kind]!r} is not in {folder / file}")
        judged.append((row["query-id"], row["corpus-id"], _score(place, row["score"])))
    name = folder.name if qrels.stem == "test" else f"{folder.name}-{qrels.stem}"
    return _retrieval(name, str(qrels), queries, corpus, judged)


def _texts_by_id(file: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for place, row in _jsonl(file):
        if "_id" not in row or "text" not in row:
            lacking = "_id" if "_id" not in row else "text"
            raise BenchError(f"{place}: expected the keys _id and text, lacks {lacking}")
        key = str(row["_id"])
        if key in texts:
            raise BenchError(f"{place}: _id {key!r} stands twice in the file; expected it once")
        texts[key] = _document(row)
    return texts


def _document(row: Mapping[str, Any]) -> str:
    return f"{row.get('title') or ''} {row['text']}".strip()


def _retrieval(
    name: str,
    where: str,
    queries: Mapping[str, str],
    corpus: Mapping[str, Document],
    judged: Iterable[tuple[str, str, float]],
) -> EvalSet:
    """Return a set of the queries that have a relevant document, over the whole corpus."""
    relevant = [(query, document, gain) for query, document, gain in judged if gain > 0]
    if len({query for query, _, _ in relevant}) < _LEAST:
        raise BenchError(
            f"{where}: expected relevant documents (a score above 0) of at least {_LEAST} queries, found "
            f"{len({query for query, _, _ in relevant})}"
        )
    used = {document for _, document, _ in relevant}
    return EvalSet(
        name=name,
        first=tuple(queries[query] for query, _, _ in relevant),
        second=tuple(corpus[document] for _, document, _ in relevant),
        gains=tuple(gain for _, _, gain in relevant),
        others=tuple(text for document, text in corpus.items() if document not in used),
    )


# -- pages in the layout of BEIR -------------------------------------------------------------------


def _page_corpus(folder: Path) -> EvalSet:
    """Return the set of a folder of corpus, queries and qrels in Parquet, as ViDoRe's second version has them."""
    rows = {}
    for part in ("corpus", "queries", "qrels"):
        files = parquet_files(folder / part)
        if not files:
            raise BenchError(
                f"{folder / part}: expected Parquet files, as SPLIT-00000-of-00001.parquet, found none"
            )
        rows[part] = [row for file in files for row in parquet_rows(file)]
    pages = page_documents(folder, rows["corpus"])
    corpus = dict(zip(_ids(rows["corpus"], "corpus"), pages, strict=True))
    texts = [str(_cell(place, row, "query")) for place, row in rows["queries"]]
    queries = dict(zip(_ids(rows["queries"], "query"), texts, strict=True))
    judged = []
    for place, row in rows["qrels"]:
        query = str(_cell(place, row, "query-id", "query_id"))
        page = str(_cell(place, row, "corpus-id", "corpus_id"))
        if query not in queries:
            raise BenchError(f"{place}: query-id {query!r} is not in {folder / 'queries'}")
        if page not in corpus:
            raise BenchError(f"{place}: corpus-id {page!r} is not in {folder / 'corpus'}")
        judged.append((query, page, _score(place, _cell(place, row, "score"))))
    return _retrieval(folder.name, str(folder / "qrels"), queries, corpus, judged)


def _ids(rows: Sequence[tuple[str, Mapping[str, Any]]], kind: str) -> list[str]:
    found: dict[str, str] = {}
    for place, row in rows:
        key = str(_cell(place, row, f"{kind}-id", f"{kind}_id"))
        if key in found:
            raise BenchError(
                f"{place}: {kind}-id {key!r} stands in {found[key]} too; expected once"
            )
        found[key] = place
    return list(found)


def _cell(place: str, row: Mapping[str, Any], *names: str) -> Any:
    """Return the value of a column, by the first of its names that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise BenchError(f"{place}: expected the column {' or '.join(names)}, lacks it")


# -- mteb ------------------------------------------------------------------------------------------


def _mteb_task(named: str) -> EvalSet:
    name, _, subset = named.partition("/")
    try:
        import mteb
    except ImportError as error:
        raise BenchError(
            f"{MTEB}{named}: needs mteb, which is not installed; run {install_command('mteb', ['mteb'])}"
        ) from error
    try:
        task: Any = mteb.get_task(name)
    except (KeyError, ValueError) as error:
        raise BenchError(f"{MTEB}{named}: mteb has no such task: {error}") from error
    if task.metadata.type not in ("Retrieval", "STS"):
        raise BenchError(
            f"{MTEB}{named}: is of the type {task.metadata.type}; expected Retrieval or STS; `python -m "
            f"embedge.bench.mteb_model BUNDLE --tasks {name}` measures others"
        )
    if list(task.metadata.modalities) != ["text"]:
        raise BenchError(
            f"{MTEB}{named}: is of {', '.join(task.metadata.modalities)}; the bench measures texts; `python -m "
            f"embedge.bench.mteb_model BUNDLE --tasks {name}` measures others"
        )
    try:
        task.load_data()
    except Exception as error:  # of datasets and the hub, of many kinds
        raise BenchError(f"{MTEB}{named}: its data could not be loaded: {error}") from error
    data = _split(named, task, _subset(named, task, subset))
    return (
        _mteb_pairs(named, task, data) if task.metadata.type == "STS" else _mteb_corpus(named, data)
    )


def _subset(named: str, task: Any, wanted: str) -> Any:
    """Return the data of a subset, by split; some tasks have none and hold splits at once."""
    subsets = dict(task.dataset)
    if any(split in subsets for split in task.metadata.eval_splits) and not wanted:
        return subsets
    if wanted in subsets:
        return subsets[wanted]
    if not wanted and len(subsets) == 1:
        return next(iter(subsets.values()))
    raise BenchError(
        f"{MTEB}{named}: expected one of the subsets {', '.join(map(str, subsets))}; name it, as "
        f"{MTEB}{task.metadata.name}/{next(iter(subsets), 'SUBSET')}"
    )


def _split(named: str, task: Any, data: Any) -> Any:
    splits = [split for split in task.metadata.eval_splits if split in data]
    if not splits:
        raise BenchError(f"{MTEB}{named}: has none of its splits {task.metadata.eval_splits}")
    return data["test" if "test" in splits else splits[0]]


def _mteb_pairs(named: str, task: Any, data: Any) -> EvalSet:
    first, second = task.column_names
    rows = [
        (
            f"{MTEB}{named}, row {number}",
            {"text1": r[first], "text2": r[second], "score": r["score"]},
        )
        for number, r in enumerate(data, 1)
    ]
    return _from_rows(Path(task.metadata.name), rows)


def _mteb_corpus(named: str, data: Any) -> EvalSet:
    if data.get("top_ranked"):
        raise BenchError(
            f"{MTEB}{named}: ranks candidates of its own for each query; expected a task that searches its corpus"
        )
    corpus = {str(row["id"]): _document(row) for row in data["corpus"]}
    queries = {str(row["id"]): str(row["text"]) for row in data["queries"]}
    judged = [
        (query, document, float(gain))
        for query, its in data["relevant_docs"].items()
        for document, gain in its.items()
    ]
    return _retrieval(named.replace("/", "-"), f"{MTEB}{named}", queries, corpus, judged)
