"""The tensors of one task under canonical names: the checkpoint with the task's adapter merged in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from embedge.export.adapters.adapter import BoundAdapter
from embedge.export.errors import CheckpointError
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.safetensors_file import first_not_finite
from embedge.export.weights.tensors import BASE, Adjustment


class TaskWeights:
    """Reads merged tensors one at a time.

    Args:
        checkpoint: the backbone.
        canonical: gives a key's canonical name.
        adapter: the bound adapter, or ``None`` for the bare backbone.
        task: name of the task; the version of what its adapter changes.
        adjustments: by canonical name, what tensors stand for that are not meant as they are stored.

    Raises:
        CheckpointError: two tensors of the checkpoint have one canonical name.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        canonical: Callable[[str], str],
        adapter: BoundAdapter | None = None,
        task: str = BASE,
        adjustments: Mapping[str, Adjustment] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._adapter = adapter
        self._task = task
        self._adjustments = adjustments or {}
        self.asked: set[str] = set()
        self._keys = canonical_keys(checkpoint.keys(), canonical)
        if adapter is not None:
            for key in adapter.added:
                self._keys.setdefault(canonical(key), key)

    def has(self, name: str) -> bool:
        self.asked.add(name)  # a graph takes what there is
        return name in self._keys

    def shape(self, name: str) -> tuple[int, ...]:
        key = self._key(name)
        source = self._adapter or self._checkpoint
        return source.shape(key)

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The merged tensor, or neighbours along its first axis, float32, a fresh array.

        Raises:
            CheckpointError: the tensor is missing, or holds NaN or infinity.
        """
        key = self._key(name)
        value = (self._adapter or self._checkpoint).read(key, rows)
        if first_not_finite(value.reshape(-1)) is not None:
            count = int(value.size - np.isfinite(value).sum())
            raise CheckpointError(
                f"{key}{self._where()}: expected finite numbers, found {count} NaN or infinite of "
                f"{value.size}; nothing was written. Restore the tensor from its source"
            )
        adjustment = self._adjustments.get(name)
        return value if adjustment is None else adjustment.of(value)

    def version(self, name: str) -> str:
        """``"base"`` for a tensor the adapter leaves alone, else the task's name."""
        self.asked.add(name)
        if self._adapter is not None and self._keys.get(name) in self._adapter.touched:
            return self._task
        return BASE

    def absorbed(self, norm: str) -> bool:
        """Whether a norm of this weight has become part of the table before it: never here."""
        return False

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self._keys)

    def changed(self) -> list[str]:
        """Canonical names of the tensors that the adapter changes."""
        touched = self._adapter.touched if self._adapter else frozenset()
        return [name for name, key in self._keys.items() if key in touched]

    def beyond_low_rank(self) -> list[str]:
        """Canonical names of the tensors that the adapter changes by something else than LoRA's product."""
        beyond = self._adapter.beyond_low_rank() if self._adapter else frozenset()
        return [name for name, key in self._keys.items() if key in beyond]

    def rank(self, name: str) -> int:
        """The rank of what the adapter adds to a tensor, 0 where that is nothing or no product."""
        key = self._keys.get(name)
        return self._adapter.rank(key) if self._adapter and key else 0

    def unread(self, asked: set[str]) -> tuple[list[str], list[str]]:
        """Floating-point tensors that are not among ``asked``, ``(changed by the adapter, others)``."""
        changed = self._adapter.touched if self._adapter else frozenset()
        left = [(n, k) for n, k in sorted(self._keys.items()) if n not in asked]
        return (
            [k for _, k in left if k in changed],
            [n for n, k in left if k not in changed and self._checkpoint.is_float(k)],
        )

    def _key(self, name: str) -> str:
        if name not in self._keys:
            raise CheckpointError(
                f"{self._checkpoint.path}: expected a tensor {name}, found none of that name; "
                "is config.json of the same model as the weights?"
            )
        return self._keys[name]

    def _where(self) -> str:
        return f" (task {self._task}, adapter merged)" if self._adapter else ""


def canonical_keys(keys: tuple[str, ...], canonical: Callable[[str], str]) -> dict[str, str]:
    """Map canonical names to the checkpoint's keys.

    Raises:
        CheckpointError: two keys have one canonical name.
    """
    result: dict[str, str] = {}
    for key in keys:
        name = canonical(key)
        if name in result:
            raise CheckpointError(
                f"tensors {result[name]} and {key} are both {name} of the backbone; expected one"
            )
        result[name] = key
    return result
