"""Which names in files that somebody else wrote may become parts of paths."""

from __future__ import annotations

import re

__all__ = ["A_NAME", "is_name", "is_path"]

A_NAME = "letters, digits, '-', '_' and '.', the first a letter or digit, at most 64 of them"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")  # a name and what kind of file it is


def is_name(text: object) -> bool:
    """Whether a text can name a folder or a file of a bundle, as those of tasks and precisions do."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def is_path(text: object) -> bool:
    """Whether a text is a path below the folder that it is relative to, with ``/`` between its parts."""
    return isinstance(text, str) and all(_PART.fullmatch(part) for part in text.split("/"))
