"""The tensors of a task with the residual streams rotated, see ``quant/rotation.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from embedge.export.weights.tensors import BASE, NormRef, Weights
from embedge.quant.rotation import Rotation

FloatArray = NDArray[np.float32]
_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class ResidualStream:
    """A residual stream: what writes it and what reads it, by canonical tensor names.

    Attributes:
        width: its channels.
        tables: weights whose rows are states of the stream (token embeddings).
        table_norm: a LayerNorm between table and stream, which the rotated table's rows have been through.
        writers: Linears whose output is added to the stream, without ``.weight``.
        readers: Linears that read a norm of the stream, and the norm's weight, ``None`` for one that reads
            the stream itself; a Linear that reads several states side by side counts too.
        output: weight of the norm after the last layer, ``None`` where nothing but Linears reads it.
        centred: whether the norms take the mean away (LayerNorm).
    """

    width: int
    tables: Sequence[str] = ()
    table_norm: NormRef | None = None
    writers: Sequence[str] = ()
    readers: Mapping[str, str | None] = field(default_factory=dict)
    output: str | None = None
    centred: bool = False


class RotatedWeights:
    """Reads the tensors of a task as those of the rotated model, which computes the same.

    Args:
        weights: the tensors.
        streams: the streams to rotate; a tensor may read one and write another.
    """

    def __init__(self, weights: Weights, streams: Iterable[ResidualStream]) -> None:
        self._weights = weights
        self._norms: dict[str, str] = {}  # by the weight that took the norm's
        self._changes: dict[str, list[Callable[[FloatArray], FloatArray]]] = {}
        self._mixes_rows: set[str] = set()
        self._ones: set[str] = set()
        self._absorbed: set[str] = set()
        self._outputs: dict[str, Rotation] = {}
        for stream in streams:
            self._rotate(stream, Rotation(stream.width, keeps_mean=stream.centred))

    def has(self, name: str) -> bool:
        return self._weights.has(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def absorbed(self, norm: str) -> bool:
        return norm in self._absorbed

    def version(self, name: str) -> str:
        """The task if its adapter changes the tensor or the norm that went into it."""
        sources = [name, self._norms[name]] if name in self._norms else [name]
        versions = [self._weights.version(source) for source in sources]
        return next((v for v in versions if v != BASE), BASE)

    def read(self, name: str, rows: slice | None = None) -> FloatArray:
        """The rotated tensor, or neighbours along its first axis, float32, a fresh array."""
        if name in self._ones:
            ones = np.ones(self.shape(name), np.float32)
            return ones if rows is None else ones[rows]
        whole = name in self._mixes_rows
        value = self._weights.read(name, None if whole else rows)
        changes = self._changes.get(name)
        if changes is None:
            return value
        step = len(value) if whole else _ROWS  # a table may be large
        for start in range(0, len(value), step):
            part = value[start : start + step]
            for change in changes:
                part = change(part)
            value[start : start + step] = part
        return value if rows is None or not whole else value[rows]

    def rotation(self, norm: str) -> Rotation:
        """By what the states behind a norm are rotated."""
        return self._outputs[norm]

    def norm_weight(self, norm: str) -> FloatArray:
        """float32 ``[width]``, a norm's own weights, which :meth:`read` has moved elsewhere."""
        return self._weights.read(norm)

    @property
    def output(self) -> str | None:
        """Weight of the norm whose rotated states are the model's last."""
        return next(iter(self._outputs), None)

    def _rotate(self, stream: ResidualStream, rotation: Rotation) -> None:
        table_norm = stream.table_norm
        for name in stream.tables:
            if table_norm is not None:
                self._norms[name] = table_norm.weight
                self._absorbed.add(table_norm.weight)
                self._change(name, partial(self._normalized, table_norm))
            self._change(name, rotation.rows)
        for linear, norm in stream.readers.items():
            if norm is not None:
                self._norms[f"{linear}.weight"] = norm
                self._ones.add(norm)
            self._change(f"{linear}.weight", self._reader(norm, rotation))
        for linear in stream.writers:
            for name in (f"{linear}.weight", f"{linear}.bias"):
                self._change(name, rotation.columns)
                self._mixes_rows.add(name)
        if stream.output is not None:
            self._ones.add(stream.output)
            self._outputs[stream.output] = rotation

    def _reader(self, norm: str | None, rotation: Rotation) -> Callable[[FloatArray], FloatArray]:
        def change(weight: FloatArray) -> FloatArray:
            states = weight.reshape(len(weight), -1, rotation.width)
            if norm is not None:
                states = states * self._weights.read(norm)
            return rotation.rows(states).reshape(weight.shape)

        return change

    def _normalized(self, norm: NormRef, rows: FloatArray) -> FloatArray:
        """LayerNorm (arXiv 1607.06450) of float32 ``[rows, width]``."""
        centred = rows - rows.mean(axis=1, keepdims=True, dtype=np.float64)
        variance = np.square(centred).mean(axis=1, keepdims=True)
        weight = self._weights.read(norm.weight)
        normalized: FloatArray = (centred / np.sqrt(variance + norm.epsilon)).astype(np.float32)
        normalized *= weight
        return normalized

    def _change(self, name: str, change: Callable[[FloatArray], FloatArray]) -> None:
        self._changes.setdefault(name, []).append(change)
