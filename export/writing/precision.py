"""Writing one precision of a bundle: its graphs, weights and layer reports, task by task."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from embedge.export.calibration.gptq import gptq_linears, quantize
from embedge.export.calibration.sensitivity import candidates, check_budget, within_budget
from embedge.export.calibration.smoothing import smoothing_constants
from embedge.export.calibration.tokens import TokenBatch
from embedge.export.context import ExportContext
from embedge.export.graph.builder import Graph
from embedge.export.graph.initializers import LazyInitializer
from embedge.export.graph.onnx_model import to_model
from embedge.export.graph.scheme import Scheme, Target
from embedge.export.model import Model
from embedge.export.options import INT4
from embedge.export.schemes.int4 import Int4Scheme
from embedge.export.schemes.int8 import ACTIVATION_CONSTANTS
from embedge.export.schemes.mixed import unmatched
from embedge.export.weights.tensors import BASE, Weights
from embedge.export.writing.bundle import dump, write_new
from embedge.export.writing.graph_metadata import graph_notes, task_notes
from embedge.export.writing.parallel import in_order
from embedge.export.writing.unpack_list import unpack_list
from embedge.export.writing.weight_store import TensorStore
from embedge.runtime.bundle.contract import UNPACKED_PRECISION
from embedge.runtime.errors import EmbedgeValueError

VISION = "vision"
VISION_GRAPH = f"{VISION}.onnx"
UNPACKED_GRAPH, UNPACK_LIST = ".unpacked.onnx", ".unpack.json"


def write_precision(
    context: ExportContext,
    folder: Path,
    precision: str,
    tasks: Sequence[str],
    batches: Sequence[TokenBatch],
) -> dict[str, dict[str, Any]]:
    """Write the graphs of a precision.

    Args:
        context: the export.
        folder: the bundle, or what becomes it.
        precision: its name.
        tasks: those to write.
        batches: calibration tokens; none: data-free methods.

    Returns:
        The manifest's entry, and that of int4's second way to run the same files.
    """
    model, options = context.model, context.options
    place = folder / precision
    if place.is_symlink():
        raise EmbedgeValueError(
            f"{place}: expected a folder, found a link to {os.path.realpath(place)}, through which "
            "nothing is written; put the folder itself there, or choose another --out"
        )
    place.mkdir(exist_ok=True)
    store = TensorStore(place)
    if context.old is not None and precision in context.old.precisions:
        for path in context.old.precisions[precision].graphs.values():
            store.adopt(folder / path)
    writes_tower = model.tower is not None and not (place / VISION_GRAPH).exists()
    _check_names_free(place, tasks)
    shared = _fresh_name(place, "shared")
    own = {task: _fresh_name(place, task) for task in tasks}
    schemes, total = _uncalibrated(context, precision, tasks[0])
    chosen: list[str] = []
    constants: dict[str, set[str]] = {name: set() for name in schemes}
    if not writes_tower:
        _check_same_rotation(context, precision)
    try:
        for number, task in enumerate(tasks):
            with context.progress.step(f"{precision}/{task}", total):
                if number == 0:
                    schemes, chosen = _calibrated(context, schemes, total, batches, place)
                weights = model.weights(model.tasks[task], schemes[precision])
                g = model.graph(weights, schemes[precision])
                if batches:
                    _gptq_passes(
                        context,
                        schemes[precision],
                        g,
                        weights,
                        task,
                        batches,
                        store,
                        shared,
                        own[task],
                    )
                _store_recipes(context, g, store, shared, own[task])
                report = _layer_report(g, store)
                _write_graph(
                    place / f"{task}.onnx",
                    g,
                    store,
                    task,
                    task_notes(context.model, g, precision, task),
                )
                write_new(place / f"{task}.layers.json", dump(report))
                constants[precision] |= set(g.constants)
                if UNPACKED_PRECISION in schemes:
                    g = model.graph(weights, schemes[UNPACKED_PRECISION])
                    _write_unpacked(context.model, g, place, store, task, shared, own[task])
                    constants[UNPACKED_PRECISION] |= set(g.constants)
        if model.tower is not None:
            if writes_tower:
                _write_tower(context, place, precision, store)
            of_tower = _constant_names(place / VISION_GRAPH)
            constants = {name: own_names | of_tower for name, own_names in constants.items()}
    finally:
        store.close()
    stated = context.stated_options(precision, calibrated=bool(batches))
    if precision == "int4" and options.budget is not None:
        stated |= {"budget": options.budget, "int8": chosen}
    return {
        name: _entry(scheme, precision, tasks, constants[name])
        | ({} if model.tower is None else {"vision": f"{precision}/{VISION_GRAPH}"})
        | {"options": stated}
        for name, scheme in schemes.items()
    }


def _entry(
    scheme: Scheme, folder: str, tasks: Sequence[str], constants: set[str]
) -> dict[str, Any]:
    """The manifest's entry of graphs that were written, without options and tower."""
    used = {n: c for n, c in ACTIVATION_CONSTANTS.items() if n in constants}
    if scheme.precision == UNPACKED_PRECISION:
        files = {
            "graphs": {task: f"{folder}/{task}{UNPACKED_GRAPH}" for task in tasks},
            "unpack": {task: f"{folder}/{task}{UNPACK_LIST}" for task in tasks},
        }
    else:
        files = {
            "graphs": {task: f"{folder}/{task}.onnx" for task in tasks},
            "layers": {task: f"{folder}/{task}.layers.json" for task in tasks},
        }
    return {
        **files,
        "devices": ["cuda" if scheme.target is Target.CUDA else "cpu"],
        "row_multiple": scheme.row_multiple,
        "activation_constants": used,
    }


