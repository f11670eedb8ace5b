"""A model folder in the Hugging Face layout: its config and its weights, read a tensor at a time.

File layouts, tried in order; pickled weights (``*.bin``) are never read:

- ``config.json`` and ``model.safetensors`` in the folder, or the parts that
  ``model.safetensors.index.json`` lists;
- the same in the sub-folder that a sentence-transformers ``modules.json`` names (older models:
  ``0_Transformer``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embedge.export.errors import CheckpointError
from embedge.export.source.card import base_name, known_names, read_license, read_name, says_nothing
from embedge.export.source.hub import is_hub_id, local_folder
from embedge.export.source.json_files import read_json, read_json_object
from embedge.export.source.safetensors_file import SafetensorsFile

__all__ = ["Checkpoint", "Tensors", "inside_folder", "pickled", "transformer_folder"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Tensors(Protocol):
    """Named float32 tensors: a checkpoint, or a checkpoint with an adapter merged in."""

    def keys(self) -> tuple[str, ...]:
        """Return the names, sorted."""

    def has(self, key: str) -> bool:
        """Return whether there is a tensor ``key``."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``."""

    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return ``key``, or some of its rows, as a fresh array."""


class Checkpoint:
    """The config and the weights of one model; the weights stay on disk until they are read.

    Attributes:
        path: the model folder, where sentence-transformers' files lie.
        transformer_path: the folder of config.json, the weights and the tokenizer; mostly ``path``
            itself.
        config: the content of config.json.
        name: the model's short name, never a path.
        names: every name the model goes by, in lower case, of those that say something.
        license: the licence declared by the model card, ``None`` if it declares none.
    """

    def __init__(
        self, path: Path, transformer_path: Path, config: dict[str, Any], name: str
    ) -> None:
        """Map the weights below ``transformer_path``; use :meth:`open`."""
        self.path = path
        self.transformer_path = transformer_path
        self.config = config
        self.name = name
        named = frozenset() if says_nothing(name) else {name.lower()}
        self.names = known_names(path, config) | named
        self.license = read_license(path)
        self._files = _weight_files(transformer_path)
        self._sha256: str | None = None

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a local model folder, or a hub id, which is fetched first.

        Args:
            source: a folder in the Hugging Face layout, or ``"organization/name"``.

        Raises:
            CheckpointError: if there is no such model, a file is missing, truncated or not what it
                should be, the weights are pickled or quantized.
        """
        path = local_folder(source)
        transformer_path = transformer_folder(path)
        config = _read_config(transformer_path)
        from_hub = isinstance(source, str) and is_hub_id(source) and not Path(source).exists()
        name = base_name(str(source)) if from_hub else read_name(path, config)
        return cls(path, transformer_path, config, name)

    def keys(self) -> tuple[str, ...]:
        """Return the names of the tensors as the files have them, sorted."""
        return tuple(sorted(self._files))

    def has(self, key: str) -> bool:
        """Return whether the model has a tensor ``key``."""
        return key in self._files

    def is_float(self, key: str) -> bool:
        """Return whether ``key`` is a weight that can be read, not e.g. a buffer of integers."""
        return self._file(key).is_float(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``.

        Raises:
            CheckpointError: if there is no such tensor.
        """
        return self._file(key).shape(key)

    def nbytes(self, key: str) -> int:
        """Return the bytes that ``key`` takes on disk.

        Raises:
            CheckpointError: if there is no such tensor.
        """
        return self._file(key).nbytes(key)

    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return ``key``, or some of its rows, as a fresh array; 16-bit floats become float32 exactly.

        Raises:
            CheckpointError: if there is no such tensor, it is not a float or holds NaN or infinity.
        """
        return self._file(key).read(key, rows)

    def sha256(self) -> str:
        """Return the hash of the weights: names, dtypes, shapes and bytes in the order of the
        names.

        It does not depend on how the tensors are split into files or ordered in them. Computed
        once.
        """
        if self._sha256 is None:
            digest = hashlib.sha256()
            for key in self.keys():
                file = self._file(key)
                digest.update(json.dumps([key, file.dtype(key), file.shape(key)]).encode() + b"\n")
                for chunk in file.chunks(key):
                    digest.update(chunk)
            self._sha256 = digest.hexdigest()
        return self._sha256

    def _file(self, key: str) -> SafetensorsFile:
        try:
            return self._files[key]
        except KeyError:
            raise CheckpointError(
                f"{self.transformer_path}: the weights have no tensor {key!r}; they have "
                f"{len(self._files)} others, check that config.json belongs to them"
            ) from None


def transformer_folder(path: Path) -> Path:
    """Return the folder below ``path`` that holds the transformer."""
    modules_file = path / "modules.json"
    if not os.path.lexists(modules_file):
        return path
    modules = read_json(modules_file, CheckpointError)
    if isinstance(modules, list) and modules and all(isinstance(m, dict) for m in modules):
        kind = str(modules[0].get("type"))
        known = kind.rpartition(".")[2] in (
            "Transformer",
            "Pooling",
            "Dense",
            "Normalize",
            "Dropout",
        )
        if kind.startswith("sentence_transformers.") and not known:
            raise CheckpointError(
                f"{modules_file}: the first module is {kind}, expected sentence_transformers' Transformer; "
                "models of other kinds cannot be exported yet"
            )
        folder = str(modules[0].get("path") or "")
        return path / inside_folder(folder, modules_file) if folder else path
    raise CheckpointError(
        f"{modules_file}: expected a list of modules, each an object with a path and a type"
    )


def inside_folder(relative: str, origin: Path) -> PurePosixPath:
    """Return ``relative`` unless it leaves the folder of the file ``origin`` that names it."""
    inside = PurePosixPath(relative)
    if inside.is_absolute() or ".." in inside.parts or re.search(r"[\\:\x00-\x1f]", relative):
        raise CheckpointError(
            f"{origin}: the path {relative!r} leaves the model folder; this is refused"
        )
    return inside


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not os.path.lexists(file):
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder}: holds a PEFT adapter, not a model; name the base model as the source "
                f"and this folder as an adapter: --adapter NAME={folder}"
            )
        raise CheckpointError(
            f"{folder}: has no config.json; expected a model folder in the Hugging Face layout"
        )
    config = read_json_object(file, CheckpointError)
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(
            f"{file}: architectures is {classes!r}, expected a list of class names"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{file}: the weights are already quantized (quantization_config is set); export from "
            "the original float weights"
        )
    return config


