"""Writing a bundle so that a failed or killed export leaves nothing under the final name.

A new bundle is written to ``.NAME.partial`` beside its place and takes its name at the end, in one step
also where a bundle has it. Additions to a bundle are new files inside it that nothing refers to until its
``manifest.json`` is replaced, which is one rename; a journal of what was there before tells them from a
user's own files. Whoever writes is alone at it (``_lock.py``) and first removes what a killed export left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedge.export.errors import ExportError
from embedge.export.options import PRECISIONS
from embedge.runtime.bundle.contract import CARD, MANIFEST, PREPARED, VISION
from embedge.runtime.bundle.files import JSON_BYTES, read_regular_file
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.json_object import read_json_object
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.bundle.model_card import model_card, renewed_card
from embedge.runtime.bundle.writing import (
    NAME_INSIDE,
    make_folder,
    partial_of,
    put_in_place,
    recover,
    replace_file,
    sweep,
)
from embedge.runtime.errors import BundleError, EmbedgeValueError

JOURNAL = ".export.partial"
LOCK = ".export.lock"
# Of embedge, in no manifest: what `prepare` made, and what a killed process was about to rename.
_OWN = (f"{PREPARED}/", LOCK, f".{MANIFEST}.", f".{CARD}.")
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
    work = partial_of(real)
    try:
        make_folder(work)
        try:
            yield work
            if overwrite:
                read_existing(out, overwrite)  # nobody's file came meanwhile
            put_in_place(work, real, replace=overwrite)
        finally:
            shutil.rmtree(work, ignore_errors=True)
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


def dump(value: Any) -> str:
    """JSON as it is written into bundles."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_new(path: Path, content: str | bytes) -> None:
    """Write a file that is not there yet, nor a link; text as UTF-8."""
    with open(path, "xb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write the model card; one that somebody else has written in stays."""
    file = folder / CARD
    card: str | None = model_card(manifest)
    if os.path.lexists(file):
        try:
            card = renewed_card(read_regular_file(file, JSON_BYTES).decode(), manifest)
        except (OSError, UnicodeDecodeError):
            return
    if card is not None:
        replace_file(file, card)


def file_entry(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return {"size": path.stat().st_size, "sha256": state.hexdigest()}


def list_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Files of a folder as the manifest lists them."""
    return {name: file_entry(folder / name) for name in sorted(names)}


def relative_files(folder: Path) -> set[str]:
    """Names of all files in a folder, with ``/``."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def is_bundle(out: Path) -> bool:
    """Whether a bundle, or something with a manifest like one, is at ``out``."""
    return (out / MANIFEST).is_file()


def read_existing(out: Path, overwrite: bool) -> Manifest | None:
    """The manifest of the bundle at ``out``; ``None`` where there is nothing, or it is replaced.

    Raises:
        EmbedgeValueError: something else is at ``out``.
    """
    if not out.exists() and not out.is_symlink():
        return None
    if out.is_dir() and not any(out.iterdir()):
        return None
    if not is_bundle(out):
        raise EmbedgeValueError(
            f"{out}: expected no such path, an empty folder or a bundle, found something else; "
            "it is left alone, also with --overwrite: choose another --out"
        )
    content = _manifest_content(out)
    if not overwrite:
        return Manifest.from_dict(content, str(out / MANIFEST))
    listed = {*content["files"], MANIFEST, CARD}
    strangers = [n for n in relative_files(out) - listed if not n.startswith(_OWN)]
    if strangers:
        raise EmbedgeValueError(
            f"{out}: expected a bundle's files alone, found {', '.join(sorted(strangers)[:5])} "
            "beside them, which --overwrite would delete; move them away or choose another --out"
        )
    return None


def check_kept(out: Path, precisions: Iterable[str]) -> None:
    """Check the files of a bundle that an addition keeps, and the content of those that it builds on.

    Args:
        out: the bundle.
        precisions: those that get further tasks.

    Raises:
        BundleError: a file is missing or damaged, or a graph reads past what is listed.
    """
    bundle = Bundle(out, verify="size")
    listed = bundle.manifest.files
    grows = {p: s for p, s in bundle.manifest.precisions.items() if p in set(precisions)}
    folders = {path.rpartition("/")[0] for s in grows.values() for path in s.graphs.values()}
    for name in listed:
        if name.rpartition("/")[0] not in folders:
            continue
        found = file_entry(out / name)["sha256"]
        if found != listed[name].sha256:
            raise BundleError(
                f"{out / name}: expected SHA-256 {listed[name].sha256}, found {found}: the file is damaged, "
                "and new tasks would share it; copy the bundle again, or export it anew with --overwrite"
            )
    for precision, settings in grows.items():
        for name in (*settings.graphs, *([VISION] if settings.vision else [])):
            bundle.graph_bytes(precision, name)


def _manifest_content(out: Path) -> dict[str, Any]:
    """The JSON of a bundle's manifest.

    Raises:
        EmbedgeValueError: it is damaged, or of something else than a bundle.
    """
    content: dict[str, Any] = {}
    found = "JSON without them"
    try:
        content = read_json_object(out / MANIFEST)
    except BundleError as error:
        found = str(error)
    if not isinstance(content.get("files"), dict):
        raise EmbedgeValueError(
            f"{out / MANIFEST}: expected a bundle's manifest with format_version and files, found "
            f"{found}; it is left alone, also with --overwrite: choose another --out"
        )
    return content


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
            ours = path.name.endswith((".onnx", ".bin", ".layers.json", ".unpack.json"))
            if ours and path.is_file() and f"{precision}/{path.name}" not in known:
                path.unlink()
        if inside.is_dir() and not any(inside.iterdir()):
            inside.rmdir()
    (out / JOURNAL).unlink()
