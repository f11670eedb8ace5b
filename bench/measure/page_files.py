"""Page images of labelled sets, in the forms of ViDoRe's data sets and of plain files.

    FILE.parquet            columns query, image: a struct of bytes and path, or bytes; a row without a query is a
                            page that nobody asks for
    FILE.jsonl, .csv, .tsv  columns query, image: the path of an image, from the file's folder
    FOLDER                  SPLIT-*.parquet, or data/SPLIT-*.parquet: the shards of such a file
    FOLDER                  corpus/, queries/, qrels/ of Parquet files: corpus-id and image, query-id and query,
                            query-id, corpus-id and score; since ViDoRe's second version

Columns that say nothing of a page's pixels or its queries (answer, source, markdown, …) are left unread.

Source: https://huggingface.co/vidore, Faysse et al., "ColPali", arXiv 2407.01449.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedge.bench.documents import Document
from embedge.bench.errors import BenchError
from embedge.runtime.host.install_advice import install_command

__all__ = [
    "PAGE_COLUMNS",
    "check_page_columns",
    "has_pages",
    "page_documents",
    "parquet_files",
    "parquet_rows",
]

PAGE_COLUMNS = ("query", "image")
_IMAGE, _FILE = "image", "image_filename"
_READ = ("query", "passage", _IMAGE, _FILE)
_IDS = ("corpus-id", "corpus_id")


def has_pages(row: Mapping[str, Any]) -> bool:
    """Return whether a row is of a set of page images."""
    return _IMAGE in row or _FILE in row


def check_page_columns(path: Path, row: Mapping[str, Any]) -> None:
    """Refuse a set of pages that names no queries, or passages beside the pages.

    Raises:
        BenchError: naming the column.
    """
    found = ", ".join(map(str, row))
    if "query" not in row:
        raise BenchError(
            f"{path}: expected the columns query and image, lacks query; found {found}"
        )
    if "passage" in row:
        raise BenchError(
            f"{path}: has both passage and image; expected one of them, which is searched; remove the other"
        )


def page_documents(folder: Path, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Document]:
    """Return the page of each row: the bytes of its image file, or its path.

    Args:
        folder: from which paths start.
        rows: each with the place that messages name.

    Raises:
        BenchError: no image, an unreadable one, or two of one ``image_filename``; or Pillow is missing.
    """
    names: dict[str, Document] = {}
    pages: dict[Document, Document] = {}  # equal bytes are held once
    found = []
    for place, row in rows:
        page = _page(place, folder, row)
        if page not in pages:
            _check_image(place, page)
        page = pages.setdefault(page, page)
        name = row.get(_FILE)
        if name is not None and names.setdefault(str(name), page) != page:
            raise BenchError(
                f"{place}: image_filename {name!r} names another image in an earlier row; expected one page a name"
            )
        found.append(page)
    return found


def _page(place: str, folder: Path, row: Mapping[str, Any]) -> Document:
    value = row.get(_IMAGE)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    value = value or row.get(_FILE)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, str):
        file = folder / value
        if file.is_file():
            return file
        raise BenchError(f"{place}: image: no such file, {file}; paths start at {folder}")
    raise BenchError(
        f"{place}: image: expected the bytes of an image file or a path, found {type(value).__name__}"
    )


def _check_image(place: str, page: Document) -> None:
    """Refuse what has no header of an image."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BenchError(
            f"{place}: page images need Pillow, which is not installed; run "
            f"{install_command('images', ['pillow'])}"
        ) from error
    try:
        with Image.open(io.BytesIO(page) if isinstance(page, bytes) else page):
            pass
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BenchError(f"{place}: image: expected an image file: {error}") from error


def parquet_files(folder: Path) -> list[Path]:
    """Return the shards of a folder, or of its ``data``: those of the split test, or of the only split.

    Raises:
        BenchError: several splits, none of them test.
    """
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(file.stem.partition("-")[0], []).append(file)
    if len(splits) > 1 and "test" not in splits:
        raise BenchError(
            f"{folder}: expected Parquet files of one split, or of one called test, found {', '.join(splits)}; name a "
            "file"
        )
    return splits.get("test", files)


def parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a Parquet file, each with its place; of sets of pages the columns that are used.

    Raises:
        BenchError: no Parquet file, or pyarrow is missing.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise BenchError(
            f"{path}: reading Parquet needs pyarrow, which is not installed; run "
            f"{install_command('parquet', ['pyarrow'])}"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
        kept = [name for name in names if name in (*_READ, *_IDS)] if _IMAGE in names else names
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=kept):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, arrow.ArrowException) as error:
        raise BenchError(f"{path}: expected a Parquet file: {error}") from error
