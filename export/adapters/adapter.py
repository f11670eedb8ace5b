"""PEFT LoRA adapters: read a folder, fit it to a checkpoint, read merged tensors one at a time.

An adapter is merged by the keys in its file, never by the patterns in its config: every key has to
find its tensor and every tensor has to be used, else binding fails with what does not fit and nothing
is written.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedge.export.adapters.binding import bind
from embedge.export.adapters.config import LoraSettings, read_peft_config
from embedge.export.adapters.keys import AdapterKeys, sort_keys
from embedge.export.adapters.merge import MergeRule
from embedge.export.errors import AdapterError
from embedge.export.source.card import read_card
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.fingerprint import files_sha256
from embedge.export.source.names import base_name, recorded_name
from embedge.export.source.safetensors_file import SafetensorsFile, TensorSource

__all__ = ["Adapter", "BoundAdapter"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


class Adapter:
    """One LoRA adapter as PEFT saves it, not yet fitted to a model.

    Attributes:
        name: the task it stands for.
        folder: where its files lie.
        settings: what adapter_config.json says about merging.
        file: its tensors.
        adapter_keys: its keys, sorted by what they are.
        sha256: hash of its two files, config and weights.
        license: what its own card declares, ``None`` where it has no card, or says nothing.
        beside: whether files beside it may say how texts become vectors; not where it is part of a checkpoint.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: LoraSettings,
        file: TensorSource,
        sha256: str | None = None,
    ) -> None:
        """Sort the keys of ``file``; use :meth:`load`, or with its hash :func:`.stacked.stacked_adapters`."""
        self.name = name
        self.folder = folder
        self.settings = settings
        self.file = file
        self.adapter_keys: AdapterKeys = sort_keys(file.keys(), name)
        self.sha256 = sha256 or files_sha256(folder / _CONFIG, folder / _WEIGHTS)
        self.beside = sha256 is None
        self.license = read_card(folder).license

    @classmethod
    def load(cls, folder: str | Path, name: str) -> Adapter:
        """Read the adapter in ``folder``, or in ``folder/name`` where ``folder`` holds several.

        The sub-folder goes first where both exist: PEFT puts the adapter ``default`` into the
        folder itself and all others into sub-folders. A file that holds several adapters gives the
        one called ``name``.

        Raises:
            AdapterError: if there is no adapter, a file is missing or damaged, or it is of a kind
                that cannot be merged exactly (PiSSA, aLoRA, other tuners, …; the message says which
                and why).
        """
        found = _find(Path(folder).expanduser(), name)
        settings = read_peft_config(found / _CONFIG)
        weights = found / _WEIGHTS
        if not weights.exists() and (found / "adapter_model.bin").exists():
            raise AdapterError(
                f"{found}: has only pickled weights (adapter_model.bin), which can run code when "
                "loaded and are not read; convert them where you trust them, in this folder: "
                'python -c "import torch; from safetensors.torch import save_file; '
                "save_file(torch.load('adapter_model.bin', weights_only=True), "
                "'adapter_model.safetensors')\""
            )
        return cls(name, found, settings, SafetensorsFile(weights, AdapterError))

    @property
    def base_model(self) -> str | None:
        """The model it was trained on, as recorded: a hub id, or the last part of a local path."""
        recorded = self.settings.base_model
        if recorded is None:
            return None
        is_hub_id = recorded.count("/") == 1 and not recorded.startswith((".", "/", "~"))
        return recorded if is_hub_id else base_name(recorded)

    def bind(
        self,
        checkpoint: Checkpoint,
        canonical: Callable[[str], str],
        *,
        heads: tuple[str, ...] = (),
        published: bool = False,
    ) -> BoundAdapter:
        """Find the tensor of ``checkpoint`` for every tensor of the adapter.

        Args:
            checkpoint: the base model.
            canonical: maps the checkpoint's keys, and the adapter's with ``base_model.model.`` and
                any wrapper in front, to one form; ``"encoder.layer.0.attention.self.query.weight"``
                for both.
            heads: starts of canonical names of modules that cannot reach the vector; the adapter's part
                of them is left out.
            published: whether it comes with the model, which may lie under any name.

        Raises:
            AdapterError: counting everything that does not fit and listing the first: keys that find
                no tensor or several, keys that are not used, shapes (both are named), ranks unlike
                the config, NaN, another base hash.

        Warns:
            UserWarning: if the adapter names another base model, changes nothing, or trains a head.
        """
        found = bind(
            self.name,
            self.file,
            self.adapter_keys,
            self.settings,
            checkpoint,
            canonical,
            heads,
        )
        self._warn(checkpoint, found.rules, found.left_out, published)
        return BoundAdapter(self, checkpoint, found.rules)

    def _warn(
        self,
        checkpoint: Checkpoint,
        rules: dict[str, MergeRule],
        left_out: tuple[str, ...],
        published: bool,
    ) -> None:
        checked = published or self.settings.base_sha256 is not None
        if not checked and (doubt := self._base_doubt(checkpoint)):
            warnings.warn(f"adapter {self.name!r} {doubt}", UserWarning, stacklevel=3)
        if left_out:
            warnings.warn(
                f"adapter {self.name!r}: left out what no vector depends on: {', '.join(left_out)}"
                + (
                    "; if it was trained for pooler_output, its own vectors are others"
                    if left_out == ("pooler",)
                    else ""
                ),
                UserWarning,
                stacklevel=3,
            )
        low_rank = [rule for rule in rules.values() if rule.a is not None]
        if not rules or (low_rank and all(rule.zero_delta for rule in low_rank)):
            warnings.warn(
                f"adapter {self.name!r}: B·A is zero in every layer, so its LoRA changes nothing; "
                "was it saved before it was trained?",
                UserWarning,
                stacklevel=3,
            )

    def _base_doubt(self, checkpoint: Checkpoint) -> str | None:
        """Say why the base may be another one than the adapter was trained on, ``None`` if it is not."""
        recorded = self.settings.base_model or ""
        place = Path(recorded).expanduser()
        if recorded and os.path.isabs(place) and os.path.exists(place):
            inside = (checkpoint.path, checkpoint.transformer_path)
            if any(os.path.samefile(place, folder) for folder in inside):
                return None
        name = recorded_name(recorded)
        if name is None:
            found = f"base_model_name_or_path is {recorded!r}" if recorded else "it names none"
            return (
                f"does not say which model it was trained on ({found} in adapter_config.json), so that "
                f"{checkpoint.name!r} is the right one could not be checked; another one of the same shapes "
                "gives wrong vectors: write the model's name there"
            )
        if name.lower() in checkpoint.names:
            return None
        return f"was trained on {name!r}, it is merged into {checkpoint.name!r}"


