"""Values of a graph with what is known of them, and the Linears that read them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from embedge.export.weights.tensors import BASE, Weights

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class LinearRef:
    """A Linear by its canonical name, or some of its output rows (fused projections).

    Attributes:
        name: of its module.
        start: its first row, ``None`` for all rows.
        stop: the row after its last.
        has_bias: whether the architecture has a bias here; a LoRA may bring one all the same.
    """

    name: str
    start: int | None = None
    stop: int | None = None
    has_bias: bool = True

    @property
    def label(self) -> str:
        """Names the Linear in graphs and reports."""
        return self.name if self.start is None else f"{self.name}[{self.start}:{self.stop}]"

    @property
    def weight(self) -> str:
        """Canonical name of its weight."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """Canonical name of its bias, which need not exist."""
        return f"{self.name}.bias"

    def out_features(self, weights: Weights) -> int:
        """Output channels, of the selected rows alone."""
        if self.start is not None and self.stop is not None:
            return self.stop - self.start
        return weights.shape(self.weight)[0]

    def in_features(self, weights: Weights) -> int:
        """Input channels."""
        return weights.shape(self.weight)[1]

    def read(self, weights: Weights) -> FloatArray:
        """The merged weight, float32 ``[out, in]``."""
        weight = weights.read(self.weight)
        return weight if self.start is None else weight[self.start : self.stop]

    def read_bias(self, weights: Weights) -> FloatArray:
        """The merged bias, float32 ``[out]``, zeros where there is none."""
        if not weights.has(self.bias):
            return np.zeros(self.out_features(weights), np.float32)
        bias = weights.read(self.bias)
        return bias if self.start is None else bias[self.start : self.stop]

    def key(self, weights: Weights, detail: str) -> str:
        """Identity of the stored weight: its tensor, the task that changes it, and the format."""
        return f"{self.label}@{weights.version(self.weight)}|{detail}"


def rows_of(name: str, *sizes: int, has_bias: bool = True) -> list[LinearRef]:
    """The Linears of a fused tensor, each with so many of its rows, in order."""
    stops = list(accumulate(sizes))
    parts = zip([0, *stops], stops, strict=False)
    return [LinearRef(name, start, stop, has_bias) for start, stop in parts]


def owner(weights: Weights, *sources: str) -> str:
    """The task whose adapter changes one of the tensors, or ``"base"``."""
    versions = {weights.version(s) for s in sources} - {BASE}
    return versions.pop() if versions else BASE


@dataclass(frozen=True, kw_only=True)
class ScaleSink:
    """A Linear whose output channels scale the input of another one linearly.

    Attributes:
        linear: the producer (value projection, up projection).
        groups: ``(kv_heads, queries_per_kv_head, head_size)`` where each of its channels feeds several
            input channels (grouped-query attention), else ``None``: one to one.
    """

    linear: LinearRef
    groups: tuple[int, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Where a normalized value came from, so that a consumer can ask for it with other parameters."""

    source: str
    weight: str
    bias: str | None
    epsilon: float
    rms: bool


class Value(str):
    """The name of a value, and what is known of it by whoever wrote its node.

    Attributes:
        node: what made it; ``None`` for inputs and constants.
        norm: the norm that made it.
        lower_bound: a number that none of its elements is ever below.
        factors: what it is the product of, where a gated MLP multiplied them.
        sink: what a per-channel scale of it may be folded into.
        row_scale: float32 ``[batch, tokens, 1]`` by which it has still to be multiplied.
        linear: the Linear whose matmul made it, the bias not yet added.
        input_shift: float32 ``[in]`` that was subtracted from that Linear's input.
        output_scale: float32 ``[out]`` by which the rows of its weight were multiplied.
    """

    node: NodeProto | None = None
    norm: Norm | None = None
    lower_bound: float | None = None
    factors: tuple[Value, Value] | None = None
    sink: ScaleSink | None = None
    row_scale: Value | None = None
    linear: LinearRef | None = None
    input_shift: FloatArray | None = None
    output_scale: FloatArray | None = None


@dataclass(frozen=True, kw_only=True)
class LinearGroup:
    """The shared input of some Linears.

    Attributes:
        value: the input, float32 ``[batch, tokens, in]``.
        linears: the Linears that read it.
        sink: what a per-channel scale of it may be folded into.
        rows: names the order of its rows, where a graph has several.
        multiplied: the Linear whose matmul nothing reads but a multiplication, or ``None``.
    """

    value: Value
    linears: tuple[LinearRef, ...]
    sink: ScaleSink | None = None
    rows: str = ""
    multiplied: LinearRef | None = None

    @property
    def label(self) -> str:
        """The name of the input: that of its first Linear."""
        return self.linears[0].label

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the Linears."""
        return tuple(linear.label for linear in self.linears)

    @property
    def gated(self) -> bool:
        """Whether a gated MLP multiplied the input."""
        return self.value.factors is not None
