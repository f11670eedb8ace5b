"""Measures a bundle: task by task, the reference first, then every system against it."""

from __future__ import annotations

import functools
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from embedge.bench.documents import Document
from embedge.bench.measure.machine import machine, versions
from embedge.bench.measure.multi_vector import multi_vectors, multi_vectors_against
from embedge.bench.measure.pages import different_pages
from embedge.bench.measure.process import measure_process, process_texts
from embedge.bench.measure.task import (
    TORCH_FP32,
    TaskData,
    add_mixed,
    image_figures,
    latency,
    longest_role,
    reference_vectors,
    single_texts,
    vectors_against,
)
from embedge.bench.options import BenchOptions
from embedge.bench.peers.context import PeerContext, kept_folder
from embedge.bench.peers.registry import build_peers
from embedge.bench.plan import Plan, make_plan
from embedge.bench.report.report import Report, Row
from embedge.bench.systems.multi_vector import (
    EmbedgeMultiVectors,
    MultiVectorReference,
    MultiVectorSystem,
)
from embedge.bench.systems.page_reference import PageReference
from embedge.bench.systems.reference import Reference
from embedge.bench.systems.source import Source
from embedge.bench.systems.system import EmbedgeSystem, MappedSystem, System, TorchSystem
from embedge.runtime.bundle.contract import CARD, MANIFEST
from embedge.runtime.host.progress import LogLines

__all__ = ["run_bench"]

_PAGES = 8  # that a process of its own embeds together
_SHORT = {"bfloat16": "bf16", "float16": "fp16"}


def run_bench(
    options: BenchOptions, show_progress_bar: bool = False, lines: LogLines | None = None
) -> Report:
    """Measure what ``options`` says and return the figures.

    Torch's number of threads is set for the whole process.

    Args:
        options: what to measure.
        show_progress_bar: on standard error.
        lines: for a log, in its place.

    Raises:
        EmbedgeError: the bundle, the reference, an adapter or a data file does not hold what was
            asked for.
    """
    plan = make_plan(options)
    started = time.monotonic()
    torch.set_num_threads(plan.threads)
    with tqdm(total=plan.steps, disable=not show_progress_bar, file=sys.stderr, unit="step") as bar:
        run = _Run(plan, bar, lines)
        rows = [row for task in plan.tasks for row in run.task_rows(task)]
        process = run.processes() if options.profile.process_repeats else {}
    return Report(
        bundle=plan.bundle.root.resolve().name,
        source=plan.manifest.source.to_dict(),
        machine=machine(plan.threads, options.device),
        versions=versions(),
        settings={
            "tasks": plan.tasks,
            "precisions": plan.precisions,
            "threads": plan.threads,
            "device": options.device,
            "texts": len(plan.texts),
            "evaluations": {t: [e.name for e in sets] for t, sets in plan.evaluations.items()},
            "layouts": {p: _layout(plan, p) for p in plan.precisions},
            "files_sha256": plan.manifest.files_sha256,
            "common_bytes": _common_bytes(plan),
            "layer_bytes": _layer_bytes(plan),
            "image_budgets": plan.budgets,
            "output_ranges": _has_ranges(plan),
            "late_interaction": plan.late_interaction,
            "latency_tasks": plan.timed_tasks,
            "peer_tasks": plan.peered_tasks,
            "shapes": [shape.name for shape in options.shapes],
            "effort": asdict(options.profile),
            "seconds": round(time.monotonic() - started, 1),
        },
        notes=tuple(dict.fromkeys(plan.notes)),
        sizes=_sizes(plan),
        process=process,
        rows=tuple(rows),
    )