class BoundAdapter:
    """The tensors of a checkpoint with an adapter merged in, computed when they are read.

    Attributes:
        adapter: the adapter.
        checkpoint: the base.
        touched: the keys whose value differs from the base's, ``added`` included.
        added: keys that the base does not have, e.g. a bias from ``lora_bias``.
    """

    def __init__(
        self, adapter: Adapter, checkpoint: Checkpoint, rules: dict[str, MergeRule]
    ) -> None:
        """Hold the rules of the changed tensors; use :meth:`Adapter.bind`."""
        self.adapter = adapter
        self.checkpoint = checkpoint
        self._rules = rules
        self.touched = frozenset(key for key, rule in rules.items() if rule.changes)
        self.added = frozenset(key for key in rules if not checkpoint.has(key))

    def sources(self, keys: Iterable[str]) -> list[str]:
        """Return the adapter's own tensors that change the tensors ``keys``, sorted."""
        rules = [self._rules[key] for key in keys]
        parts = [(r.replacement, r.a, r.b, r.magnitude, r.shift, r.rows) for r in rules]
        return sorted({part for listed in parts for part in listed if part is not None})

    def beyond_low_rank(self) -> frozenset[str]:
        """Return the keys that change by something else than ``s · B·A``: replaced, or of DoRA."""

        def is_more(rule: MergeRule) -> bool:
            parts = rule.replacement, rule.magnitude, rule.shift, rule.rows
            return rule.changes and any(part is not None for part in parts)

        return frozenset(key for key, rule in self._rules.items() if is_more(rule))

    def rank(self, key: str) -> int:
        """Return the rank of the product ``B·A`` that is added to ``key``, 0 without one."""
        rule = self._rules.get(key)
        return 0 if rule is None or rule.a is None or not rule.changes else self._rank_of(rule.a)

    def _rank_of(self, factor: str) -> int:
        return min(self.adapter.file.shape(factor))

    def keys(self) -> tuple[str, ...]:
        """Return the names of the tensors, sorted: the checkpoint's and ``added``."""
        return tuple(sorted({*self.checkpoint.keys(), *self.added}))

    def has(self, key: str) -> bool:
        """Return whether the merged model has a tensor ``key``."""
        return key in self.added or self.checkpoint.has(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``.

        Raises:
            CheckpointError: if there is no such tensor.
        """
        return self._rules[key].shape if key in self.added else self.checkpoint.shape(key)

    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return the merged tensor ``key``, or some rows, as a fresh array, by PEFT's rule in float32.

        Raises:
            CheckpointError: if there is no such tensor, or the base's holds NaN or infinity.
            AdapterError: if the merged tensor is not finite.
        """
        rule = self._rules.get(key)
        if rule is None or not rule.changes:
            return self.checkpoint.read(key, rows)
        keeps_base = rule.replacement is None and self.checkpoint.has(key)
        base = self.checkpoint.read(key) if keeps_base else None
        try:
            merged = rule.merge(base, self.adapter.file)
        except AdapterError as problem:
            raise AdapterError(f"adapter {self.adapter.name!r}: {key!r} {problem}") from problem
        return merged if rows is None else merged[rows]


def _find(folder: Path, name: str) -> Path:
    """Return the folder of the adapter ``name``: ``folder/name`` or ``folder``."""
    for candidate in (folder / name, folder):
        if os.path.lexists(candidate / _CONFIG):  # whatever it is: reading it says what is wrong
            return candidate
    others = sorted(file.parent.name for file in folder.glob(f"*/{_CONFIG}"))
    if not folder.is_dir():
        found = "there is no such folder"
    else:
        found = f"the sub-folders {', '.join(others)} have one" if others else "neither has one"
    raise AdapterError(f"{folder}: expected an {_CONFIG} here or in {name}/, {found}")
