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

The steps ``1/127`` and ``1/235`` and the zero points are initializers of their own. On
processors whose u8×s8 products saturate in 16 bits the runtime replaces them by those of 7-bit
activations.

A scale per row is a block of :class:`QuantizeLinear` as wide as the row. ``MatMulIntegerToFloat`` takes
one too, ``[batch, tokens, 1]``, on the CPU (undocumented; a test holds it), but only without its bias
input, and its own kernel multiplies by it in one thread after the product. So where the product is
multiplied again anyway (``up`` of a gated MLP) its scale waits in :attr:`Graph.pending_row_scales` for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export.graph.builder import (
    CONTRIB,
    Graph,
    LazyInitializer,
    LinearGroup,
    LinearRef,
    ScaleSink,
    TensorSpec,
)
from embedge.export.graph.scheme import (
    Rounded,
    Scheme,
    bias_name,
    digest,
    in_features,
    out_features,
    read_linear,
    recipe_key,
    reported_db,
    weight_name,
)
from embedge.export.schemes.outlier_channels import beside, outliers
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


@dataclass(frozen=True, kw_only=True)
class SmoothingConstants:
    """Constants of one Linear input, the same for all tasks of a bundle.

    Attributes:
        shift: float32 ``[in]`` subtracted from the input, or ``None``.
        smooth: float32 ``[in]`` by which the input is divided, or ``None``.
        sink: the producer that takes ``1 / smooth`` into its scales, or ``None``.
        outliers: int64, channels that are multiplied in float32; ``smooth`` makes them vanish among
            the others, or ``None``.
    """

    shift: NDArray[np.float32] | None = None
    smooth: NDArray[np.float32] | None = None
    sink: ScaleSink | None = None
    outliers: NDArray[np.int64] | None = None

    @property
    def digest(self) -> str:
        """Identifies the constants in initializer keys."""
        return digest(self.shift, self.smooth, self.outliers)


NO_PLAN = SmoothingConstants()


