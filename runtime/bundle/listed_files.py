"""The files that a manifest lists: there, inside the bundle, and the ones that the manifest means.

A file stays the one that was found first: one that has changed since, or lies in a folder that took the
place of the bundle's, must have the SHA-256 of the manifest. Links lead to files of the bundle, or to the
blobs of the hub's cache that its snapshot lies in.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from embedge.runtime.bundle.files import (
    FileState,
    kind_of,
    no_permission,
    sha256_of,
    size_of,
    state_of,
    system_reason,
)
from embedge.runtime.bundle.manifest import FileEntry
from embedge.runtime.errors import BundleError

__all__ = ["AGAIN", "ListedFiles"]

AGAIN = "copy or export the bundle again"
_REPOSITORY = re.compile(r"[a-z]+--.+")  # models--owner--name


class ListedFiles:
    """The files of a bundle.

    Args:
        root: its folder, absolute and without links.
        entries: what the manifest lists.
    """

    def __init__(self, root: Path, entries: Mapping[str, FileEntry]) -> None:
        self._root = root
        self._entries = entries
        self._blobs = _blobs(root)
        self._states: dict[str, FileState] = {}  # as they were found first

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def note(self) -> None:
        """Remembers the files that are there as the bundle's."""
        for name in self._entries:
            with suppress(BundleError):
                self._states[name] = self._find(name)[1]

    def check(self, name: str, *, hashes: bool) -> None:
        """Compares a file with the manifest, and remembers it.

        Raises:
            BundleError: if it is not what the manifest says.
        """
        (path, state), expected = self._find(name), self._entries[name]
        size = size_of(state)
        if size != expected.size:
            raise BundleError(f"{path}: expected {expected.size} bytes, found {size}; {AGAIN}")
        if hashes:
            found, state = _hashed(path)
            if found != expected.sha256:
                raise BundleError(
                    f"{path}: expected SHA-256 {expected.sha256}, found {found}; {AGAIN}"
                )
        self._states[name] = state

    def file(self, name: str) -> Path:
        """The path of a listed file, as it was when the bundle was opened.

        Raises:
            BundleError: if there is none, it lies outside the folder behind a link, or it has changed.
        """
        path, state = self._find(name)
        if self._states.get(name) != state:
            found, state = _hashed(path)
            if found != self._entries[name].sha256:
                raise BundleError(
                    f"{path}: changed since the bundle was opened: expected SHA-256 "
                    f"{self._entries[name].sha256}, found {found}; open the bundle again"
                )
            self._states[name] = state
        return path

    def unlisted(self, name: str) -> Path:
        """The path of a file beside the listed ones, without links.

        Raises:
            BundleError: if there is none, or it lies outside the folder behind a link.
        """
        return self._find(name)[0].resolve()

    def state(self, name: str) -> FileState:
        """What :meth:`file` last found of a file."""
        return self._states[name]

    @contextmanager
    def reading(self, names: Iterable[str]) -> Iterator[None]:
        """Checks files before and after they are read by somebody else, who opens them by their paths.

        Raises:
            BundleError: as :meth:`file`.
        """
        names = tuple(names)
        for name in names:
            self.file(name)
        yield
        for name in names:
            self.file(name)

    def _find(self, name: str) -> tuple[Path, FileState]:
        """The path of a file, and its state."""
        path = self._root / name
        try:
            real, status = self._resolved(path, name)
        except FileNotFoundError as error:
            raise BundleError(
                f"{path}: missing; {AGAIN}, or a part of it with `embedge subset` where it is whole"
            ) from error
        except (
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError: a circle of links, before Python 3.13
            advice = self._let_in if no_permission(error) else AGAIN
            raise BundleError(
                f"{path}: cannot be read: {system_reason(error)}; {advice}"
            ) from error
        if not stat.S_ISREG(status.st_mode):
            found = kind_of(status.st_mode)
            raise BundleError(f"{path}: expected a regular file, found {found}; {AGAIN}")
        if not real.is_relative_to(self._root) and real.parent != self._blobs:
            raise BundleError(
                f"{path}: a link that leaves the bundle, to {real}; copy the bundle with what its links "
                f"name, `cp -rL {self._root} COPY`, and open the copy"
            )
        if not os.access(real, os.R_OK):  # said here rather than by who reads it
            reason = os.strerror(errno.EACCES)
            raise BundleError(f"{path}: cannot be read: {reason}; {self._let_in}")
        return path, state_of(status)

    def _resolved(self, path: Path, name: str) -> tuple[Path, os.stat_result]:
        """A file's path without links, and its status; the folder of the bundle has none.

        Raises:
            OSError: if there is none, or it cannot be read.
        """
        at = str(self._root)
        for part in name.split("/"):
            at = os.path.join(at, part)
            status = os.lstat(at)
            if stat.S_ISLNK(status.st_mode):
                real = path.resolve(strict=True)
                return real, real.stat()
        return path, status

    @property
    def _let_in(self) -> str:
        return f"its owner can let others read it: `chmod -R a+rX {shlex.quote(str(self._root))}`"


def _hashed(path: Path) -> tuple[str, FileState]:
    try:
        return sha256_of(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error


def _blobs(root: Path) -> Path | None:
    """Where the hub's cache keeps the files of the snapshot that a folder is, or lies in."""
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and _REPOSITORY.fullmatch(repository.name):
            return repository / "blobs"
    return None
