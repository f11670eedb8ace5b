"""Files and folders that take their name once they are whole, and never through what lies there.

A file is written beside its place under a name that cannot be guessed, flushed, and renamed. A folder is
filled under ``.NAME.partial`` and takes the name ``NAME`` in one step, also from a folder that has it.

Rules:
    * Nothing is opened through a link that somebody put there: new files and folders are created, not
      opened, and what a killed process left is removed only if it is a file or folder of this user.
    * A process killed at any moment leaves the old file or folder, or the new one. What it was about to
      write is removed by the next writer: of files, by whoever finds them unlocked; of folders, by
      :func:`recover`, for whoever is alone there (:mod:`embedge.runtime.bundle.lock`).
    * Everything is on the disk before its name is, so that a power cut leaves one or the other too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from embedge.runtime.bundle.lock import check_own, is_at, lock_now
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError

__all__ = [
    "NAME_INSIDE",
    "NewFile",
    "check_replaceable",
    "make_folder",
    "new_folder",
    "partial_of",
    "put_in_place",
    "recover",
    "remove_folder",
    "replace_file",
    "replaced_of",
    "sweep",
    "sync_files",
]

_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL
_CREATE |= sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))
_ATTEMPTS = 100
NAME_INSIDE = "name a folder inside it"
_RANDOM_BYTES = 8
_PARTIAL = re.compile(rf"\.(.+)\.[0-9a-f]{{{2 * _RANDOM_BYTES}}}\.partial")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


class NewFile:
    """A file that takes the place of ``path``, or none, when it is complete.

    Args:
        path: what it becomes. An existing file keeps its permissions.

    Attributes:
        file: to write to.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        sweep(path.parent, path.name)
        self._partial, self.file = _create_beside(path)
        self._ended = False

    def commit(self) -> None:
        """Flush the file to the disk and give it its name.

        Raises:
            OSError: the disk is full, or the name belongs to something else.
        """
        self.file.flush()
        if hasattr(os, "fchmod"):
            with suppress(FileNotFoundError):
                os.fchmod(self.file.fileno(), stat.S_IMODE(self._path.stat().st_mode))
        os.fsync(self.file.fileno())
        if sys.platform == "win32":  # an open file cannot be renamed there
            self.file.close()
        os.replace(self._partial, self._path)  # elsewhere locked until it has its name
        self._ended = True
        self.file.close()
        _sync_folder(self._path.parent)

    def discard(self) -> None:
        """Remove what was written, unless it was committed."""
        if self._ended:
            return
        self._ended = True
        with suppress(OSError):  # what the buffer holds is not wanted
            self.file.close()
        self._partial.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: a reader finds the old one or the new one.

    Args:
        path: its name. A link there is replaced, not followed.
        content: all of it; text as UTF-8.

    Raises:
        OSError: nothing can be written there.
    """
    new = NewFile(path)
    try:
        new.file.write(content.encode("utf-8") if isinstance(content, str) else content)
        new.commit()
    finally:
        new.discard()


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the files that killed processes were about to rename; those of live ones are locked.

    Args:
        folder: where.
        name: what they were to be called; ``None``: anything.
    """
    with suppress(OSError):
        for partial in folder.iterdir():
            found = _PARTIAL.fullmatch(partial.name)
            if found is not None and name in (None, found[1]):
                with suppress(OSError, EmbedgeError):
                    _remove_unlocked(partial)


def sync_files(folder: Path, names: Iterable[str]) -> None:
    """Wait until files, and the folders that they lie in, are on the disk.

    Args:
        folder: where.
        names: of files below it, with ``/``.

    Raises:
        OSError: the disk refuses.
    """
    folders = {folder}
    for name in names:
        path = folder / name
        folders |= {parent for parent in path.parents if parent.is_relative_to(folder)}
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    for inner in sorted(folders, reverse=True):
        _sync_folder(inner)


def partial_of(out: Path) -> Path:
    """What a folder is called until it is whole."""
    return out.parent / f".{out.name}.partial"


def replaced_of(out: Path) -> Path:
    """What the folder before it is called for a moment, where two names cannot be exchanged."""
    return out.parent / f".{out.name}.replaced"


def recover(out: Path) -> None:
    """Undo what a killed process left beside a folder; only for whoever is alone there.

    Raises:
        EmbedgeError: something else has a name of these.
        OSError: it cannot be removed.
    """
    work, old = partial_of(out), replaced_of(out)
    if os.path.lexists(work):
        remove_folder(work)
    if not os.path.lexists(old):
        return
    check_own(old, stat.S_ISDIR, "a folder")
    if not os.path.lexists(out) or _is_empty_folder(out):
        _rename_over_empty(old, out)
    else:
        _dispose(old, work)
    _sync_folder(out.parent)


