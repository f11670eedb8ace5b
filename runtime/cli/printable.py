"""Text from files on a terminal, which would obey the control characters in it."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    """The text with what is not printed, such as control characters, as escape sequences."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
