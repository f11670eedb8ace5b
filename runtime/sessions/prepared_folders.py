"""Where what `embedge prepare` makes for this machine lies.

Rules:
    * ``prepared/MACHINE/`` in the bundle's folder. Where that cannot be written,
      ``embedge/BUNDLE/MACHINE/`` in the user's cache: ``$XDG_CACHE_HOME``, else ``~/.cache``. BUNDLE is a
      hash of the bundle's files, so it is found wherever the same bundle lies.
    * The cache is looked at first: it is written only where the bundle cannot be, and what is written into
      the bundle later takes its place.
    * A cache that another user owns or may write to is not trusted: not read, not written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import stat
import sys
from pathlib import Path

from embedge.runtime.bundle.contract import PREPARED
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.errors import BundleError, EmbedgeError

__all__ = ["PreparedFolders"]

_CACHE = "embedge"
_VARIABLE = "XDG_CACHE_HOME"
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


class PreparedFolders:
    """The folders of a bundle on a machine.

    Args:
        bundle: for which.
        machine: its folder's name.

    Attributes:
        inside: the one in the bundle's folder, which need not exist.
        command: what prepares the bundle, as it is typed.
    """

    def __init__(self, bundle: Bundle, machine: str) -> None:
        self._root = bundle.root
        self._machine = machine
        self.inside = bundle.root / PREPARED / machine
        self.command = f"embedge prepare {shlex.quote(str(bundle.root))}"
        files = sorted((name, entry.sha256) for name, entry in bundle.manifest.files.items())
        self._key = hashlib.sha256(repr(files).encode()).hexdigest()[:32]

    @property
    def to_read(self) -> list[Path]:
        """Folders to look into, the first one first; they need not exist."""
        cache = _cache_home()
        if cache is None or _distrust(cache) is not None:
            return [self.inside]
        return [cache / self._key / self._machine, self.inside]

    def to_write(self) -> Path:
        """The folder to write into, made where it is missing.

        Raises:
            BundleError: if it, or one above it inside the bundle, is a link.
            EmbedgeError: if neither the bundle nor the user's cache can be written.
        """
        self.check_no_links(self.inside)
        try:
            self.inside.mkdir(parents=True, exist_ok=True)
            if os.access(self.inside, os.W_OK | os.X_OK):
                return self.inside
            reason = os.strerror(errno.EACCES)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            reason = error.strerror or str(error)
        return self._in_cache(f"{self._root}: cannot be written ({reason})")

    def forget_cached(self, *parts: str) -> None:
        """Deletes what the cache holds of something that was just written into the bundle."""
        import shutil  # seldom needed, and slow to load

        *cached, _ = self.to_read
        for folder in cached:
            path = folder.joinpath(*parts)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def remove(self) -> bool:
        """Deletes what was prepared on any machine; whether there was something.

        Raises:
            BundleError: if the folder is a link.
            OSError: if it cannot be deleted.
        """
        import shutil  # seldom needed, and slow to load

        inside = self._root / PREPARED
        self.check_no_links(inside)
        *cached, _ = self.to_read
        found = [
            folder for folder in (*(path.parent for path in cached), inside) if folder.is_dir()
        ]
        for folder in found:
            shutil.rmtree(folder)
        return bool(found)

    def check_no_links(self, path: Path) -> None:
        """Refuses to write to a place, or delete what is there, that a link takes out of the bundle.

        Raises:
            BundleError: with where it leads.
        """
        real = path.resolve()
        if real != self._root.resolve() / path.relative_to(self._root):
            raise BundleError(
                f"{path}: expected a place inside the bundle, found a link to {real}; remove the link, "
                f"nothing is lost but the time of `{self.command}`"
            )

    def _in_cache(self, why: str) -> Path:
        cache = _cache_home()
        advice = f"name a folder of your own: `{_VARIABLE}=FOLDER {self.command}`, and for what embeds then"
        if cache is None:
            raise EmbedgeError(f"{why}, and there is no home folder to keep it in; {advice}")
        folder = cache / self._key / self._machine
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.mkdir(mode=0o700, exist_ok=True)
            problem = _distrust(cache)
            if problem is None:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            problem = error.strerror or str(error)
        if problem is not None:
            raise EmbedgeError(f"{why}, and neither can {cache}: {problem}; {advice}")
        return folder


def _cache_home() -> Path | None:
    """Embedge's folder in the user's cache; ``None`` for a user without one."""
    named = os.environ.get(_VARIABLE, "")
    if os.path.isabs(named):  # the standard has others ignored
        return Path(named) / _CACHE
    try:
        return Path.home() / ".cache" / _CACHE
    except RuntimeError:
        return None


def _distrust(cache: Path) -> str | None:
    """Why a folder's content is not this user's own; ``None``: it is, or there is none."""
    try:
        status = cache.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(status.st_mode):
        return "it is no folder"
    if sys.platform != "win32":
        if status.st_uid != os.geteuid():
            return "it belongs to another user"
        if status.st_mode & 0o022:
            return f"other users may write to it; run `chmod go-w {shlex.quote(str(cache))}`"
    return None
