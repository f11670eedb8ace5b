"""What a graph computes, as one hash: its operators and its weights, wherever in the bundle's files they lie.

Two graphs have the same hash where they have the same fields of ONNX's ModelProto, but for those that no vector
depends on: names of the producer and of the graph, documentation, metadata. A tensor counts by its name, type,
shape and the SHA-256 of its bytes. So tasks may be added, files be copied, and tensors be shared with other tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from embedge.runtime.bundle.contract import UNPACKED
from embedge.runtime.bundle.onnx_model import ExternalData, read_initializer
from embedge.runtime.bundle.packed_weights import PackedWeight
from embedge.runtime.bundle.protobuf import fields_of

__all__ = ["content_sha256"]

_NOT_COMPUTED = {
    2,
    3,
    4,
    5,
    6,
    14,
}  # fields of a model: producer, domain, versions, documentation, metadata
_GRAPH, _INITIALIZER = 7, 5
_NAME, _DOCUMENTATION = 2, 10  # of a graph


def content_sha256(
    data: bytes,
    packed: Mapping[str, PackedWeight],
    digest: Callable[[ExternalData], str],
    *,
    tensors_sha256: str | None = None,
) -> str:
    """The hash of a graph.

    Args:
        data: its file.
        packed: weights that are unpacked when it opens, by the name of their Linear.
        digest: gives the SHA-256 of bytes beside the graph, in hexadecimal.
        tensors_sha256: that of the file with the task's tensors, where tasks share the graph.

    Raises:
        ValueError: the file is no ONNX model that `embedge export` writes.
        IndexError: it is cut.
    """
    state = hashlib.sha256()
    for number, _, start, stop in fields_of(data):
        if number == _GRAPH:
            _add_graph(state, data, start, stop, digest)
        elif number not in _NOT_COMPUTED:
            _add(state, number, hashlib.sha256(data[start:stop]).hexdigest())
    for name, weight in sorted(packed.items()):
        shape = weight.out_features, weight.in_features, weight.block_size
        _add(state, "packed", name, *shape, _digests(weight, digest))
    if tensors_sha256 is not None:
        _add(state, "task_tensors", tensors_sha256)
    return state.hexdigest()


def _add_graph(
    state: Any, data: bytes, start: int, stop: int, digest: Callable[[ExternalData], str]
) -> None:
    for number, _, at, end in fields_of(data, start, stop):
        if number == _INITIALIZER:
            name, tensor, inline = read_initializer(data, at, end)
            if inline is not None:
                content = hashlib.sha256(inline).hexdigest()
            else:
                assert tensor.place is not None
                content = UNPACKED if tensor.place.location == UNPACKED else digest(tensor.place)
            _add(state, "tensor", name, tensor.elem_type, tensor.shape, content)
        elif number not in (_NAME, _DOCUMENTATION):
            _add(state, "graph", number, hashlib.sha256(data[at:end]).hexdigest())


def _digests(weight: PackedWeight, digest: Callable[[ExternalData], str]) -> dict[str, str | None]:
    """The SHA-256 of each of a weight's tensors, by its name."""

    def of(tensor: ExternalData | bytes | None) -> str | None:
        if tensor is None:
            return None
        return hashlib.sha256(tensor).hexdigest() if isinstance(tensor, bytes) else digest(tensor)

    names = ("packed", "block_scales", "zero_points", "columns", "rotation", "rows")
    return {name: of(getattr(weight, name)) for name in names}


def _add(state: Any, *values: Any) -> None:
    state.update(json.dumps(values, sort_keys=True).encode() + b"\n")
