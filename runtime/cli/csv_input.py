"""Texts from CSV as RFC 4180 has it, read by the standard library.

Rules:
    * The first line names the columns. Fields are separated by commas; in double quotes a field may hold
      commas, line breaks and quotes, which are doubled. Lines end with a line feed, also after a carriage return.
    * The input is UTF-8, and a byte order mark at the start is dropped. A NUL character is an error: it comes
      from another encoding.
    * Every field is text: a number is embedded as it is written, an empty field is an empty text.
    * A row has as many fields as there are columns. A blank line is an error, but for those at the end. So is a
      quote that never ends, or text after one.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from embedge.runtime.cli.text_input import Record, decoded
from embedge.runtime.errors import EmbedgeError
from embedge.runtime.tables.chunk import EMBEDDING, check_kept

__all__ = ["CsvInput"]

_FIELD_CHARACTERS = 64_000_000
"""Longest field: what a quote that never ends can make of a file is read into memory."""


class CsvInput:
    """CSV with texts in one column.

    Args:
        lines: each with its line end.
        column: that holds the texts.
        keep: the other columns to give; ``None``: all.

    Attributes:
        columns: names of the other columns that are given; one called ``embedding`` is not.

    Raises:
        EmbedgeError: the first line names no columns, names one twice, or not those asked for.
    """

    def __init__(
        self, lines: Iterable[bytes], column: str, *, keep: Collection[str] | None = None
    ) -> None:
        self._line = 0
        self._reader = csv.reader(self._decoded(lines), strict=True)
        with self._limited():
            self._names = next(self._reader, [])
        if not any(self._names):
            raise EmbedgeError(
                f"input line 1: expected the columns' names, found none; put a first line such as `id,{column}` there"
            )
        check_kept(keep, column)
        for name in (column, *(keep or ())):
            if self._names.count(name) != 1:
                raise EmbedgeError(
                    f"input line 1: expected one column {name!r}, found {self._names.count(name)}; columns there: "
                    f"{', '.join(self._names)} (--column names the texts', --keep others)"
                )
        if doubled := {name for name in self._names if self._names.count(name) > 1}:
            raise EmbedgeError(
                f"input line 1: expected each column once, found {', '.join(sorted(doubled))} more than once; rename "
                "them"
            )
        self._column = column
        self.columns = [
            n for n in self._names if n not in (column, EMBEDDING) and (keep is None or n in keep)
        ]

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The rows from ``start`` up to ``stop``, both from 0, each with the line that it starts on.

        Raises:
            EmbedgeError: with the number of the line that cannot be used.
        """
        place = self._names.index(self._column)
        kept = [(name, self._names.index(name)) for name in self.columns]
        for line, fields in islice(self._rows(), start, stop):
            yield Record(fields[place], line, {name: fields[index] for name, index in kept})

    def count(self) -> int:
        """How many rows there are; reads all of them."""
        return sum(1 for _ in self._rows())

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        blank = None
        while True:
            line = self._line + 1
            with self._limited():
                fields = next(self._reader, None)
            if fields is None:
                return
            if not fields:
                blank = blank or line
                continue
            if blank is not None:
                raise EmbedgeError(
                    f'input line {blank}: expected {self._expected()}, found a blank line; delete it, or write "" for '
                    "an empty text"
                )
            if len(fields) != len(self._names):
                raise EmbedgeError(
                    f"input line {line}: expected {self._expected()}, found {len(fields)}; put fields with a comma in "
                    "double quotes"
                )
            yield line, fields

    def _expected(self) -> str:
        return f"{len(self._names)} field{'s' * (len(self._names) > 1)}"

    def _decoded(self, lines: Iterable[bytes]) -> Iterator[str]:
        for raw in lines:
            self._line += 1
            if b"\0" in raw:
                raise EmbedgeError(
                    f"input line {self._line}: expected UTF-8 text, found a NUL character; convert the input first, "
                    "e.g. `iconv -f UTF-16 -t UTF-8`"
                )
            yield decoded(raw, self._line)

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Reads one row under this module's limit, which is the interpreter's, and names its errors."""
        line = self._line + 1
        before = csv.field_size_limit(_FIELD_CHARACTERS)
        try:
            yield
        except csv.Error as error:
            reason = {"unexpected end of data": "a quote that never ends"}.get(
                str(error), str(error).partition(" - ")[0]
            )
            raise EmbedgeError(
                f"input line {line}: expected CSV, found {reason}; double the quotes inside quoted fields, and end "
                "lines with a line feed"
            ) from error
        finally:
            csv.field_size_limit(before)
