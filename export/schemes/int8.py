"""int8 Linears: smoothed, per-row quantized inputs against per-channel weights.

A row ``x`` of a Linear's input (one token) becomes ``x' = (x - shift) / smooth`` with constants
calibrated per channel, then ``q = round(x' / s)`` with ``s = max|x'| / 127`` for that row alone; the
product is ``s · scale_w · (q @ W_q)`` and ``W·shift`` joins the bias. Nothing depends on other rows, so
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
asks ONNX Runtime for exact matmuls there instead.

A scale per row is a block of :class:`QuantizeLinear` as wide as the row. ``MatMulIntegerToFloat`` takes
one too, ``[batch, tokens, 1]``, on the CPU (undocumented; a test holds it), but only without its bias
input, and its own kernel multiplies by it in one thread after the product. So where the product is
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
from embedge.export.graph.scheme import Rounded, RoundingScheme, Scheme, reported_db
from embedge.export.graph.values import FloatArray, LinearGroup, LinearRef, Value, owner
from embedge.export.schemes.embedding_tables import quantized_rows
from embedge.export.schemes.outlier_channels import beside, outliers
from embedge.export.schemes.smoothing_constants import SmoothingConstants, producer_channels
from embedge.export.weights.tensors import BASE
from embedge.quant import gptq, int8
from embedge.quant.rotation import block_rotation, rotate_blocks

ACTIVATION_CONSTANTS: dict[str, dict[str, Any]] = {
    "embedge.act_step": {"dtype": "float32", "full": 1 / 127, "reduced": 1 / 63},
    "embedge.act_zero_point": {"dtype": "uint8", "full": 128, "reduced": 64},
    "embedge.act_step_bounded": {"dtype": "float32", "full": 1 / 235, "reduced": 2 / 235},
    "embedge.act_zero_point_bounded": {"dtype": "uint8", "full": 20, "reduced": 10},
}
_BOUNDED_RATIO = 235 / 20  # levels above zero per level below, at either width
_NONE = SmoothingConstants()


class Int8Scheme(Scheme):
    """See the module's description.

    Args:
        constants: of Linear inputs, by the labels of the Linears that read one; empty without calibration.
        method: "gptq" or "rtn", how weights are rounded; part of the initializer keys.
        table_bits: bits of embedding tables.
    """

    precision = "int8"
    rotates = True

    def __init__(
        self,
        constants: Mapping[tuple[str, ...], SmoothingConstants],
        method: str = "rtn",
        table_bits: int = 8,
    ) -> None:
        self.method = method
        self._constants = constants
        self._table_bits = table_bits
        self._output_scale = {
            of.sink.linear.label: 1.0 / producer_channels(of.smooth, of.sink)
            for of in constants.values()
            if of.sink is not None and of.smooth is not None
        }

    def linears(self, g: OpBuilder, group: LinearGroup) -> list[Value]:
        constants = self.constants_of(group)
        x, values, scale, zero_point = self._quantized(g, group, constants)
        row_scale = group.value.row_scale
        if row_scale is not None:
            scale = g.op("Mul", scale, row_scale)
        products = []
        for linear in group.linears:
            weight, weight_scale = self._weight(g, group, linear)
            waits = linear == group.multiplied and not g.weights.has(linear.bias)
            waits = waits and constants.shift is None and constants.outliers is None
            rows = g.const(1.0) if waits else scale
            arguments = [values, weight, rows, weight_scale, zero_point]
            y = g.op("MatMulIntegerToFloat", *arguments, domain=CONTRIB, name=linear.label)
            output_scale = self._output_scale.get(linear.label)
            if constants.outliers is not None:
                columns = outliers(
                    g, x, linear, constants.outliers, columns=constants.smooth, rows=output_scale
                )
                y = beside(g, y, *columns, row_scale)
            y.row_scale = scale if waits else None
            y.input_shift, y.output_scale = constants.shift, output_scale
            products.append(y)
        return products

    def scales_rows(self, group: LinearGroup) -> bool:
        return group.gated

    def embedding(self, g: OpBuilder, name: str, ids: str) -> Value:
        return quantized_rows(g, name, ids, self._table_bits)

    def gptq(self, group: LinearGroup) -> RoundingScheme | None:
        return self if self.method == "gptq" else None

    def shifted_norm(self, g: OpBuilder, x: Value, bias: str) -> Value | None:
        """The residual's norm with the bias in its own; the Linears read another norm anyway."""
        norm = x.norm
        if norm is None or norm.rms or norm.bias is None:
            return None
        if not self._constants:
            return None  # without constants the Linears read x itself
        gamma = g.param(norm.weight)
        own, added = norm.bias, g.initializers[bias]
        owners = {owner(g.weights, own), added.owner} - {BASE}
        beta = g.computed(
            f"{own}+{bias}",
            g.weights.shape(own),
            lambda: g.weights.read(own) + np.asarray(added.compute()[0], np.float32),
            own,
            detail=added.key,
            owned_by=owners.pop() if owners else BASE,
        )
        return g.op("LayerNormalization", norm.source, gamma, beta, axis=-1, epsilon=norm.epsilon)

    def constants_of(self, group: LinearGroup) -> SmoothingConstants:
        """The constants of an input."""
        return self._constants.get(group.labels, _NONE)

    # -- pieces -------------------------------------------------------------------------------------

    def _smoothed(self, g: OpBuilder, group: LinearGroup, constants: SmoothingConstants) -> Value:
        """``(x - shift) / smooth``, by the cheapest way there is."""
        x = group.value
        if constants.smooth is None and constants.shift is None:
            return x
        smooth = np.float32(1) if constants.smooth is None else constants.smooth
        shift = np.float32(0) if constants.shift is None else constants.shift
        norm = x.norm
        if norm is not None:
            weight, bias = norm.weight, norm.bias
            size = g.weights.shape(weight)
            gamma = g.computed(
                f"{group.label}.smoothed.weight",
                size,
                lambda: g.weights.read(weight) / smooth,
                weight,
                detail=constants.digest,
            )
            if norm.rms:
                return g.op("RMSNormalization", norm.source, gamma, axis=-1, epsilon=norm.epsilon)

            def beta() -> FloatArray:
                own = g.weights.read(bias) if bias else np.zeros(size, np.float32)
                return ((own - shift) / smooth).astype(np.float32)

            offset = g.computed(
                f"{group.label}.smoothed.bias",
                size,
                beta,
                *([bias] if bias else []),
                detail=constants.digest,
            )
            return g.op(
                "LayerNormalization", norm.source, gamma, offset, axis=-1, epsilon=norm.epsilon
            )
        if constants.shift is not None:
            x = g.op("Sub", x, g.const(constants.shift))
        if constants.smooth is not None and constants.sink is None:
            x = g.op("Mul", x, g.const(1.0 / constants.smooth))
        return x

    def _quantized(
        self, g: OpBuilder, group: LinearGroup, constants: SmoothingConstants
    ) -> tuple[Value, Value, Value, Value]:
        """The smoothed input, its uint8 values, their float32 scale ``[batch, tokens, 1]`` and zero point.

        A row of zeros has scale 0: its values are whatever rounding NaN gives, times 0.
        """
        x, lower_bound = self._smoothed(g, group, constants), group.value.lower_bound
        suffix = "" if lower_bound is None else "_bounded"
        step = _constant(g, f"embedge.act_step{suffix}")
        zero_point = _constant(g, f"embedge.act_zero_point{suffix}")
        rows = x if x.factors is None else x.factors[1]

        def zero_points() -> Value:
            shape = g.op("Concat", g.op("Shape", rows, end=-1), g.const([1], "int64"), axis=0)
            return g.op("Expand", zero_point, shape)

        zeros = g.once(f"{zero_point}.{group.rows}", zero_points)
        width = group.linears[0].in_features(g.weights)
        rotation = input_rotation(g, group)
        if rotation is not None:
            and_product = constants.outliers is not None
            return *_rotated(
                g, x, rotation, step, zeros, width, and_product=and_product
            ), zero_point
        if lower_bound is None:
            call = g.op_n("QuantizeRows", 2, x, step, zeros, domain=DOMAIN, width=width)
        else:
            if constants.smooth is not None:
                lower_bound /= float(constants.smooth.min())
            floor = g.const(-lower_bound * _BOUNDED_RATIO)
            call = g.op_n("QuantizeRowsAbove", 2, x, floor, step, zeros, domain=DOMAIN, width=width)
        return x, call[0], call[1], zero_point

    # -- rounding -----------------------------------------------------------------------------------

    def smooth_hessian(self, g: OpBuilder, group: LinearGroup, hessian: FloatArray) -> None:
        constants, rotation = self.constants_of(group), input_rotation(g, group)
        if constants.smooth is not None:
            for row, divisor in enumerate(constants.smooth):  # mapped from a file: row by row
                hessian[row] /= divisor * constants.smooth
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
        hinv: FloatArray | None = None,
    ) -> Rounded:
        constants = self.constants_of(group)
        if constants.outliers is not None:
            weight[:, constants.outliers] = 0
        rotation = input_rotation(g, group)
        lost = None
        if hinv is None and rotation is None:
            result = int8.quantize_rows(weight, constants.smooth)
            values, scales, sqnr_db = result.values, result.scales, result.sqnr_db
        else:
            signal = float(np.square(weight).sum())
            if constants.smooth is not None:
                weight *= constants.smooth
            if rotation is not None:
                weight = rotate_blocks(weight, rotation)
            if hinv is None:
                result = int8.quantize_rows(weight)
                values, scales = result.values, result.scales
            else:
                values, scales = gptq.quantize_rows(weight, hinv)
            lost = weight - values * scales[:, None]
            own = lost if rotation is None else rotate_blocks(lost, rotation.T)
            own = own if constants.smooth is None else own / constants.smooth
            sqnr_db = int8.decibels(signal, float(np.square(own).sum()))
        output_scale = self._output_scale.get(linear.label)
        if output_scale is not None:
            scales = scales * output_scale
        arrays: list[NDArray[Any]] = [np.ascontiguousarray(values.T), scales]
        return Rounded(arrays=arrays, sqnr_db=sqnr_db, weight=weight, lost=lost)

    def weight(self, g: OpBuilder, group: LinearGroup, linear: LinearRef) -> LazyInitializer:
        constants = self.constants_of(group)
        specs = weight_specs(g, linear)
        noise: list[float] = []

        def compute() -> list[NDArray[Any]]:
            rounded = self.round(g, group, linear, linear.read(g.weights))
            noise[:] = [rounded.sqnr_db]
            return rounded.arrays

        def describe(arrays: Sequence[NDArray[Any]]) -> dict[str, Any]:
            facts: dict[str, Any] = {
                "name": specs[0].name,
                "shape": list(specs[0].shape),
                "format": f"int8 {self.method}",
            }
            if constants.outliers is not None:
                facts["float32_channels"] = len(constants.outliers)
            if noise:  # GPTQ, which stores values of its own, states it itself
                facts["sqnr_db"] = reported_db(noise[0])
            return facts

        folded = digest(self._output_scale.get(linear.label), input_rotation(g, group))
        return LazyInitializer(
            key=linear.key(g.weights, f"int8|{self.method}|{constants.digest}|{folded}"),
            owner=owner(g.weights, linear.weight),
            specs=specs,
            compute=compute,
            describe=describe,
        )

    def _weight(self, g: OpBuilder, group: LinearGroup, linear: LinearRef) -> list[Value]:
        """Initializers: the weight and its scales."""
        return g.initializer(self.weight(g, group, linear))


