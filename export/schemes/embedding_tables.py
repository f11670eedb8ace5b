"""Quantized embedding tables: only the rows that are looked up are dequantized.

Rows often share large channels. The steps of a block are as large as those ask for, so that what tells rows apart is
lost: their mean is kept as float32 and added behind the table, which holds the differences. Eight bits do without it
where the stream is rotated, which spreads such channels over the row (lab note 51).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export.graph.initializers import LazyInitializer, TensorSpec
from embedge.export.graph.ops import CONTRIB, OpBuilder
from embedge.export.graph.values import Value, owner
from embedge.export.schemes.floats import half_rows, to_half
from embedge.export.weights.rotated import RotatedWeights
from embedge.export.weights.tensors import BASE
from embedge.quant import embedding_tables, int4


def quantized_rows(g: OpBuilder, name: str, ids: str, bits: int, *, half: bool = False) -> Value:
    """Rows of the table ``name`` through ``GatherBlockQuantized`` (ONNX Runtime's contrib operator).

    Args:
        g: the graph.
        name: canonical name of the table, ``[rows, width]``.
        ids: int64 ids of any shape.
        bits: 8 or 4.
        half: float16 scales, as on GPUs.
    """
    rows, width = g.weights.shape(name)
    block_size = embedding_tables.block_size_for(width, bits)
    if block_size is None:  # no block divides the width: stored as float16
        return half_rows(g, name, ids)
    blocks = width // block_size
    if half and bits == 4 and blocks % 2:
        # the CUDA kernel counts packed zero points through the whole table, the CPU's row by row
        return quantized_rows(g, name, ids, 8, half=True)

    rotated = isinstance(g.weights, RotatedWeights) and g.weights.output is not None
    centred = bits == 4 or not rotated

    def compute() -> list[NDArray[Any]]:
        # a table of 150,000 tokens is over a GB as float32; one with an adapter is merged as a whole
        merged = g.weights.version(name) != BASE
        read_rows = g.weights.read(name).__getitem__ if merged else partial(g.weights.read, name)
        mean = embedding_tables.mean_row(read_rows, (rows, width)) if centred else None
        values, full, zeros = embedding_tables.quantize_table(
            read_rows if mean is None else lambda some: read_rows(some) - mean,
            (rows, width),
            bits,
            block_size,
        )
        scales = to_half(full, name) if half else full
        if bits == 4:
            values, zeros = int4.pack_pairs(values), int4.pack_pairs(zeros)
        return [values, scales, zeros, *([] if mean is None else [mean])]

    def describe(arrays: Sequence[NDArray[Any]]) -> dict[str, Any]:
        return {"format": f"int{bits} block {block_size}"}

    per_byte = 8 // bits
    specs = [
        TensorSpec(name=name, elem_type=TensorProto.UINT8, shape=(rows, width // per_byte)),
        TensorSpec(
            name=f"{name}.scales",
            elem_type=TensorProto.FLOAT16 if half else TensorProto.FLOAT,
            shape=(rows, blocks),
        ),
        TensorSpec(
            name=f"{name}.zero_points",
            elem_type=TensorProto.UINT8,
            shape=(rows, -(-blocks // per_byte)),
        ),
    ]
    if centred:
        specs.append(TensorSpec(name=f"{name}.mean", elem_type=TensorProto.FLOAT, shape=(width,)))
    form = f"table-int{bits}{'-centred' * centred}-{block_size}{'-fp16' * half}"
    table, scale, zero, *mean_row = g.initializer(
        LazyInitializer(
            key=f"{name}@{g.weights.version(name)}|{form}",
            owner=owner(g.weights, name),
            specs=tuple(specs),
            compute=compute,
            describe=describe,
        )
    )
    found = g.op(
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
    found = g.op("Cast", found, to=TensorProto.FLOAT) if half else found
    return g.op("Add", found, *mean_row) if mean_row else found
