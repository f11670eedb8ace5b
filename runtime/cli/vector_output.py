"""Vectors to a stream, as JSONL, CSV, .npy or Parquet, and files that appear under their name when complete.

In JSON and CSV a vector is ``[0.1, -0.2]``, its numbers the shortest that give the float32 back. A null in another
column is an empty field of CSV, as an empty string is; lists and objects are JSON there.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from embedge.runtime.bundle.files import system_reason
from embedge.runtime.bundle.writing import NewFile
from embedge.runtime.errors import EmbedgeError
from embedge.runtime.tables.chunk import EMBEDDING, members_of
from embedge.runtime.tables.parquet_output import ParquetOutput, as_dtype

if TYPE_CHECKING:
    from embedge.runtime.cli.rows import Columns
    from embedge.runtime.tables.chunk import Others

__all__ = ["Layout", "VectorWriter", "csv_line", "open_output", "vector_writer"]

_BLOCK_BYTES = 1 << 20

Vectors = NDArray[Any] | Sequence[NDArray[Any]]


class VectorWriter(Protocol):
    """Takes vectors chunk by chunk."""

    def write(self, others: Others, vectors: Vectors) -> None:
        """Writes vectors ``[rows, dim]`` and, where the format can, the rows' other columns.

        Of multi-vectors each row is ``[tokens, dim]``.
        """


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How vectors are written.

    Attributes:
        file_format: "jsonl", "csv", "npy" or "parquet".
        dim: length of a vector.
        dtype: of its numbers: "float32", "float16", "int8", "uint8".
        multi_vector: whether a row has a vector a token.
        kind: the vectors' fingerprint and its parts, for Parquet.
        metadata: what else its metadata says, as JSON under these keys.
    """

    file_format: str
    dim: int
    dtype: str = "float32"
    multi_vector: bool = False
    kind: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None


@contextmanager
def open_output(name: str) -> Iterator[_NamedStream]:
    """A stream to write to; a file gets its name only when the block ends without an error.

    Args:
        name: a path, or "-" for standard output.

    Raises:
        EmbedgeError: if it cannot be written.
    """
    if name == "-":
        if sys.stdout is None:
            raise EmbedgeError("standard output is closed; name a file with --output FILE")
        stream = _NamedStream(sys.stdout.buffer, "standard output")
        yield stream
        stream.flush()
        return
    # Through a link to the file behind it: replacing the link is not what was asked for.
    try:
        target = Path(os.path.realpath(name))
        has_name = not target.exists() or stat.S_ISREG(target.stat().st_mode)
    except OSError as error:
        raise EmbedgeError(f"--output {name}: {system_reason(error)}") from error
    if not has_name:
        with _opened(target, name) as stream:  # a device or a pipe has no name to take
            yield stream
        return
    try:
        new = NewFile(target)
    except OSError as error:
        raise EmbedgeError(f"--output {name}: {error.strerror or error}") from error
    try:
        stream = _NamedStream(new.file, f"--output {name}")
        yield stream
        with stream.named():
            new.commit()
    finally:
        new.discard()


@contextmanager
def vector_writer(
    stream: _NamedStream, layout: Layout, columns: Columns = None, *, before: int = 0
) -> Iterator[VectorWriter]:
    """A writer that completes its output when the block ends without an error.

    Args:
        stream: where to.
        layout: how.
        columns: the other columns; ``None``: of CSV and Parquet those of the first rows.
        before: rows that were written elsewhere, for the numbers in messages.
    """
    if layout.file_format == "jsonl":
        yield _JsonlWriter(stream)
    elif layout.file_format == "csv":
        table = _CsvWriter(stream, columns, before)
        yield table
        table.write(
            [], np.zeros((0, layout.dim), np.float32)
        )  # the columns' names, if there is no row
    elif layout.file_format == "parquet":
        parquet = ParquetOutput(
            stream,
            dim=layout.dim,
            dtype=layout.dtype,
            multi_vector=layout.multi_vector,
            kind=layout.kind or {},
            columns=columns,
            before=before,
            metadata=layout.metadata,
        )
        yield parquet
        parquet.close()
        stream.flush()
    else:
        with _npy_writer(stream, layout) as writer:
            yield writer


@contextmanager
def _npy_writer(stream: _NamedStream, layout: Layout) -> Iterator[_NpyWriter]:
    if stream.can_seek():
        with _npy_body(stream, layout) as writer:
            yield writer
        return
    # .npy starts with the number of rows, which a pipe would have to be told first.
    folder = tempfile.gettempdir()
    spool_name = f"{folder}, where .npy is collected before it goes to {stream.name}"
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        spool = _NamedStream(
            file, spool_name, "name a roomier folder in TMPDIR, or give --output FILE"
        )
        with _npy_body(spool, layout) as writer:
            yield writer
        spool.seek(0)
        while block := file.read(_BLOCK_BYTES):
            stream.write(block)