def _rotated(
    g: OpBuilder,
    product: Value,
    rotation: FloatArray,
    step: Value,
    zeros: Value,
    width: int,
    *,
    and_product: bool,
) -> tuple[Value, Value, Value]:
    """The product of a gated MLP, its blocks rotated and quantized: product, values and scale.

    Args:
        g: the graph.
        product: the product, whose node becomes part of the call.
        rotation: of each block, float32 ``[n, n]``.
        step: factor from a row's peak to its scale.
        zeros: a zero point for each row.
        width: of a row.
        and_product: whether the product is read besides.
    """
    assert product.factors is not None
    gate, up = product.factors
    g.take_back(product)
    silu = gate.node is not None and gate.node.op_type == "QuickGelu"
    outputs = g.op_n(
        f"QuantizeRotated{'SwiGLU' * silu}{'AndProduct' * and_product}",
        2 + and_product,
        g.take_back(gate).input[0] if silu else gate,
        up,
        g.const(rotation),
        g.const([0, 0, -1, len(rotation)], "int64"),
        step,
        zeros,
        domain=DOMAIN,
        width=width,
    )
    return outputs[2] if and_product else product, outputs[0], outputs[1]


def _constant(g: OpBuilder, name: str) -> Value:
    constant = ACTIVATION_CONSTANTS[name]
    return g.const(constant["full"], constant["dtype"], name=name)


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


__all__ = ["ACTIVATION_CONSTANTS", "Int8Scheme", "input_rotation", "weight_specs"]
