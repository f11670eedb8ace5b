"""A bundle's folder, opened: its manifest, its files, and what its graphs read.

Checks when a bundle is opened, by ``verify``:
    "none"   the manifest alone
    "size"   every listed file is there, is a file inside the folder, and has its size (default)
    "full"   and has its SHA-256; every byte that a graph reads is in a listed file
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedge.runtime.bundle.content import content_sha256
from embedge.runtime.bundle.contract import INTEGER_PRECISIONS, MANIFEST, MAPS, VISION
from embedge.runtime.bundle.files import (
    GRAPH_BYTES,
    JSON_BYTES,
    FileState,
    open_regular_file,
    read_regular_file,
    state_of,
    system_reason,
)
from embedge.runtime.bundle.graph_check import (
    MAPS_OUTPUTS,
    TASK_INPUTS,
    TASK_OUTPUTS,
    VISION_INPUTS,
    VISION_OUTPUTS,
    CheckedGraph,
    ValueTypes,
    check_graph,
)
from embedge.runtime.bundle.json_object import read_json_object
from embedge.runtime.bundle.listed_files import AGAIN, ListedFiles
from embedge.runtime.bundle.locate import find_bundle
from embedge.runtime.bundle.manifest import Manifest, TaskMaps
from embedge.runtime.bundle.names import is_path
from embedge.runtime.bundle.onnx_model import ExternalData, StoredTensor
from embedge.runtime.bundle.packed_weights import PackedWeight, read_packed
from embedge.runtime.bundle.task_tensors import TaskTensors, read_task_tensors
from embedge.runtime.errors import BundleError, EmbedgeValueError

__all__ = ["VERIFY_MODES", "Bundle"]

_CHUNK_BYTES = 1 << 20
VERIFY_MODES = ("none", "size", "full")


class _Opened(NamedTuple):
    """A graph that was looked at: the file as it was, and what it holds."""

    state: FileState
    graph: CheckedGraph
    files: list[str]


class Bundle:
    """An opened bundle. It stays the one that was opened, whatever happens to the folder's name.

    A graph's ``name`` is that of its task, ``VISION``, or ``MAPS``.

    Args:
        path: the bundle's folder.
        verify: what to check, see the module's description.

    Attributes:
        root: the folder, absolute and without links.
        verify: what was checked.
        manifest: its parsed manifest.

    Raises:
        BundleError: if the folder is not a bundle, or a checked file is not what the manifest says.
        EmbedgeValueError: for an unknown ``verify``.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: str = "size") -> None:
        if verify not in VERIFY_MODES:
            raise EmbedgeValueError(
                f"verify is {verify!r}; expected one of {', '.join(VERIFY_MODES)}"
            )
        self.verify = verify
        self.root = find_bundle(path)
        self._opened: dict[tuple[str, str], _Opened] = {}
        self._content_sha256: dict[tuple[str, str], str] = {}
        file = self.root / MANIFEST
        try:
            before = state_of(os.stat(file))
            self.manifest = Manifest.from_dict(read_json_object(file), str(file))
            self._files = ListedFiles(self.root, self.manifest.files)
            if verify == "none":
                self._files.note()
            else:
                for problem in self.problems(hashes=verify == "full"):
                    raise BundleError(problem)
            after = state_of(os.stat(file))
        except FileNotFoundError as error:
            raise BundleError(
                f"{self.root}: not an embedge bundle: it has no {MANIFEST}; "
                "`embedge export` writes bundles"
            ) from error
        except OSError as error:
            raise BundleError(f"{file}: cannot be read: {error.strerror or error}") from error
        if before != after:
            raise BundleError(f"{self.root}: was replaced while it was opened; open it again")

    def problems(self, *, hashes: bool) -> list[str]:
        """What is wrong with the bundle's files, one message each.

        Args:
            hashes: compare SHA-256 too, which reads every byte, and look at what the graphs read.
        """
        found = []
        for name in self.manifest.files:
            try:
                self._files.check(name, hashes=hashes)
            except BundleError as error:
                found.append(str(error))
        return found or (self._unlisted() if hashes else [])

    def _unlisted(self) -> list[str]:
        """What is wrong with graphs or what they read beside the listed files, one message each."""
        found = []
        for precision, settings in self.manifest.precisions.items():
            others = ([VISION] if settings.vision else []) + ([MAPS] if settings.maps else [])
            for name in (*settings.graphs, *others):
                try:
                    self.graph_files(precision, name)
                    self.task_tensors(precision, name)
                except BundleError as error:
                    found.append(str(error))
        return found

    def file(self, name: str) -> Path:
        """The path of a listed file of the bundle, as it was when the bundle was opened.

        Raises:
            BundleError: if there is none, it lies outside the folder behind a link, or it has changed.
        """
        return self._files.file(name)

    def unlisted(self, name: str) -> bytes | None:
        """The bytes of the manifest or the card, ``None`` where there is none.

        Raises:
            BundleError: if it cannot be read, or is a link that leaves the bundle.
        """
        if not os.path.lexists(self.root / name):
            return None
        file = self._files.unlisted(name)
        try:
            return read_regular_file(file, JSON_BYTES)
        except OSError as error:
            raise BundleError(f"{file}: cannot be read: {system_reason(error)}") from error

    def reading(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Checks files before and after they are read by somebody else, who opens them by their paths.

        Raises:
            BundleError: as :meth:`file`.
        """
        return self._files.reading(names)

    def graph(self, precision: str, name: str) -> Path:
        """The file of a graph of a precision, both in the manifest."""
        return self.file(self._graph_name(precision, name))

    def graph_bytes(self, precision: str, name: str) -> int:
        """Bytes of a graph and of the external data it uses.

        This is the estimate of a session's weights in memory: what ONNX Runtime repacks replaces
        what it read, activations come on top.

        Raises:
            BundleError: as :meth:`graph_files`.
        """
        made = self._look_at(precision, name).graph.made
        size = self._stored_bytes(precision, name) + sum(t.nbytes for t in made.values())
        sharing = self._sharing(precision, name)
        return size + sum(self._tensors_bytes(precision, task) for task in sharing)

    def disk_bytes(self, precision: str, name: str) -> int:
        """Bytes on disk of a graph and of the data it uses.

        Raises:
            BundleError: as :meth:`graph_files`.
        """
        stored = self._stored_bytes(precision, name) + self._tensors_bytes(precision, name)
        packed = self.packed_weights(precision, name)
        if packed is None:
            return stored
        listed, weights = packed
        places = {
            (tensor.location, tensor.offset): tensor.length
            for weight in weights.values()
            for tensor, _, _ in weight.tensors
            if not isinstance(tensor, bytes)
        }
        return stored + listed.stat().st_size + sum(places.values())

    def graph_files(self, precision: str, name: str) -> list[str]:
        """Names of a graph and of every file that opening it reads.

        Raises:
            BundleError: if one of them is not the bundle's, or ends before the data that are used of it; or
                the graph is none that embedge runs.
        """
        return self._look_at(precision, name).files

    def graph_key(self, precision: str, name: str) -> str:
        """The name of a graph among those of a precision: of tasks that share one, the first."""
        return self._sharing(precision, name)[0]

    def graph_inputs(self, precision: str, name: str) -> tuple[str, ...]:
        """Names of a graph's inputs, those that are a task's tensors included.

        Raises:
            BundleError: as :meth:`task_tensors`.
        """
        return tuple(self._inputs_of(precision, name))

    def task_tensors(self, precision: str, name: str) -> TaskTensors | None:
        """What a task brings to a graph that others share; ``None`` where the graph is its own.

        Raises:
            BundleError: if the file cannot be read, or has other tensors than that of the first such task.
        """
        path = self._tensors_name(precision, name)
        if path is None:
            return None
        with self.reading([path]):
            mapped = read_task_tensors(self.file(path))
            tensors = TaskTensors({n: np.array(array) for n, array in mapped.arrays.items()})
        first = self.graph_key(precision, name)
        if first != name:
            self._check_as(self._mapped(precision, first), tensors, self.file(path), first)
        return tensors

    def token_rows(self, precision: str, name: str) -> int | None:
        """Rows of the table in which a task's graph looks up token ids; ``None`` without such a table.

        Raises:
            BundleError: as :meth:`graph_files`.
        """
        return self._look_at(precision, name).graph.token_rows

    def matmul_weights(self, precision: str, name: str) -> Mapping[str, StoredTensor]:
        """The weights of a graph's integer matmuls that do not lie in the graph itself, by name.

        Raises:
            BundleError: as :meth:`graph_files`.
        """
        return self._look_at(precision, name).graph.matmul_weights

    def packed_weights(
        self, precision: str, name: str
    ) -> tuple[Path, Mapping[str, PackedWeight]] | None:
        """The list of weights that are unpacked when a graph opens, and what it says; often ``None``.

        Raises:
            BundleError: if the list cannot be read.
        """
        path = self.manifest.precisions[precision].unpack.get(name)
        if path is None:
            return None
        listed = self.file(path)
        return listed, read_packed(listed)

    def has_attention_function(self, precision: str, name: str) -> bool:
        """Whether a graph's attention is a function of embedge's, for which its kernels have an operator.

        Raises:
            BundleError: as :meth:`graph_files`.
        """
        return any("Attention" in f for f in self._look_at(precision, name).graph.functions)

    def content_sha256(self, precision: str, name: str) -> str:
        """What a graph computes, see :mod:`embedge.runtime.bundle.content`.

        Bundles of 1.5 on have it in the manifest. For older ones every byte that the graph reads is read, once.

        Raises:
            BundleError: as :meth:`graph_files`.
        """
        settings = self.manifest.precisions[precision]
        if (maps := self._maps(precision, name)) is not None:
            return maps.content_sha256
        known = settings.content_sha256.get(name)
        if known is not None:
            return known
        if (precision, name) not in self._content_sha256:
            self._content_sha256[precision, name] = self._read_content(precision, name)
        return self._content_sha256[precision, name]

    def _read_content(self, precision: str, name: str) -> str:
        graph, packed = self.graph(precision, name), self.packed_weights(precision, name)
        tensors = self.manifest.precisions[precision].task_tensors.get(name)
        try:
            with self.reading(self.graph_files(precision, name)):
                return content_sha256(
                    read_regular_file(graph, GRAPH_BYTES),
                    packed[1] if packed else {},
                    lambda place: _sha256_at(self.external_file(graph, place), place),
                    tensors_sha256=None if tensors is None else self.manifest.files[tensors].sha256,
                )
        except OSError as error:
            raise BundleError(
                f"{graph}: cannot be read: {system_reason(error)}; {AGAIN}"
            ) from error

    def external_file(self, graph: Path, data: ExternalData) -> Path:
        """The file in which data lie that a graph, or a list of weights, names.

        Raises:
            BundleError: if it is not the bundle's, or ends before the data do.
        """
        if not is_path(data.location):
            raise BundleError(
                f"{graph}: uses weights at {data.location[:80]!r}, which may lie outside the bundle; {AGAIN}"
            )
        name = (graph.parent / data.location).relative_to(self.root).as_posix()
        if name not in self.manifest.files:
            raise BundleError(
                f"{graph}: uses weights in {name}, which the manifest does not list; {AGAIN}"
            )
        file = self.file(name)
        size, end = file.stat().st_size, data.offset + data.length
        if end > size:
            raise BundleError(
                f"{file}: truncated: {graph.name} uses bytes {data.offset} to {end}, found {size} bytes; "
                f"{AGAIN}"
            )
        return file

    def sha256_at(self, graph: Path, data: ExternalData) -> str:
        """The SHA-256 of data that a graph names, in hexadecimal.

        Raises:
            BundleError: as :meth:`external_file`.
        """
        return _sha256_at(self.external_file(graph, data), data)

    def multiplies_integers(self, precision: str) -> bool:
        """Whether a precision's matmuls are of integers, on a CPU."""
        on_cpu = "cpu" in self.manifest.precisions[precision].devices
        return precision in INTEGER_PRECISIONS and on_cpu

    def _graph_name(self, precision: str, name: str) -> str:
        settings = self.manifest.precisions[precision]
        if (maps := self._maps(precision, name)) is not None:
            return maps.graph
        return settings.vision if name == VISION and settings.vision else settings.graphs[name]

    def _maps(self, precision: str, name: str) -> TaskMaps | None:
        """The maps of a precision, if the name is theirs."""
        return self.manifest.precisions[precision].maps if name == MAPS else None

    def _tensors_name(self, precision: str, name: str) -> str | None:
        """The file of what a task brings to a graph that others share; of ``MAPS``, their base."""
        maps = self._maps(precision, name)
        tensors = self.manifest.precisions[precision].task_tensors
        return tensors.get(name if maps is None else maps.base)

    def _sharing(self, precision: str, name: str) -> list[str]:
        """Tasks that have the graph of a task, itself included; of ``VISION`` and ``MAPS``, that alone."""
        settings = self.manifest.precisions[precision]
        if (name == VISION and settings.vision) or self._maps(precision, name) is not None:
            return [name]
        return [task for task, path in settings.graphs.items() if path == settings.graphs[name]]

    def _tensors_bytes(self, precision: str, name: str) -> int:
        """Bytes of the file of a task's own tensors; 0 without one."""
        path = self._tensors_name(precision, name)
        return 0 if path is None else self.manifest.files[path].size

    def _inputs_of(self, precision: str, name: str) -> ValueTypes:
        """Element type and rank of a graph's inputs."""
        if name == VISION and self.manifest.precisions[precision].vision:
            return VISION_INPUTS
        inputs = {i: TASK_INPUTS[i] for i in self.manifest.model.inputs}
        if self._tensors_name(precision, name) is None:
            return inputs
        return {**inputs, **self._mapped(precision, name).inputs}

    def _mapped(self, precision: str, name: str) -> TaskTensors:
        """A task's tensors as they lie in its file, for what their types and shapes say."""
        path = self._tensors_name(precision, name)
        assert path is not None, name
        with self.reading([path]):
            return read_task_tensors(self.file(path))

    @staticmethod
    def _check_as(expected: TaskTensors, found: TaskTensors, file: Path, first: str) -> None:
        """Refuse tensors of other names, types or shapes than those of the first task."""
        wanted, shapes = (
            {n: (a.dtype, a.shape) for n, a in tensors.arrays.items()}
            for tensors in (expected, found)
        )
        for tensor in sorted(shapes.keys() | wanted.keys()):
            if shapes.get(tensor) != wanted.get(tensor):
                raise BundleError(
                    f"{file}: {tensor}: expected {_described(wanted.get(tensor))}, as {first} has, found "
                    f"{_described(shapes.get(tensor))}; {AGAIN}"
                )

    def _stored_bytes(self, precision: str, name: str) -> int:
        """Bytes of a graph's file, and of the stored data that it uses."""
        places = self._look_at(precision, name).graph.places
        lengths = {(place.location, place.offset): place.length for place in places}
        return self.graph(precision, name).stat().st_size + sum(lengths.values())

    def _look_at(self, precision: str, name: str) -> _Opened:
        """A graph, checked once, and again where its file has changed."""
        name = self.graph_key(precision, name)
        file = self._graph_name(precision, name)
        graph, state = self.file(file), self._files.state(file)
        opened = self._opened.get((precision, name))
        if opened is None or opened.state != state:
            tower = file == self.manifest.precisions[precision].vision
            outputs = VISION_OUTPUTS if tower else TASK_OUTPUTS
            if self._maps(precision, name) is not None:
                outputs = MAPS_OUTPUTS
            checked = check_graph(graph, inputs=self._inputs_of(precision, name), outputs=outputs)
            files = self._files_of(graph, checked, self.packed_weights(precision, name))
            opened = self._opened[precision, name] = _Opened(state, checked, files)
        return opened

    def _files_of(
        self,
        graph: Path,
        checked: CheckedGraph,
        packed: tuple[Path, Mapping[str, PackedWeight]] | None,
    ) -> list[str]:
        """Names of the files that a graph reads, and of those of the weights that are unpacked for it."""
        listed, weights = packed if packed is not None else (graph, {})
        made = {name: (tensor.elem_type, tensor.shape) for name, tensor in checked.made.items()}
        expected = dict(item for name, w in weights.items() for item in w.initializers(name))
        if made != expected:
            differing = sorted(made.keys() ^ expected.keys()) or sorted(
                name for name in made if made[name] != expected[name]
            )
            raise BundleError(
                f"{graph}: expects other weights to be unpacked than {listed.name} lists: {differing[0]}; "
                f"{AGAIN}"
            )
        packed_in = (
            t for w in weights.values() for t, _, _ in w.tensors if not isinstance(t, bytes)
        )
        files = {graph, listed}
        files |= {self.external_file(graph, place) for place in _last_of_each(checked.places)}
        files |= {self.external_file(listed, place) for place in _last_of_each(packed_in)}
        return sorted(path.relative_to(self.root).as_posix() for path in files)


def _described(tensor: tuple[np.dtype[Any], tuple[int, ...]] | None) -> str:
    """A tensor's type and shape in words."""
    return "none" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _last_of_each(places: Iterable[ExternalData]) -> Iterable[ExternalData]:
    """Of each file, the place that ends last: where that is in the file, so are the others."""
    last: dict[str, ExternalData] = {}
    for place in places:
        known = last.setdefault(place.location, place)
        if place.offset + place.length > known.offset + known.length:
            last[place.location] = place
    return last.values()


def _sha256_at(file: Path, place: ExternalData) -> str:
    state = hashlib.sha256()
    with open_regular_file(file) as opened:
        opened.seek(place.offset)
        left = place.length
        while left and (chunk := opened.read(min(left, _CHUNK_BYTES))):
            state.update(chunk)
            left -= len(chunk)
    return state.hexdigest()
