"""Standard streams, whatever the process was started with.

Rules:
    * What a stream's encoding does not have is printed as its escape sequence.
    * A standard error that is closed, full or read by nobody takes everything: a message is lost,
      not the command or its exit code.
    * Files that are opened never get the number of a closed standard stream.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["any_streams", "drop_output", "output_fails"]


@contextlib.contextmanager
def any_streams() -> Iterator[None]:
    """Standard streams that take any text, inside the block."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file would get its number, and libraries' messages
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    given, sys.stderr = sys.stderr, _lossy(sys.stderr)
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)
        sys.stderr.flush()
        sys.stderr = given


class _LossyFile(io.FileIO):
    """A file that drops what it cannot write."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _lossy(stream: TextIO) -> TextIO:
    """The same file behind a stream whose writes do not fail; a stream of no file is given back."""
    with contextlib.suppress(OSError):
        stream.flush()
    try:
        file = _LossyFile(stream.fileno(), "wb", closefd=False)
    except (OSError, ValueError):
        return stream
    return io.TextIOWrapper(io.BufferedWriter(file), encoding=stream.encoding, line_buffering=True)


def output_fails() -> bool:
    """Whether standard output takes no more; what is still buffered is then dropped."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        drop_output()
        return True
    return False


def drop_output() -> None:
    """What is still buffered goes nowhere, so that the interpreter does not complain at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
