"""Stores a graph as ONNX Runtime optimizes it and prepacks its weights for this machine.

What is stored, and when it is used: :mod:`embedge.runtime.sessions.prepared_graphs`. A graph takes its weights
twice on disk, as they were and prepacked; those of integer matmuls once where embedge's own kernels run
(:mod:`embedge.runtime.kernels.library`). The session options that do it are ONNX Runtime's
``session.save_external_prepacked_constant_initializers`` and ``optimized_model_filepath``.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

from embedge.runtime.bundle.lock import sole_holder
from embedge.runtime.bundle.manifest import FileEntry
from embedge.runtime.bundle.writing import (
    new_folder,
    recover,
    replace_file,
    sweep,
    sync_files,
)
from embedge.runtime.errors import EmbedgeError
from embedge.runtime.host.cores import available_cores
from embedge.runtime.host.onnxruntime import load_onnxruntime, open_session
from embedge.runtime.kernels.library import use_own_kernels
from embedge.runtime.sessions.prepared_graphs import GRAPH, RECORD, PreparedGraphs, PreparedRecord
from embedge.runtime.sessions.session import give_initializers, new_options
from embedge.runtime.sessions.unpack import Initializers, initializers_of

__all__ = ["prepack_graph"]

_DATA = "graph.bin"
_LOCK = ".prepare.lock"
_INLINE_BYTES = "1024"  # small tensors stay in the graph
_SPACE = 2.5  # of a graph's bytes, while it is written


def prepack_graph(prepared: PreparedGraphs, precision: str, name: str) -> int:
    """Prepack a graph, in place of an earlier one.

    Args:
        prepared: of the bundle.
        precision: one of its precisions.
        name: of a task, or ``VISION``.

    Returns:
        The bytes that it takes.

    Raises:
        BundleError: if the folder, or one above it inside the bundle, is a link.
        EmbedgeError: if the disk has no room, nothing can be written, or ONNX Runtime refuses.
    """
    name = prepared.bundle.graph_key(precision, name)
    source, place = prepared.source(precision, name), prepared.folders.to_write()
    folder = place / precision / name
    if place == prepared.folders.inside:
        prepared.folders.check_no_links(folder)

    def busy(holder: str) -> EmbedgeError:
        return EmbedgeError(
            f"{prepared.bundle.root}: expected no other `embedge prepare` of it at the same time, found "
            f"{holder}; wait until that is done, and {prepared.again}"
        )

    try:
        with sole_holder(place / _LOCK, busy):
            _clear_up(place)
            folder.parent.mkdir(exist_ok=True)
            files = _write(prepared, precision, name, source, folder)
    except OSError as error:
        raise EmbedgeError(
            f"{folder}: cannot be written: {error.strerror or error}; free some space or make the folder "
            f"writable, and {prepared.again}"
        ) from error
    if place == prepared.folders.inside:
        prepared.folders.forget_cached(precision, name)
    return sum(entry.size for entry in files.values())


def _write(
    prepared: PreparedGraphs, precision: str, name: str, source: dict[str, str], folder: Path
) -> dict[str, FileEntry]:
    """Writes a graph's folder, whole and on the disk before it has its name."""
    bundle, layout = prepared.bundle, prepared.layout(precision)
    panels = layout is not None
    with new_folder(folder, replace=True) as partial:
        _check_space(prepared, precision, name, partial)
        with bundle.reading(source):
            given = initializers_of(
                bundle, precision, name, threads=available_cores(), panels=panels, scratch=partial
            )
            exact = bundle.manifest.precisions[precision].saturates and not panels
            _save(bundle.graph(precision, name), given, partial, panels=panels, exact=exact)
            del given
        files = {path.name: FileEntry.of(path) for path in sorted(partial.iterdir())}
        record = PreparedRecord(source=source, files=files, layout=layout)
        replace_file(partial / RECORD, json.dumps(record.to_dict(), indent=2) + "\n")
        sync_files(partial, files)
    return files


def _save(graph: Path, given: Initializers, folder: Path, *, panels: bool, exact: bool) -> None:
    """Has ONNX Runtime open a graph, and write what it made of it."""
    options = new_options(threads=0, exact=exact)
    options.optimized_model_filepath = str(folder / GRAPH)
    prefix = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{prefix}_file_name", _DATA)
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", _INLINE_BYTES)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    if panels:
        use_own_kernels(options, panels=True)
    held = give_initializers(options, given)
    try:
        open_session(str(graph), options, ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise EmbedgeError(
            f"{graph}: ONNX Runtime {load_onnxruntime().__version__} cannot prepare it: "
            f"{' '.join(str(error).split())}; `embedge inspect --verify` checks the bundle's files"
        ) from error
    finally:
        del held


def _check_space(prepared: PreparedGraphs, precision: str, name: str, place: Path) -> None:
    needed = int(_SPACE * prepared.bundle.graph_bytes(precision, name))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise EmbedgeError(
            f"{place}: preparing {precision}/{name} takes {needed:,} bytes, and the disk has "
            f"{free:,}; free some, or prepare fewer tasks with --task"
        )


def _clear_up(place: Path) -> None:
    """Removes what killed processes left; for whoever is alone there."""
    sweep(place)
    for precision in place.iterdir():
        if precision.is_symlink() or not precision.is_dir():
            continue
        for path in list(precision.iterdir()):
            left = re.fullmatch(r"\.(.+)\.(partial|replaced)", path.name)
            if left is not None:
                recover(path.with_name(left[1]))
        with suppress(OSError):  # of graphs
            precision.rmdir()
