"""Writing a bundle so that a failed or killed export leaves nothing under the final name.

A new bundle is written to ``.NAME.partial`` beside its place and renamed at the end. Additions to a
bundle are new files inside it that nothing refers to until its ``manifest.json`` is replaced, which is
one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedge.export._errors import ExportError
from embedge.export._request import PRECISIONS
from embedge.runtime._errors import EmbedgeValueError
from embedge.runtime._manifest import Manifest

MANIFEST = "manifest.json"
CARD = "README.md"


@contextmanager
def new_bundle(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``out``; on success it takes the name ``out``.

    Args:
        out: the bundle's final path.
        overwrite: replace what is there, once the new bundle is whole.

    Raises:
        ExportError: the disk is full or the folder cannot be written.
    """
    work = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if work.exists():  # a killed export's
            shutil.rmtree(work)
        work.mkdir()
        yield work
        _sync(work)
        if overwrite and out.exists():
            old = out.parent / f".{out.name}.replaced"
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
            work.rename(out)
            shutil.rmtree(old)
        else:
            work.rename(out)
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def additions(out: Path, known: Mapping[str, Any]) -> Iterator[Path]:
    """Yield ``out`` itself; on failure, files that the manifest does not list are removed.

    Args:
        out: an existing bundle.
        known: the ``files`` of its manifest.

    Raises:
        ExportError: the disk is full or the folder cannot be written.
    """
    _remove_strangers(out, known)  # of a killed export
    try:
        yield out
    except BaseException as error:
        manifest = Manifest.from_dict(json.loads((out / MANIFEST).read_text("utf-8")))
        _remove_strangers(out, manifest.files)
        if isinstance(error, OSError):
            raise write_error(out, error) from error
        raise


def write_error(out: Path, error: OSError) -> ExportError:
    """An operating system's refusal as a message about the bundle."""
    free = shutil.disk_usage(_existing(out)).free
    return ExportError(
        f"{out}: the bundle could not be written: {error.strerror or error} "
        f"({free / 1e6:.0f} MB free there); nothing was left under this name. Free some space or "
        "choose another --out, and export again"
    )


def replace_file(path: Path, text: str) -> None:
    """Write UTF-8 text beside ``path`` and rename it over."""
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def file_entry(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return {"size": path.stat().st_size, "sha256": state.hexdigest()}


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's ``files``: everything in the folder but the manifest and the card."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    names = {p.relative_to(folder).as_posix(): p for p in paths}
    return {n: file_entry(p) for n, p in names.items() if n not in (MANIFEST, CARD)}


def read_existing(out: Path, overwrite: bool) -> Manifest | None:
    """The manifest of the bundle at ``out``; ``None`` where there is nothing, or it is replaced.

    Raises:
        EmbedgeValueError: something else is at ``out``.
    """
    if not out.exists() and not out.is_symlink():
        return None
    if not (out / MANIFEST).is_file():
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
            return None
        raise EmbedgeValueError(
            f"{out}: expected no such path, an empty folder or a bundle, found something else; "
            "it is left alone, also with --overwrite: choose another --out"
        )
    if overwrite:
        return None
    return Manifest.from_dict(json.loads((out / MANIFEST).read_text("utf-8")))


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _remove_strangers(folder: Path, known: Mapping[str, Any]) -> None:
    """Delete what an unfinished export left; nothing but our own kinds of file in our own folders."""
    for precision in PRECISIONS:
        inside = folder / precision
        for path in sorted(inside.glob("*")):
            ours = path.name.endswith((".onnx", ".bin", ".layers.json"))
            if ours and path.is_file() and f"{precision}/{path.name}" not in known:
                path.unlink()
        if inside.is_dir() and not any(inside.iterdir()):
            inside.rmdir()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