def _uncalibrated(
    context: ExportContext, precision: str, task: str
) -> tuple[dict[str, Scheme], int]:
    """The schemes before calibration, and the bytes of a task's tensors.

    Refuses keep patterns that match nothing.
    """
    model = context.model
    names = (precision, UNPACKED_PRECISION) if precision == "int4" else (precision,)
    schemes = {name: context.scheme(name) for name in names}
    g = model.graph(model.tasks[task], schemes[precision])
    graphs = [g]
    if model.tower is not None:
        graphs.append(model.tower.graph(model.base, context.tower_scheme(precision)))
    unused = unmatched(context.options.keep, graphs)
    if unused:
        raise EmbedgeValueError(
            f"keep pattern {', '.join(map(repr, unused))}: expected to match a layer, matched "
            "none; `embedge inspect BUNDLE --layers` lists the names"
        )
    return schemes, sum(
        spec.nbytes for initializer in g.initializers.values() for spec in initializer.specs
    )


def _calibrated(
    context: ExportContext,
    schemes: Mapping[str, Scheme],
    total: int,
    batches: Sequence[TokenBatch],
    scratch: Path,
) -> tuple[dict[str, Scheme], list[str]]:
    """The schemes with their calibrated constants, and the layers that a budget gives 8 bits.

    Args:
        context: the export.
        schemes: by precision, without calibration; the first one's weights are stored.
        total: bytes of a task's tensors in it.
        batches: calibration tokens.
        scratch: folder for a layer's weights.
    """
    model, options, note = context.model, context.options, context.progress.note
    precision, scheme = next(iter(schemes.items()))
    base, architecture = model.weights(model.base, scheme), model.architecture.text_only()
    keep, chosen = dict(options.keep), []
    budget = options.budget if precision == "int4" else None
    if budget is not None:
        check_budget(total, budget)
        if not batches:
            raise EmbedgeValueError(
                f"budget {budget:,} bytes: it chooses layers by calibration texts, and none of those "
                "given has a token; give others (--calibration)"
            )
    if precision in ("int8", "int4") and not context.constants:  # the same for both
        # ranges of channels need fewer tokens than GPTQ, and a wide model's cost minutes
        seen = batches[::2] if context.wide else batches
        context.constants.update(
            smoothing_constants(
                architecture,
                base,
                seen,
                scratch=scratch,
                report=lambda layer: note(
                    f"calibrating int8 on the backbone, layer {layer} of {len(architecture.layers)}"
                ),
            )
        )
    if budget is not None:
        int4 = context.scheme("int4", keep={}, calibrated=True)
        assert isinstance(int4, Int4Scheme)
        found = candidates(
            model,
            base,
            batches,
            int4=int4,
            keep=keep,
            scratch=scratch,
            report=note,
        )
        chosen = within_budget(found, total, budget)
        keep |= {glob.escape(label): "int8" for label in chosen}
    made = {name: context.scheme(name, keep=keep, calibrated=bool(batches)) for name in schemes}
    return made, sorted(chosen)


def _check_same_rotation(context: ExportContext, precision: str) -> None:
    """Features of a tower that is there already must fit the stream of the tasks to come."""
    old = context.old.precisions.get(precision) if context.old else None
    if context.model.tower is None or old is None:
        return
    if not old.options.get("rotation", False) and precision in ("int8", *INT4):
        raise EmbedgeValueError(
            f"{context.options.out}: its {precision} vision tower was exported by an earlier version, without "
            "rotation, and new tasks would not fit it; choose another --out, or --overwrite the bundle"
        )


def _write_tower(context: ExportContext, place: Path, precision: str, store: TensorStore) -> None:
    model = context.model
    assert model.tower is not None
    scheme = context.tower_scheme(precision)
    g = model.tower.graph(model.weights(model.base, scheme), scheme)
    total = sum(
        spec.nbytes for initializer in g.initializers.values() for spec in initializer.specs
    )
    file = _fresh_name(place, VISION)
    with context.progress.step(f"{precision}/{VISION}", total):
        _store_recipes(context, g, store, file, file)
        _write_graph(place / VISION_GRAPH, g, store, VISION, graph_notes(g, precision, VISION))


