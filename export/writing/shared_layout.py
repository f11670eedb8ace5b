"""The layout "shared": one graph for all tasks of a precision, and a file of each task's own tensors.

    int8/shared.onnx                  the backbone; what differs by task are inputs
    int8/shared.bin                   its weights
    int8/shared.constants.safetensors the constants of int8 inputs, for tasks that are added later
    int8/TASK.safetensors             what a task brings (:mod:`embedge.runtime.bundle.task_tensors`)

An adapter has to fit: low-rank changes of Linears that quantization rounds, and their biases. What else it
changes is in the graph, and refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.numpy import save

from embedge.export.calibration.branches import branch_initializers, fit_branches
from embedge.export.calibration.tokens import TokenBatch
from embedge.export.errors import AdapterError, ExportError
from embedge.export.graph.builder import Graph
from embedge.export.graph.scheme import BranchRanks, Scheme
from embedge.export.graph.values import ScaleSink
from embedge.export.plan import ExportPlan
from embedge.export.progress import Progress
from embedge.export.schemes.branch import joint_rank, padded_rank
from embedge.export.schemes.smoothing_constants import SmoothingConstants
from embedge.export.source.safetensors_file import SafetensorsFile
from embedge.export.weights.task import TaskWeights
from embedge.export.weights.tensors import Weights
from embedge.export.writing.files import write_new
from embedge.export.writing.weight_store import TensorStore
from embedge.runtime.bundle.contract import SHARED_CONSTANTS
from embedge.runtime.errors import EmbedgeValueError

__all__ = [
    "CONSTANTS",
    "SHARED",
    "check_fits",
    "check_same_graph",
    "fitted_branches",
    "read_constants",
    "write_constants",
    "write_task_tensors",
]

Constants = Mapping[tuple[str, ...], SmoothingConstants]

SHARED, CONSTANTS = "shared", SHARED_CONSTANTS
_LABEL, _PART = "|", "/"
_INSTEAD = "export it in a bundle of its own, with --layout merged"
_SHOWN = 5
_EVERY, _MANY_BATCHES = 3, 6


def check_fits(
    task: str, weights: TaskWeights, g: Graph, ranks: BranchRanks, progress: Progress
) -> None:
    """Refuse an adapter that branches cannot hold.

    Args:
        task: its name.
        weights: the task's tensors.
        g: the task's graph.
        ranks: of the branches.
        progress: told of adapters that branches hold in part.

    Raises:
        AdapterError: naming what it changes.
    """
    linears = [linear for group in g.linear_groups.values() for linear in group.linears]
    held, biases = {linear.weight for linear in linears}, {linear.bias for linear in linears}
    changed = weights.changed()
    beyond = [f"{name} (not by LoRA alone)" for name in weights.beyond_low_rank() if name in held]
    beyond += [name for name in changed if name not in held | biases]
    if beyond:
        more = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
        raise AdapterError(
            f"task {task!r}: with --layout shared an adapter may change Linears by LoRA, and their biases; this one "
            f"changes {', '.join(beyond[:_SHOWN])}{more}; {_INSTEAD}"
        )
    in_part: list[str] = []
    for group in g.linear_groups.values():
        rank = ranks.of(group.label)
        largest = max(weights.rank(linear.weight) for linear in group.linears)
        if largest > rank:
            raise AdapterError(
                f"task {task!r}: its adapter has rank {largest} in {group.label}, above the branch's {rank}; leave "
                f"--branch-rank out, or give {padded_rank(largest)} or more; where tasks are there, export all anew"
            )
        joint = joint_rank(weights, group)
        if joint > rank:
            in_part.append(f"{group.label} (rank {joint} of all that read the input, {rank} held)")
    if in_part:
        more = f" and {len(in_part) - 1} more" if len(in_part) > 1 else ""
        progress.tell(
            f"task {task}: branches hold the larger part of its adapter in {in_part[0]}{more}; a higher "
            "--branch-rank holds all, with all tasks exported anew where some are there"
        )


def check_same_graph(path: Path, task: str, content: bytes) -> None:
    """Refuse a task whose graph is not the one that is there.

    Args:
        path: the graph that is there.
        task: whose graph it is compared with.
        content: that graph, as it would be written.

    Raises:
        EmbedgeValueError: naming inputs that differ, as far as there are some.
    """
    before = path.read_bytes()
    if before == content:
        return
    one, other = (onnx.ModelProto.FromString(data) for data in (before, content))
    for model in (one, other):  # they name versions
        del model.metadata_props[:]
    if one == other:
        return
    inputs = [
        {i.name: i.type.SerializeToString() for i in model.graph.input} for model in (one, other)
    ]
    names = sorted(n for n in {**inputs[0], **inputs[1]} if inputs[0].get(n) != inputs[1].get(n))
    what = f"inputs: {', '.join(names[:_SHOWN])}" if names else "operators or constants"
    of_branches = bool(names) and all(".branch_" in name for name in names)
    advice = "leave --branch-rank out: added tasks take the graph's" if of_branches else _INSTEAD
    raise EmbedgeValueError(
        f"{path}: the graph of task {task!r} has other {what}; the tasks of a shared graph need the same; {advice}"
    )


def write_task_tensors(
    plan: ExportPlan,
    path: Path,
    g: Graph,
    scheme: Scheme,
    weights: Weights,
    batches: Sequence[TokenBatch],
    store: TensorStore,
) -> None:
    """Compute what a task brings to a shared graph, and write it.

    Args:
        plan: the export.
        path: the new file.
        g: the task's graph.
        scheme: its precision.
        weights: the task's tensors.
        batches: calibration tokens; none: branches are fitted without.
        store: has the graph's own tensors.
    """
    found = dict(fitted_branches(plan, g, scheme, weights, batches, store))
    tensors: dict[str, NDArray[Any]] = {}
    for initializer in g.task_tensors.values():
        arrays = found.pop(initializer.key, None)
        for spec, array in zip(initializer.specs, arrays or initializer.compute(), strict=True):
            if array.shape != spec.shape:
                raise AssertionError(f"{spec.name}: declared {spec.shape}, computed {array.shape}")
            tensors[spec.name] = np.ascontiguousarray(array)
        plan.progress.advance(initializer.nbytes, initializer.specs[0].name)
    write_new(path, save(tensors))


def fitted_branches(
    plan: ExportPlan,
    g: Graph,
    scheme: Scheme,
    weights: Weights,
    batches: Sequence[TokenBatch],
    store: TensorStore,
    wanted: Collection[str] | None = None,
) -> Iterator[tuple[str, Sequence[NDArray[Any]]]]:
    """The branches of a task that calibration fits, their tensors by the initializer's key.

    Args:
        plan: the export.
        g: the task's graph.
        scheme: its precision.
        weights: the task's tensors.
        batches: calibration tokens; none: nothing is fitted.
        store: has the weights beside which the branches are.
        wanted: keys of those to fit; ``None``: all.
    """
    if not batches or not branch_initializers(g, scheme):
        return
    architecture = plan.model.architecture.text_only()
    fitted = fit_branches(
        architecture,
        weights,
        g,
        scheme,
        _for_branches(scheme.precision, batches),
        store.arrays,
        wanted=wanted,
        scratch=store.folder,
        report=plan.progress.layers("fitting branches", len(architecture.layers)),
    )
    for initializer, arrays in fitted:
        yield initializer.key, arrays


def _for_branches(precision: str, batches: Sequence[TokenBatch]) -> Sequence[TokenBatch]:
    """The calibration tokens that branches are fitted with.

    The 16 or 32 ranks of int8 are as true with every third batch, from short texts to long ones; the more
    at int4 are not (lab note 67).
    """
    few = precision != "int8" or len(batches) < _MANY_BATCHES
    return batches if few else batches[::_EVERY]


def read_constants(path: Path, sinks: Mapping[tuple[str, ...], ScaleSink | None]) -> Constants:
    """The constants of a shared graph's int8 inputs, as :func:`write_constants` wrote them.

    Args:
        path: the file.
        sinks: what a scale of an input may be folded into, by its Linears.
    """
    file = SafetensorsFile(path, ExportError)
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for key in file.keys():
        labels, _, part = key.rpartition(_PART)
        found.setdefault(tuple(labels.split(_LABEL)), {})[part] = file.read(key)
    constants = dict.fromkeys(sinks, SmoothingConstants())
    for names, parts in found.items():
        outliers = parts.get("outliers")
        constants[names] = SmoothingConstants(
            shift=parts.get("shift"),
            smooth=parts.get("smooth", parts.get("smooth_in_sink")),
            int4_smooth=parts.get("int4_smooth"),
            sink=sinks[names] if "smooth_in_sink" in parts else None,
            outliers=None if outliers is None else outliers.astype(np.int64),
        )
    return constants


def write_constants(path: Path, constants: Constants) -> None:
    """Write the constants of a shared graph's int8 inputs, which a task that is added later needs.

    Args:
        path: the new file.
        constants: by the Linears of an input.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for labels, of in constants.items():
        smooth = "smooth" if of.sink is None else "smooth_in_sink"
        outliers = None if of.outliers is None else of.outliers.astype(np.float32)
        parts = {
            "shift": of.shift,
            smooth: of.smooth,
            "int4_smooth": of.int4_smooth,
            "outliers": outliers,
        }
        for part, array in parts.items():
            if array is not None:
                tensors[f"{_LABEL.join(labels)}{_PART}{part}"] = array
    write_new(path, save(tensors))
