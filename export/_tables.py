"""Quantized embedding tables: only the rows that are looked up are dequantized."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export._graph import BASE, CONTRIB, Graph, Recipe, TensorSpec
from embedge.quant import _int4, _tables


def quantized_rows(g: Graph, name: str, ids: str, bits: int) -> str:
    """Rows of the table ``name`` through ``GatherBlockQuantized`` (ONNX Runtime's contrib operator).

    Args:
        g: the graph.
        name: canonical name of the table, ``[rows, width]``.
        ids: int64 ids of any shape.
        bits: 8 or 4.
    """
    rows, width = g.weights.shape(name)
    block_size = _tables.block_size_for(width, bits)
    if block_size is None:  # no block divides the width: stored as float16
        spec = TensorSpec(name=name, elem_type=TensorProto.FLOAT16, shape=(rows, width))
        key = f"{name}@{g.weights.version(name)}|table-fp16"
        [table] = g.recipe(
            Recipe(
                key=key,
                owner=g.owner(name),
                specs=(spec,),
                compute=lambda: [g.weights.read(name).astype(np.float16)],
            )
        )
        return g.op("Cast", g.op("Gather", table, ids), to=TensorProto.FLOAT)
    blocks = width // block_size

    def compute() -> list[NDArray[Any]]:
        # a table of 150,000 tokens is over a GB as float32; one with an adapter is merged as a whole
        merged = g.weights.version(name) != BASE
        read_rows = g.weights.read(name).__getitem__ if merged else partial(g.weights.read, name)
        values, scales, zeros = _tables.quantize_table(read_rows, (rows, width), bits, block_size)
        if bits == 4:
            return [_int4.pack_pairs(values), scales, _int4.pack_pairs(zeros)]
        return [values, scales, zeros]

    def describe(arrays: Sequence[NDArray[Any]]) -> dict[str, Any]:
        return {"format": f"int{bits} block {block_size}"}

    per_byte = 8 // bits
    specs = (
        TensorSpec(name=name, elem_type=TensorProto.UINT8, shape=(rows, width // per_byte)),
        TensorSpec(name=f"{name}.scales", elem_type=TensorProto.FLOAT, shape=(rows, blocks)),
        TensorSpec(
            name=f"{name}.zero_points",
            elem_type=TensorProto.UINT8,
            shape=(rows, -(-blocks // per_byte)),
        ),
    )
    key = f"{name}@{g.weights.version(name)}|table-int{bits}-{block_size}"
    table, scale, zero = g.recipe(
        Recipe(key=key, owner=g.owner(name), specs=specs, compute=compute, describe=describe)
    )
    return g.op(
        "GatherBlockQuantized",
        table,
        ids,
        scale,
        zero,
        domain=CONTRIB,
        bits=bits,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