def _weight_files(folder: Path) -> dict[str, SafetensorsFile]:
    """Return the file that holds each tensor below ``folder``."""
    if os.path.lexists(folder / _WEIGHTS):
        file = SafetensorsFile(folder / _WEIGHTS, CheckpointError)
        return dict.fromkeys(file.keys(), file)
    if os.path.lexists(folder / _INDEX):
        return _shards(folder)
    if any((folder / name).exists() for name in _PICKLES):
        raise CheckpointError(pickled(folder))
    raise CheckpointError(
        f"{folder}: has no weights; expected {_WEIGHTS}, or {_INDEX} and the files it lists"
    )


def pickled(folder: Path) -> str:
    """What to say of a folder that has only pickled weights: a command that converts them in place."""
    code = (
        "import glob, sys, torch; from safetensors.torch import save_file; p = sys.argv[1]; t = {}; "
        "[t.update(torch.load(f, 'cpu', weights_only=True)) for f in "
        "sorted(glob.glob(glob.escape(p) + '/pytorch_model*.bin'))]; "
        "save_file({k: v.clone().contiguous() for k, v in t.items()}, p + '/model.safetensors', "
        "metadata={'format': 'pt'})"
    )
    return (
        f"{folder}: has only pickled weights (pytorch_model.bin), which can run code when loaded and are "
        "not read; expected model.safetensors. This command, which needs torch and safetensors, writes it "
        f"beside them; run it where you trust them: python -c {shlex.quote(code)} {shlex.quote(str(folder))}"
    )


def _shards(folder: Path) -> dict[str, SafetensorsFile]:
    index_file = folder / _INDEX
    weight_map = read_json_object(index_file, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(
            f"{index_file}: expected a weight_map from tensor names to file names"
        )
    names = sorted(set(weight_map.values()))
    if missing := [
        name for name in names if not (folder / inside_folder(name, index_file)).is_file()
    ]:
        raise CheckpointError(
            f"{index_file}: {len(missing)} of {len(names)} weight files are missing: "
            f"{', '.join(missing)}; fetch the model again"
        )
    shards = {name: SafetensorsFile(folder / name, CheckpointError) for name in names}
    # Like transformers, tensors that the index forgets are taken from the shards that it does list.
    files = {key: shard for shard in shards.values() for key in shard.keys()}
    held = {name: set(shard.keys()) for name, shard in shards.items()}
    if absent := sorted(key for key, name in weight_map.items() if key not in held[name]):
        raise CheckpointError(
            f"{index_file}: {len(absent)} tensors are not in the files that it names: "
            f"{', '.join(f'{key} in {weight_map[key]}' for key in absent)}; fetch the model again"
        )
    return files | {key: shards[name] for key, name in weight_map.items()}
