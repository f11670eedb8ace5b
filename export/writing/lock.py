"""One export at a time to a folder: two at once would delete or lose each other's files.

The lock is ``.NAME.lock`` beside the bundle, or ``.export.lock`` inside a bundle whose parent cannot be
written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from embedge.export.errors import ExportError
from embedge.export.writing.bundle import write_error
from embedge.export.writing.existing import LOCK, is_bundle
from embedge.runtime.bundle.lock import release_lock, take_lock

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def sole_exporter(out: Path) -> Iterator[None]:
    """Keep others from exporting to ``out`` meanwhile.

    Folders on the way to ``out`` are made, and removed again where they are left empty.

    Raises:
        ExportError: another process or thread exports to it, or nothing can be written there.
        EmbedgeError: something else than a lock has its name.
    """
    real = Path(os.path.realpath(out))
    with ExitStack() as held:
        try:
            held.callback(_remove_empty, _make_folder(real.parent))
            held.callback(release_lock, *_lock(out, real))
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


def _lock(out: Path, real: Path) -> tuple[Path, int]:
    def busy(holder: str) -> ExportError:
        return ExportError(
            f"{out}: expected no other export to it at the same time, found {holder} exporting to it; "
            "wait until that is done, or choose another --out"
        )

    beside = real.parent / f".{real.name}.lock"
    try:
        return beside, take_lock(beside, busy)
    except OSError as error:
        if error.errno not in _READ_ONLY or not is_bundle(real):
            raise
        return real / LOCK, take_lock(real / LOCK, busy)
