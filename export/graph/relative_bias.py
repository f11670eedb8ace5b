"""Score biases by relative position, as T5 and MPNet have them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedge.export.graph.builder import Graph
from embedge.export.graph.long_attention import distances
from embedge.export.graph.values import Value


def relative_bias(g: Graph, table: str, tokens: str, max_length: int) -> Value:
    """float32 ``[heads, tokens, tokens]``, added to the scores of all layers.

    Args:
        g: the graph.
        table: name of the weights, ``[buckets, heads]``.
        tokens: int64 scalar, padded tokens of the batch.
        max_length: most tokens of a text.
    """
    # bias[h, i, j] = table[bucket(j - i), h]: gather one row of biases per distance, then pick.
    count, heads = g.weights.shape(table)
    buckets = relative_buckets(np.arange(-max_length + 1, max_length), count)
    by_distance = g.computed(
        f"{table}.by_distance",
        (heads, len(buckets)),
        lambda: np.ascontiguousarray(g.weights.read(table)[buckets].T),
        table,
        detail=f"length {max_length}",
    )
    offset = g.op("Add", distances(g, tokens), g.const(max_length - 1, "int64"))
    return g.op("Gather", by_distance, offset, axis=1)


def relative_buckets(distance: NDArray[np.int64], buckets: int) -> NDArray[np.int64]:
    """T5's bidirectional buckets of ``key - query`` distances (transformers' MPNet, distance ≤ 128)."""
    half = buckets // 2
    position = -distance
    result = np.where(position < 0, half, 0)
    position = np.abs(position)
    exact = half // 2
    with np.errstate(divide="ignore"):
        # float32 as in transformers: the logarithm's rounding decides borderline distances
        ratio = np.log(position.astype(np.float32) / np.float32(exact))
        far = exact + ratio / np.float32(np.log(128 / exact)) * np.float32(half - exact)
    far = np.where(position > 0, far, 0).astype(np.int64)
    return result + np.where(position < exact, position, np.minimum(far, half - 1))