def _constant_names(graph: Path) -> set[str]:
    """Names of the initializers in a graph file, small constants among them."""
    return {t.name for t in onnx.load(str(graph), load_external_data=False).graph.initializer}


def _gptq_passes(
    context: ExportContext,
    scheme: Scheme,
    g: Graph,
    weights: Weights,
    task: str,
    batches: Sequence[TokenBatch],
    store: TensorStore,
    shared: str,
    file: str,
) -> None:
    """Quantize what this task's adapter changes with its own activations, the rest with the backbone's."""
    model, architecture = context.model, context.model.architecture.text_only()

    def report(owner: str, layer: int) -> None:
        context.progress.note(f"{owner}: GPTQ, layer {layer} of {len(architecture.layers)}")

    missing = [r for r in gptq_linears(g, scheme) if not store.has(r.initializer.key)]
    passes = (
        (BASE, model.weights(model.base, scheme), shared),
        (task, weights, file),
    )
    for owner, source, target in passes:
        linears = [r for r in missing if r.initializer.owner == owner]
        if not linears:
            continue
        made = quantize(
            architecture,
            source,
            g,
            batches,
            linears,
            scratch=store.folder,
            report=partial(report, owner),
        )
        for linear in made:
            store.put(linear.initializer, linear.arrays, target, linear.facts)
            del linear  # the next weight is as large


def _store_recipes(
    context: ExportContext, g: Graph, store: TensorStore, shared: str, own: str
) -> None:
    """Compute and write what is not stored yet, in the graph's order, a few initializers at a time."""
    missing = {r.key: r for r in g.initializers.values() if not store.has(r.key)}
    arrays = in_order(
        list(missing.values()),
        lambda initializer: initializer.compute(),
        cost=lambda initializer: initializer.elements,
    )
    for initializer in g.initializers.values():
        if not store.has(initializer.key):
            store.put(initializer, next(arrays), shared if initializer.owner == BASE else own)
        context.progress.advance(
            sum(spec.nbytes for spec in initializer.specs), initializer.specs[0].name
        )


def _layer_report(g: Graph, store: TensorStore) -> dict[str, Any]:
    def row(initializer: LazyInitializer) -> dict[str, Any]:
        name = initializer.specs[0].name
        return {"name": name, **store.reports[initializer.key]}

    return {"layers": [row(r) for r in g.initializers.values() if r.key in store.reports]}


def _write_graph(
    path: Path, g: Graph, store: TensorStore, task: str, notes: Mapping[str, str]
) -> None:
    tensors = [
        tensor for initializer in g.initializers.values() for tensor in store.tensors(initializer)
    ]
    model = to_model(g, tensors, task, notes)
    write_new(path, model.SerializeToString(deterministic=True))


def _write_unpacked(
    model: Model, g: Graph, place: Path, store: TensorStore, task: str, shared: str, own: str
) -> None:
    """The graph that runs a task's stored int4 weights as int8, and the list that it needs.

    Args:
        model: what is exported.
        g: the graph.
        place: the folder of int4.
        store: has the int4 weights; takes what is new.
        task: its name.
        shared: file for new tensors of all tasks.
        own: file for new tensors of this one.
    """
    for initializer in [
        *g.initializers.values(),
        *(r for u in g.unpacked.values() for r in u.initializers),
    ]:
        if not store.has(initializer.key):
            store.put(
                initializer, initializer.compute(), shared if initializer.owner == BASE else own
            )
    notes = task_notes(model, g, UNPACKED_PRECISION, task)
    _write_graph(place / f"{task}{UNPACKED_GRAPH}", g, store, task, notes)
    write_new(place / f"{task}{UNPACK_LIST}", dump(unpack_list(g, store)))


def _check_names_free(place: Path, tasks: Sequence[str]) -> None:
    """Refuse to write over files that no export wrote."""
    for task in tasks:
        for end in (".onnx", ".layers.json", UNPACKED_GRAPH, UNPACK_LIST):
            name = task + end
            if os.path.lexists(place / name):
                raise EmbedgeValueError(
                    f"{place / name}: expected no such file, found one that the bundle's manifest "
                    "does not list; move it away or give the task another name"
                )


def _fresh_name(place: Path, stem: str) -> str:
    """``stem.bin``, or the first of ``stem.2.bin``, … that an earlier export did not write."""
    number = 1
    name = f"{stem}.bin"
    while os.path.lexists(place / name):
        number += 1
        name = f"{stem}.{number}.bin"
    return name


__all__ = ["write_precision"]
