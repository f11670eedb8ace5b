"""The list beside a graph whose weights the runtime unpacks: where their 4-bit tensors lie."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from embedge.export.graph.ops import OpBuilder
from embedge.export.writing.files import write_new
from embedge.export.writing.weight_store import Stored, TensorStore
from embedge.runtime.bundle.json_object import json_text


def write_unpack_list(path: Path, g: OpBuilder, store: TensorStore) -> None:
    """Write what :func:`embedge.runtime.bundle.packed_weights.read_packed` reads.

    Args:
        path: the new file.
        g: a pruned graph of :class:`Int4UnpackedScheme`.
        store: holds the initializers of its weights.
    """
    weights = {}
    for label, unpacked in g.unpacked.items():
        values, scales, zeros = map(_place, store.places(unpacked.packed))
        columns, rotation, rows = (
            None if initializer is None else _place(store.places(initializer)[0])
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
    write_new(path, json_text({"weights": weights}))


def _place(stored: Stored) -> dict[str, Any]:
    """Where a tensor lies; a small one itself."""
    if stored.inline is not None:
        return {"base64": base64.b64encode(stored.inline).decode()}
    return {"location": stored.file, "offset": stored.offset, "length": stored.length}
