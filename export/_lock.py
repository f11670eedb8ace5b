"""One export at a time to a folder: two at once would delete or lose each other's files.

The lock is the operating system's, on ``.NAME.lock`` beside the bundle, or on ``.export.lock`` inside a
bundle whose parent cannot be written. The system frees it when a process ends, however it ends; the
file only says whose it is, and goes when the export is done.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from embedge.export._bundle_writer import LOCK, is_bundle, write_error
from embedge.export._errors import ExportError

_BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

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
def sole_exporter(out: Path) -> Iterator[None]:
    """Keep others from exporting to ``out`` meanwhile.

    Folders on the way to ``out`` are made, and removed again where they are left empty.

    Raises:
        ExportError: another process or thread exports to it, or nothing can be written there.
    """
    real = Path(os.path.realpath(out))
    with ExitStack() as held:
        try:
            held.callback(_remove_empty, _make_folder(real.parent))
            held.callback(_release, *_open_lock(out, real))
        except OSError as error:
            raise write_error(out, error) from error
        yield


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder, and return what was made, the innermost first."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _open_lock(out: Path, real: Path) -> tuple[Path, int]:
    beside = real.parent / f".{real.name}.lock"
    try:
        return beside, _locked(out, beside)
    except OSError as error:
        if error.errno not in _READ_ONLY or not is_bundle(real):
            raise
        return real / LOCK, _locked(out, real / LOCK)


def _locked(out: Path, file: Path) -> int:
    """The descriptor of the lock file, locked, with the number of this process in it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                _take(descriptor)
            except OSError as error:
                if error.errno in _BUSY:
                    raise _busy(out, os.read(descriptor, 20).decode("ascii", "replace")) from None
                # a file system without locks: as good as it gets
            if _is_at(descriptor, file):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has removed the file meanwhile


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _busy(out: Path, holder: str) -> ExportError:
    who = f"process {holder.strip()}" if holder.strip() else "another process"
    return ExportError(
        f"{out}: expected no other export to it at the same time, found {who} exporting to it; wait "
        "until that is done, or choose another --out"
    )


def _release(file: Path, descriptor: int) -> None:
    if sys.platform == "win32":  # an open file cannot be removed there
        os.close(descriptor)
    with suppress(OSError):
        file.unlink()
    if sys.platform != "win32":
        os.close(descriptor)
