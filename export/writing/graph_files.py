"""The files of one task at one precision beside its weights: graphs and the layer report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from embedge.export.graph.builder import Graph
from embedge.export.graph.initializers import LazyInitializer
from embedge.export.graph.onnx_model import to_model
from embedge.export.writing.files import write_new
from embedge.export.writing.weight_store import TensorStore
from embedge.runtime.bundle.json_object import json_text
from embedge.runtime.errors import EmbedgeValueError

GRAPH, LAYERS = ".onnx", ".layers.json"
UNPACKED_GRAPH, UNPACK_LIST = ".unpacked.onnx", ".unpack.json"
TASK_TENSORS = ".safetensors"


def check_names_free(place: Path, tasks: Iterable[str]) -> None:
    """Refuse to write over files that no export wrote.

    Raises:
        EmbedgeValueError: naming the file.
    """
    for task in tasks:
        for end in (GRAPH, LAYERS, UNPACKED_GRAPH, UNPACK_LIST, TASK_TENSORS):
            name = task + end
            if os.path.lexists(place / name):
                raise EmbedgeValueError(
                    f"{place / name}: expected no such file, found one that the bundle's manifest "
                    "does not list; move it away or give the task another name"
                )


def write_graph(
    path: Path, g: Graph, store: TensorStore, name: str, notes: Mapping[str, str]
) -> None:
    """Write a graph whose initializers are all stored.

    Args:
        path: the new file.
        g: the graph.
        store: says where its initializers lie.
        name: the task, or that of the vision tower.
        notes: the file's metadata.
    """
    write_new(path, graph_content(g, store, name, notes))


def graph_content(g: Graph, store: TensorStore, name: str, notes: Mapping[str, str]) -> bytes:
    """What :func:`write_graph` writes."""
    tensors = [tensor for i in g.initializers.values() for tensor in store.tensors(i)]
    content: bytes = to_model(g, tensors, name, notes).SerializeToString(deterministic=True)
    return content


def write_layer_report(path: Path, g: Graph, store: TensorStore) -> None:
    """Write the format, size and error of each quantized layer of a graph."""

    def row(initializer: LazyInitializer) -> dict[str, Any]:
        return {"name": initializer.specs[0].name, **store.reports[initializer.key]}

    rows = [row(i) for i in g.initializers.values() if i.key in store.reports]
    write_new(path, json_text({"layers": rows}))
