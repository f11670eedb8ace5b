"""Some rows of an input at once: their texts, and what goes with them into the output."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from embedge.runtime.errors import EmbedgeError, EmbedgeValueError

if TYPE_CHECKING:
    import pyarrow

    Others: TypeAlias = Sequence[Mapping[str, Any]] | pyarrow.Table

__all__ = ["EMBEDDING", "Chunk", "check_kept", "members_of", "runs_of"]

EMBEDDING = "embedding"
"""The column, or the member, that the vectors get; one of this name in the input is left out."""


@dataclass(frozen=True)
class Chunk:
    """Rows that are embedded in one call.

    Attributes:
        texts: a text, or the path of an image, a row.
        numbers: of the rows in the input, from 1, for messages.
        others: the rows' other columns: a mapping a row, or a table of as many rows.
        unit: what the numbers count, "line" or "row".
    """

    texts: Sequence[str]
    numbers: Sequence[int]
    others: Others
    unit: str


def check_kept(keep: Collection[str] | None, column: str) -> None:
    """Refuses to keep what is not written beside the vectors.

    Args:
        keep: names of other columns; ``None``: all.
        column: that holds the texts.

    Raises:
        EmbedgeValueError: a name is that of the texts or of the vectors.
    """
    for name, reason in ((column, "holds the texts"), (EMBEDDING, "gets the vectors")):
        if name in (keep or ()):
            raise EmbedgeValueError(
                f"columns to keep: expected others than {name!r}, which {reason}; leave it out, or rename the input's "
                "column"
            )


def members_of(others: Others) -> Sequence[Mapping[str, Any]]:
    """The other columns as a mapping a row, in Python's types.

    Raises:
        EmbedgeError: Python has no type for a value, as for times of nanoseconds without pandas.
    """
    if isinstance(others, Sequence):
        return others
    try:
        members: list[dict[str, Any]] = others.to_pylist()
    except ValueError as error:
        raise EmbedgeError(
            f"expected columns that JSON has a form for, found type {str(error).partition('. ')[0]}; leave such "
            "columns out with --keep, or write Parquet"
        ) from error
    return members


def runs_of(lengths: Iterable[int], *, rows: int, characters: int) -> Iterator[tuple[int, int]]:
    """Splits rows into runs that end at a number of rows, or once they hold so many characters.

    Args:
        lengths: characters of each row.
        rows: most rows of a run, at least 1.
        characters: a run ends at the row that reaches them.

    Yields:
        The first row of a run and the row after its last.
    """
    start = held = end = 0
    for end, length in enumerate(lengths, start=1):
        held += length
        if end - start >= rows or held >= characters:
            yield start, end
            start, held = end, 0
    if end > start:
        yield start, end
