"""Late interaction (MaxSim) of multi-vectors: one product per document or handful of short ones.

Documents are not copied together: a thousand pages are as many bytes as a core reads in the time
that their products take. Only short ones are, where a call per document would cost more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.errors import EmbedgeValueError

__all__ = ["max_sim"]

Vectors = NDArray[np.float32]

# Products held at once, in float32 values (64 MiB); a step of the usual size fits into a cache.
_BLOCK_VALUES = 1 << 24
# Tokens of the queries, and of short documents, that go into one product.
_STEP_TOKENS = 1024
# Values from which on a maximum over rows runs at full speed.
_WIDE_ROW = 512


def max_sim(queries: Sequence[Vectors], documents: Sequence[Vectors]) -> Vectors:
    """Late interaction: per query token its best document token's product, summed over the query.

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
    for rows in _groups(queries, _STEP_TOKENS):
        starts = np.cumsum([0, *(len(queries[row]) for row in rows[:-1])])
        tokens = np.ascontiguousarray(np.concatenate([queries[row] for row in rows]).T)
        groups.append((rows, starts, tokens))
    most = max((tokens.shape[1] for _, _, tokens in groups), default=1)
    for columns in _groups(documents, min(_STEP_TOKENS, max(1, _BLOCK_VALUES // most))):
        parts = [documents[column] for column in columns]
        for rows, starts, tokens in groups:
            best = _best(parts[0], tokens) if len(parts) == 1 else _best_of_each(parts, tokens)
            scores[np.ix_(rows, columns)] = np.add.reduceat(best, starts, axis=-1).T.reshape(
                len(rows), len(columns)
            )
    return scores


def _groups(parts: Sequence[Vectors], tokens: int) -> Iterator[list[int]]:
    """Places of neighbours of so many tokens together, or of a longer one; empty ones left out."""
    group: list[int] = []
    held = 0
    for place, part in enumerate(parts):
        if not len(part):
            continue
        if group and held + len(part) > tokens:
            yield group
            group, held = [], 0
        group.append(place)
        held += len(part)
    if group:
        yield group


def _best(document: Vectors, tokens: Vectors) -> Vectors:
    """The best product of each query token, float32 ``[tokens]``.

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
    """The best product of each query token in each document, float32 ``[documents, tokens]``."""
    starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
    best: Vectors = np.maximum.reduceat(np.concatenate(documents) @ tokens, starts, axis=0)
    return best


def _column_maxima(products: Vectors) -> Vectors:
    """Maximum over the rows, several of them side by side where they are short."""
    count, width = products.shape
    side = min(count, max(1, _WIDE_ROW // width))
    even = count - count % side
    wide = products[:even].reshape(-1, side * width).max(axis=0).reshape(side, width)
    best: Vectors = wide.max(axis=0)
    if even < count:
        np.maximum(best, products[even:].max(axis=0), out=best)
    return best