class Int8Scheme(Scheme):
    """See the module's description.

    Args:
        plans: constants by the label of an input's first Linear; empty without calibration.
        method: "gptq" or "rtn", how weights are rounded; part of the initializer keys.
        table_bits: bits of embedding tables.
    """

    precision = "int8"
    devices = ("cpu",)
    rotates = True
    fused_attention = True
    functions = True

    def __init__(
        self, plans: Mapping[str, SmoothingConstants], method: str = "rtn", table_bits: int = 8
    ) -> None:
        self.method = method
        self._plans = plans
        self._table_bits = table_bits
        self._output_scale: dict[str, NDArray[np.float32]] = {}
        self.keep_plans(lambda label: True)

    def keep_plans(self, wanted: Callable[[str], bool]) -> None:
        """Forget the plans of inputs that other schemes read: nothing may be folded for those.

        Args:
            wanted: whether this scheme runs the Linears of an input, by the label of the first.
        """
        self._plans = {label: plan for label, plan in self._plans.items() if wanted(label)}
        self._output_scale = {
            plan.sink.lin.label: 1.0 / producer_channels(plan.smooth, plan.sink)
            for plan in self._plans.values()
            if plan.sink is not None and plan.smooth is not None
        }

    def linears(self, g: Graph, group: LinearGroup) -> list[str]:
        plan = self._plan(g, group)
        for lin in group.lins:
            if plan.shift is not None:
                g.input_shift[lin.label] = plan.shift
            if lin.label in self._output_scale:
                g.output_scale[lin.label] = self._output_scale[lin.label]
        x = self._smoothed(g, group.value, group.label, plan)
        lower_bound = group.lower_bound
        if lower_bound is not None and plan.smooth is not None:
            lower_bound /= float(plan.smooth.min())
        values, scale, zero_point = self._quantized(
            g, self._rotated(g, x, group), group, lower_bound
        )
        row_scale = g.pending_row_scales.get(group.value)
        if row_scale is not None:
            scale = g.op("Mul", scale, row_scale)
        products = []
        for lin in group.lins:
            weight, weight_scale = self._weight(g, group, lin)
            waits = lin == group.multiplied and not g.weights.has(bias_name(lin))
            waits = waits and plan.shift is None and plan.outliers is None
            rows = g.const(1.0) if waits else scale
            arguments = [values, weight, rows, weight_scale, zero_point]
            y = g.op("MatMulIntegerToFloat", *arguments, domain=CONTRIB, name=lin.label)
            if waits:
                g.pending_row_scales[y] = scale
            if plan.outliers is not None:
                rows_out = self._output_scale.get(lin.label)
                columns = outliers(g, x, lin, plan.outliers, columns=plan.smooth, rows=rows_out)
                y = beside(g, y, *columns, row_scale)
            products.append(y)
        return products

    def scales_rows(self, group: LinearGroup) -> bool:
        return group.gated

    def embedding(self, g: Graph, name: str, ids: str) -> str:
        from embedge.export.schemes.embedding_tables import quantized_rows

        return quantized_rows(g, name, ids, self._table_bits)

    def shifted_norm(self, g: Graph, x: str, bias: str) -> str | None:
        """The residual's norm with the bias in its own; the Linears read another norm anyway."""
        norm = g.norms.get(x)
        if norm is None or norm.rms or norm.bias is None:
            return None
        if not self._plans:
            return None  # without plans the Linears read x itself
        gamma = g.param(norm.weight)
        own, added = norm.bias, g.initializers[bias]
        owners = {g.owner(own), added.owner} - {BASE}
        beta = g.computed(
            f"{own}+{bias}",
            g.weights.shape(own),
            lambda: g.weights.read(own) + np.asarray(added.compute()[0], np.float32),
            own,
            detail=added.key,
            owner=owners.pop() if owners else BASE,
        )
        return g.op("LayerNormalization", norm.source, gamma, beta, axis=-1, epsilon=norm.epsilon)

    # -- pieces -------------------------------------------------------------------------------------

    def _smoothed(self, g: Graph, x: str, label: str, plan: SmoothingConstants) -> str:
        """``(x - shift) / smooth``, by the cheapest way there is."""
        if plan.smooth is None and plan.shift is None:
            return x
        smooth = np.float32(1) if plan.smooth is None else plan.smooth
        shift = np.float32(0) if plan.shift is None else plan.shift
        norm = g.norms.get(x)
        if norm is not None:
            weight, bias = norm.weight, norm.bias
            size = g.weights.shape(weight)
            gamma = g.computed(
                f"{label}.smoothed.weight",
                size,
                lambda: g.weights.read(weight) / smooth,
                weight,
                detail=plan.digest,
            )
            if norm.rms:
                return g.op("RMSNormalization", norm.source, gamma, axis=-1, epsilon=norm.epsilon)

            def beta() -> NDArray[np.float32]:
                own = g.weights.read(bias) if bias else np.zeros(size, np.float32)
                return ((own - shift) / smooth).astype(np.float32)

            offset = g.computed(
                f"{label}.smoothed.bias", size, beta, *([bias] if bias else []), detail=plan.digest
            )
            return g.op(
                "LayerNormalization", norm.source, gamma, offset, axis=-1, epsilon=norm.epsilon
            )
        if plan.shift is not None:
            x = g.op("Sub", x, g.const(plan.shift))
        if plan.smooth is not None and plan.sink is None:
            x = g.op("Mul", x, g.const(1.0 / plan.smooth))
        return x

    def _quantized(
        self, g: Graph, x: str, group: LinearGroup, lower_bound: float | None
    ) -> tuple[str, str, str]:
        """``(uint8 values, float32 scale [batch, tokens, 1], uint8 zero point)``.

        A row of zeros has scale 0: its values are whatever rounding NaN gives, times 0.
        """
        axis = g.const([-1], "int64")
        suffix = "" if lower_bound is None else "_bounded"
        step = _constant(g, f"embedge.act_step{suffix}")
        zero_point = _constant(g, f"embedge.act_zero_point{suffix}")
        if lower_bound is None:
            peak = g.op("ReduceMax", g.op("Abs", x), axis, keepdims=1)
        else:
            peak = g.op("ReduceMax", x, axis, keepdims=1)
            peak = g.op("Max", peak, g.const(-lower_bound * _BOUNDED_RATIO))
        scale = g.op("Mul", peak, step)
        shared = f"{zero_point}.{group.rows}"
        if shared not in g.shared:
            rows = g.op("Concat", g.op("Shape", x, end=-1), g.const([1], "int64"), axis=0)
            g.shared[shared] = g.op("Expand", zero_point, rows)
        width = in_features(g, group.lins[0])
        values = g.op("QuantizeLinear", x, scale, g.shared[shared], axis=-1, block_size=width)
        return values, scale, zero_point

    def _rotated(self, g: Graph, x: str, group: LinearGroup) -> str:
        """The input with its blocks rotated, where :func:`input_rotation` says so."""
        rotation = input_rotation(g, group)
        if rotation is None:
            return x
        blocks = g.op("Reshape", x, g.const([0, 0, -1, len(rotation)], "int64"))
        return g.op(
            "Reshape", g.op("MatMul", blocks, g.const(rotation)), g.const([0, 0, -1], "int64")
        )

    def _plan(self, g: Graph, group: LinearGroup) -> SmoothingConstants:
        plan = self._plans.get(group.label, NO_PLAN)
        if plan.sink is not None and plan.sink.lin.label not in g.output_scale:
            return NO_PLAN  # the producer is kept at another precision and was not scaled
        return plan

    # -- rounding -----------------------------------------------------------------------------------

    def smooth_hessian(self, g: Graph, group: LinearGroup, hessian: NDArray[np.float32]) -> None:
        """Turn ``Σ x xᵀ`` of a Linear input into that of what is quantized, in place."""
        plan = self._plan(g, group)
        if plan.smooth is not None:
            for row, divisor in enumerate(plan.smooth):  # mapped from a file: row by row
                hessian[row] /= divisor * plan.smooth
        if plan.outliers is not None:
            hessian[plan.outliers] = 0
            hessian[:, plan.outliers] = 0
        rotation = input_rotation(g, group)
        if rotation is not None:
            size = len(rotation)
            for row in range(0, len(hessian), size):
                block = rotation.T @ hessian[row : row + size]
                hessian[row : row + size] = rotate_blocks(block, rotation)

    def round(
        self,
        g: Graph,
        group: LinearGroup,
        lin: LinearRef,
        weight: NDArray[np.float32],
        hinv: NDArray[np.float32] | None = None,
    ) -> Rounded:
        """Quantize one of the Linears that share an input, to nearest or by GPTQ.

        Args:
            g: the graph that the Linear is in.
            group: the input.
            lin: one of the Linears that read it.
            weight: its merged weight, float32 ``[out, in]``, which may be changed.
            hinv: what :func:`embedge.quant.gptq.inverse_cholesky` made of the smoothed Hessian.
        """
        plan = self._plan(g, group)
        if plan.outliers is not None:
            weight[:, plan.outliers] = 0
        rotation = input_rotation(g, group)
        lost = None
        if hinv is None and rotation is None:
            result = int8.quantize_rows(weight, plan.smooth)
            values, scales, sqnr_db = result.values, result.scales, result.sqnr_db
        else:
            signal = float(np.square(weight).sum())
            if plan.smooth is not None:
                weight *= plan.smooth
            if rotation is not None:
                weight = rotate_blocks(weight, rotation)
            if hinv is None:
                result = int8.quantize_rows(weight)
                values, scales = result.values, result.scales
            else:
                values, scales = gptq.quantize_rows(weight, hinv)
            lost = weight - values * scales[:, None]
            own = lost if rotation is None else rotate_blocks(lost, rotation.T)
            own = own if plan.smooth is None else own / plan.smooth
            sqnr_db = int8.decibels(signal, float(np.square(own).sum()))
        output_scale = self._output_scale.get(lin.label)
        if output_scale is not None:
            scales = scales * output_scale
        arrays: list[NDArray[Any]] = [np.ascontiguousarray(values.T), scales]
        return Rounded(arrays=arrays, sqnr_db=sqnr_db, weight=weight, lost=lost)

    def _weight(self, g: Graph, group: LinearGroup, lin: LinearRef) -> list[str]:
        """Initializers: the weight and its scales."""
        return g.initializer(self.weight_recipe(g, group, lin))

    def weight_recipe(self, g: Graph, group: LinearGroup, lin: LinearRef) -> LazyInitializer:
        """The initializer of one of the Linears that share an input; its ``compute`` rounds to nearest."""
        plan = self._plan(g, group)
        noise: list[float] = []

        def compute() -> list[NDArray[Any]]:
            rounded = self.round(g, group, lin, read_linear(g, lin))
            noise[:] = [rounded.sqnr_db]
            return rounded.arrays

        def describe(arrays: Sequence[NDArray[Any]]) -> dict[str, Any]:
            facts: dict[str, Any] = {
                "name": f"{lin.label}.weight",
                "shape": [in_features(g, lin), out_features(g, lin)],
                "format": f"int8 {self.method}",
            }
            if plan.outliers is not None:
                facts["float32_channels"] = len(plan.outliers)
            if noise:  # GPTQ, which stores values of its own, states it itself
                facts["sqnr_db"] = reported_db(noise[0])
            return facts

        specs = weight_specs(g, lin)
        constants = digest(self._output_scale.get(lin.label), input_rotation(g, group))
        key = recipe_key(g, lin, f"int8|{self.method}|{plan.digest}|{constants}")
        owner = g.owner(weight_name(lin))
        return LazyInitializer(
            key=key, owner=owner, specs=specs, compute=compute, describe=describe
        )


