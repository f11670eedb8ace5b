"""The texts and the labelled sets that are measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from embedge.bench.documents import Document
from embedge.bench.errors import BenchError

__all__ = [
    "EvalSet",
    "Text",
    "default_texts",
    "limited",
    "read_texts",
    "spaced",
    "subset",
]

Item = TypeVar("Item")
_TEXTS = Path(__file__).with_name("data") / "texts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text to measure fidelity on, and what kind of text it is."""

    text: str
    kind: str = "text"


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A labelled set, of texts alone or of queries and page images.

    Attributes:
        name: the file's name without its ending.
        first: queries, or the first texts of pairs, ``[n]``.
        second: their passages or pages, or the second texts, ``[n]``.
        scores: graded similarity of each pair; ``None`` for queries and passages.
        gains: how relevant each row's passage is; ``None``: 1 each.
        others: passages of the corpus that belong to no row.
    """

    name: str
    first: tuple[str, ...]
    second: tuple[Document, ...]
    scores: tuple[float, ...] | None = None
    gains: tuple[float, ...] | None = None
    others: tuple[Document, ...] = ()

    @property
    def passages(self) -> tuple[Document, ...]:
        """The second texts or pages, and the others."""
        return self.second + self.others

    @property
    def modality(self) -> str:
        """What is searched: ``"text"``, or ``"image"`` for pages."""
        return "text" if isinstance(self.second[0], str) else "image"

    @property
    def metric(self) -> str:
        """``"spearman"`` for graded pairs, ``"ndcg@10"`` for queries."""
        return "ndcg@10" if self.scores is None else "spearman"

    @property
    def roles(self) -> tuple[str | None, str | None]:
        """What the two columns are: ``"query"`` and ``"document"``, or plain texts."""
        return ("query", "document") if self.scores is None else (None, None)


def default_texts() -> list[Text]:
    """Return the texts that ship with the bench; ``data/README.md`` says what they are."""
    return read_texts(_TEXTS)


def read_texts(file: Path) -> list[Text]:
    """Return the texts of a file: JSONL with ``text`` (and ``kind``), else one text a line.

    Raises:
        BenchError: unreadable, or fewer than twelve texts (top-10 overlap needs more than ten).
    """
    if file.suffix == ".jsonl":
        rows = _rows(file)
        texts = [Text(text=str(r["text"]), kind=str(r.get("kind", "text"))) for r in rows]
    else:
        texts = [Text(text=line) for line in _lines(file)]
    unique = list({text.text: text for text in texts}.values())
    if len(unique) < 12:
        raise BenchError(f"{file}: expected at least 12 different texts, found {len(unique)}")
    return unique


def spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Return ``count`` items at equal distances, all where there are fewer; none for 0."""
    if not count:
        return []
    return list(items[:: max(1, len(items) // count)][:count])


def subset(count: int, limit: int | None, seed: int = 0) -> Sequence[int]:
    """Return ``limit`` of ``count`` row numbers, drawn by ``seed``, in order; all for ``None``."""
    if limit is None or count <= limit:
        return range(count)
    drawn: list[int] = np.sort(np.random.default_rng(seed).permutation(count)[:limit]).tolist()
    return drawn


def limited(evaluation: EvalSet, limit: int | None) -> EvalSet:
    """Return a seeded subset of at most ``limit`` rows; passages outside it leave the corpus, and of the others as
    many stay.
    """
    rows = subset(len(evaluation.first), limit)
    others = subset(len(evaluation.others), limit)
    return EvalSet(
        name=evaluation.name,
        first=tuple(evaluation.first[i] for i in rows),
        second=tuple(evaluation.second[i] for i in rows),
        scores=None if evaluation.scores is None else tuple(evaluation.scores[i] for i in rows),
        gains=None if evaluation.gains is None else tuple(evaluation.gains[i] for i in rows),
        others=tuple(evaluation.others[i] for i in others),
    )


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{file}: expected a UTF-8 text file: {error}") from error
    return [line for line in text.splitlines() if line.strip()]


def _rows(file: Path) -> list[dict[str, object]]:
    rows = []
    for number, line in enumerate(_lines(file), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BenchError(f"{file}:{number}: expected a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise BenchError(f"{file}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows
