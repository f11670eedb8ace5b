"""Which names in files that somebody else wrote may become parts of paths."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["A_NAME", "is_name", "is_path", "name_problem", "path_problem"]

A_NAME = "letters, digits, '-', '_' and '.', the first a letter or digit, at most 64 of them"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")  # a name and what kind of file it is


def is_name(text: object) -> bool:
    """Whether a text can name a folder or a file of a bundle, as those of tasks and precisions do."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def is_path(text: object) -> bool:
    """Whether a text is a path below the folder that it is relative to, with ``/`` between its parts."""
    return isinstance(text, str) and all(_PART.fullmatch(part) for part in text.split("/"))


def name_problem(of: str) -> Callable[[str], str | None]:
    """A rule (:mod:`embedge.runtime.bundle.schema`) for the names of tasks or of precisions."""

    def problem(name: str) -> str | None:
        if is_name(name):
            return None
        return f"{name[:80]!r} is no name of a {of}; expected {A_NAME}; rename it, or export the bundle again"

    return problem


def path_problem(path: str) -> str | None:
    """A rule for paths inside of the bundle."""
    if is_path(path):
        return None
    return (
        f"{path[:80]!r} is not a path inside the bundle; expected a relative one, each part of {A_NAME}; "
        "a bundle that embedge wrote has no other: export it again"
    )
