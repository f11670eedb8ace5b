"""Fitting the branches of a task: what its weights have and the stored ones lack, by its own activations.

The arithmetic of one input is in ``quant/branch.py``. As for GPTQ, an input's Hessian is ``Σ x xᵀ`` over the tokens
that reach it in the unquantized model, here with the task's adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.export.calibration.gptq import input_factor
from embedge.export.calibration.layers import calibrate
from embedge.export.calibration.statistics import InputStatistics
from embedge.export.calibration.tokens import TokenBatch
from embedge.export.graph.architecture import Architecture
from embedge.export.graph.builder import Graph
from embedge.export.graph.initializers import LazyInitializer
from embedge.export.graph.scheme import BranchedScheme, Scheme
from embedge.export.graph.values import LinearGroup
from embedge.export.schemes.branch import branch_initializer, branch_tensors, fit_branch
from embedge.export.weights.tensors import Weights

__all__ = ["Fitted", "branch_initializers", "fit_branches"]

Fitted = tuple[LazyInitializer, Sequence[NDArray[Any]]]
"""What is stored of an input's branch, and its tensors."""


def branch_initializers(g: Graph, scheme: Scheme) -> dict[str, LazyInitializer]:
    """The branches of a graph, by the label of their input."""
    return {
        label: branch_initializer(g, group, of)
        for label, group in g.linear_groups.items()
        if (of := scheme.branched(group)) is not None
    }


def fit_branches(
    architecture: Architecture,
    weights: Weights,
    g: Graph,
    scheme: Scheme,
    batches: Sequence[TokenBatch],
    stored: Callable[[LazyInitializer], Sequence[NDArray[Any]]],
    *,
    wanted: Collection[str] | None = None,
    scratch: Path,
    report: Callable[[int], None],
) -> Iterator[Fitted]:
    """Fit the branches of a task's graph, layer by layer; one layer's weights are held.

    Args:
        architecture: the model.
        weights: the task's tensors.
        g: the task's graph.
        scheme: its precision.
        batches: calibration tokens, at least one.
        stored: gives the tensors of an initializer of :meth:`BranchedScheme.weight`.
        wanted: keys of the branches to fit; ``None``: all.
        scratch: folder for a layer's weights.
        report: takes the number of each layer that was run.

    Raises:
        CheckpointError: inputs are not finite, or a Hessian is not positive definite.
    """
    initializers = {
        label: initializer
        for label, initializer in branch_initializers(g, scheme).items()
        if wanted is None or initializer.key in wanted
    }
    passes = calibrate(
        architecture,
        weights,
        batches,
        scratch=scratch,
        wants_hessian=lambda group: group.label in initializers,
    )
    for index, statistics in passes:
        report(index + 1)
        for label, value in statistics.items():
            group = g.linear_groups[label]
            of = scheme.branched(group)
            if of is not None and label in initializers:
                yield initializers[label], _fitted(g, group, of, value, stored)
            value.matrices.clear()


def _fitted(
    g: Graph,
    group: LinearGroup,
    scheme: BranchedScheme,
    statistics: InputStatistics,
    stored: Callable[[LazyInitializer], Sequence[NDArray[Any]]],
) -> list[NDArray[Any]]:
    """The branch of an input, with its Hessian."""
    factor = input_factor(g, group, scheme, statistics, "a branch cannot be fitted here")
    lost = [
        scheme.lost(
            linear,
            scheme.for_input(g, group, np.array(matrix.T, order="C")),
            stored(scheme.weight(g, group, linear)),
        )
        for linear, matrix in zip(group.linears, statistics.matrices, strict=True)
    ]
    fitted = fit_branch(group, scheme, lost, factor)
    return branch_tensors(group, scheme, fitted, [len(part) for part in lost])
