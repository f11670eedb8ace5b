"""Files that somebody else may have written: regular ones alone, read up to a size.

A FIFO would block whoever opens it, a device has no end, and a file may be larger than the memory. What is
refused here is an :class:`OSError` with the reason, as for a file that the operating system refuses.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from io import BufferedReader
from typing import TypeAlias

__all__ = [
    "GRAPH_BYTES",
    "JSON_BYTES",
    "TOKENIZER_BYTES",
    "FileState",
    "kind_of",
    "no_permission",
    "open_regular_file",
    "read_regular_file",
    "sha256_of",
    "size_of",
    "state_of",
    "system_reason",
]

JSON_BYTES = 64 << 20  # a manifest of 1,000 tasks takes 2 MB, a list of 36 layers to unpack 6 MB
GRAPH_BYTES = 512 << 20  # without the weights beside it a graph of 36 layers takes 3 MB
TOKENIZER_BYTES = 512 << 20  # those of 262,144 words take 33 MB

FileState: TypeAlias = tuple[int, ...]

# Opened for its status alone: nobody writes into a FIFO, and a terminal stays somebody else's.
_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY")
)
_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a file for reading, or what a link to it names.

    Raises:
        OSError: if it cannot be opened, or is something else than a regular file.
    """
    _check_regular(path, os.stat(path).st_mode)  # opening a device may do something
    descriptor = os.open(path, _FLAGS)
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a file.

    Args:
        path: the file, or a link to it.
        limit: most bytes that it may have.

    Raises:
        OSError: as :func:`open_regular_file`, and if the file is larger.
    """
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if max(size, len(data)) > limit:
        reason = f"expected at most {limit:,} bytes, found {max(size, len(data)):,}"
        raise OSError(errno.EFBIG, reason, os.fspath(path))
    return data


def sha256_of(path: str | os.PathLike[str]) -> tuple[str, FileState]:
    """The SHA-256 of a file in lower-case hexadecimal, and its state, the same before and after.

    Raises:
        OSError: as :func:`open_regular_file`, and if the file is written meanwhile.
    """
    with open_regular_file(path) as file:
        before = state_of(os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = state_of(os.fstat(file.fileno()))
    if before != after:
        reason = "was written while it was read; open the bundle again"
        raise OSError(errno.EBUSY, reason, os.fspath(path))
    return digest, after


def state_of(found: os.stat_result) -> FileState:
    """What changes when a file is written or another takes its name; what else may change, too."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def size_of(state: FileState) -> int:
    """Bytes of a file in a state."""
    return state[2]


def kind_of(mode: int) -> str:
    """What a file is by its ``st_mode``, in words."""
    return next((words for fits, words in _KINDS if fits(mode)), "something else")


def system_reason(error: OSError | RuntimeError | ValueError) -> str:
    """Why the operating system refused a path, with what to do where it is not about the path itself."""
    if isinstance(error, FileNotFoundError) and error.filename is None:  # of `os.getcwd`
        return (
            "the working folder was deleted or moved; `cd` to one that exists, or give a whole path"
        )
    return getattr(error, "strerror", None) or str(error)


def no_permission(error: BaseException) -> bool:
    """Whether a file is there and this user may not use it."""
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)


def _check_regular(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        reason = f"expected a regular file, found {kind_of(mode)}"
        raise OSError(errno.EINVAL, reason, os.fspath(path))
