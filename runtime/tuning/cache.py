"""The tuning cache: what `embedge prepare` measured on this machine, kept beside the bundle.

``prepared/MACHINE/tuning.json``, by threads of a run and by precision: how long some shapes take, and
the way of running batches that was fastest. It decides speed alone, never a vector.

Rules:
    * It counts for the machine (ONNX Runtime's version and the processor's instructions), the number
      of threads and the graph that were measured; new measurements join older ones.
    * A damaged file, one of another machine and one of other graphs are left out with a warning.
    * It is written beside and renamed, is in no manifest, and may be deleted at any time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, TypeAlias

from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.json_object import read_json_object
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.bundle.schema import MOST_BYTES, Place, Record, Within, record
from embedge.runtime.errors import BundleError, warn
from embedge.runtime.sessions.prepared_folders import PreparedFolders
from embedge.runtime.sessions.prepared_graphs import machine_name
from embedge.runtime.sessions.session_workers import RunSettings

__all__ = ["TunedPrecision", "Tuning", "add_tuning", "read_tuning", "tuning_file"]

_NAME = "tuning.json"
_FORMAT_VERSION = 1


def _time_problem(value: float) -> str | None:
    return None if value > 0 else f"expected a time above 0, found {value}"


def _threads_problem(count: str) -> str | None:
    return None if re.fullmatch("[0-9]{1,9}", count) else f"{count!r} is no number of threads"


@record
class TunedPrecision(Record):
    """A precision as it was measured, with its fastest settings.

    Attributes:
        task: whose graph ran; those of the other tasks differ in their weights alone.
        graph_sha256: of that graph's file, as the manifest has it.
        graph_bytes: what a session of it counts towards a memory limit.
        milliseconds: median time by shape, ``"16x64"`` being 16 texts of 64 tokens.
        settings: the way of running that these times are of.
    """

    task: str
    graph_sha256: str
    graph_bytes: Annotated[int, Within(1, MOST_BYTES)]
    milliseconds: Mapping[str, Annotated[float, _time_problem]]
    settings: RunSettings

    def fits(self, manifest: Manifest, precision: str) -> bool:
        """Whether the bundle's graph still is the one that was measured."""
        graph = manifest.precisions[precision].graphs.get(self.task)
        return graph is not None and manifest.files[graph].sha256 == self.graph_sha256


@record
class _Head(Record):
    """What is read of the file before anything else."""

    format_version: Annotated[int, Within(1)]
    machine: str

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.format_version != _FORMAT_VERSION:
            yield "format_version", f"expected {_FORMAT_VERSION}, found {self.format_version}"
        if self.machine != machine_name():
            yield "machine", f"measured on another, {self.machine}; this is {machine_name()}"


@record
class _Document(_Head):
    threads: Mapping[Annotated[str, _threads_problem], Mapping[str, TunedPrecision]]


# By precision; of one machine and one number of threads.
Tuning: TypeAlias = Mapping[str, TunedPrecision]


def read_tuning(bundle: Bundle, threads: int) -> Tuning:
    """What was measured of a bundle's precisions on this machine; often nothing.

    Args:
        bundle: whose precisions.
        threads: of a run.
    """
    folders = _folders(bundle)
    file, again = tuning_file(bundle), f"run `{folders.command}` again"
    try:
        everything = _read(file)
    except (BundleError, OSError) as error:
        warn(f"not used: {error}; {again}")
        return {}
    if everything is None:
        others = [o for folder in folders.to_read for o in sorted(folder.parent.glob(f"*/{_NAME}"))]
        if others:
            warn(
                f"{others[0]}: not used: measured on another machine or with another ONNX Runtime "
                f"({others[0].parent.name}; this is {machine_name()}); {again} here"
            )
        return {}
    known = bundle.manifest.precisions
    here = {p: found for p, found in everything.get(threads, {}).items() if p in known}
    stale = [p for p, found in here.items() if not found.fits(bundle.manifest, p)]
    if stale:
        warn(
            f"{file}: not used for {', '.join(stale)}: measured with another graph than the bundle "
            f"has now; {again}"
        )
    return {p: found for p, found in here.items() if p not in stale}


def add_tuning(bundle: Bundle, threads: int, measured: Tuning) -> Path:
    """Stores measurements, in place of earlier ones of the same precisions and threads.

    Args:
        bundle: whose precisions.
        threads: of a run.
        measured: by precision.

    Returns:
        The file.

    Raises:
        BundleError: if a link leads out of the bundle there.
        EmbedgeError: if neither the bundle nor the user's cache can be written.
        OSError: if it cannot be written.
    """
    from embedge.runtime.bundle.writing import replace_file  # who reads needs none of it

    folders = _folders(bundle)
    file = folders.to_write() / _NAME
    try:
        everything = _read(file) or {}
    except (BundleError, OSError):
        everything = {}  # damaged: what is measured now takes its place
    everything[threads] = {**everything.get(threads, {}), **measured}
    document = _Document(
        format_version=_FORMAT_VERSION,
        machine=machine_name(),
        threads={str(count): found for count, found in sorted(everything.items())},
    )
    replace_file(file, json.dumps(document.to_dict(), indent=2) + "\n")
    if file.parent == folders.inside:
        folders.forget_cached(_NAME)
    return file


def tuning_file(bundle: Bundle) -> Path:
    """Where the measurements of this machine lie, if there are any."""
    files = [folder / _NAME for folder in _folders(bundle).to_read]
    return next((file for file in files if file.exists()), files[-1])


def _folders(bundle: Bundle) -> PreparedFolders:
    return PreparedFolders(bundle, machine_name())


def _read(file: Path) -> dict[int, dict[str, TunedPrecision]] | None:
    """The measurements in a file, by threads and precision; ``None`` without one.

    Raises:
        BundleError: if it is damaged, of another format, or of another machine.
    """
    if not file.exists():
        return None
    values, place = read_json_object(file), Place(str(file))
    _Head.parse(values, place)
    return {int(n): dict(found) for n, found in _Document.parse(values, place).threads.items()}
