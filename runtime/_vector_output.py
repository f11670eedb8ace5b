"""Vectors to a stream, as JSONL or .npy, and files that appear under their name when complete."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from embedge.runtime._errors import EmbedgeError

__all__ = ["VectorWriter", "open_output", "vector_writer"]

_NPY_HEADER_BYTES = 128


class VectorWriter(Protocol):
    """Takes vectors chunk by chunk."""

    def write(self, others: Sequence[Mapping[str, Any]], vectors: NDArray[np.float32]) -> None:
        """Writes float32 ``[rows, dim]`` and, where the format can, the rows' other members."""


@contextmanager
def open_output(name: str) -> Iterator[BinaryIO]:
    """A stream to write to; a file gets its name only when the block ends without an error.

    Args:
        name: a path, or "-" for standard output.

    Raises:
        EmbedgeError: if the file cannot be written.
    """
    if name == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    # Through a link to the file behind it: replacing the link is not what was asked for.
    target = Path(os.path.realpath(name))
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        with _opened(target, name) as stream:  # a device or a pipe has no name to take
            yield stream
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with _opened(temporary, name) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def vector_writer(stream: BinaryIO, file_format: str, dim: int) -> Iterator[VectorWriter]:
    """A writer that completes its output when the block ends without an error.

    Args:
        stream: where to.
        file_format: "jsonl" or "npy".
        dim: length of the vectors.
    """
    if file_format == "jsonl":
        yield _JsonlWriter(stream)
        return
    if stream.seekable() and stream is not sys.stdout.buffer:
        with _npy_body(stream, dim) as writer:
            yield writer
        return
    # .npy starts with the number of rows, which a pipe would have to be told first.
    with tempfile.TemporaryFile() as spool:
        with _npy_body(spool, dim) as writer:
            yield writer
        spool.seek(0)
        shutil.copyfileobj(spool, stream)


@contextmanager
def _npy_body(stream: Any, dim: int) -> Iterator[_NpyWriter]:
    stream.write(_npy_header(0, dim))
    writer = _NpyWriter(stream)
    yield writer
    stream.seek(0)
    stream.write(_npy_header(writer.rows, dim))
    stream.seek(0, os.SEEK_END)


class _JsonlWriter:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, others: Sequence[Mapping[str, Any]], vectors: NDArray[np.float32]) -> None:
        for members, vector in zip(others, vectors, strict=True):
            # The shortest digits that give the float32 back: half the bytes of Python's floats.
            numbers = ", ".join(vector.astype(str))
            kept = {key: value for key, value in members.items() if key != "embedding"}
            head = json.dumps(kept)[:-1] + (", " if kept else "")
            self._stream.write(f'{head}"embedding": [{numbers}]}}\n'.encode("ascii"))
        self._stream.flush()


class _NpyWriter:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.rows = 0

    def write(self, others: Sequence[Mapping[str, Any]], vectors: NDArray[np.float32]) -> None:
        self._stream.write(np.ascontiguousarray(vectors, "<f4").tobytes())
        self.rows += len(vectors)


def _npy_header(rows: int, dim: int) -> bytes:
    """Version 1.0 of the .npy format, always of the same length so that it can be rewritten."""
    start = b"\x93NUMPY\x01\x00" + (_NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}".encode()
    return start + shape.ljust(_NPY_HEADER_BYTES - 11) + b"\n"


@contextmanager
def _opened(path: Path, name: str) -> Iterator[BinaryIO]:
    try:
        stream = path.open("wb")
    except OSError as error:
        raise EmbedgeError(f"--output {name}: {error.strerror or error}") from error
    with stream:
        yield stream
