"""A model folder in the Hugging Face layout: its config and its weights, read a tensor at a time.

File layouts, tried in order:

- ``config.json`` and the weights in the folder;
- the same in the sub-folder that a sentence-transformers ``modules.json`` names (older models:
  ``0_Transformer``).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.export.errors import CheckpointError
from embedge.export.source.base_quantization import BaseQuantization, loaded_dtype
from embedge.export.source.bitsandbytes import check_quantization, dequantized
from embedge.export.source.card import read_card
from embedge.export.source.fingerprint import weights_sha256
from embedge.export.source.hub import is_hub_id, local_folder
from embedge.export.source.json_files import read_json_object
from embedge.export.source.modules import transformer_folder
from embedge.export.source.names import base_name, cached_hub_id, known_names, model_name
from embedge.export.source.safetensors_file import SafetensorsFile, StoredTensors
from embedge.export.source.tensor_parts import part_names, parts_of
from embedge.export.source.weight_files import partly, weight_files

__all__ = ["Checkpoint", "ModelFolder"]


class ModelFolder:
    """What is known of one model before its weights are opened.

    Attributes:
        path: the model folder, where sentence-transformers' files lie.
        transformer_path: the folder of config.json, the weights and the tokenizer; mostly ``path``
            itself.
        config: the content of config.json.
        name: the model's short name, never a path.
        names: every name the model goes by, in lower case, of those that say something.
        card: what its model card says.
        hub_id: its id on the hub, ``None`` for a folder elsewhere than in the hub's cache.
    """

    def __init__(self, source: str | Path) -> None:
        """Find a local model folder, or a hub id, which is fetched first.

        Args:
            source: a folder in the Hugging Face layout, or ``"organization/name"``.

        Raises:
            CheckpointError: if there is no such model, a file is missing, truncated or not what it
                should be, or the weights are quantized by another method than bitsandbytes'.
        """
        self.path = local_folder(source)
        is_fetched = isinstance(source, str) and is_hub_id(source) and not Path(source).exists()
        self.hub_id = str(source) if is_fetched else cached_hub_id(self.path)
        self.transformer_path = transformer_folder(self.path)
        self.config = _read_config(self.transformer_path, self.hub_id)
        self.card = read_card(self.path)
        title = self.card.title
        self.name = model_name(self.path, title, self.config)
        if is_fetched:
            self.name = base_name(str(source))
        self.names = known_names(self.path, title, self.config, self.name)

    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of its tensors as the files have them; none where they cannot be read."""
        try:
            return tuple(weight_files(self.transformer_path))
        except CheckpointError:
            return ()


class Checkpoint(ModelFolder):
    """The config and the weights of one model; the weights stay on disk until they are read.

    Attributes:
        fused: modules whose rows are read as those of several, as :meth:`with_parts` was told.
        quantization: of the base, as :meth:`with_base_quantization` was told, ``None`` without.
    """

    def __init__(self, source: str | Path | ModelFolder) -> None:
        """Open a model, as :class:`ModelFolder` does, or one that was found so; map its weights.

        Raises:
            CheckpointError: likewise, or if the weights are pickled.
        """
        if isinstance(source, ModelFolder):
            vars(self).update(vars(source))
        else:
            super().__init__(source)
        self._stored = weight_files(self.transformer_path, self.hub_id)
        file = self.transformer_path / "config.json"
        self._whole: Mapping[str, StoredTensors] = dequantized(self._stored, self.config, file)
        self._files = self._whole
        self.fused: Mapping[str, tuple[str, ...]] = {}
        self._aside = ""
        self.quantization: BaseQuantization | None = None
        self._sha256: str | None = None

    def with_parts(self, fused: Mapping[str, tuple[str, ...]], aside: str = "") -> Checkpoint:
        """Return the same model with the rows of fused tensors as tensors of their own.

        Args:
            fused: by the end of a fused module's name, the ends of those whose rows it holds, in order.
            aside: ends of the names of tensors that are left out, as a regular expression; "" for none.
        """
        split = copy.copy(self)
        split._files = parts_of(self._whole, fused, aside)
        split.fused, split._aside = fused, aside
        return split

    def with_base_quantization(
        self, how: BaseQuantization, is_linear: Callable[[str], bool]
    ) -> Checkpoint:
        """Return the same model as bitsandbytes quantizes it when it is loaded.

        Args:
            how: the format and its settings.
            is_linear: whether a tensor of :meth:`keys` is the weight of a Linear.

        Raises:
            CheckpointError: the weights are stored quantized, or config.json names a dtype that is none of
                bitsandbytes'.
            EmbedgeValueError: a module to skip is none of the model's, or no Linear is left to quantize.
        """
        if self.config.get("quantization_config"):
            raise CheckpointError(
                f"{self.transformer_path}: its weights are stored as bitsandbytes quantized them, and "
                f"base_quantization {how.kind!r} asks to quantize them again; leave it out, or name the original model"
            )
        linears = [
            key
            for key, file in self._stored.items()
            if len(file.shape(key)) == 2 and any(map(is_linear, part_names(key, self.fused)))
        ]
        stored = (self._stored[key].dtype(key) for key in linears)
        dtype = how.dtype or loaded_dtype(self.config, stored)
        quantized = copy.copy(self)
        quantized.quantization, quantized._whole = how.restored(self._whole, linears, dtype)
        return quantized.with_parts(self.fused, self._aside)

    @property
    def stored(self) -> Mapping[str, SafetensorsFile]:
        """The file of every tensor as it is stored, whole."""
        return self._stored

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

    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return ``key``, or some of its rows, as a fresh array; 16-bit floats become float32 exactly.

        What bitsandbytes has quantized is restored, see :mod:`embedge.export.source.bitsandbytes`.

        Raises:
            CheckpointError: if there is no such tensor, it is not a float or holds NaN or infinity.
        """
        return self._file(key).read(key, rows)

    def sha256(self) -> str:
        """Return the hash of the weights, see :func:`weights_sha256`; computed once."""
        if self._sha256 is None:
            self._sha256 = weights_sha256(self._stored)
        return self._sha256

    def _file(self, key: str) -> StoredTensors:
        try:
            return self._files[key]
        except KeyError:
            raise CheckpointError(
                f"{self.transformer_path}: the weights have no tensor {key!r}; they have "
                f"{len(self._files)} others, check that config.json belongs to them"
            ) from None


def _read_config(folder: Path, hub_id: str | None) -> dict[str, Any]:
    file = folder / "config.json"
    if not os.path.lexists(file):
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder}: holds a PEFT adapter, not a model; name the base model as the source "
                f"and this folder as an adapter: --adapter NAME={folder}"
            )
        raise CheckpointError(
            f"{folder}: has no config.json; expected a model folder in the Hugging Face layout{partly(hub_id)}"
        )
    config = read_json_object(file)
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(
            f"{file}: architectures is {classes!r}, expected a list of class names"
        )
    check_quantization(config, file)
    return config