class _Run:
    """A plan being measured, with a progress bar."""

    def __init__(self, plan: Plan, bar: Any, lines: LogLines | None) -> None:
        self._plan = plan
        self._lines = lines
        self._steps = 0
        self._profile = plan.options.profile
        self._bar = bar

    def task_rows(self, task: str) -> Iterator[Row]:
        """Yield the row of every system on a task."""
        rows = self._multi_vector_rows if self._plan.late_interaction else self._vector_rows
        yield from rows(task)
        gc.collect()  # models with reference cycles, before the next task's

    def _vector_rows(self, task: str) -> Iterator[Row]:
        plan = self._plan
        data = TaskData(
            texts=plan.texts,
            evaluations=plan.evaluations[task],
            dims=plan.dims,
            normalize=plan.manifest.model.normalize,
            budgets=plan.budgets,
            multi_vectors=plan.manifest.model.multi_vector_dim is not None,
        )
        self._step(f"{task}: reference")
        reference = reference_vectors(self._reference(task), data)
        merged = self._reference(task, merged=True)
        with self._systems(task, merged) as systems:
            figures, vectors = {}, {}
            for system in systems:
                self._step(f"{task}: {system.name}")
                figures[system.name], found = vectors_against(
                    system, data, reference, self._profile
                )
                if system.precision is not None:
                    vectors[system.precision] = found
            own = {s.precision: figures[s.name] for s in systems if s.precision is not None}
            add_mixed(own, vectors, data, reference)
            if data.pages is not None:
                timed = task in plan.page_tasks
                if timed:
                    self._step(f"{task}: pages")
                images = image_figures(
                    systems, vectors, data, reference, self._profile, timed=timed
                )
                for name, budgets in images.items():
                    figures[name]["images"] = budgets
            if task in plan.timed_tasks:
                texts = [text.text for text in plan.texts]
                self._note_long_shapes(merged.tokens.max_length)
                times = latency(
                    systems,
                    merged.tokens,
                    texts,
                    plan.singles,
                    longest_role(merged.source),
                    plan.options.shapes,
                    self._profile,
                    lambda name: self._step(f"{task}: {name}"),
                )
                figures = {name: values | times[name] for name, values in figures.items()}
            for system in systems:
                yield _row(task, system, figures[system.name])

    def _multi_vector_rows(self, task: str) -> Iterator[Row]:
        plan = self._plan
        data = TaskData(texts=plan.texts, evaluations=plan.evaluations[task], dims=plan.dims)
        self._step(f"{task}: reference")
        adapter, device = plan.adapters.get(task), plan.options.device
        reference = multi_vectors(MultiVectorReference(plan.source, adapter, device=device), data)
        systems: list[MultiVectorSystem] = [
            MultiVectorReference(
                plan.source,
                adapter,
                merged=True,
                device=device,
                name=TORCH_FP32,
                bytes_on_disk=_weights_bytes(plan.source),
            )
            for _ in plan.torch_types
        ]
        systems += [
            EmbedgeMultiVectors(plan.bundle.root, task, precision, plan.threads, device)
            for precision in plan.precisions
            if task in plan.manifest.precisions[precision].graphs
        ]
        figures = {}
        for system in systems:
            self._step(f"{task}: {system.name}")
            figures[system.name] = multi_vectors_against(system, data, reference, self._profile)
        if task in plan.timed_tasks and self._profile.singles:
            self._step(f"{task}: single texts")
            calls = {s.name: functools.partial(s.encode, role="query") for s in systems}
            for name, single in single_texts(calls, plan.singles, self._profile).items():
                figures[name]["single"] = single | {"role": "query"}
        for system in systems:
            yield _row(task, system, figures[system.name])

    def _reference(self, task: str, dtype: str = "float32", *, merged: bool = False) -> Reference:
        """Load the reference of a task, with its images where the bundle takes them."""
        plan = self._plan
        kind = PageReference if plan.takes_images else Reference
        return kind(
            plan.source,
            plan.adapters.get(task),
            dtype,
            merged=merged,
            device=plan.options.device,
            task=task,
        )

    @contextmanager
    def _systems(self, task: str, merged: Reference) -> Iterator[list[System]]:
        """Open every system for a task; what peers wrote is removed at the end, unless it is to be kept."""
        plan, systems = self._plan, list[System]()
        device = plan.options.device
        weights = _weights_bytes(plan.source)
        for dtype in plan.torch_types:
            if dtype == "float32":
                systems.append(TorchSystem(TORCH_FP32, merged, weights))
                continue
            halved = self._reference(task, dtype, merged=True)
            systems.append(TorchSystem(f"torch {_SHORT[dtype]}", halved, weights // 2))
        temporary = Path(tempfile.mkdtemp(prefix="embedge-bench-"))
        try:
            if task in plan.peered_tasks:
                self._step(f"{task}: building peers")
                kept = plan.options.peer_files
                workdir = temporary if kept is None else kept_folder(kept / task, merged)
                context = PeerContext(merged=merged, threads=plan.threads, workdir=workdir)
                systems += build_peers(plan.peers, context, plan.notes.append)
            systems += [
                EmbedgeSystem(plan.bundle.root, task, precision, plan.threads, device)
                for precision in plan.precisions
                if task in plan.manifest.precisions[precision].graphs
            ]
            systems += [
                MappedSystem(plan.bundle.root, task, precision, plan.threads, device)
                for precision in plan.mapped(task)
            ]
            yield systems
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def processes(self) -> dict[str, Any]:
        """Return cold start, task switch and memory by system; torch on the first task."""
        plan = self._plan
        common = process_texts([text.text for text in plan.texts]) | {"threads": plan.threads}
        common["device"] = plan.options.device
        common["multi_vector"] = plan.late_interaction
        result = {}
        for precision in plan.precisions:
            self._step(f"cold start, {precision}")
            graphs = plan.manifest.precisions[precision].graphs
            tasks = [task for task in plan.tasks if task in graphs]
            own = {"bundle": str(plan.bundle.root.resolve()), "precision": precision}
            job = {"system": "embedge", "tasks": tasks, **own, **common}
            measured = measure_process(job, self._profile.process_repeats)
            if plan.page_tasks:
                self._step(f"cold start with a page, {precision}")
            result[f"embedge {precision}"] = measured | self._page_process(job)
        self._step("cold start, torch")
        adapter = plan.adapters.get(plan.tasks[0])
        job = {
            "system": "torch",
            "source": str(plan.source.path),
            "adapter": None if adapter is None else str(adapter.resolve()),
            "pooling": plan.source.pooling,
            "tasks": plan.tasks[:1],
            **common,
        }
        result[TORCH_FP32] = measure_process(job, self._profile.process_repeats)
        return result

    def _page_process(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return what a process that embeds pages alone measured of itself, nothing where there are no pages."""
        plan = self._plan
        if not plan.page_tasks:
            return {}
        sets = plan.evaluations[plan.page_tasks[0]]
        pages = different_pages(next(one for one in sets if one.modality == "image"))
        with tempfile.TemporaryDirectory(prefix="embedge-bench-") as folder:
            files = [
                _page_file(page, Path(folder) / str(n)) for n, page in enumerate(pages[:_PAGES])
            ]
            return {"pages": measure_process(job | {"pages": files}, self._profile.process_repeats)}

    def _note_long_shapes(self, most: int) -> None:
        for shape in self._plan.options.shapes:
            if shape.tokens > most:
                self._plan.notes.append(
                    f"{shape.name} was not timed: the model takes {most} tokens"
                )

    def _step(self, name: str) -> None:
        self._bar.set_description(name, refresh=False)
        self._bar.update()
        self._steps += 1
        if self._lines is not None:
            self._lines.say(lambda: f"step {self._steps} of {self._plan.steps}: {name}")


def _page_file(page: Document, file: Path) -> str:
    """Return the path of an image file, which is written to ``file`` where there are only its bytes."""
    if isinstance(page, bytes):
        file.write_bytes(page)
        return str(file)
    return str(Path(page).resolve())


def _row(task: str, system: System | MultiVectorSystem, figures: dict[str, Any]) -> Row:
    return Row(
        task=task,
        system=system.name,
        role=system.role,
        precision=system.precision,
        bytes_on_disk=system.bytes_on_disk,
        **figures,
    )


def _sizes(plan: Plan) -> dict[str, int]:
    """Return bytes of the source's weights and of each precision's folder, all tasks together."""
    sizes = {precision: plan.manifest.folder_bytes(precision) for precision in plan.precisions}
    return {"fp32_weights": _weights_bytes(plan.source), **sizes}


def _layout(plan: Plan, precision: str) -> str:
    return "shared" if plan.manifest.precisions[precision].task_tensors else "merged"


def _has_ranges(plan: Plan) -> bool:
    """Return whether the bundle keeps the ranges of 8-bit vectors; else they are of the texts for fidelity."""
    return all(plan.manifest.tasks[task].output_ranges is not None for task in plan.tasks)


def _common_bytes(plan: Plan) -> int:
    """Return the bytes of what every part of the bundle has too: tokenizer, manifest, card."""
    root = plan.bundle.root
    listed = sum(entry.size for name, entry in plan.manifest.files.items() if "/" not in name)
    unlisted = [root / MANIFEST, root / CARD]
    return listed + sum(file.stat().st_size for file in unlisted if file.exists())


def _layer_bytes(plan: Plan) -> dict[str, dict[str, int]]:
    """Return the bytes of the tables of layers by precision and task, which lie beside graphs and weights."""
    files = plan.manifest.files
    return {
        precision: {
            task: files[name].size
            for task, name in plan.manifest.precisions[precision].layers.items()
        }
        for precision in plan.precisions
    }


def _weights_bytes(source: Source) -> int:
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        sizes = [file.stat().st_size for file in source.transformer.glob(pattern)]
        if sizes:
            return sum(sizes)
    return 0
