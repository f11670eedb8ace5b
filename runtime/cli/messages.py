"""Errors and warnings of a command: one line each on standard error, in the command's words.

Rules:
    * Options stand where the library's message names Python's arguments, see :func:`in_options`.
    * Control characters of files' texts reach no terminal.
    * Never a traceback; the environment variable EMBEDGE_TRACEBACK=1 shows it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from typing import TextIO

from embedge.runtime.arguments import in_options
from embedge.runtime.bundle.files import system_reason
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError, EmbedgeWarning

__all__ = ["failed", "in_options", "printable", "report", "show_warning"]

_SMALLER = "ask for less at once, as with --threads 1 or --max-batch-tokens"


def printable(text: str) -> str:
    """The text with what is not printed, such as control characters, as escape sequences."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def failed(message: str, code: int) -> int:
    """Prints a message as one line, and gives the exit code back."""
    lines = [line.strip() for line in message.splitlines()]
    shown = printable("; ".join(line for line in lines if line))
    print(f"embedge: error: {shown}", file=sys.stderr)
    return code


def report(error: Exception, options: Mapping[str, str], *, output_fails: bool) -> int:
    """Prints an error as one line; its exit code.

    Args:
        error: what ended the command.
        options: as for :func:`in_options`.
        output_fails: whether standard output takes no more, whose errors have no name.
    """
    if os.environ.get("EMBEDGE_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, (EmbedgeError, EmbedgeWarning)):  # warnings: as `python -W error` has them
        message = in_options(str(error), error.arguments, options)
        return failed(message, 2 if isinstance(error, EmbedgeValueError) else 1)
    if isinstance(error, OSError):
        return failed(_system_error(error, output_fails), 1)
    if isinstance(error, MemoryError):
        cause = f" ({error})" if str(error) else ""
        return failed(f"memory ran out{cause}; end other programs, or {_SMALLER}", 1)
    if isinstance(error, RuntimeError) and "new thread" in str(error):
        return failed(f"{error}; allow more processes (`ulimit -u`), or pass --threads 1", 1)
    return failed(
        f"unexpected {type(error).__name__}: {error} (EMBEDGE_TRACEBACK=1 shows where)", 1
    )


def _system_error(error: OSError, output_fails: bool) -> str:
    """What failed and why."""
    reason = system_reason(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    if output_fails:
        return f"standard output: {reason}; make room, or write to another place"
    return reason if ";" in reason else f"{reason} (EMBEDGE_TRACEBACK=1 shows where)"


def show_warning(
    options: Mapping[str, str],
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning as one line; in the place of ``warnings.showwarning``."""
    text = " ".join(str(message).split())
    if isinstance(message, EmbedgeWarning):
        text = in_options(text, message.arguments, options)
    print(f"embedge: warning: {printable(text)}", file=sys.stderr)
