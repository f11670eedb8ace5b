"""Tables and named values that fit the terminal."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

__all__ = ["named_value", "table"]

_OF_A_FILE = 120  # columns
_NARROWEST = 8  # columns are not cut further
_NAME = 14


def table(rows: Sequence[Sequence[str]], labels: int | None = None) -> list[str]:
    """Rows as lines with aligned columns, the first row underlined.

    Args:
        rows: the header and the others.
        labels: how many columns are text, before those of figures, which stand on the right and are never
            cut; ``None``: all, and what is wider than the terminal is wrapped.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while (
        labels is None
        and sum(widths) + 2 * (len(widths) - 1) > _width()
        and max(widths) > _NARROWEST
    ):
        widths[widths.index(max(widths))] -= 1
    lines = [line for row in rows[:1] for line in _row(row, widths, labels)]
    lines.append("  ".join("-" * width for width in widths))
    return lines + [line for row in rows[1:] for line in _row(row, widths, labels)]


def _row(cells: Sequence[str], widths: Sequence[int], labels: int | None) -> list[str]:
    """A row's lines, several where a cell is wider than its column."""
    wrapped = [_wrapped(cell, width) for cell, width in zip(cells, widths, strict=True)]
    left = len(widths) if labels is None else labels
    return [
        "  ".join(
            part.ljust(width) if column < left else part.rjust(width)
            for column, (part, width) in enumerate(zip(parts, widths, strict=True))
        ).rstrip()
        for parts in zip_longest(*wrapped, fillvalue="")
    ] or [""]


def _wrapped(cell: str, width: int) -> list[str]:
    """A cell in lines, cut behind a space, dot or comma where that is possible."""
    lines = [""]
    for part in re.findall(r"[^ .,_]+[ .,_]*|[ .,_]+", cell):
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.rstrip() for line in lines]


def _width() -> int:
    """Columns of the terminal, or of COLUMNS; a file takes what most terminals have."""
    return shutil.get_terminal_size((_OF_A_FILE, 24)).columns


def named_value(name: str, value: str) -> list[str]:
    """A named value, its further lines below its first."""
    width = max(_width() - _NAME, 20)
    lines = textwrap.wrap(value, width, break_on_hyphens=False) or [""]
    return [f"{label:{_NAME}}{line}" for label, line in zip_longest([name], lines, fillvalue="")]
