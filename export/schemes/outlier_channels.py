"""Input channels that are hundreds of times the others in single tokens, multiplied in float32.

The gated product of language models has some (massive activations, arXiv 2402.17762). A few columns of a
weight cost nothing in float32, and without them what is left of the input and of the weight fits its
integers (LLM.int8(), arXiv 2208.07339).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedge.export.graph.builder import Graph, LinearRef
from embedge.export.graph.scheme import digest, out_features, read_linear, weight_name

__all__ = ["beside", "outliers"]


def outliers(
    g: Graph,
    x: str,
    lin: LinearRef,
    channels: NDArray[np.int64],
    *,
    columns: NDArray[np.float32] | None = None,
    rows: NDArray[np.float32] | None = None,
) -> tuple[str, str]:
    """Some channels of a Linear's input ``[batch, tokens, n]``, and their weights ``[n, out]``.

    Args:
        g: the graph.
        x: the Linear's input.
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
    return g.op("Gather", x, g.const(channels, "int64"), axis=-1), matrix


def beside(g: Graph, y: str, values: str, matrix: str, row_scale: str | None = None) -> str:
    """``y`` and the float32 product of some columns beside it.

    Args:
        g: the graph.
        y: a product ``[batch, tokens, out]``.
        values: of the columns, ``[batch, tokens, n]``.
        matrix: their weights ``[n, out]``.
        row_scale: float32 ``[batch, tokens, 1]`` by which the values are multiplied, or ``None``.
    """
    if row_scale is not None:
        values = g.op("Mul", values, row_scale)
    return g.op("Add", y, g.op("MatMul", values, matrix))
