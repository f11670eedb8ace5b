"""A bundle's folder: its manifest, and files that are what the manifest says.

Checks when a bundle is opened, by ``verify``:
    "none"   the manifest alone
    "size"   every listed file is there, is a file inside the folder, and has its size (default)
    "full"   and has its SHA-256; every byte that a graph reads is in a listed file

A bundle stays the one that was opened: a file that is read later and has changed since, or lies in a folder
that took the place of the bundle's, must have the SHA-256 of the manifest that was read. Links lead to files
of the bundle, or to the blobs of the hub's cache that its snapshot lies in.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from embedge.runtime.bundle.contract import INTEGER_PRECISIONS, MANIFEST, UNPACKED, VISION
from embedge.runtime.bundle.files import (
    FileState,
    kind_of,
    no_permission,
    sha256_of,
    state_of,
    system_reason,
)
from embedge.runtime.bundle.graph_check import (
    TASK_INPUTS,
    TASK_OUTPUTS,
    VISION_INPUTS,
    VISION_OUTPUTS,
    check_graph,
)
from embedge.runtime.bundle.json_object import read_json_object
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.bundle.names import is_path
from embedge.runtime.bundle.onnx_reader import ExternalData, read_external_data
from embedge.runtime.bundle.packed_weights import PackedWeight, read_packed
from embedge.runtime.bundle.writing import partial_of, replaced_of
from embedge.runtime.errors import BundleError, EmbedgeValueError

__all__ = ["VERIFY_MODES", "Bundle"]

VERIFY_MODES = ("none", "size", "full")
_AGAIN = "copy or export the bundle again"
_REPOSITORY = re.compile(r"[a-z]+--.+")  # models--owner--name


class Bundle:
    """An opened bundle.

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
        if not isinstance(path, (str, os.PathLike)):
            raise EmbedgeValueError(
                f"bundle is {path!r}; expected the path of a bundle's folder, as `embedge export` "
                "writes it"
            )
        self.verify = verify
        self.root = _root(path)
        self._states: dict[str, FileState] = {}  # of the manifest's files, as they were opened
        self._checked: dict[tuple[str, str], tuple[FileState, tuple[list[str], int | None]]] = {}
        file = self.root / MANIFEST
        try:
            before = state_of(os.stat(file))
            self.manifest = Manifest.from_dict(read_json_object(file), str(file))
            if verify != "none":
                for problem in self.problems(hashes=verify == "full"):
                    raise BundleError(problem)
            else:
                self._note_files()
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
                self._check(name, hashes=hashes)
            except BundleError as error:
                found.append(str(error))
        return found or (self._unlisted() if hashes else [])

    def _unlisted(self) -> list[str]:
        """What is wrong with graphs or what they read beside the listed files, one message each."""
        found = []
        for precision, settings in self.manifest.precisions.items():
            for name in (*settings.graphs, *([VISION] if settings.vision else [])):
                try:
                    self.graph_files(precision, name)
                except BundleError as error:
                    found.append(str(error))
        return found

    def file(self, name: str) -> Path:
        """The path of a listed file of the bundle, as it was when the bundle was opened.

        Raises:
            BundleError: if there is none, it lies outside the folder behind a link, or it has changed.
        """
        path, state = self._find(name)
        if self._states.get(name) != state:
            try:
                found, state = sha256_of(path)
            except OSError as error:
                raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
            if found != self.manifest.files[name].sha256:
                raise BundleError(
                    f"{path}: changed since the bundle was opened: expected SHA-256 "
                    f"{self.manifest.files[name].sha256}, found {found}; open the bundle again"
                )
            self._states[name] = state
        return path

    def _find(self, name: str) -> tuple[Path, FileState]:
        """The path of a file of the bundle, and its state."""
        path = self.root / name
        try:
            real = path.resolve(strict=True)
            status = real.stat()
        except FileNotFoundError as error:
            raise BundleError(
                f"{path}: missing; {_AGAIN}, or a part of it with `embedge subset` where it is whole"
            ) from error
        except (
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError: links in a circle, before Python 3.13
            advice = self._let_in if no_permission(error) else _AGAIN
            raise BundleError(
                f"{path}: cannot be read: {system_reason(error)}; {advice}"
            ) from error
        if not stat.S_ISREG(status.st_mode):
            found = kind_of(status.st_mode)
            raise BundleError(f"{path}: expected a regular file, found {found}; {_AGAIN}")
        if not real.is_relative_to(self.root) and real.parent != _blobs(self.root):
            raise BundleError(
                f"{path}: a link that leaves the bundle, to {real}; copy the bundle with what its links "
                f"name, `cp -rL {self.root} COPY`, and open the copy"
            )
        if not os.access(real, os.R_OK):  # said here rather than by who reads it
            raise BundleError(
                f"{path}: cannot be read: {os.strerror(errno.EACCES)}; {self._let_in}"
            )
        return path, state_of(status)

    @property
    def _let_in(self) -> str:
        return f"its owner can let others read it: `chmod -R a+rX {shlex.quote(str(self.root))}`"

    @contextmanager
    def reading(self, names: Iterable[str]) -> Iterator[None]:
        """Checks files before and after they are read by somebody else, who opens them by their paths.

        Raises:
            BundleError: as :meth:`file`.
        """
        names = tuple(names)
        for name in names:
            self.file(name)
        yield
        for name in names:
            self.file(name)

    def _note_files(self) -> None:
        """Remembers the files that are there as the bundle's."""
        for name in self.manifest.files:
            with suppress(BundleError):
                self._states[name] = self._find(name)[1]

    def graph(self, precision: str, name: str) -> Path:
        """The graph file of a task, or of ``VISION``, at a precision; all in the manifest."""
        settings = self.manifest.precisions[precision]
        path = settings.vision if name == VISION and settings.vision else settings.graphs[name]
        return self.file(path)

    def graph_bytes(self, precision: str, name: str) -> int:
        """Bytes of the graph of a task, or of ``VISION``, and of the external data it uses.

        This is the estimate of a session's weights in memory: what ONNX Runtime repacks replaces
        what it read, activations come on top.

        Raises:
            BundleError: if the graph cannot be read, or uses data outside its folder or past the
                end of a file.
        """
        stored, unpacked = self._bytes(precision, name)
        return stored + unpacked

    def disk_bytes(self, precision: str, name: str) -> int:
        """Bytes on disk of the graph of a task, or of ``VISION``, and of the data it uses.

        Raises:
            BundleError: as :meth:`graph_bytes`.
        """
        stored, _ = self._bytes(precision, name)
        packed = self.packed_weights(precision, name)
        if packed is None:
            return stored
        listed, weights = packed
        places = {
            (tensor.location, tensor.offset): self._external_bytes(listed, tensor)
            for weight in weights.values()
            for tensor, _, _ in weight.tensors
            if not isinstance(tensor, bytes)
        }
        return stored + listed.stat().st_size + sum(places.values())

    def _bytes(self, precision: str, name: str) -> tuple[int, int]:
        """What a graph and its data take as they are stored, and what is unpacked beside them."""
        graph = self.graph(precision, name)
        sizes: dict[tuple[str, int], int] = {}
        unpacked = 0
        for data in read_external_data(graph):
            if data.location == UNPACKED and data.length is not None:
                unpacked += data.length
            else:
                sizes[data.location, data.offset] = self._external_bytes(graph, data)
        return graph.stat().st_size + sum(sizes.values()), unpacked

    def graph_files(self, precision: str, name: str) -> list[str]:
        """Names of the graph of a task, or of ``VISION``, and of every file that opening it reads.

        Raises:
            BundleError: if one of them is not the bundle's, or the graph none that embedge runs.
        """
        return self._check_graph(precision, name)[0]

    def token_rows(self, precision: str, name: str) -> int | None:
        """Rows of the table in which a task's graph looks up token ids; ``None`` without such a table.

        Raises:
            BundleError: as :meth:`graph_files`.
        """
        return self._check_graph(precision, name)[1]

    def _check_graph(self, precision: str, name: str) -> tuple[list[str], int | None]:
        """The files of a graph and the rows of its table of tokens, looked at once."""
        graph = self.graph(precision, name)
        state = self._states[graph.relative_to(self.root).as_posix()]
        known = self._checked.get((precision, name))
        if known is None or known[0] != state:
            known = state, self._checked_files(precision, name, graph)
            self._checked[precision, name] = known
        return known[1]

    def _checked_files(
        self, precision: str, name: str, graph: Path
    ) -> tuple[list[str], int | None]:
        if name == VISION and self.manifest.precisions[precision].vision:
            inputs, outputs = VISION_INPUTS, VISION_OUTPUTS
        else:
            inputs, outputs = {i: TASK_INPUTS[i] for i in self.manifest.model.inputs}, TASK_OUTPUTS
        checked = check_graph(graph, inputs=inputs, outputs=outputs)
        files = {graph}
        made = {}
        for tensor_name, tensor in checked.initializers.items():
            if tensor.place is None:
                continue
            if tensor.place.location == UNPACKED:
                made[tensor_name] = tensor.elem_type, tensor.shape
            else:
                files.add(self.external_file(graph, tensor.place)[0])
        packed = self.packed_weights(precision, name)
        listed, weights = packed if packed is not None else (graph, {})
        expected = dict(
            item for key, weight in weights.items() for item in weight.initializers(key)
        )
        if made != expected:
            differing = sorted(made.keys() ^ expected.keys()) or sorted(
                key for key in made if made[key] != expected[key]
            )
            raise BundleError(
                f"{graph}: expects other weights to be unpacked than {listed.name} lists: {differing[0]}; "
                f"{_AGAIN}"
            )
        for weight in weights.values():
            for place, _, _ in weight.tensors:
                if not isinstance(place, bytes):
                    files.add(self.external_file(listed, place)[0])
        if packed is not None:
            files.add(listed)
        names = sorted(path.relative_to(self.root).as_posix() for path in files)
        return names, checked.token_rows

    def multiplies_integers(self, precision: str) -> bool:
        """Whether a precision's products are of integers, on a CPU."""
        return (
            precision in INTEGER_PRECISIONS and "cpu" in self.manifest.precisions[precision].devices
        )

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

    def _external_bytes(self, graph: Path, data: ExternalData) -> int:
        return self.external_file(graph, data)[1]

    def external_file(self, graph: Path, data: ExternalData) -> tuple[Path, int]:
        """The file in which data lie that a graph, or a list of weights, names; and their bytes.

        Raises:
            BundleError: if it is not the bundle's, or ends before the data do.
        """
        file = self._beside(graph, data.location)
        size = file.stat().st_size
        length = size - data.offset if data.length is None else data.length
        if data.offset < 0 or length < 0 or data.offset + length > size:
            raise BundleError(
                f"{file}: truncated: {graph.name} uses bytes {data.offset} to "
                f"{data.offset + length}, found {size} bytes; {_AGAIN}"
            )
        return file, length

    def _beside(self, graph: Path, location: str) -> Path:
        """A listed file that a graph, or a list of weights, names from its own folder."""
        if not is_path(location):
            raise BundleError(
                f"{graph}: uses weights at {location[:80]!r}, which may lie outside the bundle; {_AGAIN}"
            )
        name = (graph.parent / location).relative_to(self.root).as_posix()
        if name not in self.manifest.files:
            raise BundleError(
                f"{graph}: uses weights in {name}, which the manifest does not list; {_AGAIN}"
            )
        return self.file(name)

    def _check(self, name: str, *, hashes: bool) -> None:
        """Compares a file with the manifest, and remembers it."""
        (path, state), expected = self._find(name), self.manifest.files[name]
        size = path.stat().st_size
        if size != expected.size:
            raise BundleError(f"{path}: expected {expected.size} bytes, found {size}; {_AGAIN}")
        if hashes:
            try:
                found, state = sha256_of(path)
            except OSError as error:
                raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
            if found != expected.sha256:
                raise BundleError(
                    f"{path}: expected SHA-256 {expected.sha256}, found {found}; {_AGAIN}"
                )
        self._states[name] = state


def _root(path: str | os.PathLike[str]) -> Path:
    """The bundle's folder by its own name, whatever links led there and wherever the program goes.

    Raises:
        BundleError: if there is no folder.
    """
    given = Path(path)
    advice = "name the folder that `embedge export` wrote with --out"
    try:
        root = given.resolve(strict=True)
        mode = root.stat().st_mode
        if stat.S_ISDIR(mode):
            return root
        found = kind_of(mode)
        _check_unfinished(given.absolute(), found)
    except FileNotFoundError as error:
        found = "nothing there" if error.filename is not None else system_reason(error)
        with suppress(OSError):
            _check_unfinished(given.absolute(), found)
        expanded = os.path.expanduser(given)
        if expanded != str(given):
            advice = f"Python does not expand ~: give {expanded}"
    except (OSError, RuntimeError, ValueError) as error:
        found = f"what cannot be read ({system_reason(error)})"
    raise BundleError(f"{given}: expected a bundle's folder, found {found}; {advice}")


def _check_unfinished(given: Path, found: str) -> None:
    """Says what an interrupted export left where a bundle is looked for.

    Raises:
        BundleError: if it left something.
        OSError: if that cannot be seen.
    """
    left = replaced_of(given)
    if left.is_dir():
        raise BundleError(
            f"{given}: expected a bundle's folder, found {found}: `embedge export --overwrite` was "
            f"interrupted and left the bundle as {left}; rename it to {given}, or run that export again"
        )
    if partial_of(given).is_dir():
        raise BundleError(
            f"{given}: expected a bundle's folder, found {found}, and beside it an export that has not "
            "ended; wait until it has, or run it again if it was interrupted"
        )


def _blobs(root: Path) -> Path | None:
    """Where the hub's cache keeps the files of the snapshot that a folder is, or lies in."""
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and _REPOSITORY.fullmatch(repository.name):
            return repository / "blobs"
    return None
