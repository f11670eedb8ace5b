"""int8 Linears: smoothed, per-row quantized inputs against per-channel weights.

A row ``x`` of a Linear's input (one token) becomes ``x' = (x - shift) / smooth`` with constants
calibrated per channel, then ``q = round(x' / s)`` with ``s = max|x'| / 127`` for that row alone; the
matmul gives ``s · scale_w · (q @ W_q)`` and ``W·shift`` joins the bias. Nothing depends on other rows, so
a vector depends neither on its batch nor on its padding.

* After a norm, shift and smooth are a second norm on the same sum with other parameters, for free
  where nothing else reads the first.
* Where a Linear (value, up) scales the input channel by channel, the smoothing goes into its scales.
* In such an input, the channels that are hundreds of times the others in single tokens (the gated
  product of language models) are scaled down to nothing there and multiplied in float32 beside it.
* An input that is never below a bound (GELU) spends 20 levels below zero and 235 above:
  ``q = round(x' / s) + 20`` with ``s = max(max x' / 235, -bound / 20)``.
* What a gated MLP multiplies has few large values in a row. Each block of up to 16 channels is multiplied
  by an orthogonal matrix, which spreads them, and the rows of the weight by the same one.

The steps ``1/127`` and ``1/235`` and the zero points are initializers of their own, which the manifest
lists with the values of 7-bit activations: enough where u8×s8 matmuls saturate in 16 bits. The runtime
asks ONNX Runtime for exact matmuls there instead. Portable weights do not saturate anywhere
(:func:`embedge.quant.int8.row_scales`); a graph of others stops where they do (``graph/saturation.py``).

Operators of such a Linear, in order (functions and their bodies: ``graph/fused_ops.py``):
    ``QuantizeRows``, ``QuantizeRowsAbove`` (never below a bound) or ``QuantizeRotated…``       ``int8_inputs.py``
    ``MatMulIntegerToFloat``, ``MatMulIntegerToFloatAdd`` or ``…Sub``                           here
    ``MatMul`` in float32 of outlier channels, added                                            ``outlier_channels.py``
    the same with a branch: ``BranchRows``, ``MatMulIntegerToFloatBranch``, …                   ``branch.py``

A scale per row is a block of ``QuantizeLinear`` as wide as the row. ``MatMulIntegerToFloat`` takes
one too, ``[batch, tokens, 1]``, on the CPU (undocumented; a test holds it), but only without its bias
input, and its own kernel multiplies by it in one thread after the matmul. So where its result is
multiplied again anyway (``up`` of a gated MLP) its scale waits in :attr:`Value.row_scale` for the next one.
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
    reported_db,
)
from embedge.export.graph.values import FloatArray, LinearGroup, LinearRef, Value, owner
from embedge.export.schemes.branch import branch_input
from embedge.export.schemes.embedding_tables import quantized_rows
from embedge.export.schemes.int8_inputs import int8_input
from embedge.export.schemes.outlier_channels import beside, outliers
from embedge.export.schemes.smoothed_inputs import divide_hessian, norm_with_bias
from embedge.export.schemes.smoothing_constants import SmoothingConstants, producer_channels
from embedge.quant import gptq, int8
from embedge.quant.coordinate_descent import refine_rows
from embedge.quant.rotation import block_rotation, rotate_blocks

_NONE, _NO_BRANCHES = SmoothingConstants(), BranchRanks()


class Int8Scheme(Scheme):
    """See the module's description.

    Args:
        constants: of Linear inputs, by the labels of the Linears that read one; empty without calibration.
        method: "gptq" or "rtn", how weights are rounded; part of the initializer keys.
        table_bits: bits of embedding tables.
        portable: whether sums of pairs of weights are bounded, so that products fit 16 bits.
        branch_ranks: columns of the branches of inputs.
        sweeps: of coordinate descent behind GPTQ.
    """

    precision = "int8"
    rotates = True
    damping = 0.01

    def __init__(
        self,
        constants: Mapping[tuple[str, ...], SmoothingConstants],
        method: str = "rtn",
        table_bits: int = 8,
        *,
        portable: bool = False,
        branch_ranks: BranchRanks = _NO_BRANCHES,
        sweeps: int = 0,
    ) -> None:
        self.method = method
        self._sweeps = sweeps
        self.branch_ranks = branch_ranks
        self.saturates = not portable
        self._portable = portable
        self._constants = constants
        self._table_bits = table_bits
        self._output_scale = {
            of.sink.linear.label: 1.0 / producer_channels(of.smooth, of.sink)
            for of in constants.values()
            if of.sink is not None and of.smooth is not None
        }

    def linears(self, g: OpBuilder, group: LinearGroup) -> list[Value]:
        constants = self.constants_of(group)
        x, values, scale, zero_point = int8_input(g, group, constants, input_rotation(g, group))
        row_scale = group.value.row_scale
        if row_scale is not None:
            scale = g.op("Mul", scale, row_scale)
        branch = (
            branch_input(g, group, self, values, scale, zero_point)
            if self.branch_ranks.least
            else None
        )
        results = []
        for linear in group.linears:
            weight, weight_scale = self._weight(g, group, linear)
            waits = linear == group.multiplied and not g.weights.has(linear.bias)
            waits = waits and constants.shift is None and constants.outliers is None
            waits = waits and branch is None
            rows = g.const(1.0) if waits else scale
            arguments = [values, weight, rows, weight_scale, zero_point]
            if branch is None:
                y = g.op("MatMulIntegerToFloat", *arguments, domain=CONTRIB, name=linear.label)
            else:
                arguments += branch.operands(linear)
                y = g.op("MatMulIntegerToFloatBranch", *arguments, domain=DOMAIN, name=linear.label)
            output_scale = self._output_scale.get(linear.label)
            if constants.outliers is not None:
                columns = outliers(
                    g, x, linear, constants.outliers, columns=constants.smooth, rows=output_scale
                )
                y = beside(g, y, *columns, row_scale)
            y.row_scale = scale if waits else None
            y.input_shift, y.output_scale = constants.shift, output_scale
            results.append(y)
        return results

    def scales_rows(self, group: LinearGroup) -> bool:
        return group.gated and not self.branch_ranks.least

    def embedding(self, g: OpBuilder, name: str, ids: str) -> Value:
        return quantized_rows(g, name, ids, self._table_bits)

    def gptq(self, group: LinearGroup) -> RoundingScheme | None:
        return self if self.method == "gptq" else None

    def branched(self, group: LinearGroup) -> BranchedScheme | None:
        return self if self.branch_ranks.least else None

    def shifted_norm(self, g: OpBuilder, x: Value, bias: str) -> Value | None:
        """The residual's norm with the bias in its own; the Linears read another norm anyway."""
        if not self._constants:
            return None  # without constants the Linears read x itself
        if bias in g.task_tensors:
            return None  # a norm has its weights in the graph
        return norm_with_bias(g, x, bias)

    def constants_of(self, group: LinearGroup) -> SmoothingConstants:
        """The constants of an input."""
        return self._constants.get(group.labels, _NONE)

    # -- rounding -----------------------------------------------------------------------------------

    def input_shift(self, group: LinearGroup) -> FloatArray | None:
        return self.constants_of(group).shift

    def smooth_hessian(self, g: OpBuilder, group: LinearGroup, hessian: FloatArray) -> None:
        constants, rotation = self.constants_of(group), input_rotation(g, group)
        if constants.smooth is not None:
            divide_hessian(hessian, constants.smooth)
        if constants.outliers is not None:
            hessian[constants.outliers] = 0
            hessian[:, constants.outliers] = 0
        if rotation is not None:
            size = len(rotation)
            for row in range(0, len(hessian), size):
                block = rotation.T @ hessian[row : row + size]
                hessian[row : row + size] = rotate_blocks(block, rotation)

    def round(
        self,
        g: OpBuilder,
        group: LinearGroup,
        linear: LinearRef,
        weight: FloatArray,
        factor: FloatArray | None = None,
    ) -> Rounded:
        constants = self.constants_of(group)
        if constants.outliers is not None:
            weight[:, constants.outliers] = 0
        rotation = input_rotation(g, group)
        noise = 0.0
        if factor is None and rotation is None:
            result = int8.quantize_rows(weight, constants.smooth, pairs=self._portable)
            values, scales, sqnr_db = result.values, result.scales, result.sqnr_db
        else:
            signal = float(np.square(weight).sum())
            weight = self.for_input(g, group, weight)
            if factor is None:
                result = int8.quantize_rows(weight, pairs=self._portable)
                values, scales = result.values, result.scales
            else:
                values, scales, noise = gptq.quantize_rows(weight, factor, pairs=self._portable)
                if self._sweeps:
                    values, noise = refine_rows(
                        weight, factor, values, scales, sweeps=self._sweeps, pairs=self._portable
                    )
            lost = weight - values * scales[:, None]
            own = lost if rotation is None else rotate_blocks(lost, rotation.T)
            own = own if constants.smooth is None else own / constants.smooth
            sqnr_db = int8.decibels(signal, float(np.square(own).sum()))
        output_scale = self._output_scale.get(linear.label)
        if output_scale is not None:
            scales = scales * output_scale
        arrays: list[NDArray[Any]] = [np.ascontiguousarray(values.T), scales]
        return Rounded(arrays=arrays, sqnr_db=sqnr_db, weight=weight, noise=noise)

    def for_input(self, g: OpBuilder, group: LinearGroup, weight: FloatArray) -> FloatArray:
        constants, rotation = self.constants_of(group), input_rotation(g, group)
        if constants.outliers is not None:
            weight[:, constants.outliers] = 0
        if constants.smooth is not None:
            weight *= constants.smooth
        return weight if rotation is None else rotate_blocks(weight, rotation)

    def _scales(self, linear: LinearRef, scales: FloatArray) -> FloatArray:
        """Those of stored tensors without what was folded into them."""
        factors = self.row_factors(linear)
        return scales if factors is None else scales / factors

    def lost(
        self, linear: LinearRef, weight: FloatArray, arrays: Sequence[NDArray[Any]]
    ) -> FloatArray:
        values, scales = arrays
        stored: FloatArray = values.T * self._scales(linear, scales)[:, None]
        return weight - stored

    def refined(
        self,
        linear: LinearRef,
        weight: FloatArray,
        arrays: Sequence[NDArray[Any]],
        factor: FloatArray,
    ) -> list[NDArray[Any]]:
        values, scales = arrays
        own = self._scales(linear, scales)
        refined, _ = refine_rows(weight, factor, values.T, own, sweeps=1, pairs=self._portable)
        return [np.ascontiguousarray(refined.T), scales]

    def row_factors(self, linear: LinearRef) -> FloatArray | None:
        return self._output_scale.get(linear.label)

    def weight(self, g: OpBuilder, group: LinearGroup, linear: LinearRef) -> LazyInitializer:
        constants = self.constants_of(group)
        specs = weight_specs(g, linear)
        noise: list[float] = []

        def compute() -> list[NDArray[Any]]:
            rounded = self.round(g, group, linear, linear.read(g.stored))
            noise[:] = [rounded.sqnr_db]
            return rounded.arrays

        def describe(arrays: Sequence[NDArray[Any]]) -> dict[str, Any]:
            facts: dict[str, Any] = {
                "name": specs[0].name,
                "shape": list(specs[0].shape),
                "format": f"int8 {self.method}{' portable' * self._portable}",
            }
            if constants.outliers is not None:
                facts["float32_channels"] = len(constants.outliers)
            if noise:  # GPTQ, which stores values of its own, states it itself
                facts["sqnr_db"] = reported_db(noise[0])
            return facts

        folded = digest(self._output_scale.get(linear.label), input_rotation(g, group))
        kind = f"int8{'-portable' * self._portable}|{self.method}|{constants.digest}|{folded}"
        return LazyInitializer(
            key=linear.key(g.stored, kind),
            owner=owner(g.stored, linear.weight),
            specs=specs,
            compute=compute,
            describe=describe,
        )

    def _weight(self, g: OpBuilder, group: LinearGroup, linear: LinearRef) -> list[Value]:
        """Initializers: the weight and its scales."""
        return g.initializer(self.weight(g, group, linear))


def input_rotation(g: OpBuilder, group: LinearGroup) -> FloatArray | None:
    """What the blocks of an input are multiplied by, float32 ``[n, n]``; ``None``: nothing."""
    return block_rotation(group.linears[0].in_features(g.weights)) if group.gated else None


def weight_specs(g: OpBuilder, linear: LinearRef) -> tuple[TensorSpec, ...]:
    """The initializers of a Linear: int8 ``[in, out]`` and float32 ``[out]``."""
    name, rows = linear.label, linear.out_features(g.weights)
    shape = (linear.in_features(g.weights), rows)
    return (
        TensorSpec(name=f"{name}.weight", elem_type=TensorProto.INT8, shape=shape),
        TensorSpec(name=f"{name}.scales", elem_type=TensorProto.FLOAT, shape=(rows,)),
    )


__all__ = ["Int8Scheme", "input_rotation", "weight_specs"]
