"""Filling a precision's weight files with what a graph needs and no graph before it has stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from embedge.export.calibration.branches import branch_initializers
from embedge.export.calibration.gptq import GptqLinear, gptq_linears, quantize
from embedge.export.calibration.tokens import TokenBatch
from embedge.export.graph.builder import Graph
from embedge.export.graph.initializers import LazyInitializer
from embedge.export.graph.scheme import Scheme
from embedge.export.plan import ExportPlan
from embedge.export.progress import Progress
from embedge.export.weights.tensors import BASE, Weights
from embedge.export.writing.parallel import in_order
from embedge.export.writing.weight_store import TensorStore


def store_quantized(
    plan: ExportPlan,
    store: TensorStore,
    g: Graph,
    scheme: Scheme,
    weights: Weights,
    batches: Sequence[TokenBatch],
    files: Mapping[str, str],
) -> None:
    """Round by GPTQ what a task's adapter changes with its own activations, the rest with the backbone's.

    Args:
        plan: the export.
        store: takes the tensors.
        g: the task's graph.
        scheme: its precision.
        weights: the task's tensors.
        batches: calibration tokens, at least one.
        files: for new tensors, by their owner: the task or "base".
    """
    architecture = plan.model.architecture.text_only()
    # Turns hold all weights of an input, and in a shared graph branches are the tasks'.
    branches = {} if plan.shared or plan.wide else branch_initializers(g, scheme)
    missing = [i for i in gptq_linears(g, scheme) if not store.has(i.initializer.key)]
    for owner, file in files.items():
        linears = [i for i in missing if i.initializer.owner == owner]
        if not linears:
            continue
        layers = quantize(
            architecture,
            plan.model.weights(plan.model.base, scheme) if owner == BASE else weights,
            g,
            batches,
            linears,
            scheme=scheme,
            branches=_of_their_linears(branches, linears, owner),
            scratch=store.folder,
            report=plan.progress.layers(f"{owner}: GPTQ", len(architecture.layers)),
        )
        for initializer, arrays, facts in layers:
            store.put(initializer, arrays, file, facts)
            del arrays  # the next weight is as large


def _of_their_linears(
    branches: Mapping[str, LazyInitializer], linears: Sequence[GptqLinear], owner: str
) -> dict[str, LazyInitializer]:
    """The branches of an owner all of whose Linears are rounded now."""
    rounded = {item.linear for item in linears}
    return {
        item.group.label: branches[item.group.label]
        for item in linears
        if item.group.label in branches
        and branches[item.group.label].owner == owner
        and rounded.issuperset(item.group.linears)
    }


def store_computed(
    progress: Progress,
    store: TensorStore,
    initializers: Sequence[LazyInitializer],
    files: Mapping[str, str],
) -> None:
    """Compute what is not stored yet and write it in the given order, a few initializers at a time.

    Args:
        progress: takes every initializer, stored before or not.
        store: takes the tensors.
        initializers: what a graph needs.
        files: for new tensors, by their owner.
    """
    missing = {i.key: i for i in initializers if not store.has(i.key)}
    arrays = in_order(list(missing.values()), lambda i: i.compute(), cost=lambda i: i.elements)
    for initializer in initializers:
        if not store.has(initializer.key):
            store.put(initializer, next(arrays), files[initializer.owner])
        progress.advance(initializer.nbytes, initializer.specs[0].name)
