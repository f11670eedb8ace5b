"""How Linears and embedding tables are stored and run: what graphs ask of a precision.

The schemes themselves lie in :mod:`embedge.export.schemes`, one file each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import isfinite
from typing import Any, Protocol

from numpy.typing import NDArray

from embedge.export.graph.initializers import LazyInitializer
from embedge.export.graph.ops import OpBuilder
from embedge.export.graph.values import FloatArray, LinearGroup, LinearRef, Value


class Target(Enum):
    """What a graph is written for, which decides its operators.

    ``ONNX``: ONNX's own operators, on the CPU. ``CPU``: ONNX Runtime's besides, and embedge's functions.
    ``CUDA``: operators and types that ONNX Runtime's CUDA provider implements.
    """

    ONNX = "onnx"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A quantized Linear.

    Attributes:
        arrays: the stored tensors, in the order of the initializer's specs.
        sqnr_db: signal to noise of the weight in decibels.
        weight: float32 ``[out, in]``, what was quantized.
        noise: of its outputs, the squares that GPTQ's rounding added up over the calibration tokens; 0
            where there were none.
    """

    arrays: list[NDArray[Any]]
    sqnr_db: float
    weight: FloatArray
    noise: float = 0.0


class Scheme(ABC):
    """One precision.

    Attributes:
        precision: its name.
        target: what its graphs are written for.
        row_multiple: batch × tokens is a multiple of it.
        rotates: whether residual streams are rotated first, where the family allows it.
        saturates: whether products saturate where two of them are added in 16 bits, so that a graph stops
            there (``saturation.py``).
    """

    precision: str
    target: Target = Target.CPU
    row_multiple: int = 1
    rotates: bool = False
    saturates: bool = False

    @abstractmethod
    def linears(self, g: OpBuilder, group: LinearGroup) -> list[Value]:
        """Matmuls of an input with the weights of the Linears that share it, in their order, without biases.

        A matmul knows what it left out (:attr:`Value.input_shift`) and by what it was scaled.
        """

    @abstractmethod
    def embedding(self, g: OpBuilder, name: str, ids: str) -> Value:
        """Rows of the table ``name`` for int64 ``ids`` of any shape, float32."""

    def scales_rows(self, group: LinearGroup) -> bool:
        """Whether :meth:`linears` takes a value whose rows are still to be scaled as it is."""
        return False

    def shifted_norm(self, g: OpBuilder, x: Value, bias: str) -> Value | None:
        """``x + bias`` for free, where ``x`` is a norm that can be asked for again; else ``None``."""
        return None

    def gptq(self, group: LinearGroup) -> RoundingScheme | None:
        """The scheme that rounds the Linears of an input by GPTQ, ``None`` where none does."""
        return None

    def branched(self, group: LinearGroup) -> BranchedScheme | None:
        """The scheme that gives the Linears of an input a branch, ``None`` where none does."""
        return None


class RoundingScheme(Protocol):
    """A scheme whose weights are rounded to integers.

    Attributes:
        damping: share of a Hessian's mean diagonal that is added to it.
    """

    damping: float

    def input_shift(self, group: LinearGroup) -> FloatArray | None:
        """float32 ``[in]`` that is subtracted from a Linear input before it is quantized, or ``None``."""

    def smooth_hessian(self, g: OpBuilder, group: LinearGroup, hessian: FloatArray) -> None:
        """Turn ``Σ x xᵀ`` of a Linear input, shifted already, into that of what is quantized, in place."""

    def round(
        self,
        g: OpBuilder,
        group: LinearGroup,
        linear: LinearRef,
        weight: FloatArray,
        factor: FloatArray | None = None,
    ) -> Rounded:
        """Quantize one of the Linears that share an input, to nearest or by GPTQ.

        Args:
            g: the graph that the Linear is in.
            group: the input.
            linear: one of the Linears that read it.
            weight: its merged weight, float32 ``[out, in]``, which may be changed.
            factor: what :func:`embedge.quant.gptq.cholesky` made of the smoothed Hessian.
        """

    def weight(self, g: OpBuilder, group: LinearGroup, linear: LinearRef) -> LazyInitializer:
        """The initializer of one of the Linears; its ``compute`` rounds to nearest."""


@dataclass(frozen=True, kw_only=True)
class BranchRanks:
    """Columns of the branches of a graph, multiples of 16.

    Attributes:
        least: of any input; 0: none has a branch.
        larger: of some, by the label of the input.
    """

    least: int = 0
    larger: Mapping[str, int] = field(default_factory=dict)

    def of(self, label: str) -> int:
        """Columns of the branch of an input."""
        return self.larger.get(label, self.least)


class BranchedScheme(RoundingScheme, Protocol):
    """A scheme whose Linears have a branch (``schemes/branch.py``).

    Attributes:
        branch_ranks: columns of ``down`` by input.
    """

    branch_ranks: BranchRanks

    def for_input(self, g: OpBuilder, group: LinearGroup, weight: FloatArray) -> FloatArray:
        """A weight for the input as it is quantized: smoothed and rotated; float32 ``[out, in]``, may be changed."""

    def lost(
        self, linear: LinearRef, weight: FloatArray, arrays: Sequence[NDArray[Any]]
    ) -> FloatArray:
        """What stored tensors lack of a weight.

        Args:
            linear: whose they are.
            weight: float32 ``[out, in]``, of :meth:`for_input`.
            arrays: what is stored, of :meth:`weight`.

        Returns:
            float32 ``[out, in]``.
        """

    def refined(
        self,
        linear: LinearRef,
        weight: FloatArray,
        arrays: Sequence[NDArray[Any]],
        factor: FloatArray,
    ) -> list[NDArray[Any]]:
        """Stored tensors brought closer to another weight, by one sweep of coordinate descent.

        Args:
            linear: whose they are.
            weight: float32 ``[out, in]``, for the input as it is quantized.
            arrays: what is stored.
            factor: as of :meth:`round`.
        """

    def row_factors(self, linear: LinearRef) -> FloatArray | None:
        """float32 ``[out]`` by which a Linear's results are multiplied besides, or ``None``."""


def reported_db(value: float) -> float | None:
    """Decibels for the layer report; ``None`` where they are infinite, which JSON has not."""
    return round(value, 2) if isfinite(value) else None
