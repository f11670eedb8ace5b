"""int4 Linears: ``MatMulNBits`` with 4-bit blocks, a scale and a zero point each.

On the CPU the operator quantizes its input per row and block (accuracy level 4), so outliers stay in
their block. What a LayerNorm makes is shifted and smoothed as for int8, by a second norm. On GPUs (int4-fp16)
the operator takes float16 inputs and scales. Where calibration ran, the values come from GPTQ, stored under
the same initializer key; this scheme's own ``compute`` is the data-free fallback with error-minimising grids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export.graph.initializers import LazyInitializer, TensorSpec, digest
from embedge.export.graph.ops import CONTRIB, DOMAIN, OpBuilder
from embedge.export.graph.scheme import (
    BranchedScheme,
    BranchRanks,
    Rounded,
    RoundingScheme,
    Scheme,
    Target,
    reported_db,
)
from embedge.export.graph.values import FloatArray, LinearGroup, LinearRef, Value, owner
from embedge.export.schemes.branch import BranchInput, branch_input
from embedge.export.schemes.embedding_tables import quantized_rows
from embedge.export.schemes.floats import to_half
from embedge.export.schemes.int8_inputs import quantized_rows_of
from embedge.export.schemes.outlier_channels import beside, outliers
from embedge.export.schemes.smoothed_inputs import divide_hessian, norm_with_bias, smoothed
from embedge.export.schemes.smoothing_constants import SmoothingConstants
from embedge.quant import gptq, int4
from embedge.quant.coordinate_descent import refine_blocks

_NONE, _NO_BRANCHES = SmoothingConstants(), BranchRanks()


class Int4Scheme(Scheme):
    """See the module's description.

    Args:
        block_size: input channels per block, a power of two ≥ 16.
        method: "gptq" or "rtn", part of the initializer keys.
        table_bits: bits of embedding tables.
        outliers: channels that are multiplied in float32, by the labels of the Linears that read them.
        norms: shift and smoothing of inputs that a norm makes, by the labels of the Linears that read them; they
            cost another norm, and a bias less.
        branch_ranks: columns of the branches of inputs.
        sweeps: of coordinate descent behind GPTQ.
    """

    precision = "int4"
    rotates = True
    damping = 0.1  # of the paper's .01 few calibration texts make too much (lab note 67)
    scale_type: int = TensorProto.FLOAT

    def __init__(
        self,
        block_size: int,
        method: str,
        table_bits: int,
        outliers: Mapping[tuple[str, ...], NDArray[np.int64]] | None = None,
        norms: Mapping[tuple[str, ...], SmoothingConstants] | None = None,
        branch_ranks: BranchRanks = _NO_BRANCHES,
        sweeps: int = 0,
    ) -> None:
        self._outliers = outliers or {}
        self._norms = norms or {}
        self.branch_ranks = branch_ranks
        self._sweeps = sweeps
        self.block_size = block_size
        self.method = method
        self._table_bits = table_bits
        # Blocks above 32: ONNX Runtime's CPU kernel takes another path for an odd last row (measured: vectors
        # move by up to 6e-4), so the runtime keeps batch × tokens even.
        self.row_multiple = 1 if block_size <= 32 else 2

    def linears(self, g: OpBuilder, group: LinearGroup) -> list[Value]:
        constants, channels = self.norm_constants(group), self._outliers.get(group.labels)
        x = smoothed(g, group, constants)
        branch = self._branch(g, group, x, channels) if self.branch_ranks.least else None
        results = [
            self._matmul(g, x, group, linear, branch, accuracy_level=4) for linear in group.linears
        ]
        for y in results:
            y.input_shift = constants.shift
        if channels is None:
            return results
        return [
            beside(g, y, *outliers(g, group.value, linear, channels))
            for y, linear in zip(results, group.linears, strict=True)
        ]

    def _branch(
        self, g: OpBuilder, group: LinearGroup, x: Value, channels: NDArray[np.int64] | None
    ) -> BranchInput:
        """The branch of an input, which it reads as 8-bit rows: without the channels set apart."""
        if channels is not None:
            kept = np.ones(group.linears[0].in_features(g.weights), np.float32)
            kept[channels] = 0
            x = g.op("Mul", x, g.const(kept))
        return branch_input(g, group, self, *quantized_rows_of(g, group, x))

    def _matmul(
        self,
        g: OpBuilder,
        x: str,
        group: LinearGroup,
        linear: LinearRef,
        branch: BranchInput | None = None,
        **options: int,
    ) -> Value:
        return g.op(
            "MatMulNBits" if branch is None else "MatMulNBitsBranch",
            x,
            *g.initializer(self.weight(g, group, linear)),
            *(() if branch is None else branch.operands(linear)),
            domain=CONTRIB if branch is None else DOMAIN,
            name=linear.label,
            K=linear.in_features(g.weights),
            N=linear.out_features(g.weights),
            bits=4,
            block_size=self.block_size,
            **options,
        )

    def embedding(self, g: OpBuilder, name: str, ids: str) -> Value:
        return quantized_rows(g, name, ids, self._table_bits)

    def shifted_norm(self, g: OpBuilder, x: Value, bias: str) -> Value | None:
        """The residual's norm with the bias in its own, where the Linears read another one."""
        if bias in g.task_tensors:
            return None  # a norm has its weights in the graph
        return norm_with_bias(g, x, bias) if self._norms else None

    def norm_constants(self, group: LinearGroup) -> SmoothingConstants:
        """The shift and smoothing of an input, none unless a norm makes it."""
        return self._norms.get(group.labels, _NONE)

    # -- rounding -----------------------------------------------------------------------------------

    def gptq(self, group: LinearGroup) -> RoundingScheme | None:
        return self if self.method == "gptq" else None

    def branched(self, group: LinearGroup) -> BranchedScheme | None:
        return self if self.branch_ranks.least else None

    def input_shift(self, group: LinearGroup) -> FloatArray | None:
        return self.norm_constants(group).shift

    def smooth_hessian(self, g: OpBuilder, group: LinearGroup, hessian: FloatArray) -> None:
        channels, smooth = self._outliers.get(group.labels), self.norm_constants(group).smooth
        if channels is not None:
            hessian[channels] = 0
            hessian[:, channels] = 0
        if smooth is not None:
            divide_hessian(hessian, smooth)

    def _for_input(self, group: LinearGroup, weight: FloatArray) -> FloatArray:
        """A weight for the input as it is quantized, float32 ``[out, in]``, the same array changed."""
        channels, smooth = self._outliers.get(group.labels), self.norm_constants(group).smooth
        if channels is not None:
            weight[:, channels] = 0
        if smooth is not None:
            weight *= smooth
        return weight

    def round(
        self,
        g: OpBuilder,
        group: LinearGroup,
        linear: LinearRef,
        weight: FloatArray,
        factor: FloatArray | None = None,
    ) -> Rounded:
        parts = int4.split_blocks(self._for_input(group, weight), self.block_size)
        noise = 0.0
        if factor is None:
            scales, zeros = int4.block_grid(parts)
            values = int4.quantize(parts, scales, zeros)
        else:
            values, scales, zeros, noise = gptq.quantize_blocks(weight, factor, self.block_size)
            if self._sweeps:
                values, scales, noise = refine_blocks(
                    weight, factor, values, scales, zeros, sweeps=self._sweeps
                )
        arrays = self._stored(linear, values, scales, zeros)
        smooth = self.norm_constants(group).smooth
        columns = None if smooth is None else int4.split_blocks(smooth[None], self.block_size)[0]
        sqnr_db = int4.blocks_sqnr_db(parts, values, scales, zeros, columns)
        return Rounded(arrays=arrays, sqnr_db=sqnr_db, weight=weight, noise=noise)

    def _stored(
        self,
        linear: LinearRef,
        values: NDArray[np.uint8],
        scales: FloatArray,
        zeros: NDArray[np.uint8],
    ) -> list[NDArray[Any]]:
        half = self.scale_type == TensorProto.FLOAT16
        return [
            int4.pack_pairs(values),
            to_half(scales, linear.weight) if half else scales,
            int4.pack_pairs(zeros),
        ]

    def _blocks(
        self, arrays: Sequence[NDArray[Any]]
    ) -> tuple[NDArray[np.uint8], FloatArray, NDArray[np.uint8]]:
        """Values, scales and zero points of stored tensors."""
        packed, scales, zeros = arrays
        values = int4.unpack_pairs(packed, self.block_size)
        return values, scales.astype(np.float32), int4.unpack_pairs(zeros, scales.shape[1])

    def for_input(self, g: OpBuilder, group: LinearGroup, weight: FloatArray) -> FloatArray:
        return self._for_input(group, weight)

    def lost(
        self, linear: LinearRef, weight: FloatArray, arrays: Sequence[NDArray[Any]]
    ) -> FloatArray:
        stored = int4.dequantize(*self._blocks(arrays))
        return weight - stored.reshape(len(weight), -1)[:, : weight.shape[1]]

    def refined(
        self,
        linear: LinearRef,
        weight: FloatArray,
        arrays: Sequence[NDArray[Any]],
        factor: FloatArray,
    ) -> list[NDArray[Any]]:
        values, scales, zeros = self._blocks(arrays)
        values, scales, _ = refine_blocks(weight, factor, values, scales, zeros, sweeps=1)
        return self._stored(linear, values, scales, zeros)

    def row_factors(self, linear: LinearRef) -> FloatArray | None:
        return None

    def restored(self, group: LinearGroup, weight: FloatArray) -> FloatArray:
        """What rounding to nearest leaves of a weight: exact for outlier channels and for the input's shift.

        Args:
            group: the Linear's input.
            weight: float32 ``[out, in]``, which is changed.

        Returns:
            float32 ``[in, out]``.
        """
        channels: Sequence[int] | NDArray[np.int64] = self._outliers.get(group.labels, [])
        exact, constants = weight[:, channels], self.norm_constants(group)
        shift = constants.shift
        along = None if shift is None else weight @ shift
        parts = int4.split_blocks(self._for_input(group, weight), self.block_size)
        scales, zeros = int4.block_grid(parts)
        values = int4.dequantize(int4.quantize(parts, scales, zeros), scales, zeros)
        result = values.reshape(len(weight), -1)[:, : weight.shape[1]]
        result[:, channels] = exact
        if constants.smooth is not None:
            result /= constants.smooth
        if shift is not None and along is not None:
            # the layer that runs it has no other bias for it; one column more is exact along the shift
            result += np.outer(along - result @ shift, shift / max(float(shift @ shift), 1e-30))
        return np.ascontiguousarray(result.T)

    def weight(self, g: OpBuilder, group: LinearGroup, linear: LinearRef) -> LazyInitializer:
        rows, columns = linear.out_features(g.weights), linear.in_features(g.weights)
        blocks = -(-columns // self.block_size)
        noise: list[float] = []

        def compute() -> list[NDArray[Any]]:
            rounded = self.round(g, group, linear, linear.read(g.stored))
            noise[:] = [rounded.sqnr_db]
            return rounded.arrays

        def describe(arrays: Sequence[NDArray[Any]]) -> dict[str, Any]:
            facts: dict[str, Any] = {"format": f"int4 block {self.block_size} {self.method}"}
            if noise:  # GPTQ, which stores values of its own, states it itself
                facts["sqnr_db"] = reported_db(noise[0])
            return facts

        def spec(part: str, elem_type: int, *shape: int) -> TensorSpec:
            return TensorSpec(name=f"{linear.label}.{part}", elem_type=elem_type, shape=shape)

        kept, constants = digest(self._outliers.get(group.labels)), self.norm_constants(group)
        if constants.smooth is not None:
            kept += f"|{constants.digest}|{digest(constants.shift)}"
        return LazyInitializer(
            key=linear.key(g.stored, f"{self.precision}|{self.block_size}|{self.method}|{kept}"),
            owner=owner(g.stored, linear.weight),
            specs=(
                spec("weight", TensorProto.UINT8, rows, blocks, self.block_size // 2),
                spec("scales", self.scale_type, rows, blocks),
                spec("zero_points", TensorProto.UINT8, rows, -(-blocks // 2)),
            ),
            compute=compute,
            describe=describe,
        )


class Int4Float16Scheme(Int4Scheme):
    """int4 for GPUs: the same values, float16 scales and inputs; see the module's description."""

    precision = "int4-fp16"
    target = Target.CUDA
    scale_type = TensorProto.FLOAT16

    def __init__(self, block_size: int, method: str, table_bits: int, sweeps: int = 0) -> None:
        super().__init__(block_size, method, table_bits, sweeps=sweeps)
        self.row_multiple = 1

    def linears(self, g: OpBuilder, group: LinearGroup) -> list[Value]:
        half = g.op("Cast", group.value, to=TensorProto.FLOAT16)
        results = [self._matmul(g, half, group, linear) for linear in group.linears]
        return [g.op("Cast", y, to=TensorProto.FLOAT) for y in results]

    def embedding(self, g: OpBuilder, name: str, ids: str) -> Value:
        return quantized_rows(g, name, ids, self._table_bits, half=True)
