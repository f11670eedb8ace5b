"""``manifest.json``: everything about a bundle that a caller could get wrong.

Rules:
    * ``format_version`` is "major.minor". Another major version is refused, a newer minor one
      warns. 1.1 added images: ``model.image`` and ``vision`` of a precision; 1.2 precisions whose
      weights are unpacked when a graph opens: ``unpack``; 1.3 ``tokenizer.truncation_side``
      and ``model.truncate_dim``; 1.4 ``rotation`` in the list of weights to unpack.
    * Unknown keys are ignored; a missing or wrong one is an error with its path.
    * Paths are relative to the bundle, with ``/``, and stay inside it.
    * Every graph, what it reads, layer table and the tokenizer is listed in ``files``.
    * ``from_dict`` and ``to_dict`` are inverses for documents of this version without unknown keys.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedge.runtime.bundle.contract import FORMAT_VERSION, VISION
from embedge.runtime.bundle.image_settings import ImageSettings
from embedge.runtime.bundle.json_object import Table
from embedge.runtime.bundle.manifest_parts import (
    ActivationConstant,
    Adapter,
    FileEntry,
    Model,
    Precision,
    Producer,
    Source,
    Task,
    TokenizerSettings,
    check_names,
    check_path,
)
from embedge.runtime.errors import EmbedgeWarning, ManifestError

__all__ = [
    "ActivationConstant",
    "Adapter",
    "FileEntry",
    "ImageSettings",
    "Manifest",
    "Model",
    "Precision",
    "Producer",
    "Source",
    "Task",
    "TokenizerSettings",
]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A parsed ``manifest.json``; see the module's rules and README's format section."""

    producer: Producer
    source: Source
    model: Model
    tokenizer: TokenizerSettings
    tasks: Mapping[str, Task]
    precisions: Mapping[str, Precision]
    files: Mapping[str, FileEntry]
    format_version: str = FORMAT_VERSION

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], file: str = "manifest.json") -> Manifest:
        """The manifest in a parsed JSON document.

        Args:
            values: the document.
            file: its name, for messages.

        Raises:
            ManifestError: with the path of the first key that cannot be used, or for a
                ``format_version`` of another major version.
        """
        document = Table(values, "", file)
        version = _checked_version(document)
        files = document.table("files")
        for name in files.values:
            check_path(files, None, name)
        tasks, precisions = document.table("tasks"), document.table("precisions")
        check_names(tasks, "task")
        check_names(precisions, "precision")
        manifest = cls(
            format_version=version,
            producer=Producer.parse(document.table("producer")),
            source=Source.parse(document.table("source")),
            model=Model.parse(document.table("model")),
            tokenizer=TokenizerSettings.parse(document.table("tokenizer")),
            tasks={name: Task.parse(t) for name, t in tasks.tables()},
            precisions={name: Precision.parse(p) for name, p in precisions.tables()},
            files={name: FileEntry.parse(f) for name, f in files.tables()},
        )
        manifest._check_references(file)
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """The manifest as a JSON document, keys in the order of the format's description."""
        return {
            "format_version": self.format_version,
            "producer": self.producer.to_dict(),
            "source": self.source.to_dict(),
            "model": self.model.to_dict(),
            "tokenizer": self.tokenizer.to_dict(),
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "precisions": {name: p.to_dict() for name, p in self.precisions.items()},
            "files": {name: entry.to_dict() for name, entry in self.files.items()},
        }

    def folder_bytes(self, precision: str) -> int:
        """Bytes of the files in the folders of a precision's graphs, which another may use too."""
        graphs = self.precisions[precision].graphs.values()
        folders = tuple({path.rpartition("/")[0] + "/" for path in graphs})
        return sum(entry.size for name, entry in self.files.items() if name.startswith(folders))

    def _check_references(self, file: str) -> None:
        """Every task and file that is named exists in the manifest."""
        if not self.tasks or not self.precisions:
            missing = "precisions" if self.tasks else "tasks"
            raise ManifestError(f"{file}: {missing}: expected at least one, found none")
        named = {"tokenizer.file": self.tokenizer.file}
        for name, precision in self.precisions.items():
            if precision.vision is not None:
                key = f"precisions.{name}.vision"
                if self.model.image is None:
                    raise ManifestError(f"{file}: {key}: expected null, as model.image is")
                if VISION in self.tasks:
                    raise ManifestError(f"{file}: {key}: a task has the name {VISION!r} as well")
                named[key] = precision.vision
            listed = {
                "graphs": precision.graphs,
                "layers": precision.layers,
                "unpack": precision.unpack,
            }
            for kind, paths in listed.items():
                for task, path in paths.items():
                    key = f"precisions.{name}.{kind}.{task}"
                    if task not in self.tasks:
                        known = ", ".join(self.tasks)
                        raise ManifestError(f"{file}: {key}: no such task; tasks: {known}")
                    named[key] = path
        for key, path in named.items():
            if path not in self.files:
                raise ManifestError(f"{file}: {key}: {path!r} is not listed in files")


def _checked_version(document: Table) -> str:
    version = document.string("format_version")
    match = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", version)
    if match is None:
        document.fail("format_version", f'expected "major.minor", found {version!r}')
    known_major, known_minor = map(int, FORMAT_VERSION.split("."))
    major, minor = map(int, match.groups())
    if major != known_major:
        hint = "upgrade embedge" if major > known_major else "export the bundle again"
        document.fail(
            "format_version",
            f"this embedge reads version {known_major}.x, the bundle is {version}; {hint}",
        )
    if minor > known_minor:
        warnings.warn(
            f"{document.file}: format_version {version} is newer than {FORMAT_VERSION}, which this "
            "embedge knows; what it does not know is ignored",
            EmbedgeWarning,
            stacklevel=2,
        )
    return version
