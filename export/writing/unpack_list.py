"""The list beside a graph whose weights the runtime unpacks: where their 4-bit tensors lie."""

from __future__ import annotations

import base64
from typing import Any

from embedge.export.graph.initializers import LazyInitializer
from embedge.export.graph.ops import OpBuilder
from embedge.export.writing.weight_store import TensorStore

__all__ = ["unpack_list"]


def unpack_list(g: OpBuilder, store: TensorStore) -> dict[str, Any]:
    """The list that :func:`embedge.runtime.bundle.packed_weights.read_packed` reads.

    Args:
        g: a pruned graph of :class:`Int4UnpackedScheme`.
        store: holds the initializers of its weights.
    """
    weights = {}
    for label, unpacked in g.unpacked.items():
        values, scales, zeros = _places(store, unpacked.packed)
        columns, rotation, rows = (
            None if initializer is None else _places(store, initializer)[0]
            for initializer in (unpacked.columns, unpacked.rotation, unpacked.rows)
        )
        weights[label] = {
            "out_features": unpacked.out_features,
            "in_features": unpacked.in_features,
            "block_size": unpacked.block_size,
            "packed": values,
            "block_scales": scales,
            "zero_points": zeros,
            "columns": columns,
            "rotation": rotation,
            "rows": rows,
        }
    return {"weights": weights}


def _places(store: TensorStore, initializer: LazyInitializer) -> list[dict[str, Any]]:
    """Where each tensor of a stored initializer lies."""
    result: list[dict[str, Any]] = []
    for tensor in store.tensors(initializer):
        entry = {e.key: e.value for e in tensor.external_data}
        if entry:
            numbers = {key: int(entry[key]) for key in ("offset", "length")}
            result.append({"location": entry["location"], **numbers})
        else:
            result.append({"base64": base64.b64encode(tensor.raw_data).decode()})
    return result
