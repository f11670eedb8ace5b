"""Texts of a Parquet file's column, in chunks, in bounded memory whatever the sizes of its row groups.

Rules:
    * The column holds strings: ``string``, ``large_string``, ``string_view`` or a dictionary of them. Another
      type is an error before anything is read; numbers are not turned into text.
    * A null is no text: an error with the number of its row, before the first text is given wherever the
      file's statistics tell. An empty string is an empty text.
    * The other columns keep their types. One called ``embedding`` is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from embedge.runtime.errors import EmbedgeError, EmbedgeValueError
from embedge.runtime.tables.arrow import load_pyarrow, named_errors
from embedge.runtime.tables.chunk import EMBEDDING, Chunk, check_kept, runs_of

if TYPE_CHECKING:
    import pyarrow

__all__ = ["ParquetInput", "check_text_column", "texts_of"]

_READ_BYTES = 1 << 20  # pages are read as they are needed, not a row group's columns as a whole
_ADVICE = "expected a whole Parquet file; write it anew, or name another"
_NO_NULLS = "fill such rows or leave them out"


class ParquetInput:
    """A Parquet file with texts.

    Args:
        path: of the file.
        column: that holds the texts.
        keep: the other columns to give; ``None``: all.
        name: of the file in messages; ``None``: its path.

    Attributes:
        rows: how many the file has.
        schema: of the other columns, a ``pyarrow.Schema``.

    Raises:
        EmbedgeValueError: a column is not there, or is none of texts.
        EmbedgeError: the file cannot be read, or a row has no text.
        EmbedgeImportError: pyarrow is missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        column: str,
        *,
        keep: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        arrow = load_pyarrow()
        self._name = name or os.fspath(path)
        self._column = column
        with named_errors(self._name, _ADVICE):
            self._file = arrow.parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)
        schema = self._file.schema_arrow
        check_text_column(schema, column, self._name)
        check_kept(keep, column)
        _check_names(schema.names, keep, self._name)
        self._kept = [
            index
            for index, other in enumerate(schema.names)
            if other not in (column, EMBEDDING) and (keep is None or other in keep)
        ]
        self.rows: int = self._file.metadata.num_rows
        self.schema = arrow.schema([schema.field(index) for index in self._kept])
        self._refuse_nulls()

    def chunks(
        self, start: int = 0, stop: int | None = None, *, rows: int, characters: int
    ) -> Iterator[Chunk]:
        """The rows from ``start`` up to ``stop``, both from 0, in chunks.

        Args:
            start: the first row.
            stop: the row after the last; ``None``: all.
            rows: most rows of a chunk.
            characters: a chunk ends at the row that reaches them.

        Raises:
            EmbedgeError: the file is damaged, or a row has no text.
        """
        stop = self.rows if stop is None else min(stop, self.rows)
        with named_errors(self._name, _ADVICE):
            for first, table in self._tables(start, stop, rows):
                texts = texts_of(table.column(self._column), self._name, first)
                others = table.select(self._names_kept)
                for begin, end in runs_of(map(len, texts), rows=rows, characters=characters):
                    yield Chunk(
                        texts[begin:end],
                        range(first + begin + 1, first + end + 1),
                        others.slice(begin, end - begin),
                        "row",
                    )

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def _names_kept(self) -> list[str]:
        return [self._file.schema_arrow.names[index] for index in self._kept]

    def _tables(self, start: int, stop: int, rows: int) -> Iterator[tuple[int, pyarrow.Table]]:
        """Tables of at most ``rows`` rows, each with the number of its first, from 0."""
        arrow = load_pyarrow()
        groups: list[int] = []  # that hold rows of the range
        first = begin = 0  # the first row of these, and of the next group
        for group in range(self._file.num_row_groups):
            end = begin + self._file.metadata.row_group(group).num_rows
            if end > start and begin < stop:
                first = first if groups else begin
                groups.append(group)
            begin = end
        columns = [self._column, *self._names_kept]
        for batch in self._file.iter_batches(
            batch_size=rows, row_groups=groups, columns=columns, use_threads=False
        ):
            end = min(first + batch.num_rows, stop)
            skipped = max(start - first, 0)
            if end > first + skipped:
                cut = batch.slice(skipped, end - first - skipped)
                yield first + skipped, arrow.Table.from_batches([cut])
            first += batch.num_rows

    def _refuse_nulls(self) -> None:
        """Finds a null that the statistics tell of, before an hour's work is done."""
        with named_errors(self._name, _ADVICE):
            paths = [
                self._file.metadata.schema.column(i).path
                for i in range(self._file.metadata.num_columns)
            ]
            leaf = paths.index(self._column)
            first = 0
            for group in range(self._file.num_row_groups):
                of_group = self._file.metadata.row_group(group)
                statistics = of_group.column(leaf).statistics
                if statistics is not None and statistics.has_null_count and statistics.null_count:
                    for batch in self._file.iter_batches(
                        row_groups=[group], columns=[self._column], use_threads=False
                    ):
                        _check_nulls(batch.column(0), self._name, first)
                        first += batch.num_rows
                first += of_group.num_rows


def check_text_column(schema: pyarrow.Schema, column: str, name: str) -> None:
    """Refuses a column that is not there, or holds no texts.

    Args:
        schema: of the table, a ``pyarrow.Schema``.
        column: its name.
        name: of the table, for messages.

    Raises:
        EmbedgeValueError: saying which columns hold texts.
    """
    texts = [field.name for field in schema if _is_text(field.type)]
    there = f"columns of texts there: {', '.join(texts) or 'none'}"
    found = schema.names.count(column)
    if found != 1:
        count = f"{found} of that name" if found else "no such column"
        raise EmbedgeValueError(f"{name}: expected one column {column!r}, found {count}; {there}")
    kind = schema.field(column).type
    if not _is_text(kind):
        raise EmbedgeValueError(
            f"{name}: column {column!r}: expected strings, found {kind}; {there}"
        )


def texts_of(column: pyarrow.ChunkedArray, name: str, first: int = 0) -> list[str]:
    """The texts of a column.

    Args:
        column: of strings.
        name: of the table, for messages.
        first: the number of its first row, from 0.

    Raises:
        EmbedgeError: a row has no text, or one that is not UTF-8.
    """
    _check_nulls(column, name, first)
    try:
        texts: list[str] = column.to_pylist()
    except UnicodeDecodeError:
        row = next(row for row, value in enumerate(column, first + 1) if _is_damaged(value))
        raise EmbedgeError(
            f"{name}: row {row}: expected UTF-8, found other bytes; write the column anew"
        ) from None
    return texts


def _check_nulls(column: Any, name: str, first: int) -> None:
    if column.null_count:
        row = next(row for row, null in enumerate(column.is_null().to_pylist(), first + 1) if null)
        raise EmbedgeError(f"{name}: row {row}: expected a text, found null; {_NO_NULLS}")


def _check_names(names: Sequence[str], keep: Sequence[str] | None, name: str) -> None:
    for other in keep or ():
        if names.count(other) != 1:
            raise EmbedgeValueError(
                f"{name}: expected one column {other!r} to keep, found {names.count(other)}; columns there: "
                f"{', '.join(names)}"
            )


def _is_text(kind: Any) -> bool:
    types = load_pyarrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_damaged(value: Any) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return True
    return False
