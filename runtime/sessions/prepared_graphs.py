"""Graphs as ONNX Runtime optimized and prepacked them on this machine: found, and checked.

Opening a session, ONNX Runtime optimizes the graph and prepacks every weight into the layout that the
processor's matmuls want: time and memory that each process spends again. A prepared graph is its result on
disk, written by `embedge prepare` (:mod:`embedge.runtime.tuning.prepack_graphs`). The next session maps it:
nothing is prepacked, the pages are shared by all processes and can be dropped under pressure.

Rules:
    * They lie in ``MACHINE/PRECISION/NAME/`` of one of two folders (:mod:`embedge.runtime.sessions.prepared_folders`).
      MACHINE names ONNX Runtime's version and the processor's instructions, so another machine does not
      see them.
    * Each carries the hashes of the files that it was made from, and of its own. One that does not fit the
      manifest any more, is damaged, or that ONNX Runtime refuses is left out with a warning. Its graph is
      hashed in any case; its weights, which would take longer than opening them, under ``verify="full"``.
    * Deleting the folder loses nothing but the time.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from embedge.runtime.bundle.contract import VISION
from embedge.runtime.bundle.files import FileState, sha256_of, state_of
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.json_object import read_json_object
from embedge.runtime.bundle.manifest import FileEntry
from embedge.runtime.bundle.names import is_path
from embedge.runtime.bundle.schema import Place, Record, record
from embedge.runtime.errors import BundleError, warn
from embedge.runtime.host.onnxruntime import load_onnxruntime
from embedge.runtime.host.processor import processor_identity
from embedge.runtime.kernels.library import own_kernels
from embedge.runtime.kernels.register import OPERATORS
from embedge.runtime.kernels.repack import PANELS
from embedge.runtime.sessions.prepared_folders import PreparedFolders

__all__ = ["GRAPH", "RECORD", "PreparedGraphs", "PreparedRecord", "machine_name"]

RECORD, GRAPH = "prepared.json", "graph.onnx"


def _file_problem(name: str) -> str | None:
    return None if is_path(name) else f"{name[:80]!r} is no name of a file beside it"


@record
class PreparedRecord(Record):
    """What stands beside a prepared graph, in ``prepared.json``.

    Attributes:
        source: SHA-256 of the bundle's files that it was made from.
        files: its own.
        layout: how embedge's kernels read its weights; ``None``: as ONNX Runtime prepacks them.
    """

    source: Any = None
    files: Mapping[Annotated[str, _file_problem], FileEntry] = field(default_factory=dict)
    layout: Any = None


class PreparedGraphs:
    """The prepared graphs of a bundle on this machine.

    Args:
        bundle: whose graphs.

    Attributes:
        bundle: as given.
        folders: where they lie.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.folders = PreparedFolders(bundle, machine_name())
        self._whole: dict[Path, tuple[FileState, FileEntry]] = {}

    def find(self, precision: str, name: str) -> Path | None:
        """The prepared graph of a task, or of ``VISION``; ``None`` if there is none that fits.

        Its files are compared as the bundle's were (``verify``), and the graph's SHA-256 in any case.
        """
        problems = []
        for folder in self._recorded(precision, name):
            problem = self._problem(folder, precision, name, full=self.bundle.verify == "full")
            if problem is None:
                return folder / GRAPH
            problems.append(f"{folder}: not used: {problem}")
        if problems:
            self.warn(problems[0])
        return None

    def warn(self, problem: str) -> None:
        """Warns of what is wrong with a prepared graph, and says what mends it."""
        warn(f"{problem}; {self.again}")

    def problems(self) -> list[str]:
        """What is wrong with the prepared graphs, every byte compared: one message each."""
        return [
            f"{folder}: not used: {problem}; {self.again}"
            for folder, problem in self._checked()
            if problem is not None
        ]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(1 for _ in self._existing())

    @property
    def again(self) -> str:
        """What mends a prepared graph, for messages."""
        return f"run `{self.folders.command}` again"

    def _recorded(self, precision: str, name: str) -> list[Path]:
        """The folders in which a graph is recorded."""
        folders = (folder / precision / name for folder in self.folders.to_read)
        return [folder for folder in folders if os.path.lexists(folder / RECORD)]

    def _existing(self) -> Iterator[tuple[Path, str, str]]:
        for precision, settings in self.bundle.manifest.precisions.items():
            own = [t for t in settings.graphs if self.bundle.graph_key(precision, t) == t]
            for name in (*own, *([VISION] if settings.vision else [])):
                for folder in self._recorded(precision, name):
                    yield folder, precision, name

    def _checked(self) -> Iterator[tuple[Path, str | None]]:
        for folder, precision, name in self._existing():
            yield folder, self._problem(folder, precision, name, full=True)

    def _problem(self, folder: Path, precision: str, name: str, *, full: bool) -> str | None:
        """Why a prepared graph is not used."""
        try:
            record = PreparedRecord.parse(read_json_object(folder / RECORD), Place(RECORD))
            if record.source != self.source(precision, name):
                return "made from other files than the bundle has now"
            if GRAPH not in record.files:
                return f"{RECORD}: files: expected {GRAPH} among them"
            if record.layout != self.layout(precision):
                return f"weights laid out as {record.layout}, not {self.layout(precision)}"
            for file, entry in record.files.items():
                problem = self._difference(folder / file, entry, hashed=full or file == GRAPH)
                if problem is not None:
                    return f"{file}: {problem}"
        except (BundleError, OSError) as error:
            return str(error)
        return None

    def _difference(self, file: Path, expected: FileEntry, *, hashed: bool) -> str | None:
        """What a file has another of than expected; a hash is not taken again of the same file."""
        status = file.stat()
        if status.st_size != expected.size:
            return f"expected {expected.size} bytes, found {status.st_size}"
        state = state_of(status)
        if hashed and self._whole.get(file) != (state, expected):
            found, state = sha256_of(file)
            if found != expected.sha256:
                return f"expected SHA-256 {expected.sha256}, found {found}"
            self._whole[file] = state, expected
        return None

    def layout(self, precision: str) -> str | None:
        """How embedge's kernels read the weights; ``None``: as ONNX Runtime prepacks them."""
        return PANELS if self.bundle.multiplies_integers(precision) and own_kernels() else None

    def source(self, precision: str, name: str) -> dict[str, str]:
        """SHA-256, as the manifest has them, of the files of a graph."""
        listed = self.bundle.manifest.files
        names = self.bundle.graph_files(precision, name)
        return {name: listed[name].sha256 for name in names}


def machine_name() -> str:
    """A folder name for what prepared graphs depend on: ONNX Runtime, the processor and the kernels."""
    prepacked_by = processor_identity()
    if own_kernels():
        prepacked_by += f"\n{PANELS}\n{OPERATORS}"
    digest = hashlib.sha256(prepacked_by.encode()).hexdigest()[:12]
    return f"onnxruntime-{load_onnxruntime().__version__}-{platform.machine()}-{digest}"
