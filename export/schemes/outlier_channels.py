"""Input channels that are hundreds of times the others in single tokens, multiplied in float32.

The gated product of language models has some (massive activations, arXiv 2402.17762). A few columns of a
weight cost nothing in float32, and without them what is left of the input and of the weight fits its
integers (LLM.int8(), arXiv 2208.07339).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedge.export.graph.initializers import digest
from embedge.export.graph.ops import OpBuilder
from embedge.export.graph.values import LinearRef, Value

__all__ = ["beside", "outliers"]


def outliers(
    g: OpBuilder,
    x: str,
    linear: LinearRef,
    channels: NDArray[np.int64],
    *,
    columns: NDArray[np.float32] | None = None,
    rows: NDArray[np.float32] | None = None,
) -> tuple[Value, Value]:
    """Some channels of a Linear's input ``[batch, tokens, n]``, and their weights ``[n, out]``.

    Args:
        g: the graph.
        x: the Linear's input.
        linear: the Linear.
        channels: int64, ascending.
        columns: float32 ``[in]`` by which the weight's columns are multiplied first, or ``None``.
        rows: float32 ``[out]`` by which its rows are, or ``None``.
    """

    def compute() -> NDArray[np.float32]:
        matrix = linear.read(g.weights)[:, channels]
        if columns is not None:
            matrix = matrix * columns[channels]
        if rows is not None:
            matrix = matrix * rows[:, None]
        return np.ascontiguousarray(matrix.T)

    matrix = g.computed(
        f"{linear.label}.outliers",
        (len(channels), linear.out_features(g.weights)),
        compute,
        linear.weight,
        detail=digest(channels, columns, rows),
        by_task=True,
    )
    return g.op("Gather", x, g.const(channels, "int64"), axis=-1), matrix


def beside(g: OpBuilder, y: Value, values: str, matrix: str, row_scale: str | None = None) -> Value:
    """``y`` and the float32 matmul of some columns beside it.

    Args:
        g: the graph.
        y: a matmul ``[batch, tokens, out]``.
        values: of the columns, ``[batch, tokens, n]``.
        matrix: their weights ``[n, out]``.
        row_scale: float32 ``[batch, tokens, 1]`` by which the values are multiplied, or ``None``.
    """
    if row_scale is not None:
        values = g.op("Mul", values, row_scale)
    return g.add(y, g.op("MatMul", values, matrix))
