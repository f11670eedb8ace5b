"""Writing one precision of a bundle: its graphs, weights and layer reports, task by task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from embedge.export.calibration.branches import branch_initializers
from embedge.export.calibration.tokens import TokenBatch
from embedge.export.families.base import Tower
from embedge.export.graph.builder import Graph
from embedge.export.graph.initializers import LazyInitializer
from embedge.export.graph.scheme import Scheme, Target
from embedge.export.plan import ExportPlan
from embedge.export.schemes.int8_inputs import ACTIVATION_CONSTANTS
from embedge.export.schemes.registry import PORTABLE, PRECISIONS
from embedge.export.weights.tensors import BASE, Weights
from embedge.export.writing.graph_files import (
    GRAPH,
    LAYERS,
    TASK_TENSORS,
    UNPACK_LIST,
    UNPACKED_GRAPH,
    check_names_free,
    graph_content,
    write_graph,
    write_layer_report,
)
from embedge.export.writing.graph_metadata import graph_notes, task_notes
from embedge.export.writing.shared_layout import (
    CONSTANTS,
    SHARED,
    check_fits,
    check_same_graph,
    fitted_branches,
    read_constants,
    write_constants,
    write_task_tensors,
)
from embedge.export.writing.unpack_list import write_unpack_list
from embedge.export.writing.weight_store import TensorStore
from embedge.export.writing.weights import store_computed, store_quantized
from embedge.runtime.bundle.content import content_sha256
from embedge.runtime.bundle.contract import UNPACKED_PRECISION, VISION
from embedge.runtime.bundle.manifest import FileEntry
from embedge.runtime.bundle.packed_weights import read_packed
from embedge.runtime.errors import EmbedgeValueError

_VISION_GRAPH = f"{VISION}{GRAPH}"


def write_precision(
    plan: ExportPlan,
    folder: Path,
    precision: str,
    tasks: Sequence[str],
    batches: Sequence[TokenBatch],
) -> dict[str, dict[str, Any]]:
    """Write the graphs of a precision.

    Args:
        plan: the export.
        folder: the bundle, or what becomes it.
        precision: its name.
        tasks: those to write.
        batches: calibration tokens; none: data-free methods.

    Returns:
        The manifest's entry, and that of int4's second way to run the same files.

    Raises:
        EmbedgeValueError: a file is in the way, or a budget cannot be kept.
    """
    place = _open_folder(folder / precision, tasks)
    with TensorStore(place) as store:
        if plan.old is not None and precision in plan.old.precisions:
            for path in sorted(set(plan.old.precisions[precision].graphs.values())):
                store.adopt(folder / path)
        writer = _PrecisionWriter(plan, precision, store, batches)
        for task in tasks:
            with plan.progress.step(f"{precision}/{task}"):
                writer.write_task(task)
        if plan.model.tower is not None:
            writer.write_tower(plan.model.tower)
    return writer.entries(tasks)


class _PrecisionWriter:
    """The steps of :func:`write_precision`, which says what the arguments are."""

    def __init__(
        self,
        plan: ExportPlan,
        precision: str,
        store: TensorStore,
        batches: Sequence[TokenBatch],
    ) -> None:
        self._plan = plan
        self._precision = precision
        self._store = store
        self._batches = batches
        self._shared = store.free_name("shared")
        self._schemes: dict[str, Scheme] = {}
        self._eight_bit: list[str] = []  # layers that a budget gives 8 bits
        self._constants: dict[str, set[str]] = {}  # names of the small ones, by scheme
        self._contents: dict[str, dict[str, str]] = {}  # hashes by scheme and graph
        self._has_tower = (store.folder / _VISION_GRAPH).exists()
        stated = plan.stated_options(precision, calibrated=bool(batches))
        self._has_shared = _check_same_layout(plan, precision, stated)
        if self._has_shared:
            self._take_constants()
        if self._has_tower:
            _check_same_rotation(plan, precision)

    def write_task(self, task: str) -> None:
        """Calibrate, once for all tasks; quantize and store weights; write the graphs that read them."""
        self._calibrate()
        if self._plan.shared:
            self._write_shared(task)
        else:
            self._write_merged(task)

    def _take_constants(self) -> None:
        """Use the constants of int8 inputs that the shared graph was written with."""
        path = self._store.folder / CONSTANTS
        if not path.exists():
            raise EmbedgeValueError(
                f"{path}: expected the constants that the shared graph was written with, found no such file, and a "
                "task that is added needs them; copy the whole bundle again, or --overwrite it"
            )
        groups = self._plan.model.plain_graphs[0].linear_groups.values()
        self._plan.constants.clear()  # another precision may have others
        self._plan.constants.update(
            read_constants(path, {group.labels: group.sink for group in groups})
        )

    def _calibrate(self) -> None:
        if not self._schemes:
            self._schemes, self._eight_bit = self._plan.calibrate(
                self._precision, self._batches, self._store.folder
            )
            self._constants = {name: set() for name in self._schemes}

    def _write_shared(self, task: str) -> None:
        """Write a task's own tensors, and before those of the first the graph."""
        plan, model, store = self._plan, self._plan.model, self._store
        scheme = self._schemes[self._precision]
        backbone = model.weights(model.base, scheme)
        weights = model.weights(model.tasks[task], scheme)
        g = model.graph(weights, scheme, backbone)
        ranks = plan.branch_ranks(self._precision)
        check_fits(task, model.tasks[task], g, ranks, plan.progress)
        needed = _initializers(g)
        new = [*g.task_tensors.values(), *([] if self._has_shared else needed)]
        plan.progress.expect(sum(i.nbytes for i in new))
        path = store.folder / f"{SHARED}{GRAPH}"
        notes = task_notes(model, g, self._precision, None)
        if self._has_shared:
            store.adopt_named(path, needed)
            missing = [initializer for initializer in needed if not store.has(initializer.key)]
            if missing:
                raise EmbedgeValueError(
                    f"{path}: expected {missing[0].specs[0].name} of this type and shape, which the graph of task "
                    f"{task!r} needs, found none; export with the embedge that wrote it, or choose another --out"
                )
            check_same_graph(path, task, graph_content(g, store, SHARED, notes))
        else:
            files = {BASE: self._shared}
            if self._batches:
                store_quantized(plan, store, g, scheme, weights, self._batches, files)
            store_computed(plan.progress, store, needed, files)
            write_graph(path, g, store, SHARED, notes)
            write_layer_report(store.folder / f"{SHARED}{LAYERS}", g, store)
            write_constants(store.folder / CONSTANTS, plan.constants)
            self._has_shared = True
        self._constants[self._precision] |= set(g.constants)
        own = store.folder / f"{task}{TASK_TENSORS}"
        write_task_tensors(plan, own, g, scheme, weights, self._batches, store)
        content = content_sha256(
            path.read_bytes(), {}, store.sha256_at, tensors_sha256=FileEntry.of(own).sha256
        )
        self._contents.setdefault(self._precision, {})[task] = content

    def _write_merged(self, task: str) -> None:
        """Quantize and store a task's weights; write the graphs that read them."""
        plan, model, store = self._plan, self._plan.model, self._store
        scheme = self._schemes[self._precision]
        weights = model.weights(model.tasks[task], scheme)
        graphs = {name: model.graph(weights, scheme) for name, scheme in self._schemes.items()}
        needed = {name: _initializers(g) for name, g in graphs.items()}
        plan.progress.expect(sum(i.nbytes for of in needed.values() for i in of))
        files = {BASE: self._shared, task: store.free_name(task)}
        if self._batches:
            g = graphs[self._precision]
            store_quantized(plan, store, g, scheme, weights, self._batches, files)
            self._store_branches(g, scheme, weights, needed[self._precision], files)
        for name, g in graphs.items():
            store_computed(plan.progress, store, needed[name], files)
            path = store.folder / f"{task}{UNPACKED_GRAPH if name == UNPACKED_PRECISION else GRAPH}"
            write_graph(path, g, store, task, task_notes(model, g, name, task))
            if name == UNPACKED_PRECISION:
                write_unpack_list(store.folder / f"{task}{UNPACK_LIST}", g, store)
            else:
                write_layer_report(store.folder / f"{task}{LAYERS}", g, store)
            self._constants[name] |= set(g.constants)
            self._note_content(name, task, path)

    def _store_branches(
        self,
        g: Graph,
        scheme: Scheme,
        weights: Weights,
        needed: Sequence[LazyInitializer],
        files: Mapping[str, str],
    ) -> None:
        """Fit the branches of a merged graph beside its weights, which are stored before."""
        plan, store = self._plan, self._store
        branches = {i.key: i for i in branch_initializers(g, scheme).values()}
        others = [initializer for initializer in needed if initializer.key not in branches]
        if branches:
            store_computed(plan.progress, store, others, files)
        # As GPTQ: what an adapter changes by the task's activations, the rest by the backbone's.
        for owner, file in files.items():
            own = {k: i for k, i in branches.items() if i.owner == owner and not store.has(k)}
            if not own:
                continue
            of = plan.model.weights(plan.model.base, scheme) if owner == BASE else weights
            for key, arrays in fitted_branches(
                plan, g, scheme, of, self._batches, store, wanted=own.keys()
            ):
                store.put(own[key], arrays, file)

    def write_tower(self, tower: Tower) -> None:
        """Write the vision tower, which all tasks share, where it is not there yet."""
        plan, path = self._plan, self._store.folder / _VISION_GRAPH
        if not self._has_tower:
            scheme = plan.tower_scheme(self._precision)
            g = tower.graph(plan.model.weights(plan.model.base, scheme), scheme)
            needed = _initializers(g)
            with plan.progress.step(f"{self._precision}/{VISION}"):
                plan.progress.expect(sum(i.nbytes for i in needed))
                files = {BASE: self._store.free_name(VISION)}
                store_computed(plan.progress, self._store, needed, files)
                notes = graph_notes(g, self._precision, VISION)
                write_graph(path, g, self._store, VISION, notes)
            for name in self._schemes:
                self._note_content(name, VISION, path)
        there = onnx.load(str(path), load_external_data=False).graph.initializer
        for names in self._constants.values():
            names |= {tensor.name for tensor in there}

    def _note_content(self, scheme: str, name: str, path: Path) -> None:
        """Hash a graph that was written, and what is unpacked for it."""
        listed = path.parent / f"{name}{UNPACK_LIST}"
        unpacks = scheme == UNPACKED_PRECISION and name != VISION
        packed = read_packed(listed) if unpacks else {}
        content = content_sha256(path.read_bytes(), packed, self._store.sha256_at)
        self._contents.setdefault(scheme, {})[name] = content

    def entries(self, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What the manifest says about the graphs that were written."""
        plan, precision = self._plan, self._precision
        stated = plan.stated_options(precision, calibrated=bool(self._batches))
        if precision == "int4" and plan.options.budget is not None:
            stated |= {"budget": plan.options.budget, "int8": self._eight_bit}
        tower = {} if plan.model.tower is None else {"vision": f"{precision}/{_VISION_GRAPH}"}

        def paths(end: str) -> dict[str, str]:
            return {task: f"{precision}/{task}{end}" for task in tasks}

        def of_all(end: str) -> dict[str, str]:
            return dict.fromkeys(tasks, f"{precision}/{SHARED}{end}")

        return {
            name: {
                **(
                    {"graphs": paths(UNPACKED_GRAPH), "unpack": paths(UNPACK_LIST)}
                    if name == UNPACKED_PRECISION
                    else {
                        "graphs": of_all(GRAPH),
                        "layers": of_all(LAYERS),
                        "task_tensors": paths(TASK_TENSORS),
                    }
                    if plan.shared
                    else {"graphs": paths(GRAPH), "layers": paths(LAYERS)}
                ),
                "devices": ["cuda" if scheme.target is Target.CUDA else "cpu"],
                "row_multiple": scheme.row_multiple,
                "activation_constants": {
                    n: c for n, c in ACTIVATION_CONSTANTS.items() if n in self._constants[name]
                },
                **tower,
                "options": stated,
                "content_sha256": self._contents[name],
                "portable": plan.options.portable and name in PORTABLE,
            }
            for name, scheme in self._schemes.items()
        }


def _check_same_layout(plan: ExportPlan, precision: str, stated: Mapping[str, Any]) -> bool:
    """Tasks are added to a precision as those that it has were written; whether it has a shared graph."""
    old = plan.old.precisions.get(precision) if plan.old else None
    if old is None:
        return False
    shared = bool(old.task_tensors)
    if shared != plan.shared:
        layout = "shared" if shared else "merged"
        raise EmbedgeValueError(
            f"{plan.options.out}: its {precision} has the layout {layout}; add --layout {layout}, choose "
            "another --out, or --overwrite the bundle"
        )
    options = {name: value for name, value in old.options.items() if name != "by_task"}
    differing = sorted(n for n in {**options, **stated} if options.get(n) != stated.get(n))
    if shared and differing:
        name = differing[0]
        raise EmbedgeValueError(
            f"{plan.options.out}: its {precision} was exported with {name} {options.get(name)!r}, and this call "
            f"has {stated.get(name)!r}; the tasks of a shared graph need the same: change that, choose another "
            "--out, or --overwrite the bundle"
        )
    return shared


def _initializers(g: Graph) -> list[LazyInitializer]:
    """What a graph needs, its own and what its weights are unpacked from."""
    return [*g.initializers.values(), *(i for u in g.unpacked.values() for i in u.initializers)]


def _open_folder(place: Path, tasks: Sequence[str]) -> Path:
    """The precision's folder, in which no file has the name of one to be written."""
    if place.is_symlink():
        raise EmbedgeValueError(
            f"{place}: expected a folder, found a link to {os.path.realpath(place)}, through which "
            "nothing is written; put the folder itself there, or choose another --out"
        )
    place.mkdir(exist_ok=True)
    check_names_free(place, tasks)
    return place


def _check_same_rotation(plan: ExportPlan, precision: str) -> None:
    """Features of a tower that is there already must fit the stream of the tasks to come."""
    old = plan.old.precisions.get(precision) if plan.old else None
    if plan.model.tower is None or old is None:
        return
    if not old.options.get("rotation", False) and PRECISIONS[precision].method:
        raise EmbedgeValueError(
            f"{plan.options.out}: its {precision} vision tower was exported by an earlier version, without "
            "rotation, and new tasks would not fit it; choose another --out, or --overwrite the bundle"
        )
