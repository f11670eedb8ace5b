"""Locks of files: one process at a time, until it ends, however it ends.

The lock is the operating system's, on a file that says whose it is and goes when its holder is done. The
file is never opened through a link, and nothing but a lock of embedge's own is written to. The package
filelock does not say who holds a lock, and locks no file that is open already, as new files are here
(:mod:`embedge.runtime.bundle.writing`): most of this module would stay beside it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from embedge.runtime.bundle.files import kind_of
from embedge.runtime.errors import EmbedgeError

__all__ = ["check_own", "is_at", "lock_now", "release_lock", "sole_holder", "take_lock"]

_BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_LINK = (errno.ELOOP, errno.EMLINK)  # what O_NOFOLLOW says about links, by system
_FLAGS = os.O_RDWR | os.O_CREAT
_FLAGS |= sum(
    getattr(os, name, 0)
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
)
_HOLDER = re.compile(rb"\d{0,20}\n?")

if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> None:
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # a locked byte cannot be read by others
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def sole_holder(file: Path, busy: Callable[[str], EmbedgeError]) -> Iterator[None]:
    """Hold the lock on a file; arguments and errors are those of :func:`take_lock`."""
    descriptor = take_lock(file, busy)
    try:
        yield
    finally:
        release_lock(file, descriptor)


def take_lock(file: Path, busy: Callable[[str], EmbedgeError]) -> int:
    """Take the lock on a file, which is made if there is none.

    Args:
        file: which says whose the lock is.
        busy: the error when somebody else has it, from the holder in words.

    Returns:
        What :func:`release_lock` takes.

    Raises:
        EmbedgeError: ``busy``, or something else than a lock of embedge's is there.
        OSError: it cannot be opened.
    """
    while True:
        descriptor = _open(file)
        try:
            try:
                _take(descriptor)
            except OSError as error:
                if error.errno in _BUSY:
                    raise busy(_holder(descriptor)) from None
                # a file system without locks: as good as it gets
            if is_at(descriptor, file):
                _check_content(descriptor, file)
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has removed the file meanwhile


def release_lock(file: Path, descriptor: int) -> None:
    """Remove the file and free the lock."""
    if sys.platform == "win32":  # an open file cannot be removed there
        os.close(descriptor)
    with suppress(OSError):
        file.unlink()
    if sys.platform != "win32":
        os.close(descriptor)


def lock_now(descriptor: int) -> bool:
    """Take the lock on an open file; ``False`` if somebody has it, or there are no locks."""
    try:
        _take(descriptor)
    except OSError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has a name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def check_own(path: Path, fits: Callable[[int], bool], expected: str) -> None:
    """Refuse what is not of the kind that embedge makes there, or of another user.

    Args:
        path: of embedge's naming; it exists.
        fits: the kind, by ``st_mode``.
        expected: the kind in words.

    Raises:
        EmbedgeError: what is there, and what to do.
        FileNotFoundError: nothing is there.
    """
    _check_status(path, path.lstat(), fits, expected)


def _open(file: Path) -> int:
    with suppress(FileNotFoundError):  # opening a device may do something
        check_own(file, stat.S_ISREG, "a file")
    try:
        descriptor = os.open(file, _FLAGS, 0o666)
    except OSError as error:
        if error.errno in _LINK:
            raise _foreign(file, "a file", "a link") from error
        raise
    try:
        _check_status(file, os.fstat(descriptor), stat.S_ISREG, "a file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_status(
    path: Path, status: os.stat_result, fits: Callable[[int], bool], expected: str
) -> None:
    if not fits(status.st_mode):
        raise _foreign(path, expected, kind_of(status.st_mode))
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        raise _foreign(path, expected, f"a file of {status.st_nlink} names")
    if hasattr(os, "geteuid"):
        owners = os.geteuid(), path.parent.stat().st_uid  # a shared drive shows its own for all
        if status.st_uid not in owners:
            raise _foreign(path, f"{expected} of this user", f"one of user {status.st_uid}")


def _check_content(descriptor: int, file: Path) -> None:
    if not _HOLDER.fullmatch(os.read(descriptor, 32)):
        raise _foreign(file, "a lock of embedge's, with a process number", "other content")


def _foreign(path: Path, expected: str, found: str) -> EmbedgeError:
    return EmbedgeError(
        f"{path}: expected {expected} that embedge made, or nothing, found {found}; it was left as it "
        "is: move it away if it is not needed there, or write to another place"
    )


def _holder(descriptor: int) -> str:
    number = os.read(descriptor, 20).decode("ascii", "replace").strip()
    return f"process {number}" if number else "another process"
