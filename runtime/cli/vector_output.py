"""Vectors to a stream, as JSONL or .npy, and files that appear under their name when complete."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from embedge.runtime.bundle.files import system_reason
from embedge.runtime.bundle.writing import NewFile
from embedge.runtime.errors import EmbedgeError

__all__ = ["VectorWriter", "open_output", "vector_writer"]

_BLOCK_BYTES = 1 << 20

Vectors = NDArray[np.float32] | Sequence[NDArray[np.float32]]


class VectorWriter(Protocol):
    """Takes vectors chunk by chunk."""

    def write(self, others: Sequence[Mapping[str, Any]], vectors: Vectors) -> None:
        """Writes float32 ``[rows, dim]`` and, where the format can, the rows' other members.

        Of multi-vectors each row is float32 ``[tokens, dim]``.
        """


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
def vector_writer(stream: _NamedStream, file_format: str, dim: int) -> Iterator[VectorWriter]:
    """A writer that completes its output when the block ends without an error.

    Args:
        stream: where to.
        file_format: "jsonl" or "npy".
        dim: length of the vectors.
    """
    if file_format == "jsonl":
        yield _JsonlWriter(stream)
        return
    if stream.can_seek():
        with _npy_body(stream, dim) as writer:
            yield writer
        return
    # .npy starts with the number of rows, which a pipe would have to be told first.
    folder = tempfile.gettempdir()
    spool_name = f"{folder}, where .npy is collected before it goes to {stream.name}"
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        spool = _NamedStream(
            file, spool_name, "name a roomier folder in TMPDIR, or give --output FILE"
        )
        with _npy_body(spool, dim) as writer:
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
def _npy_body(stream: _NamedStream, dim: int) -> Iterator[_NpyWriter]:
    stream.write(_npy_header(0, dim))
    writer = _NpyWriter(stream)
    yield writer
    stream.seek(0)
    stream.write(_npy_header(writer.rows, dim))
    stream.seek(0, os.SEEK_END)
    stream.flush()


class _JsonlWriter:
    def __init__(self, stream: _NamedStream) -> None:
        self._stream = stream

    def write(self, others: Sequence[Mapping[str, Any]], vectors: Vectors) -> None:
        for members, vector in zip(others, vectors, strict=True):
            kept = {key: value for key, value in members.items() if key != "embedding"}
            head = json.dumps(kept)[:-1] + (", " if kept else "")
            self._stream.write(f'{head}"embedding": {_as_json(vector)}}}\n'.encode("ascii"))
        self._stream.flush()


def _as_json(vector: NDArray[np.float32]) -> str:
    """A vector, or the rows of one a token, as a JSON array."""
    # the shortest digits that give the float32 back: half the bytes of Python's floats
    parts = vector.astype(str) if vector.ndim == 1 else map(_as_json, vector)
    return f"[{', '.join(parts)}]"


class _NpyWriter:
    def __init__(self, stream: _NamedStream) -> None:
        self._stream = stream
        self.rows = 0

    def write(self, others: Sequence[Mapping[str, Any]], vectors: Vectors) -> None:
        self._stream.write(np.ascontiguousarray(vectors, "<f4").tobytes())
        self.rows += len(vectors)


def _npy_header(rows: int, dim: int) -> bytes:
    """The head of a .npy file; NumPy leaves room in it for any number of rows."""
    header = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)}
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
