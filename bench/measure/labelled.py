"""One labelled set: the vectors of its two columns, and what they are worth in each output format.

Rules:
    * Of queries and passages the passages are stored, and queries are floats, but for bits: those are compared with
      the queries' bits. Of graded pairs both sides are stored.
    * ``binary+int8`` is a search over bits for four times as many as are wanted, which 8-bit codes then order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.bench.documents import Document
from embedge.bench.measure.quality import (
    Floats,
    Quality,
    compare,
    ndcg_of_order,
    quality,
    truncated,
)
from embedge.bench.measure.texts import EvalSet
from embedge.bench.systems.system import PageSystem, System
from embedge.runtime.scoring.quantization import dequantize_embeddings, quantize_embeddings
from embedge.runtime.scoring.rescoring import search_binary

__all__ = [
    "STORED",
    "Columns",
    "against",
    "column_quality",
    "encode_columns",
    "encode_pages",
    "firsts",
    "format_qualities",
    "stored_columns",
]

Vectors = NDArray[np.float32]
STORED = ("float16", "int8", "binary")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The vectors of a set's two columns.

    Attributes:
        first: float32 ``[rows, dim]``.
        second: float32 ``[rows and others, dim]``.
    """

    first: Vectors
    second: Vectors

    def cut(self, dim: int, normalize: bool) -> Columns:
        """Return them at a dimension, back to length 1 if ``normalize``."""
        first, second = (truncated(c, dim, normalize) for c in (self.first, self.second))
        return Columns(first=first.astype(np.float32), second=second.astype(np.float32))


def encode_columns(system: System, evaluation: EvalSet) -> Columns:
    """Return a system's vectors of a set, each different text and page embedded once."""
    asked, searched = evaluation.roles
    first = _unique(evaluation.first, lambda texts: system.encode(texts, role=asked))
    if evaluation.modality == "image":
        assert isinstance(system, PageSystem)  # the plan lets no other meet a set of pages
        return Columns(first=first, second=encode_pages(system, evaluation))
    second = _unique(evaluation.passages, lambda texts: system.encode(texts, role=searched))
    return Columns(first=first, second=second)


def encode_pages(system: PageSystem, evaluation: EvalSet, max_pixels: int | None = None) -> Vectors:
    """Return the vectors of a set's pages, float32 ``[rows and others, dim]``, each different page embedded once."""
    return _unique(evaluation.passages, lambda pages: system.encode_images(pages, max_pixels))


def column_quality(
    evaluation: EvalSet, columns: Columns, dim: int, normalize: bool, depth: int = 10
) -> Quality:
    """Return the quality of float vectors at a dimension, nDCG at ``depth``."""
    first, second = (truncated(c, dim, normalize) for c in (columns.first, columns.second))
    return quality(evaluation, first, second, depth)


def against(evaluation: EvalSet, ours: Quality, reference: Quality) -> dict[str, float]:
    """Return value, reference, difference and its interval."""
    values = {"value": ours.value, "reference": reference.value}
    return values | asdict(compare(evaluation, ours, reference))


def format_qualities(evaluation: EvalSet, columns: Columns, ranges: Vectors) -> dict[str, Quality]:
    """Return the quality of vectors in each stored format but float32.

    Args:
        evaluation: the set.
        columns: of one dimension.
        ranges: of 8-bit codes, float32 ``[2, dim]``.
    """
    return dict(_format_qualities(evaluation, columns, ranges))


def _format_qualities(
    evaluation: EvalSet, columns: Columns, ranges: Vectors
) -> Iterator[tuple[str, Quality]]:
    for name in STORED:
        first, second = stored_columns(evaluation, columns, name, ranges)
        yield name, quality(evaluation, first, second)
    if evaluation.scores is None:
        yield "binary+int8", _rescored(evaluation, columns, ranges)


def stored_columns(
    evaluation: EvalSet, columns: Columns, name: str, ranges: Vectors
) -> tuple[Floats, Floats]:
    """Return what a stored format keeps of both columns, float64 ``[n, dim]`` each.

    Args:
        evaluation: the set.
        columns: of one dimension.
        name: one of :data:`STORED`.
        ranges: of 8-bit codes, float32 ``[2, dim]``.
    """
    second = _restored(columns.second, name, ranges)
    as_stored = evaluation.scores is not None or name == "binary"
    first = _restored(columns.first, name, ranges) if as_stored else columns.first
    return first.astype(np.float64), second


def _restored(vectors: Vectors, name: str, ranges: Vectors) -> Floats:
    """Return what a format keeps of vectors, float64 ``[n, dim]``."""
    given = ranges if name == "int8" else None
    codes = quantize_embeddings(vectors, name, given)
    restored: Floats = dequantize_embeddings(codes, name, given, vectors.shape[1]).astype(
        np.float64
    )
    return restored


def _rescored(evaluation: EvalSet, columns: Columns, ranges: Vectors) -> Quality:
    queries = columns.first[firsts(evaluation.first)]
    passages = columns.second[firsts(evaluation.passages)]
    order, _ = search_binary(
        queries,
        quantize_embeddings(passages, "binary"),
        quantize_embeddings(passages, "int8", ranges),
        ranges=ranges,
        top_k=min(10, len(passages)),
        similarity="dot",  # as of the other formats: what was stored had length 1
    )
    items = ndcg_of_order(evaluation, list(order))
    return Quality(value=float(items.mean()), items=items)


def firsts(items: tuple[Document, ...]) -> list[int]:
    """Return where each different text or page stands first."""
    numbers: dict[Document, int] = {}
    for row, item in enumerate(items):
        numbers.setdefault(item, row)
    return list(numbers.values())


def _unique(items: tuple[Document, ...], encode: Callable[[list[Any]], Vectors]) -> Vectors:
    """Return the vectors of some items, each different one embedded once."""
    numbers: dict[Document, int] = {}
    of = [numbers.setdefault(item, len(numbers)) for item in items]
    vectors: Vectors = encode(list(numbers))[of]
    return vectors
