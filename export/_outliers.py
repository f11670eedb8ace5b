"""Input channels that are hundreds of times the others in single tokens, multiplied in float32.

The gated product of language models has some (massive activations, arXiv 2402.17762). A few columns of a
weight cost nothing in float32, and without them what is left of the input and of the weight fits its
integers (LLM.int8(), arXiv 2208.07339).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedge.export._forms import digest, out_features, read_linear, weight_name
from embedge.export._graph import Graph, Lin

__all__ = ["with_outliers"]


def with_outliers(
    g: Graph,
    x: str,
    y: str,
    lin: Lin,
    channels: NDArray[np.int64],
    *,
    columns: NDArray[np.float32] | None = None,
    rows: NDArray[np.float32] | None = None,
) -> str:
    """``y`` and the part of a Linear's product that some channels make.

    Args:
        g: the graph.
        x: the Linear's input.
        y: the product without those channels.
        lin: the Linear.
        channels: int64, ascending.
        columns: float32 ``[in]`` by which the weight's columns are multiplied first, or ``None``.
        rows: float32 ``[out]`` by which its rows are, or ``None``.
    """

    def compute() -> NDArray[np.float32]:
        matrix = read_linear(g, lin)[:, channels]
        if columns is not None:
            matrix = matrix * columns[channels]
        if rows is not None:
            matrix = matrix * rows[:, None]
        return np.ascontiguousarray(matrix.T)

    matrix = g.computed(
        f"{lin.label}.outliers",
        (len(channels), out_features(g, lin)),
        compute,
        weight_name(lin),
        detail=digest(channels, columns, rows),
    )
    few = g.op("Gather", x, g.const(channels, "int64"), axis=-1)
    return g.op("Add", y, g.op("MatMul", few, matrix))