@contextmanager
def new_folder(out: Path, *, replace: bool) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes its name when the block ends without an error.

    Args:
        out: its name, which an empty folder may have.
        replace: whether anything else may have it, and is deleted.

    Raises:
        EmbedgeError: something that is not embedge's is in the way.
        OSError: the system refuses; ``out`` is as it was.
    """
    work = partial_of(out)
    make_folder(work)
    try:
        yield work
        put_in_place(work, out, replace=replace)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder that nobody else has made, in place of one that a killed process left.

    Raises:
        EmbedgeError: something else is there.
        OSError: it cannot be made.
    """
    if os.path.lexists(path):
        remove_folder(path)
    path.mkdir()


def remove_folder(path: Path) -> None:
    """Delete a folder of this user with all that is in it; links in it are not followed.

    Raises:
        EmbedgeError: it is something else, or of somebody else.
        OSError: it cannot be deleted.
    """
    check_own(path, stat.S_ISDIR, "a folder")
    shutil.rmtree(path)


def check_replaceable(name: str, out: Path) -> None:
    """Refuse to replace a folder that something is mounted on, or that the process works in.

    Args:
        name: of the argument.
        out: the name.

    Raises:
        EmbedgeValueError: something is mounted there, or this process, and the shell that started it, would
            be left in a deleted folder.
    """
    if os.path.ismount(out):
        raise EmbedgeValueError(
            f"{name}: {out} is a mounted disk or volume, whose folder cannot be replaced; {NAME_INSIDE}, "
            f"such as {out / 'bundle'}"
        )
    with suppress(OSError):  # nothing is there, or the working folder is gone already
        here = Path.cwd()
        if any(os.path.samefile(out, folder) for folder in (here, *here.parents)):
            raise EmbedgeValueError(
                f"{name}: {out} is the working folder, or holds it, and the new folder would take its place; "
                "`cd` out of it, or name another"
            )


def check_new(out: Path, real: Path) -> None:
    """Refuse a new folder's name that something has.

    Args:
        out: the name, as the caller gave it.
        real: the same without links.

    Raises:
        EmbedgeValueError: something other than an empty folder is there, or see :func:`check_replaceable`.
    """
    if os.path.lexists(real) and not _is_empty_folder(real):
        raise EmbedgeValueError(
            f"{out}: expected no such path, found one; name another, or move it"
        )
    check_replaceable("out", real)


def put_in_place(work: Path, out: Path, *, replace: bool) -> None:
    """Give a whole folder the name ``out``, in one step where the system can.

    Args:
        work: ``partial_of(out)``, its files on the disk.
        out: its name, which an empty folder may have.
        replace: whether anything else may have it, and is deleted.

    Raises:
        OSError: the system refuses; ``out`` is as it was.
    """
    if not replace or not os.path.lexists(out) or _is_empty_folder(out):
        _rename_over_empty(work, out)
        _sync_folder(out.parent)
        return
    if not _exchange(work, out):
        old = replaced_of(out)
        os.rename(out, old)
        try:
            os.rename(work, out)
        except BaseException:
            os.rename(old, out)
            raise
        with suppress(OSError):
            os.rename(old, work)
    _sync_folder(out.parent)
    shutil.rmtree(work, ignore_errors=True)  # what is left then is the next writer's to delete


def _dispose(old: Path, work: Path) -> None:
    """Delete a folder that was replaced; under this name it is never found half deleted."""
    os.rename(old, work)
    remove_folder(work)


def _rename_over_empty(source: Path, target: Path) -> None:
    if sys.platform == "win32" and os.path.lexists(target):
        target.rmdir()
    os.rename(source, target)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; ``False`` where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    names = os.fsencode(one), os.fsencode(other)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _create_beside(path: Path) -> tuple[Path, BinaryIO]:
    """A new file in the folder of ``path``, locked as long as it is open."""
    for _ in range(_ATTEMPTS):
        partial = path.with_name(f".{path.name}.{secrets.token_hex(_RANDOM_BYTES)}.partial")
        try:
            descriptor = os.open(partial, _CREATE, 0o666)
        except FileExistsError:
            continue
        file = os.fdopen(descriptor, "r+b")
        lock_now(descriptor)
        if is_at(descriptor, partial):  # not swept before it was locked
            return partial, file
        file.close()
    raise EmbedgeError(
        f"{path.parent}: expected that a new file stays there, found each one gone at once; make "
        "sure that nothing else deletes files there"
    )


def _remove_unlocked(partial: Path) -> None:
    check_own(partial, stat.S_ISREG, "a file")
    if sys.platform == "win32":  # fails while it is open
        partial.unlink()
        return
    flags = os.O_RDWR | sum(getattr(os, n, 0) for n in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))
    descriptor = os.open(partial, flags)
    try:
        if lock_now(descriptor) and is_at(descriptor, partial):
            partial.unlink()
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Flush a folder's names, where the system can."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
