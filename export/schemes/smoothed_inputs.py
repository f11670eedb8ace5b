"""Shift and smoothing of a Linear's input, by the cheapest way there is.

A norm is asked for a second time with them in its parameters. The residual's copy is then read by the residual
alone, so that it can carry the bias of the Linear behind it.
"""

from __future__ import annotations

import numpy as np

from embedge.export.graph.ops import OpBuilder
from embedge.export.graph.values import FloatArray, LinearGroup, Value, owner
from embedge.export.schemes.smoothing_constants import SmoothingConstants
from embedge.export.weights.tensors import BASE

__all__ = ["divide_hessian", "norm_with_bias", "smoothed"]


def smoothed(g: OpBuilder, group: LinearGroup, constants: SmoothingConstants) -> Value:
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
        return g.op("LayerNormalization", norm.source, gamma, offset, axis=-1, epsilon=norm.epsilon)
    if constants.shift is not None:
        x = g.op("Sub", x, g.const(constants.shift))
    if constants.smooth is not None and constants.sink is None:
        x = g.op("Mul", x, g.const(1.0 / constants.smooth))
    return x


def norm_with_bias(g: OpBuilder, x: Value, bias: str) -> Value | None:
    """A norm's result plus a bias that is in the norm's own, or ``None`` where ``x`` is of no such norm.

    Args:
        g: the graph.
        x: the value.
        bias: initializer, float32 of the norm's width.
    """
    norm = x.norm
    if norm is None or norm.rms or norm.bias is None:
        return None
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


def divide_hessian(hessian: FloatArray, smooth: FloatArray) -> None:
    """Make float32 ``[in, in]`` ``Σ x xᵀ`` that of inputs divided by ``smooth``, in place."""
    for row, divisor in enumerate(smooth):  # mapped from a file: row by row
        hessian[row] /= divisor * smooth
