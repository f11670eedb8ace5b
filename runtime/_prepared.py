"""Graphs as ONNX Runtime optimized and pre-packed them on this machine, kept beside the bundle.

Opening a session, ONNX Runtime optimizes the graph and packs every weight into the layout that the
processor's products want: time and memory that each process spends again. A prepared graph is its
result on disk. The next session maps it: nothing is packed, the pages are shared by all processes
and can be dropped under pressure. (ONNX Runtime's session options
``session.save_external_prepacked_constant_initializers`` and ``optimized_model_filepath``.)

Rules:
    * They lie in ``prepared/MACHINE/PRECISION/NAME/`` of the bundle's folder; MACHINE names ONNX
      Runtime's version and the processor's instructions, so another machine does not see them.
    * Each carries the hashes of the files that it was made from. One that does not fit the manifest
      any more, or is cut short, is left out with a warning.
    * Deleting the folder loses nothing but the time.
    * Each takes the graph's weights twice on disk, as they were and packed; those of integer products
      once where embedge's own kernels run (:mod:`embedge.runtime._kernels`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import warnings
from pathlib import Path
from typing import Any

from embedge.runtime._bundle import Bundle
from embedge.runtime._cores import available_cores
from embedge.runtime._cpu import keep_products_exact
from embedge.runtime._errors import BundleError, EmbedgeError, EmbedgeWarning
from embedge.runtime._kernels import OPERATORS, PANELS, own_kernels, use_own_kernels
from embedge.runtime._names import is_path
from embedge.runtime._onnxruntime import load_onnxruntime, open_session
from embedge.runtime._session import give_initializers
from embedge.runtime._typed_json import read_json_object
from embedge.runtime._unpack import Initializers

__all__ = ["PREPARED", "PreparedGraphs", "machine_name"]

PREPARED = "prepared"
_RECORD, _GRAPH, _DATA = "prepared.json", "graph.onnx", "graph.bin"
_INLINE_BYTES = "1024"  # small tensors stay in the graph
_SPACE = 2.5  # of a graph's bytes, while it is written


class PreparedGraphs:
    """The prepared graphs of a bundle on this machine.

    Args:
        bundle: whose graphs.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.folder = bundle.root / PREPARED / machine_name()

    def find(self, precision: str, name: str) -> Path | None:
        """The prepared graph of a task, or of ``VISION``; ``None`` if there is none that fits."""
        folder = self.folder / precision / name
        if not (folder / _RECORD).exists():
            return None
        try:
            record = read_json_object(folder / _RECORD)
            problem = self._problem(folder, record, self._source(precision, name))
            if problem is None and record.get("layout") != self._layout(precision):
                problem = (
                    f"weights laid out as {record.get('layout')}, not {self._layout(precision)}"
                )
        except (BundleError, OSError) as error:
            problem = str(error)
        if problem is None:
            return folder / _GRAPH
        warnings.warn(
            f"{folder}: not used: {problem}; run `embedge prepare {self._bundle.root}` again",
            EmbedgeWarning,
            stacklevel=2,
        )
        return None

    def write(self, precision: str, name: str) -> int:
        """Prepares a graph, in place of an earlier one.

        Returns:
            The bytes that it takes.

        Raises:
            BundleError: if the folder, or one above it inside the bundle, is a link.
            EmbedgeError: if the disk has no room, or ONNX Runtime refuses.
            OSError: if the folder cannot be written.
        """
        source, folder = self._source(precision, name), self.folder / precision / name
        self.check_no_links(folder)
        partial = folder.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            self._check_space(precision, name)
            layout = self._layout(precision)
            panels = layout is not None
            with self._bundle.reading(source):
                given = self._bundle.unpacked(
                    precision, name, threads=available_cores(), panels=panels, scratch=partial
                )
                _save_prepacked(self._bundle.graph(precision, name), given, partial, panels=panels)
                del given
            files = {path.name: path.stat().st_size for path in partial.iterdir()}
            record = {"source": source, "files": files, "layout": layout}
            (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return sum(files.values())

    def remove(self) -> bool:
        """Deletes what was prepared on any machine; whether there was something.

        Raises:
            BundleError: if the folder is a link.
        """
        everything = self._bundle.root / PREPARED
        self.check_no_links(everything)
        found = everything.is_dir()
        if found:
            shutil.rmtree(everything)
        return found

    def check_no_links(self, path: Path) -> None:
        """Refuses to write to a place, or delete what is there, that a link takes out of the bundle.

        Raises:
            BundleError: with where it leads.
        """
        root = self._bundle.root
        real = path.resolve()
        if real != root.resolve() / path.relative_to(root):
            raise BundleError(
                f"{path}: expected a place inside the bundle, found a link to {real}; remove the link, "
                f"nothing is lost but the time of `embedge prepare {root}`"
            )

    def _layout(self, precision: str) -> str | None:
        """How embedge's kernels read the weights; ``None``: as ONNX Runtime packs them."""
        return PANELS if self._bundle.multiplies_integers(precision) and own_kernels() else None

    def _source(self, precision: str, name: str) -> dict[str, str]:
        """SHA-256, as the manifest has them, of the files of a graph."""
        listed = self._bundle.manifest.files
        names = self._bundle.graph_files(precision, name)
        return {name: listed[name].sha256 for name in names}

    @staticmethod
    def _problem(folder: Path, record: dict[str, Any], source: dict[str, str]) -> str | None:
        if record.get("source") != source:
            return "made from other files than the bundle has now"
        files = record.get("files")
        if not isinstance(files, dict) or _GRAPH not in files:
            return f"{_RECORD} lists no files"
        for name, size in files.items():
            if not is_path(name):
                return f"{_RECORD} lists {name[:80]!r}, which is no name of its files"
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name}: expected {size} bytes, found {found}"
        return None

    def _check_space(self, precision: str, name: str) -> None:
        needed = int(_SPACE * self._bundle.graph_bytes(precision, name))
        free = shutil.disk_usage(self._bundle.root).free
        if free < needed:
            raise EmbedgeError(
                f"{self._bundle.root}: preparing {precision}/{name} takes {needed:,} bytes, and the disk has "
                f"{free:,}; free some, or prepare fewer tasks with --task"
            )


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
