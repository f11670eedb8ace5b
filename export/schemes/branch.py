"""The low-rank branch beside quantized Linears that share an input.

``y = x'·W_q + (x'·down)·up``: what quantization lost of a weight, and in the layout "shared" what the task's
adapter adds to the backbone's, as far as so many ranks hold it. The fit is QERA's (arXiv 2410.06040), in
:mod:`embedge.quant.branch`. ``x'`` is the input as it is quantized, so both products are of 8-bit integers, and one
``down`` serves all Linears of an input (query, key and value; gate and up).

Values of ``down`` and ``up`` have 7 bits, so that no two products exceed 16 bits together. They lie in the kernels'
panels (``runtime/kernels/native/README.md``), which read them where they are: they may be inputs of a graph.

Operators of an input (functions and their bodies: ``graph/fused_ops.py``):
    ``BranchRows``                    ``x'·down``, whose rows are quantized in their turn
    ``MatMulIntegerToFloatBranch``    a Linear's product and the branch's, at int8; ``…Add`` and ``…Sub``
    ``MatMulNBitsBranch``             the same at int4
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export.graph.initializers import LazyInitializer, TensorSpec
from embedge.export.graph.ops import DOMAIN, OpBuilder
from embedge.export.graph.scheme import BranchedScheme, BranchRanks
from embedge.export.graph.values import FloatArray, LinearGroup, LinearRef, Value, owner
from embedge.export.schemes.int8_inputs import row_zero_points
from embedge.export.weights.task import TaskWeights
from embedge.quant import branch
from embedge.runtime.bundle.task_tensors import TaskTensors
from embedge.runtime.errors import EmbedgeValueError

__all__ = [
    "BranchInput",
    "branch_initializer",
    "branch_input",
    "branch_tensors",
    "default_branch_rank",
    "fit_branch",
    "joint_rank",
    "padded_rank",
    "ranks_of",
]

_COLUMNS, _ROWS = 16, 4  # of a panel's line
_NARROW = 512  # hidden size


def default_branch_rank(hidden_size: int, precision: str) -> int:
    """Columns of a branch where the user names none, see lab notes 58 and 67."""
    at_8_bits, at_4_bits = (16, 64) if hidden_size < _NARROW else (32, 96)
    return at_8_bits if precision == "int8" else at_4_bits


def ranks_of(tensors: TaskTensors, least: int) -> BranchRanks:
    """The ranks of a shared graph, by what a task brings to it.

    Args:
        tensors: of one of its tasks.
        least: of any input.
    """
    end = ".branch_down_scale"
    ranks = {
        n.removesuffix(end): len(array) for n, array in tensors.arrays.items() if n.endswith(end)
    }
    return BranchRanks(least=least, larger={n: r for n, r in ranks.items() if r > least})


def joint_rank(weights: TaskWeights, group: LinearGroup) -> int:
    """The rank that a branch needs to hold what a task's adapter adds to the Linears of an input."""
    return sum(weights.rank(name) for name in {linear.weight for linear in group.linears})


