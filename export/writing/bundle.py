"""Writing a bundle so that a failed or killed export leaves nothing under the final name.

A new bundle is written to ``.NAME.partial`` beside its place and takes its name at the end, in one step
also where a bundle has it. Additions to a bundle are new files inside it that nothing refers to until its
``manifest.json`` is replaced, which is one rename; a journal of what was there before tells them from a
user's own files. Whoever writes is alone at it (``lock.py``) and first removes what a killed export left.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedge.export.errors import ExportError
from embedge.export.schemes.registry import PRECISIONS
from embedge.export.writing.existing import is_bundle, read_existing
from embedge.export.writing.files import relative_files
from embedge.runtime.bundle.contract import CARD, MANIFEST
from embedge.runtime.bundle.files import JSON_BYTES, read_regular_file
from embedge.runtime.bundle.json_object import read_json_object
from embedge.runtime.bundle.writing import (
    NAME_INSIDE,
    new_folder,
    recover,
    replace_file,
    sweep,
)
from embedge.runtime.errors import BundleError

JOURNAL = ".export.partial"
_KINDS = (".onnx", ".bin", ".layers.json", ".unpack.json", ".safetensors")
_EARLIER = tuple(f".{name}.partial" for name in (JOURNAL, MANIFEST, CARD))  # of earlier versions
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_NOTHING_LEFT = "nothing was left under this name"
_LEFT_ALONE = "the bundle that was there is as it was"


@contextmanager
def new_bundle(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``out``; on success it takes the name ``out``.

    Args:
        out: the bundle's final path.
        overwrite: replace what is there, once the new bundle is whole.

    Raises:
        ExportError: the disk is full or the folder cannot be written.
        EmbedgeError: something is in the way.
    """
    left = _LEFT_ALONE if overwrite and is_bundle(out) else _NOTHING_LEFT
    real = Path(os.path.realpath(out))
    try:
        with new_folder(real, replace=overwrite) as work:
            yield work
            if overwrite:
                read_existing(out, overwrite)  # nobody's file came meanwhile
    except OSError as error:
        raise write_error(out, error, left) from error


def clear_up(out: Path) -> None:
    """Undo what a killed export left beside and inside ``out``; only for whoever is alone there.

    Raises:
        ExportError: it cannot be removed.
        EmbedgeError: something else has a name of embedge's.
    """
    real = Path(os.path.realpath(out))
    try:
        recover(real)
        if is_bundle(real):
            roll_back(real)
    except OSError as error:
        raise write_error(out, error, _LEFT_ALONE if is_bundle(real) else _NOTHING_LEFT) from error


@contextmanager
def additions(out: Path) -> Iterator[Path]:
    """Yield ``out`` itself; on failure, the files that were written since are removed.

    Args:
        out: an existing bundle.

    Raises:
        ExportError: the disk is full or the folder cannot be written.
    """
    try:
        replace_file(out / JOURNAL, json.dumps(sorted(relative_files(out))))
        yield out
        (out / JOURNAL).unlink()
    except BaseException as error:
        roll_back(out)
        if isinstance(error, OSError):
            raise write_error(out, error, _LEFT_ALONE) from error
        raise


def write_error(out: Path, error: OSError, left: str = _NOTHING_LEFT) -> ExportError:
    """An operating system's refusal as a message about the bundle.

    Args:
        out: the bundle.
        error: what was refused.
        left: what there is under its name now.
    """
    reason, advice = error.strerror or str(error), "choose another --out"
    if error.errno in _NO_SPACE:
        free = shutil.disk_usage(_existing(out)).free
        reason += f" ({free / 1e6:.0f} MB free there)"
        advice = "free some space or choose another --out"
    elif error.errno in _NO_PERMISSION:
        advice = "choose an --out that this user can write to"
    elif error.errno == errno.EBUSY:  # something is mounted there
        advice = NAME_INSIDE
    elif error.errno in _VANISHED:
        advice = "make sure that nothing else moves or deletes files there"
    place = "" if error.filename in (None, str(out)) else f"{error.filename}: "
    return ExportError(
        f"{out}: the bundle could not be written: {place}{reason}; {left}: {advice}, and export again"
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def roll_back(out: Path) -> None:
    """Delete what an unfinished addition wrote: our kinds of file that its journal does not list."""
    sweep(out)
    for name in _EARLIER:
        (out / name).unlink(missing_ok=True)
    if (out / JOURNAL).is_symlink() or not (out / JOURNAL).is_file():
        return
    try:
        before = set(json.loads(read_regular_file(out / JOURNAL, JSON_BYTES)))
        known = {*before, *read_json_object(out / MANIFEST)["files"]}
    except (ValueError, KeyError, TypeError, RecursionError, BundleError):
        return
    for precision in PRECISIONS:
        inside = out / precision
        if inside.is_symlink():
            continue  # nothing is added through a link
        for path in sorted(inside.glob("*")):
            ours = path.name.endswith(_KINDS)
            if ours and path.is_file() and f"{precision}/{path.name}" not in known:
                path.unlink()
        if inside.is_dir() and not any(inside.iterdir()):
            inside.rmdir()
    (out / JOURNAL).unlink()
