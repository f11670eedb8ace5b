"""Graphs as ONNX Runtime optimized and pre-packed them on this machine, kept beside the bundle.

Opening a session, ONNX Runtime optimizes the graph and packs every weight into the layout that the
processor's products want: time and memory that each process spends again. A prepared graph is its
result on disk. The next session maps it: nothing is packed, the pages are shared by all processes
and can be dropped under pressure. (ONNX Runtime's session options
``session.save_external_prepacked_constant_initializers`` and ``optimized_model_filepath``.)

Rules:
    * They lie in ``MACHINE/PRECISION/NAME/`` of a place beside the bundle (:mod:`embedge.runtime.sessions.places`);
      MACHINE names ONNX Runtime's version and the processor's instructions, so another machine does not
      see them.
    * Each carries the hashes of the files that it was made from, and of its own. One that does not fit the
      manifest any more, is damaged, or that ONNX Runtime refuses is left out with a warning. Its graph is
      hashed in any case; its weights, which would take longer than opening them, under ``verify="full"``.
    * Deleting the folder loses nothing but the time.
    * Each takes the graph's weights twice on disk, as they were and packed; those of integer products
      once where embedge's own kernels run (:mod:`embedge.runtime.kernels.library`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from embedge.runtime.bundle.contract import VISION
from embedge.runtime.bundle.files import FileState, sha256_of, state_of
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.json_object import read_json_object
from embedge.runtime.bundle.lock import sole_holder
from embedge.runtime.bundle.manifest import FileEntry
from embedge.runtime.bundle.names import is_path
from embedge.runtime.bundle.schema import Place, Record
from embedge.runtime.bundle.writing import (
    make_folder,
    partial_of,
    put_in_place,
    recover,
    replace_file,
    sweep,
    sync_files,
)
from embedge.runtime.errors import BundleError, EmbedgeError, EmbedgeWarning
from embedge.runtime.host.cores import available_cores
from embedge.runtime.host.onnxruntime import load_onnxruntime, open_session
from embedge.runtime.host.processor import keep_products_exact
from embedge.runtime.kernels.library import OPERATORS, PANELS, own_kernels, use_own_kernels
from embedge.runtime.sessions.places import Places
from embedge.runtime.sessions.session import give_initializers
from embedge.runtime.sessions.unpack import Initializers, initializers_of

__all__ = ["PreparedGraphs", "machine_name"]

_RECORD, _GRAPH, _DATA = "prepared.json", "graph.onnx", "graph.bin"
_LOCK = ".prepare.lock"
_INLINE_BYTES = "1024"  # small tensors stay in the graph
_SPACE = 2.5  # of a graph's bytes, while it is written


def _file_problem(name: str) -> str | None:
    return None if is_path(name) else f"{name[:80]!r} is no name of a file beside it"


@dataclass(frozen=True, kw_only=True)
class _Record(Record):
    """What stands beside a prepared graph.

    Attributes:
        source: SHA-256 of the bundle's files that it was made from.
        files: its own.
        layout: how embedge's kernels read its weights; ``None``: as ONNX Runtime packs them.
    """

    source: Any = None
    files: Mapping[Annotated[str, _file_problem], FileEntry] = field(default_factory=dict)
    layout: Any = None


class PreparedGraphs:
    """The prepared graphs of a bundle on this machine.

    Args:
        bundle: whose graphs.

    Attributes:
        places: where they lie.
        folder: the place in the bundle's own folder.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.places = Places(bundle, machine_name())
        self.folder = self.places.inside
        self._whole: dict[Path, tuple[FileState, FileEntry]] = {}

    def find(self, precision: str, name: str) -> Path | None:
        """The prepared graph of a task, or of ``VISION``; ``None`` if there is none that fits.

        Its files are compared as the bundle's were (``verify``), and the graph's SHA-256 in any case.
        """
        problems = []
        for folder in self._folders(precision, name):
            problem = self._problem(folder, precision, name, full=self._bundle.verify == "full")
            if problem is None:
                return folder / _GRAPH
            problems.append(f"{folder}: not used: {problem}")
        if problems:
            self.warn(problems[0])
        return None

    def warn(self, problem: str) -> None:
        """Warns of what is wrong with a prepared graph, and says what mends it."""
        warnings.warn(f"{problem}; {self._again}", EmbedgeWarning, stacklevel=3)

    def problems(self) -> list[str]:
        """What is wrong with the prepared graphs, every byte compared: one message each."""
        return [
            f"{folder}: not used: {problem}; {self._again}"
            for folder, problem in self._checked()
            if problem is not None
        ]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(1 for _ in self._existing())

    def write(self, precision: str, name: str) -> int:
        """Prepares a graph, in place of an earlier one.

        Returns:
            The bytes that it takes.

        Raises:
            BundleError: if the folder, or one above it inside the bundle, is a link.
            EmbedgeError: if the disk has no room, nothing can be written, or ONNX Runtime refuses.
        """
        source, place = self._source(precision, name), self.places.to_write()
        folder = place / precision / name
        if place == self.folder:
            self.places.check_no_links(folder)
        try:
            with sole_holder(place / _LOCK, self._busy):
                _clear_up(place)
                folder.parent.mkdir(exist_ok=True)
                files = self._write_alone(precision, name, source, folder)
        except OSError as error:
            raise EmbedgeError(
                f"{folder}: cannot be written: {error.strerror or error}; free some space or make the folder "
                f"writable, and {self._again}"
            ) from error
        if place == self.folder:
            self.places.forget_cached(precision, name)
        return sum(entry.size for entry in files.values())

    def _write_alone(
        self, precision: str, name: str, source: dict[str, str], folder: Path
    ) -> dict[str, FileEntry]:
        """Write a graph's folder, whole and on the disk before it has its name."""
        partial = partial_of(folder)
        make_folder(partial)
        try:
            self._check_space(precision, name, partial)
            layout = self._layout(precision)
            panels = layout is not None
            with self._bundle.reading(source):
                given = initializers_of(
                    self._bundle,
                    precision,
                    name,
                    threads=available_cores(),
                    panels=panels,
                    scratch=partial,
                )
                _save_prepacked(self._bundle.graph(precision, name), given, partial, panels=panels)
                del given
            files = {
                path.name: FileEntry(size=path.stat().st_size, sha256=sha256_of(path)[0])
                for path in sorted(partial.iterdir())
            }
            record = _Record(source=source, files=files, layout=layout)
            replace_file(partial / _RECORD, json.dumps(record.to_dict(), indent=2) + "\n")
            sync_files(partial, files)
            put_in_place(partial, folder, replace=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return files

    def _busy(self, holder: str) -> EmbedgeError:
        return EmbedgeError(
            f"{self._bundle.root}: expected no other `embedge prepare` of it at the same time, found "
            f"{holder}; wait until that is done, and {self._again}"
        )

    @property
    def _again(self) -> str:
        return f"run `{self.places.command}` again"

    def _folders(self, precision: str, name: str) -> list[Path]:
        """The folders in which a graph is recorded."""
        folders = (place / precision / name for place in self.places.to_read)
        return [folder for folder in folders if os.path.lexists(folder / _RECORD)]

    def _existing(self) -> Iterator[tuple[Path, str, str]]:
        for precision, settings in self._bundle.manifest.precisions.items():
            for name in (*settings.graphs, *([VISION] if settings.vision else [])):
                for folder in self._folders(precision, name):
                    yield folder, precision, name

    def _checked(self) -> Iterator[tuple[Path, str | None]]:
        for folder, precision, name in self._existing():
            yield folder, self._problem(folder, precision, name, full=True)

    def _problem(self, folder: Path, precision: str, name: str, *, full: bool) -> str | None:
        """Why a prepared graph is not used."""
        try:
            record = _Record.parse(read_json_object(folder / _RECORD), Place(_RECORD))
            if record.source != self._source(precision, name):
                return "made from other files than the bundle has now"
            if _GRAPH not in record.files:
                return f"{_RECORD}: files: expected {_GRAPH} among them"
            if record.layout != self._layout(precision):
                return f"weights laid out as {record.layout}, not {self._layout(precision)}"
            for file, entry in record.files.items():
                problem = self._difference(folder / file, entry, hashed=full or file == _GRAPH)
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

    def _layout(self, precision: str) -> str | None:
        """How embedge's kernels read the weights; ``None``: as ONNX Runtime packs them."""
        return PANELS if self._bundle.multiplies_integers(precision) and own_kernels() else None

    def _source(self, precision: str, name: str) -> dict[str, str]:
        """SHA-256, as the manifest has them, of the files of a graph."""
        listed = self._bundle.manifest.files
        names = self._bundle.graph_files(precision, name)
        return {name: listed[name].sha256 for name in names}

    def _check_space(self, precision: str, name: str, place: Path) -> None:
        needed = int(_SPACE * self._bundle.graph_bytes(precision, name))
        free = shutil.disk_usage(place).free
        if free < needed:
            raise EmbedgeError(
                f"{place}: preparing {precision}/{name} takes {needed:,} bytes, and the disk has "
                f"{free:,}; free some, or prepare fewer tasks with --task"
            )


def _clear_up(place: Path) -> None:
    """Remove what killed processes left; for whoever is alone there."""
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


def machine_name() -> str:
    """A folder name for what prepared graphs depend on: ONNX Runtime, the processor and the kernels."""
    packed_by = _instructions()
    if own_kernels():
        packed_by += f"\n{PANELS}\n{OPERATORS}"
    digest = hashlib.sha256(packed_by.encode()).hexdigest()[:12]
    return f"onnxruntime-{load_onnxruntime().__version__}-{platform.machine()}-{digest}"


@functools.cache
def _instructions() -> str:
    """The processor's name and flags as Linux lists them, or what Python knows elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    keys = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    found = {line for line in lines if line.partition(":")[0].strip() in keys}
    return "\n".join(sorted(found))


def _save_prepacked(graph: Path, given: Initializers, folder: Path, *, panels: bool) -> None:
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    keep_products_exact(options)
    options.optimized_model_filepath = str(folder / _GRAPH)
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
            f"{graph}: ONNX Runtime {onnxruntime.__version__} cannot prepare it: "
            f"{' '.join(str(error).split())}; `embedge inspect --verify` checks the bundle's files"
        ) from error
    finally:
        del held
