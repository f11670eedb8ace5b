"""Fewer vectors of a text: neighbours among them are joined (hierarchical token pooling)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.scoring.similarity import normalized

__all__ = ["pool_tokens"]

Vectors = NDArray[np.float32]
_PROTECTED = 1  # the first, most often [CLS]


def pool_tokens(vectors: Vectors, pool_factor: float) -> Vectors:
    """A text's multi-vectors, about ``1 / pool_factor`` as many.

    All but the first are clustered by Ward's linkage on cosine distance, and each cluster becomes its mean, of length
    1. Clusters come in the order of their first tokens.

    Source: sentence-transformers 6, ``HierarchicalTokenPooling``; Clavié et al., "Reducing the Footprint of
    Multi-Vector Retrieval with Minimal Performance Impact via Token Pooling", arXiv 2409.14683.

    Args:
        vectors: float32 ``[tokens, dim]``, of length 1 each.
        pool_factor: at least 1, which leaves them as they are.

    Returns:
        float32 ``[tokens, dim]``.
    """
    rest = vectors[_PROTECTED:]
    clusters = max(int(len(rest) // pool_factor), 1)
    if clusters >= len(rest):
        return vectors
    labels = _ward(np.clip(1 - rest @ rest.T, 0, 2), clusters)
    sums = np.zeros((clusters, vectors.shape[1]), np.float32)
    np.add.at(sums, labels, rest)
    means = sums / np.bincount(labels, minlength=clusters)[:, None].astype(np.float32)
    return normalized(np.concatenate([vectors[:_PROTECTED], means]))


def _ward(distances: Vectors, clusters: int) -> NDArray[np.intp]:
    """Which cluster each point belongs to, numbered by their first points.

    The two nearest clusters become one until so many are left. Source of the distances after a merge: Lance and
    Williams 1967, with Ward's coefficients.

    Args:
        distances: ``[n, n]``, symmetric.
        clusters: from 1 to n.
    """
    count = len(distances)
    squared = distances.astype(np.float64) ** 2
    np.fill_diagonal(squared, np.inf)
    sizes = np.ones(count)
    owner = np.arange(count)
    nearest = squared.argmin(1)
    least = squared[np.arange(count), nearest]
    for _ in range(count - clusters):
        first = int(least.argmin())
        second = int(nearest[first])
        first, second = min(first, second), max(first, second)
        joined = (
            (sizes + sizes[first]) * squared[first]
            + (sizes + sizes[second]) * squared[second]
            - sizes * squared[first, second]
        ) / (sizes + sizes[first] + sizes[second])
        joined[[first, second]] = np.inf
        squared[first], squared[:, first] = joined, joined
        squared[second], squared[:, second] = np.inf, np.inf
        sizes[first] += sizes[second]
        owner[owner == second] = first
        least[second] = np.inf
        # Ward's distances never fall below those before: only rows whose nearest was one of the two change.
        stale = np.flatnonzero(((nearest == first) | (nearest == second)) & np.isfinite(least))
        stale = np.union1d(stale, [first])
        nearest[stale] = squared[stale].argmin(1)
        least[stale] = squared[stale, nearest[stale]]
    return np.unique(owner, return_inverse=True)[1].reshape(-1)
