"""Weight files of one precision: every tensor once, whatever the number of tasks.

Large tensors lie in files beside the graphs, at offsets aligned to 4096 bytes (what mapping needs);
tensors of at most 4096 bytes lie in the graphs themselves. A tensor is looked up first by its initializer's
key (equal key, equal bytes: nothing is computed), then by the hash of its bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export.graph.initializers import LazyInitializer, TensorSpec
from embedge.runtime.bundle.contract import INLINE_BYTES
from embedge.runtime.bundle.onnx_model import ExternalData
from embedge.runtime.errors import BundleError

ALIGNMENT = 4096


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a tensor lies: in a file of the folder, or, when small, here."""

    file: str = ""
    offset: int = 0
    length: int = 0
    inline: bytes | None = None


class TensorStore:
    """Appends tensors to the weight files of one precision's folder; closes them with its block.

    Args:
        folder: the precision's folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reports: dict[str, dict[str, Any]] = {}
        self._by_key: dict[str, tuple[Stored, ...]] = {}
        self._by_hash: dict[str, Stored] = {}
        self._digests: dict[tuple[str, int], str] = {}  # by file and offset
        self._open: dict[str, IO[bytes]] = {}
        self._closed: set[str] = set()

    def adopt(self, graph_file: Path) -> None:
        """Make the tensors of a graph that is already in the folder available for sharing.

        Raises:
            BundleError: a file ends before a tensor does.
        """
        model = onnx.load(str(graph_file), load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            stored = _place_of(tensor)
            self._closed.add(stored.file)
            with open(self.folder / stored.file, "rb") as file:
                file.seek(stored.offset)
                state = hashlib.sha256()
                left = stored.length
                while left:
                    chunk = file.read(min(left, 1 << 20))
                    if not chunk:
                        raise BundleError(
                            f"{self.folder / stored.file}: expected {left:,} bytes more for {tensor.name} of "
                            f"{graph_file.name}, found the end; copy or export the bundle again"
                        )
                    left -= len(chunk)
                    state.update(chunk)
            self._remember(state.hexdigest(), stored)

    def adopt_named(self, graph_file: Path, initializers: Iterable[LazyInitializer]) -> None:
        """Take the tensors of a graph in the folder for those of the same names, types and shapes.

        For a graph that is written again from the same source with the same options: equal names are equal bytes.

        Args:
            graph_file: the graph; its tensors were adopted.
            initializers: what is to be stored.
        """
        model = onnx.load(str(graph_file), load_external_data=False)
        there = {tensor.name: tensor for tensor in model.graph.initializer}
        for initializer in initializers:
            found = [there.get(spec.name) for spec in initializer.specs]
            if all(
                tensor is not None
                and (tensor.data_type, tuple(tensor.dims)) == (spec.elem_type, spec.shape)
                for tensor, spec in zip(found, initializer.specs, strict=True)
            ):
                self._by_key[initializer.key] = tuple(_place_of(t) for t in found if t is not None)

    def has(self, key: str) -> bool:
        """Whether an initializer of this key was stored."""
        return key in self._by_key

    def put(
        self,
        initializer: LazyInitializer,
        arrays: Sequence[NDArray[Any]],
        file: str,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Store what an initializer made.

        Args:
            initializer: its key and the initializers it makes.
            arrays: one per initializer, of the declared type and shape.
            file: name of the file in the folder that new large tensors go to.
            facts: further columns of the per-layer report.
        """
        if len(arrays) != len(initializer.specs):
            raise AssertionError(
                f"{initializer.key}: {len(arrays)} arrays for {len(initializer.specs)}"
            )
        stored = []
        for spec, array in zip(initializer.specs, arrays, strict=True):
            _check(spec, array)
            stored.append(self._store(np.ascontiguousarray(array), file))
        self._by_key[initializer.key] = tuple(stored)
        if initializer.describe is not None:
            self.reports[initializer.key] = {
                "shape": list(initializer.specs[0].shape),
                "bytes": initializer.nbytes,
                **initializer.describe(arrays),
                **(facts or {}),
            }

    def places(self, initializer: LazyInitializer) -> tuple[Stored, ...]:
        """Where each tensor of a stored initializer lies."""
        return self._by_key[initializer.key]

    def arrays(self, initializer: LazyInitializer) -> list[NDArray[Any]]:
        """The tensors of a stored initializer, read again."""
        result = []
        for spec, stored in zip(initializer.specs, self.places(initializer), strict=True):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(spec.elem_type)
            if stored.inline is not None:
                array = np.frombuffer(stored.inline, dtype)
            else:
                if stored.file in self._open:
                    self._open[stored.file].flush()
                count = stored.length // dtype.itemsize
                array = np.fromfile(self.folder / stored.file, dtype, count, offset=stored.offset)
            result.append(array.reshape(spec.shape))
        return result

    def tensors(self, initializer: LazyInitializer) -> list[TensorProto]:
        """The stored initializers of an initializer as ONNX tensors."""
        result = []
        for spec, stored in zip(initializer.specs, self.places(initializer), strict=True):
            tensor = TensorProto(name=spec.name, data_type=spec.elem_type, dims=spec.shape)
            if stored.inline is not None:
                tensor.raw_data = stored.inline
            else:
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (
                    ("location", stored.file),
                    ("offset", str(stored.offset)),
                    ("length", str(stored.length)),
                ):
                    tensor.external_data.add(key=key, value=value)
            result.append(tensor)
        return result

    def sha256_at(self, place: ExternalData) -> str:
        """The SHA-256 of a tensor that lies in a file of the folder, in hexadecimal."""
        return self._digests[place.location, place.offset]

    def free_name(self, stem: str) -> str:
        """``stem.bin``, or the first of ``stem.2.bin``, … that an earlier export did not write."""
        number = 1
        name = f"{stem}.bin"
        while os.path.lexists(self.folder / name):
            number += 1
            name = f"{stem}.{number}.bin"
        return name

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:  # closes the others also when one fails, on a full disk
            for file in self._open.values():
                stack.callback(file.close)
            self._open.clear()

    def _store(self, array: NDArray[Any], name: str) -> Stored:
        if array.nbytes <= INLINE_BYTES:
            return Stored(inline=array.tobytes())
        data: Any = array.reshape(-1).view(np.uint8)
        digest = hashlib.sha256(data).hexdigest()
        if digest in self._by_hash:
            return self._by_hash[digest]
        if name in self._closed:
            raise AssertionError(f"{name} belongs to an earlier export and is not appended to")
        if name not in self._open:
            self._open[name] = open(self.folder / name, "xb")  # noqa: SIM115 - closed with the store
        file = self._open[name]
        offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
        file.write(bytes(offset - file.tell()))
        file.write(data)
        return self._remember(digest, Stored(file=name, offset=offset, length=array.nbytes))

    def _remember(self, digest: str, stored: Stored) -> Stored:
        self._by_hash[digest] = stored
        self._digests[stored.file, stored.offset] = digest
        return stored


def _place_of(tensor: TensorProto) -> Stored:
    """Where a tensor of a graph lies."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return Stored(inline=tensor.raw_data)
    entry = {e.key: e.value for e in tensor.external_data}
    return Stored(file=entry["location"], offset=int(entry["offset"]), length=int(entry["length"]))


def _check(spec: TensorSpec, array: NDArray[Any]) -> None:
    expected = onnx.helper.tensor_dtype_to_np_dtype(spec.elem_type)
    if array.shape != spec.shape or array.dtype != expected:
        raise AssertionError(
            f"{spec.name}: declared {expected} {spec.shape}, computed {array.dtype} {array.shape}"
        )
