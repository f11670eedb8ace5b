"""Writing the graph of a precision's maps into a bundle that is there, and its entry in the manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx import ModelProto

from embedge.export.graph.maps_graph import to_maps_model
from embedge.export.graph.ops import OpBuilder
from embedge.export.writing.bundle import additions
from embedge.export.writing.files import list_files, write_new
from embedge.export.writing.graph_files import GRAPH
from embedge.export.writing.model_card import write_card
from embedge.export.writing.weight_store import TensorStore
from embedge.runtime.bundle.content import content_sha256
from embedge.runtime.bundle.contract import FORMAT_VERSION, MANIFEST, MAPS
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.json_object import json_text, read_json_object
from embedge.runtime.bundle.manifest import FileEntry, Manifest
from embedge.runtime.bundle.onnx_model import ExternalData
from embedge.runtime.bundle.writing import replace_file, sync_files
from embedge.runtime.errors import EmbedgeError

__all__ = ["NewMaps", "write_maps"]


class NewMaps:
    """Maps of one precision that are to be written.

    Args:
        model: the base task's graph.
        graph: continued by the maps.
        notes: metadata of the new graph.
        entry: their part of the manifest, but for ``graph`` and ``content_sha256``.
    """

    def __init__(
        self, model: ModelProto, graph: OpBuilder, notes: Mapping[str, str], entry: dict[str, Any]
    ) -> None:
        self.model, self.graph, self.notes, self.entry = model, graph, notes, entry


def write_maps(out: Path, found: Mapping[str, NewMaps]) -> None:
    """Add maps to a bundle, in the place of those that it has.

    Args:
        out: the bundle, which nobody else writes meanwhile.
        found: by precision.

    Raises:
        EmbedgeError: if the bundle was changed since its graphs were read, or cannot be written.
    """
    before = Bundle(out, verify="none")
    with additions(out) as folder:
        new = [
            name
            for precision, maps in found.items()
            for name in _write_graph(before, folder, precision, maps)
        ]
        document = read_json_object(folder / MANIFEST)
        if Manifest.from_dict(document) != before.manifest:
            raise EmbedgeError(f"{out}: was changed while maps were fitted; fit them again")
        old = _replaced(before, found)
        for precision, maps in found.items():
            document["precisions"][precision]["maps"] = maps.entry
        files = {name: entry for name, entry in document["files"].items() if name not in old}
        document["files"] = files | list_files(folder, new)
        document["format_version"] = max(
            document["format_version"], FORMAT_VERSION, key=lambda v: [*map(int, v.split("."))]
        )
        write_card(folder, Manifest.from_dict(document, str(folder / MANIFEST)))
        sync_files(folder, new)
        replace_file(folder / MANIFEST, json_text(document))
    for name in old:
        (out / name).unlink(missing_ok=True)


def _write_graph(bundle: Bundle, folder: Path, precision: str, maps: NewMaps) -> list[str]:
    """Write a graph and its weights; return the names of both."""
    base = str(maps.entry["base"])
    place = bundle.graph(precision, base)
    stem = _free_stem(place.parent)
    names = [f"{stem}{GRAPH}"]
    with TensorStore(place.parent) as store:
        for initializer in maps.graph.initializers.values():
            store.put(initializer, list(initializer.compute()), f"{stem}.bin")
        if os.path.lexists(place.parent / f"{stem}.bin"):
            names.append(f"{stem}.bin")
        tensors = [t for i in maps.graph.initializers.values() for t in store.tensors(i)]
        own = store.sha256_at
    model = to_maps_model(maps.model, maps.graph, tensors, maps.notes)
    content: bytes = model.SerializeToString(deterministic=True)
    write_new(place.parent / names[0], content)
    folder_name = place.parent.relative_to(bundle.root).as_posix()
    listed = [f"{folder_name}/{name}" for name in names]
    maps.entry["graph"] = listed[0]

    def digest(data: ExternalData) -> str:
        if data.location == f"{stem}.bin":
            return own(data)
        return bundle.sha256_at(place, data)

    tensors_name = bundle.manifest.precisions[precision].task_tensors.get(base)
    maps.entry["content_sha256"] = content_sha256(
        content,
        {},
        digest,
        tensors_sha256=None if tensors_name is None else FileEntry.of(folder / tensors_name).sha256,
    )
    return listed


def _free_stem(place: Path) -> str:
    """``maps``, or the first of ``maps.2``, … that no file has."""
    number, stem = 1, MAPS
    while any(os.path.lexists(place / f"{stem}{end}") for end in (GRAPH, ".bin")):
        number += 1
        stem = f"{MAPS}.{number}"
    return stem


def _replaced(bundle: Bundle, found: Mapping[str, NewMaps]) -> set[str]:
    """Names of the files that maps of before alone have."""
    names = set()
    for precision in found:
        if (maps := bundle.manifest.precisions[precision].maps) is not None:
            beside = maps.graph.removesuffix(GRAPH) + ".bin"
            names |= {maps.graph, *({beside} & bundle.manifest.files.keys())}
    return names
