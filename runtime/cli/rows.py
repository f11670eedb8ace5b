"""The rows of ``embedge embed``'s input, whatever its format, and which of them a call embeds."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from embedge.runtime.bundle.files import kind_of, state_of, system_reason
from embedge.runtime.cli.csv_input import CsvInput
from embedge.runtime.cli.text_input import Record, chunked, read_records
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError
from embedge.runtime.tables.chunk import Chunk
from embedge.runtime.tables.parquet_input import ParquetInput

if TYPE_CHECKING:
    import pyarrow

    Columns: TypeAlias = Sequence[str] | pyarrow.Schema | None

__all__ = ["Rows", "SteadyFile", "open_rows", "parse_shard", "shard_of"]

_SHARD = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


class Rows(ABC):
    """Rows of an input that is open.

    Attributes:
        columns: the other columns: their names, a schema, or ``None`` where each row has its own.
    """

    columns: Columns = None

    @abstractmethod
    def chunks(
        self, start: int, stop: int | None, *, rows: int, characters: int
    ) -> Iterator[Chunk]:
        """The rows from ``start`` up to ``stop``, both from 0, in chunks.

        Raises:
            EmbedgeError: naming what cannot be used.
        """

    @abstractmethod
    def count(self) -> int:
        """How many rows there are; leaves nothing to read where the file has to be read for it."""


class _Lines(Rows):
    """Lines, or the objects of JSONL."""

    def __init__(self, stream: BinaryIO, field: str | None, keep: Sequence[str] | None) -> None:
        self._stream, self._field, self._keep = stream, field, keep
        self.columns = [] if field is None else None

    def chunks(
        self, start: int, stop: int | None, *, rows: int, characters: int
    ) -> Iterator[Chunk]:
        records = read_records(self._stream, self._field, keep=self._keep, start=start, stop=stop)
        return _as_chunks(records, rows, characters)

    def count(self) -> int:
        return sum(1 for _ in self._stream)


class _Csv(Rows):
    def __init__(self, stream: BinaryIO, column: str, keep: Sequence[str] | None) -> None:
        self._input = CsvInput(stream, column, keep=keep)
        self.columns = self._input.columns

    def chunks(
        self, start: int, stop: int | None, *, rows: int, characters: int
    ) -> Iterator[Chunk]:
        return _as_chunks(self._input.records(start, stop), rows, characters)

    def count(self) -> int:
        return self._input.count()


class _Parquet(Rows):
    def __init__(self, file: ParquetInput) -> None:
        self._file = file
        self.columns = file.schema

    def chunks(
        self, start: int, stop: int | None, *, rows: int, characters: int
    ) -> Iterator[Chunk]:
        return self._file.chunks(start, stop, rows=rows, characters=characters)

    def count(self) -> int:
        return self._file.rows


@contextmanager
def open_rows(
    name: str, file_format: str, column: str | None, keep: Sequence[str] | None
) -> Iterator[Rows]:
    """Opens an input until the block ends.

    Args:
        name: of the file, or "-" for standard input.
        file_format: "lines", "jsonl", "csv" or "parquet".
        column: with the texts, or the key of JSONL; ``None`` for lines.
        keep: the other columns to give; ``None``: all.

    Raises:
        EmbedgeError: it cannot be opened, or has no such column.
        EmbedgeValueError: for a column of Parquet that is not there or holds no texts.
    """
    if file_format == "parquet":
        if name == "-":
            raise EmbedgeValueError(
                "--input -: Parquet is read from its end, which a pipe has not; expected --input FILE"
            )
        with _opened(name):  # for the words of what cannot be opened
            file = ParquetInput(name, column or "", keep=keep, name=f"--input {name}")
        try:
            yield _Parquet(file)
        finally:
            file.close()
        return
    with _opened(name) if name != "-" else _stdin() as stream:
        if file_format == "csv":
            yield _Csv(stream, column or "", keep)
        else:
            yield _Lines(stream, column, keep)


def parse_shard(text: str) -> tuple[int, int]:
    """``--shard i/n`` as two numbers.

    Raises:
        EmbedgeValueError: it is none of n shards.
    """
    found = _SHARD.fullmatch(text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise EmbedgeValueError(
            f"--shard {text}: expected i/n with i from 1 to n, such as 1/4 for the first of four"
        )
    return int(found[1]), int(found[2])


def shard_of(rows: int, shard: tuple[int, int]) -> tuple[int, int]:
    """The rows of a shard, both ends from 0, the second one not included.

    Shards follow each other without a gap, and their numbers of rows differ by one at most.
    """
    number, count = shard
    return rows * (number - 1) // count, rows * number // count


class SteadyFile:
    """A file that is read more than once, and has to stay the one that it was.

    Args:
        name: of the file.
        option: that reads it so, for messages.

    Attributes:
        sha256: of its bytes, in hexadecimal.

    Raises:
        EmbedgeValueError: it is no regular file.
        EmbedgeError: it cannot be read, or changed while it was.
    """

    def __init__(self, name: str, option: str) -> None:
        self._name = name
        try:
            mode = os.stat(name).st_mode
        except OSError as error:
            raise EmbedgeError(f"--input {name}: {system_reason(error)}") from error
        if not stat.S_ISREG(mode):
            raise EmbedgeValueError(
                f"{option}: the input is read twice, which only a regular file can be; found {kind_of(mode)} as "
                f"--input {name}; write its content to a file first"
            )
        with _opened(name) as file:
            self._state = _state(os.fstat(file.fileno()))
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.check()

    def check(self) -> None:
        """Refuses a file that is no longer the one that was opened first.

        Raises:
            EmbedgeError: another file has its name, or it was written to.
        """
        try:
            now = _state(os.stat(self._name))
        except OSError as error:
            raise EmbedgeError(f"--input {self._name}: {system_reason(error)}") from error
        if now != self._state:
            raise EmbedgeError(
                f"--input {self._name}: expected the file of the start, found that it was written to meanwhile; start "
                "anew, with --resume after deleting the output's .parts"
            )


def _state(status: os.stat_result) -> tuple[int, ...]:
    return state_of(status)[:4]  # not when it got another name or other rights, in a job of hours


def _as_chunks(records: Iterator[Record], rows: int, characters: int) -> Iterator[Chunk]:
    for some in chunked(records, rows=rows, characters=characters):
        yield Chunk(
            [record.text for record in some],
            [record.line for record in some],
            [record.others for record in some],
            "line",
        )


@contextmanager
def _opened(name: str) -> Iterator[BufferedReader]:
    try:
        file = open(name, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise EmbedgeError(f"--input {name}: {error.strerror or error}") from error
    with file:
        yield file


@contextmanager
def _stdin() -> Iterator[BinaryIO]:
    if sys.stdin is None:
        raise EmbedgeError("standard input is closed; name a file with --input FILE")
    if sys.stdin.buffer.isatty():
        print("embedge: reads lines from the terminal; Ctrl-D ends them", file=sys.stderr)
    yield sys.stdin.buffer
