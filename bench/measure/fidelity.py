"""How close vectors are to the reference's, and whether they depend on the company they keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from embedge.bench.measure.quality import truncated
from embedge.quant.fidelity import cosine_rows, pair_spearman, top_k_overlap

__all__ = ["batch_invariance", "by_kind", "fidelity"]

Vectors = NDArray[np.float32]


def fidelity(ours: Vectors, reference: Vectors, dims: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the measures at each dimension, by the dimension as a string.

    Args:
        ours: float32 ``[n, dim]``, n > 10.
        reference: float32 ``[n, dim]``, of the same texts.
        dims: where to cut, full dimension included where it is wanted.
    """
    result = {}
    for dim in dims:
        a, b = truncated(ours, dim), truncated(reference, dim)
        cosines = cosine_rows(a, b)
        result[str(dim)] = {
            "cosine_mean": float(cosines.mean()),
            "cosine_min": float(cosines.min()),
            "pair_spearman": pair_spearman(a, b),
            "top10_overlap": top_k_overlap(a, b, k=10),
        }
    return result


def by_kind(ours: Vectors, reference: Vectors, kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return cosine mean and min of each kind of text, at full dimension."""
    cosines = cosine_rows(ours, reference)
    labels = np.array(kinds)
    return {
        kind: {
            "texts": int((labels == kind).sum()),
            "cosine_mean": float(cosines[labels == kind].mean()),
            "cosine_min": float(cosines[labels == kind].min()),
        }
        for kind in dict.fromkeys(kinds)
    }


def batch_invariance(
    encode: Callable[[Sequence[str], int], Sequence[Vectors] | Vectors],
    texts: Sequence[str],
    seed: int = 0,
) -> dict[str, float]:
    """Return how much a text's vector depends on its batch: alone, among others, in other order.

    Args:
        encode: texts and batch size to float32 ``[n, dim]``, or ``[tokens, dim]`` a text.
        texts: of mixed lengths.
        seed: of the other orders.

    Returns:
        ``cosine_min`` and ``max_difference`` (largest absolute difference of a component) over all
        texts and settings against the text encoded alone.
    """
    alone = np.vstack([encode([text], 1)[0] for text in texts])
    generator = np.random.default_rng(seed)
    lowest, largest = 1.0, 0.0
    for batch_size in (3, 8, 32):  # odd and even numbers of rows
        order = generator.permutation(len(texts))
        shuffled = encode([texts[i] for i in order], batch_size)
        vectors = np.vstack([shuffled[place] for place in np.argsort(order)])
        lowest = min(lowest, float(cosine_rows(vectors, alone).min()))
        largest = max(largest, float(np.abs(vectors - alone).max()))
    return {"cosine_min": lowest, "max_difference": largest, "texts": float(len(texts))}