def _constant(g: Graph, name: str) -> str:
    return g.const(
        ACTIVATION_CONSTANTS[name]["full"], ACTIVATION_CONSTANTS[name]["dtype"], name=name
    )


def input_rotation(g: Graph, group: LinearGroup) -> NDArray[np.float32] | None:
    """What the blocks of an input are multiplied by, float32 ``[n, n]``; ``None``: nothing."""
    return block_rotation(in_features(g, group.lins[0])) if group.gated else None


def weight_specs(g: Graph, lin: LinearRef) -> tuple[TensorSpec, ...]:
    """The initializers of a Linear: int8 ``[in, out]`` and float32 ``[out]``."""
    rows, columns = out_features(g, lin), in_features(g, lin)
    weight = TensorSpec(
        name=f"{lin.label}.weight", elem_type=TensorProto.INT8, shape=(columns, rows)
    )
    return weight, TensorSpec(
        name=f"{lin.label}.scales", elem_type=TensorProto.FLOAT, shape=(rows,)
    )


def producer_channels(smooth: NDArray[np.float32], sink: ScaleSink) -> NDArray[np.float32]:
    """A consumer's per-channel smoothing as one value per producer channel.

    Under grouped-query attention one value channel feeds a channel of several query heads; the plan
    gives those one common value.
    """
    if sink.groups is None:
        return smooth
    kv_heads, repeat, head_size = sink.groups
    shared: NDArray[np.float32] = smooth.reshape(kv_heads, repeat, head_size)[:, 0].reshape(-1)
    return shared


__all__ = [
    "ACTIVATION_CONSTANTS",
    "Int8Scheme",
    "SmoothingConstants",
    "input_rotation",
    "weight_specs",
]
