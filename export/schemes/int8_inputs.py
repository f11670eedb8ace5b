"""The inputs of int8 Linears: smoothed by constants, then quantized row by row."""

from __future__ import annotations

from typing import Any, NamedTuple

from embedge.export.graph.ops import DOMAIN, OpBuilder
from embedge.export.graph.values import FloatArray, LinearGroup, Value
from embedge.export.schemes.smoothed_inputs import smoothed
from embedge.export.schemes.smoothing_constants import SmoothingConstants

__all__ = [
    "ACTIVATION_CONSTANTS",
    "Int8Input",
    "int8_input",
    "quantized_rows_of",
    "row_zero_points",
]

ACTIVATION_CONSTANTS: dict[str, dict[str, Any]] = {
    "embedge.act_step": {"dtype": "float32", "full": 1 / 127, "reduced": 1 / 63},
    "embedge.act_zero_point": {"dtype": "uint8", "full": 128, "reduced": 64},
    "embedge.act_step_bounded": {"dtype": "float32", "full": 1 / 235, "reduced": 2 / 235},
    "embedge.act_zero_point_bounded": {"dtype": "uint8", "full": 20, "reduced": 10},
}
_BOUNDED_RATIO = 235 / 20  # levels above zero per level below, at either width


class Int8Input(NamedTuple):
    """A Linear input as integers.

    Attributes:
        exact: float32, the smoothed input itself.
        values: uint8, of the input's shape.
        scale: float32 ``[batch, tokens, 1]``.
        zero_point: uint8 scalar.
    """

    exact: Value
    values: Value
    scale: Value
    zero_point: Value


def int8_input(
    g: OpBuilder, group: LinearGroup, constants: SmoothingConstants, rotation: FloatArray | None
) -> Int8Input:
    """Write an input's integers; of a row of zeros, whose scale is 0, they stand for nothing.

    Args:
        g: the graph.
        group: the input.
        constants: what it is smoothed by.
        rotation: by which each block of a gated product is multiplied, float32 ``[n, n]``, or ``None``.
    """
    x, lower_bound = smoothed(g, group, constants), group.value.lower_bound
    suffix = "" if lower_bound is None else "_bounded"
    step = _constant(g, f"embedge.act_step{suffix}")
    zero_point = _constant(g, f"embedge.act_zero_point{suffix}")
    rows = x if x.factors is None else x.factors[1]

    zeros = row_zero_points(g, group, rows, zero_point)
    options: dict[str, Any] = {
        "domain": DOMAIN,
        "width": group.linears[0].in_features(g.weights),
    }
    if rotation is not None:
        blocks = g.const(rotation), g.const([0, 0, -1, len(rotation)], "int64")
        and_product = constants.outliers is not None
        function, factors = _gated(g, x)
        values, scale, *product = g.op_n(
            f"{function}{'AndProduct' * and_product}",
            2 + and_product,
            *(*factors, *blocks, step, zeros),
            **options,
        )
        return Int8Input(product[0] if product else x, values, scale, zero_point)
    if lower_bound is None:
        values, scale = g.op_n("QuantizeRows", 2, x, step, zeros, **options)
    else:
        if constants.smooth is not None:
            lower_bound /= float(constants.smooth.min())
        floor = g.const(-lower_bound * _BOUNDED_RATIO)
        values, scale = g.op_n("QuantizeRowsAbove", 2, x, floor, step, zeros, **options)
    return Int8Input(x, values, scale, zero_point)


def row_zero_points(g: OpBuilder, group: LinearGroup, rows: Value, zero_point: Value) -> Value:
    """A zero point for each row of an input, ``[batch, tokens, 1]``; written once for all inputs.

    Args:
        g: the graph.
        group: the input.
        rows: a value with its rows.
        zero_point: uint8 scalar.
    """

    def write() -> Value:
        shape = g.op("Concat", g.op("Shape", rows, end=-1), g.const([1], "int64"), axis=0)
        return g.op("Expand", zero_point, shape)

    return g.once(f"{zero_point}.{group.rows}", write)


def quantized_rows_of(g: OpBuilder, group: LinearGroup, x: Value) -> tuple[Value, Value, Value]:
    """A value's rows as integers: values, scales and zero point as in :class:`Int8Input`.

    Args:
        g: the graph.
        group: the input whose rows the value has.
        x: float32 ``[batch, tokens, in]``.
    """
    step, zero_point = g.const(1 / 127), g.const(128, "uint8")
    zeros = row_zero_points(g, group, x, zero_point)
    width = group.linears[0].in_features(g.weights)
    values, scale = g.op_n("QuantizeRows", 2, x, step, zeros, domain=DOMAIN, width=width)
    return values, scale, zero_point


def _gated(g: OpBuilder, product: Value) -> tuple[str, tuple[str, str]]:
    """The function that multiplies, rotates and quantizes, and what it multiplies; it replaces the nodes."""
    assert product.factors is not None
    gate, up = product.factors
    g.take_back(product)
    if gate.node is None or gate.node.op_type != "QuickGelu":
        return "QuantizeRotated", (gate, up)
    return "QuantizeRotatedSwiGLU", (g.take_back(gate).input[0], up)


def _constant(g: OpBuilder, name: str) -> Value:
    constant = ACTIVATION_CONSTANTS[name]
    return g.const(constant["full"], constant["dtype"], name=name)
