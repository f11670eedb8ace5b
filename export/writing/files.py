"""Files of a bundle: how they are written first, and how the manifest lists them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from embedge.runtime.bundle.manifest import FileEntry


def write_new(path: Path, content: str | bytes) -> None:
    """Write a file that is not there yet, nor a link; text as UTF-8."""
    with open(path, "xb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def relative_files(folder: Path) -> set[str]:
    """Names of all files in a folder, with ``/``."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def list_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of files of a folder, as the manifest lists them."""
    return {name: FileEntry.of(folder / name).to_dict() for name in sorted(names)}
