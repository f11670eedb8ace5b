"""GPTQ over a model: each layer's Hessians from calibration tokens, and its weights rounded with them.

The arithmetic of one weight is in ``quant/gptq.py``. An input's Hessian is ``Σ x xᵀ`` over the tokens that
reach it in the unquantized model, so the order of the layers changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.export.calibration.layers import calibrate
from embedge.export.calibration.statistics import InputStatistics
from embedge.export.calibration.tokens import TokenBatch
from embedge.export.errors import CheckpointError
from embedge.export.graph.architecture import Architecture
from embedge.export.graph.builder import Graph
from embedge.export.graph.initializers import LazyInitializer
from embedge.export.graph.scheme import BranchedScheme, Rounded, RoundingScheme, Scheme, reported_db
from embedge.export.graph.values import LinearGroup, LinearRef
from embedge.export.schemes.branch import branch_tensors, fit_branch
from embedge.export.weights.tensors import Weights
from embedge.quant import gptq

Quantized = tuple[LazyInitializer, Sequence[NDArray[Any]], dict[str, Any]]
"""What is stored of a Linear or a branch, its tensors, and further columns of the layer report."""

_TURNS = 2  # of rounding to what a branch leaves; a third gains .5 % (lab note 67)


@dataclass(frozen=True, kw_only=True)
class GptqLinear:
    """A Linear that GPTQ rounds.

    Attributes:
        group: its input.
        linear: the Linear.
        scheme: what rounds it.
        initializer: what is stored of it.
    """

    group: LinearGroup
    linear: LinearRef
    scheme: RoundingScheme
    initializer: LazyInitializer


def gptq_linears(g: Graph, scheme: Scheme) -> list[GptqLinear]:
    """The Linears of a graph that a precision's scheme rounds by GPTQ, in the graph's order."""
    return [
        GptqLinear(
            group=group,
            linear=linear,
            scheme=rounding,
            initializer=rounding.weight(g, group, linear),
        )
        for group in g.linear_groups.values()
        if (rounding := scheme.gptq(group)) is not None
        for linear in group.linears
    ]


def quantize(
    architecture: Architecture,
    weights: Weights,
    g: Graph,
    batches: Sequence[TokenBatch],
    linears: Sequence[GptqLinear],
    *,
    scheme: Scheme,
    scratch: Path,
    report: Callable[[int], None],
    branches: Mapping[str, LazyInitializer] | None = None,
) -> Iterator[Quantized]:
    """Round Linears of a graph by GPTQ, layer by layer; one layer's weights are held.

    Args:
        architecture: the model.
        weights: the tensors to run: a task's, or the backbone's; the Linears' are the same in both.
        g: the task's graph.
        batches: calibration tokens.
        linears: those to round, from :func:`gptq_linears`.
        scheme: the precision.
        scratch: folder for a layer's weights.
        report: takes the number of each layer that was run.
        branches: those that are fitted in turns with all Linears of their input, by its label.

    Raises:
        CheckpointError: inputs are not finite, or a Hessian is not positive definite.
    """
    branches = branches or {}
    wanted = {label: list(of) for label, of in groupby(linears, lambda linear: linear.group.label)}
    passes = calibrate(
        architecture,
        weights,
        batches,
        scratch=scratch,
        wants_hessian=lambda group: group.label in wanted,
    )
    for index, statistics in passes:
        report(index + 1)
        for label, value in statistics.items():
            of = scheme.branched(value.group) if label in branches else None
            if of is not None:
                yield from _quantize_with_branch(g, wanted[label], of, branches[label], value)
            elif label in wanted:
                yield from _quantize_group(g, wanted[label], value)
            value.matrices.clear()


def _quantize_group(
    g: Graph, linears: Sequence[GptqLinear], statistics: InputStatistics
) -> Iterator[Quantized]:
    """Round Linears that share an input, with its Hessian."""
    first = linears[0]
    factor = input_factor(g, first.group, first.scheme, statistics, "GPTQ is not possible here")
    matrices = dict(zip(first.group.linears, statistics.matrices, strict=True))
    for item in linears:
        weight = np.array(matrices[item.linear].T, order="C")
        rounded = item.scheme.round(g, item.group, item.linear, weight, factor)
        del weight
        facts = {
            "sqnr_db": reported_db(rounded.sqnr_db),
            "output_error": _output_error(rounded, factor),
        }
        arrays = rounded.arrays
        del rounded  # the next weight is as large
        if item is linears[-1]:
            del factor
        yield item.initializer, arrays, facts
        del arrays


def _quantize_with_branch(
    g: Graph,
    linears: Sequence[GptqLinear],
    scheme: BranchedScheme,
    initializer: LazyInitializer,
    statistics: InputStatistics,
) -> Iterator[Quantized]:
    """Round Linears that share an input, and fit their branch, in turns: each to what the other leaves."""
    group = linears[0].group
    factor = input_factor(g, group, scheme, statistics, "GPTQ is not possible here")
    weights, stored = [], []
    for linear, matrix in zip(group.linears, statistics.matrices, strict=True):
        rounded = scheme.round(g, group, linear, np.array(matrix.T, order="C"), factor)
        weights.append(rounded.weight)
        stored.append(rounded.arrays)
        del rounded

    def lost() -> list[NDArray[np.float32]]:
        parts = zip(group.linears, weights, stored, strict=True)
        return [scheme.lost(linear, weight, arrays) for linear, weight, arrays in parts]

    stops = np.cumsum([len(weight) for weight in weights])
    fitted = fit_branch(group, scheme, lost(), factor)
    for _ in range(_TURNS):
        held = np.split(fitted.restored(), stops[:-1])
        stored = [
            scheme.refined(linear, weight - part, arrays, factor)
            for linear, weight, part, arrays in zip(
                group.linears, weights, held, stored, strict=True
            )
        ]
        fitted = fit_branch(group, scheme, lost(), factor)
    held = np.split(fitted.restored(), stops[:-1])
    for item, weight, part, left, arrays in zip(
        linears, weights, held, lost(), stored, strict=True
    ):
        noise, signal = gptq.energy(left - part, factor), gptq.energy(weight, factor)
        yield item.initializer, arrays, {"output_error": _share(noise, signal)}
    yield initializer, branch_tensors(group, scheme, fitted, [len(w) for w in weights]), {}


def input_factor(
    g: Graph, group: LinearGroup, scheme: RoundingScheme, statistics: InputStatistics, failure: str
) -> NDArray[np.float32]:
    """What :func:`embedge.quant.gptq.cholesky` makes of the Hessian of an input as it is quantized.

    Args:
        g: the graph that the input is in.
        group: the input.
        scheme: that of its Linears.
        statistics: of the input; its Hessian is used up.
        failure: what is not possible then, for the message.

    Raises:
        CheckpointError: the Hessian is not positive definite.
    """
    shift = scheme.input_shift(group)
    if shift is not None:
        statistics.shift(shift)
    hessian, statistics.hessian = statistics.hessian, None
    assert hessian is not None
    scheme.smooth_hessian(g, group, hessian)
    try:
        return gptq.cholesky(hessian, scheme.damping)
    except ArithmeticError as problem:
        raise CheckpointError(f"{group.label}: {failure}: {problem}") from problem


def _output_error(rounded: Rounded, factor: NDArray[np.float32]) -> float:
    """``‖(W - W_q)·X‖ / ‖W·X‖`` over the calibration tokens."""
    signal = gptq.energy(rounded.weight, factor)
    return _share(rounded.noise, signal)


def _share(noise: float, signal: float) -> float:
    return round(float(np.sqrt(noise / signal)), 6) if signal > 0 else 0.0
