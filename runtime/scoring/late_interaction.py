"""Late interaction (MaxSim) of multi-vectors: one matmul per document, or per handful of short ones.

Long documents are not copied together: a thousand pages are as many bytes as a core reads in the time
that their matmuls take. Short ones are, where a call per document would cost more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.errors import EmbedgeValueError

__all__ = ["max_sim"]

Vectors = NDArray[np.float32]

# Scores of token pairs held at once, float32 (64 MiB); a step of the usual size fits into a cache.
_BLOCK_VALUES = 1 << 24
# Tokens of the queries, and of short documents, that go into one matmul.
_STEP_TOKENS = 1024
# Values from which on a maximum over rows runs at full speed.
_WIDE_ROW = 512


def max_sim(queries: Sequence[Vectors], documents: Sequence[Vectors]) -> Vectors:
    """Late interaction: each query token's best dot product with a document token, summed over the query.

    Source: Khattab and Zaharia, "ColBERT", arXiv 2004.12832.

    Args:
        queries: float32 ``[tokens, dim]`` each; one without tokens scores 0.
        documents: float32 ``[tokens, dim]`` each; one without tokens scores 0.

    Returns:
        float32 ``[len(queries), len(documents)]``.

    Raises:
        EmbedgeValueError: if dimensions differ.
    """
    dims = {part.shape[1] for part in (*queries, *documents)}
    if len(dims) > 1:
        raise EmbedgeValueError(
            f"multi-vectors of different dimensions: {', '.join(map(str, sorted(dims)))}; encode "
            "both with the same model"
        )
    scores = np.zeros((len(queries), len(documents)), np.float32)
    groups = []
    for of_queries in _groups(queries, _STEP_TOKENS):
        parts = [queries[index] for index in of_queries]
        tokens = np.ascontiguousarray(np.concatenate(parts).T)
        groups.append((of_queries, _starts(parts), tokens))
    most = max((tokens.shape[1] for _, _, tokens in groups), default=1)
    for of_documents in _groups(documents, min(_STEP_TOKENS, max(1, _BLOCK_VALUES // most))):
        parts = [documents[index] for index in of_documents]
        for of_queries, starts, tokens in groups:
            best = _best(parts[0], tokens) if len(parts) == 1 else _best_of_each(parts, tokens)
            summed = np.add.reduceat(best, starts, axis=-1)
            shape = len(of_queries), len(of_documents)
            scores[np.ix_(of_queries, of_documents)] = summed.T.reshape(shape)
    return scores


def _groups(parts: Sequence[Vectors], tokens: int) -> Iterator[list[int]]:
    """Indices of neighbours of so many tokens together, or of one longer part; empty ones left out."""
    group: list[int] = []
    held = 0
    for index, part in enumerate(parts):
        if not len(part):
            continue
        if group and held + len(part) > tokens:
            yield group
            group, held = [], 0
        group.append(index)
        held += len(part)
    if group:
        yield group


def _starts(parts: Sequence[Vectors]) -> NDArray[np.intp]:
    """Where each part begins once they are concatenated."""
    return np.cumsum([0, *map(len, parts[:-1])])


def _best(document: Vectors, tokens: Vectors) -> Vectors:
    """The best score of each query token, float32 ``[tokens]``.

    Args:
        document: float32 ``[document tokens, dim]``.
        tokens: float32 ``[dim, tokens]``.
    """
    step = max(1, _BLOCK_VALUES // tokens.shape[1])
    best = _column_maxima(document[:step] @ tokens)
    for start in range(step, len(document), step):
        np.maximum(best, _column_maxima(document[start : start + step] @ tokens), out=best)
    return best


def _best_of_each(documents: Sequence[Vectors], tokens: Vectors) -> Vectors:
    """The best score of each query token in each document, float32 ``[documents, tokens]``."""
    pairs = np.concatenate(documents) @ tokens
    best: Vectors = np.maximum.reduceat(pairs, _starts(documents), axis=0)
    return best


def _column_maxima(scores: Vectors) -> Vectors:
    """Maximum over the document's tokens, several rows side by side where they are short."""
    count, width = scores.shape
    side = min(count, max(1, _WIDE_ROW // width))
    even = count - count % side
    wide = scores[:even].reshape(-1, side * width).max(axis=0).reshape(side, width)
    best: Vectors = wide.max(axis=0)
    if even < count:
        np.maximum(best, scores[even:].max(axis=0), out=best)
    return best