class _NamedStream:
    """A stream whose failures name it; a reader that has gone stays a BrokenPipeError.

    Args:
        stream: where to.
        name: for messages.
        advice: what to do about a failure.
    """

    def __init__(
        self, stream: BinaryIO, name: str, advice: str = "make room, or write to another place"
    ) -> None:
        self._stream = stream
        self.name = name
        self._advice = advice

    def can_seek(self) -> bool:
        """Whether the start can be written again; standard output's may be another program's."""
        is_output = sys.stdout is not None and self._stream is sys.stdout.buffer
        return self._stream.seekable() and not is_output

    def write(self, data: bytes) -> None:
        """Writes all of it; an unbuffered stream may take less at a time."""
        rest = memoryview(data)
        with self.named():
            while rest:
                rest = rest[self._stream.write(rest) :]

    def seek(self, place: int, whence: int = os.SEEK_SET) -> None:
        with self.named():
            self._stream.seek(place, whence)

    def flush(self) -> None:
        with self.named():
            self._stream.flush()

    def close(self) -> None:
        with self.named():
            self._stream.close()

    @contextmanager
    def named(self) -> Iterator[None]:
        """Failures inside name the stream."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise EmbedgeError(f"{self.name}: {error.strerror or error}; {self._advice}") from error


@contextmanager
def _npy_body(stream: _NamedStream, layout: Layout) -> Iterator[_NpyWriter]:
    stream.write(_npy_header(0, layout))
    writer = _NpyWriter(stream, layout.dtype)
    yield writer
    stream.seek(0)
    stream.write(_npy_header(writer.rows, layout))
    stream.seek(0, os.SEEK_END)
    stream.flush()


class _JsonlWriter:
    def __init__(self, stream: _NamedStream) -> None:
        self._stream = stream

    def write(self, others: Others, vectors: Vectors) -> None:
        for members, vector in zip(members_of(others), vectors, strict=True):
            kept = {key: value for key, value in members.items() if key != EMBEDDING}
            head = _json_of(kept)[:-1] + (", " if kept else "")
            self._stream.write(f'{head}"embedding": {_as_json(vector)}}}\n'.encode("ascii"))
        self._stream.flush()


class _CsvWriter:
    def __init__(self, stream: _NamedStream, columns: Columns, before: int) -> None:
        self._stream = stream
        self._names: list[str] | None = None
        self._rows = before
        self._headed = False
        if columns is not None:  # a schema's, or the names themselves
            self._names = list(getattr(columns, "names", columns))

    def write(self, others: Others, vectors: Vectors) -> None:
        lines = []
        members = [
            {key: value for key, value in row.items() if key != EMBEDDING}
            for row in members_of(others)
        ]
        if not self._headed:
            if self._names is None:
                self._names = list(members[0]) if members else []
            lines.append(self._line([*self._names, EMBEDDING]))
            self._headed = True
        names = self._names or []
        for row, vector in zip(members, vectors, strict=True):
            self._rows += 1
            if set(row) != set(names):
                raise EmbedgeError(
                    f"output row {self._rows}: expected the columns of the first row ({', '.join(names) or 'none'}), "
                    f"found {', '.join(row) or 'none'}; choose columns that all rows have with --keep"
                )
            fields = [self._field(name, row[name]) for name in names]
            lines.append(self._line([*fields, _as_json(vector)]))
        self._stream.write(b"".join(lines))
        self._stream.flush()

    def _field(self, name: str, value: Any) -> Any:
        try:
            return _csv_field(value)
        except EmbedgeError as error:
            raise EmbedgeError(f"output row {self._rows}: column {name!r}: {error}") from error

    def _line(self, fields: Sequence[Any]) -> bytes:
        try:
            return csv_line(fields).encode()
        except UnicodeEncodeError as error:
            raise EmbedgeError(
                f"output row {self._rows}: expected text that UTF-8 has, found half of a surrogate pair in "
                f"{fields!r:.80}; leave that column out with --keep, or write JSONL"
            ) from error


def csv_line(fields: Sequence[Any]) -> str:
    """A row of CSV that ends with a line feed; fields with a carriage return are quoted as those with a line feed."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerow(fields)  # what it ends with, it quotes
    return text.getvalue().removesuffix("\r\n") + "\n"


def _csv_field(value: Any) -> Any:
    """What the csv module writes; lists and objects as JSON, of which no number is NaN or infinite."""
    is_plain = isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if value is None or is_plain else _json_of(value)


def _json_of(value: Any) -> str:
    """JSON of what another format may have had.

    Raises:
        EmbedgeError: JSON has no form for it.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise EmbedgeError(
            f"expected columns that JSON has a form for, found {str(error).removeprefix('Object of ')}; leave such "
            "columns out with --keep, or write Parquet"
        ) from error


def _as_json(vector: NDArray[Any]) -> str:
    """A vector, or the rows of one a token, as a JSON array."""
    # the shortest digits that give the float32 back: half the bytes of Python's floats
    parts = vector.astype(str) if vector.ndim == 1 else map(_as_json, vector)
    return f"[{', '.join(parts)}]"


class _NpyWriter:
    def __init__(self, stream: _NamedStream, dtype: str) -> None:
        self._stream = stream
        self._dtype = dtype
        self.rows = 0

    def write(self, others: Others, vectors: Vectors) -> None:
        assert isinstance(vectors, np.ndarray)
        self._stream.write(as_dtype(vectors, self._dtype, self.rows + 1).tobytes())
        self.rows += len(vectors)


def _npy_header(rows: int, layout: Layout) -> bytes:
    """The head of a .npy file; NumPy leaves room in it for any number of rows."""
    header = io.BytesIO()
    descr = np.dtype(layout.dtype).newbyteorder("<").str
    described = {"descr": descr, "fortran_order": False, "shape": (rows, layout.dim)}
    npy_format.write_array_header_1_0(header, described)
    return header.getvalue()


@contextmanager
def _opened(path: Path, name: str) -> Iterator[_NamedStream]:
    try:
        file = path.open("wb")
    except OSError as error:
        raise EmbedgeError(f"--output {name}: {error.strerror or error}") from error
    stream = _NamedStream(file, f"--output {name}")
    try:
        yield stream
    finally:
        stream.close()
