"""Where a bundle's folder is, and what is wrong where there is none."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from embedge.runtime.bundle.files import kind_of, system_reason
from embedge.runtime.errors import BundleError, EmbedgeValueError

__all__ = ["find_bundle"]


def find_bundle(path: str | os.PathLike[str]) -> Path:
    """A bundle's folder by its own name, whatever links led there and wherever the program goes.

    Raises:
        BundleError: if there is no folder.
        EmbedgeValueError: if it is not a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise EmbedgeValueError(
            f"bundle is {path!r}; expected the path of a bundle's folder, as `embedge export` writes it"
        )
    given = Path(path)
    advice = "name the folder that `embedge export` wrote with --out"
    try:
        root = given.resolve(strict=True)
        mode = root.stat().st_mode
        if stat.S_ISDIR(mode):
            return root
        found = kind_of(mode)
        _check_unfinished(given.absolute(), found)
    except FileNotFoundError as error:
        found = "nothing there" if error.filename is not None else system_reason(error)
        with suppress(OSError):
            _check_unfinished(given.absolute(), found)
        expanded = os.path.expanduser(given)
        if expanded != str(given):
            advice = f"Python does not expand ~: give {expanded}"
    except (OSError, RuntimeError, ValueError) as error:
        found = f"what cannot be read ({system_reason(error)})"
    raise BundleError(f"{given}: expected a bundle's folder, found {found}; {advice}")


def _check_unfinished(given: Path, found: str) -> None:
    """Says what an interrupted export left where a bundle is looked for.

    Raises:
        BundleError: if it left something.
        OSError: if that cannot be seen.
    """
    from embedge.runtime.bundle.writing import partial_of, replaced_of  # for messages alone

    left = replaced_of(given)
    if left.is_dir():
        raise BundleError(
            f"{given}: expected a bundle's folder, found {found}: `embedge export --overwrite` was "
            f"interrupted and left the bundle as {left}; rename it to {given}, or run that export again"
        )
    if partial_of(given).is_dir():
        raise BundleError(
            f"{given}: expected a bundle's folder, found {found}, and beside it an export that has not "
            "ended; wait until it has, or run it again if it was interrupted"
        )
