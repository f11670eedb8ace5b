"""fp32 and fp16: ``MatMul`` with the transposed weight, and ``Gather``.

fp16 is for GPUs: weights and matmuls are float16, everything between them stays float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export.errors import CheckpointError
from embedge.export.graph.initializers import LazyInitializer, TensorSpec
from embedge.export.graph.ops import OpBuilder
from embedge.export.graph.scheme import Scheme, Target
from embedge.export.graph.values import FloatArray, LinearGroup, LinearRef, Value, owner

HALF_MAX = float(np.finfo(np.float16).max)  # 65504


class Float32Scheme(Scheme):
    """Float32 storage and arithmetic."""

    precision = "fp32"
    target = Target.ONNX
    elem_type: int = TensorProto.FLOAT

    def linears(self, g: OpBuilder, group: LinearGroup) -> list[Value]:
        return self._matmuls(g, group.value, group.linears)

    def embedding(self, g: OpBuilder, name: str, ids: str) -> Value:
        return g.op("Gather", g.param(name), ids, name=f"{name}/rows")

    def matrix(self, g: OpBuilder, linear: LinearRef) -> Value:
        """The transposed weight ``[in, out]`` as an initializer."""
        shape = linear.in_features(g.weights), linear.out_features(g.weights)
        spec = TensorSpec(name=f"{linear.label}.weight", elem_type=self.elem_type, shape=shape)

        def compute() -> list[NDArray[Any]]:
            weight = np.ascontiguousarray(linear.read(g.weights).T)
            half = self.elem_type == TensorProto.FLOAT16
            return [to_half(weight, linear.weight) if half else weight]

        initializer = LazyInitializer(
            key=linear.key(g.weights, self.precision),
            owner=owner(g.weights, linear.weight),
            specs=(spec,),
            compute=compute,
        )
        return g.initializer(initializer)[0]

    def _matmuls(self, g: OpBuilder, x: str, linears: Sequence[LinearRef]) -> list[Value]:
        return [g.op("MatMul", x, self.matrix(g, linear), name=linear.label) for linear in linears]


class Float16Scheme(Float32Scheme):
    """Float16 weights and matmuls for GPUs.

    Args:
        rotates: whether the residual streams are rotated: of a vision tower whose language tower is.
    """

    precision = "fp16"
    target = Target.CUDA
    elem_type = TensorProto.FLOAT16

    def __init__(self, *, rotates: bool = False) -> None:
        self.rotates = rotates

    def linears(self, g: OpBuilder, group: LinearGroup) -> list[Value]:
        half = g.op("Cast", group.value, to=TensorProto.FLOAT16)
        halves = self._matmuls(g, half, group.linears)
        return [g.op("Cast", y, to=TensorProto.FLOAT) for y in halves]

    def embedding(self, g: OpBuilder, name: str, ids: str) -> Value:
        return half_rows(g, name, ids)


def half_rows(g: OpBuilder, name: str, ids: str) -> Value:
    """Rows of the table ``name`` for int64 ``ids``, stored as float16, looked up as float32."""
    spec = TensorSpec(name=name, elem_type=TensorProto.FLOAT16, shape=g.weights.shape(name))
    initializer = LazyInitializer(
        key=f"{name}@{g.weights.version(name)}|fp16",
        owner=owner(g.weights, name),
        specs=(spec,),
        compute=lambda: [to_half(g.weights.read(name), name)],
    )
    return g.op("Cast", g.op("Gather", g.initializer(initializer)[0], ids), to=TensorProto.FLOAT)


def to_half(array: FloatArray, name: str) -> NDArray[np.float16]:
    """The float16 of a tensor.

    Raises:
        CheckpointError: for an element that float16 has no finite number for.
    """
    largest = float(max(array.max(initial=0), -array.min(initial=0)))
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float16(largest)):
            raise CheckpointError(
                f"{name}: expected magnitudes of at most {HALF_MAX:.0f}, the largest of float16, found "
                f"{largest:.6g}; export at int8, int4 or fp32 instead"
            )
    return array.astype(np.float16)