def padded_rank(rank: int) -> int:
    """The smallest number of columns, whole panels of them, for a product of a rank."""
    return -(-rank // _COLUMNS) * _COLUMNS


@dataclass(frozen=True, kw_only=True)
class BranchInput:
    """What the branch makes of an input.

    Attributes:
        rows: what a product takes of it: uint8 ``[batch, tokens, rank]``, their float32 ``[batch, tokens, 1]``
            scales, and the zero point.
        up: by Linear, its int8 panels and their float32 ``[out]`` scales.
    """

    rows: tuple[Value, Value, Value]
    up: Mapping[LinearRef, tuple[Value, Value]]

    def operands(self, linear: LinearRef) -> tuple[Value, ...]:
        """What the function of a Linear's product takes last."""
        return (*self.rows, *self.up[linear])


def branch_input(
    g: OpBuilder,
    group: LinearGroup,
    scheme: BranchedScheme,
    values: Value,
    scale: Value,
    zero_point: Value,
) -> BranchInput:
    """Write an input's branch.

    Args:
        g: the graph.
        group: the input.
        scheme: that of its Linears.
        values: uint8 ``[batch, tokens, in]``, the quantized input.
        scale: float32 ``[batch, tokens, 1]``.
        zero_point: uint8 scalar.
    """
    down, down_scale, *ups = g.initializer(branch_initializer(g, group, scheme), by_task=True)
    step, middle = g.const(1 / 127), g.const(128, "uint8")
    zeros = row_zero_points(g, group, values, middle)
    rows, row_scale = g.op_n(
        "BranchRows",
        2,
        *(values, scale, zero_point, down, down_scale, step, zeros),
        domain=DOMAIN,
        width=scheme.branch_ranks.of(group.label),
    )
    pairs = zip(ups[::2], ups[1::2], strict=True)
    return BranchInput(
        rows=(rows, row_scale, middle), up=dict(zip(group.linears, pairs, strict=True))
    )


def branch_initializer(g: OpBuilder, group: LinearGroup, scheme: BranchedScheme) -> LazyInitializer:
    """The tensors of an input's branch: ``down`` and its scales, and for each Linear ``up`` and its scales.

    Its ``compute`` is the data-free fit, to weights that are rounded to nearest.

    Raises:
        EmbedgeValueError: a Linear has channels that do not fill lines of panels.
    """
    rank, depth = scheme.branch_ranks.of(group.label), group.linears[0].in_features(g.weights)
    _check_sizes(g, group)

    def spec(name: str, elem_type: int, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, elem_type=elem_type, shape=shape)

    int8, float32 = TensorProto.INT8, TensorProto.FLOAT
    label = group.label
    specs = [
        spec(f"{label}.branch_down", int8, rank // _COLUMNS, depth // _ROWS, _COLUMNS, _ROWS),
        spec(f"{label}.branch_down_scale", float32, rank),
    ]
    for linear in group.linears:
        name, size = linear.label, linear.out_features(g.weights)
        shape = size // _COLUMNS, rank // _ROWS, _COLUMNS, _ROWS
        specs += [
            spec(f"{name}.branch_up", int8, *shape),
            spec(f"{name}.branch_up_scale", float32, size),
        ]

    def compute() -> list[NDArray[Any]]:
        lost = []
        for linear in group.linears:
            stored = scheme.round(g, group, linear, linear.read(g.stored)).arrays
            weight = scheme.for_input(g, group, linear.read(g.weights))
            lost.append(scheme.lost(linear, weight, stored))
        fitted = fit_branch(group, scheme, lost, None)
        return branch_tensors(group, scheme, fitted, [len(part) for part in lost])

    stored = ",".join(scheme.weight(g, group, linear).key for linear in group.linears)
    merged = ",".join(linear.key(g.weights, "") for linear in group.linears)
    return LazyInitializer(
        key=f"{label}.branch|{rank}|{stored}|{merged}",
        owner=owner(g.weights, *(linear.weight for linear in group.linears)),
        specs=tuple(specs),
        compute=compute,
    )


def fit_branch(
    group: LinearGroup,
    scheme: BranchedScheme,
    lost: Sequence[FloatArray],
    factor: FloatArray | None,
) -> branch.QuantizedBranch:
    """The best branch of an input, rounded; ``up`` has the Linears' columns beside each other.

    Args:
        group: the input.
        scheme: that of its Linears.
        lost: of each Linear, see :meth:`BranchedScheme.lost`.
        factor: what :func:`embedge.quant.gptq.cholesky` made of the smoothed Hessian; ``None``: no calibration.
    """
    error = np.concatenate(lost) if len(lost) > 1 else lost[0]
    return branch.quantize(*branch.fit(error, factor, scheme.branch_ranks.of(group.label)))


def branch_tensors(
    group: LinearGroup,
    scheme: BranchedScheme,
    fitted: branch.QuantizedBranch,
    sizes: Sequence[int],
) -> list[NDArray[Any]]:
    """What is stored of a branch, the tensors of :func:`branch_initializer`.

    Args:
        group: the input.
        scheme: that of its Linears.
        fitted: from :func:`fit_branch`.
        sizes: output channels of the Linears.
    """
    arrays: list[NDArray[Any]] = [branch.panels_of(fitted.down), fitted.down_scale]
    start = 0
    for linear, size in zip(group.linears, sizes, strict=True):
        rows = slice(start, start + size)
        factors, scale = scheme.row_factors(linear), fitted.up_scale[rows]
        arrays += [
            branch.panels_of(np.ascontiguousarray(fitted.up[:, rows])),
            scale if factors is None else scale * factors,
        ]
        start = rows.stop
    return arrays


def _check_sizes(g: OpBuilder, group: LinearGroup) -> None:
    for linear in group.linears:
        rows, columns = linear.out_features(g.weights), linear.in_features(g.weights)
        if rows % _COLUMNS or columns % _ROWS:
            raise EmbedgeValueError(
                f"{linear.label}: a branch needs output channels that are a multiple of {_COLUMNS} and input "
                f"channels that are one of {_ROWS}, found {rows} and {columns}; leave --branch-rank and "
                "--layout shared out"
            )
